"""Branches that return something else in the backward pass than in the forward pass are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.engine.pytorch_private import TorchDispatchMode
from monai_iunet.networks.blocks.coupling import AdditiveCoupling

SAID = "Counting returns something else in the backward pass"


class Counter:
    calls = 0


class Counting(nn.Conv2d):
    """Depends on how often it was called, which an object of its own counts."""

    factor = 0.2

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counter.calls += 1
        return super().forward(x) * (1 + self.factor * self.counter.calls)


def counting(factor: float) -> Any:
    def make_branch(_: int, before: int, after: int, *__: Any) -> nn.Module:
        branch = Counting(before, after, 3, 1, 1)
        branch.factor = factor
        return branch

    return make_branch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.2, -0.4, 10.0])
@pytest.mark.parametrize("activations", ["invert", "convolutions"])
def test_a_branch_that_depends_on_an_object_of_its_own(activations: str, factor: float, dtype: torch.dtype) -> None:
    network = IUNet(2, (4, 8), make_branch=counting(factor), activations=activations).to(dtype)
    value = network(torch.rand(1, 4, 8, 8, dtype=dtype)).square().sum()
    with pytest.raises(RuntimeError, match=SAID):
        value.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_states_show_it_in_any_type(autocast: bool) -> None:
    for factor in (0.2, 0.0):
        network = SegIUNet(2, 1, 2, (8, 16), make_branch=counting(factor), exact=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = network(torch.rand(1, 1, 16, 16)).float().square().sum()
        if factor:
            with pytest.raises(RuntimeError, match=SAID):
                value.backward()
        else:
            value.backward()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("through", [False, True])
def test_in_either_direction_and_where_a_state_is_inverted_alone(inverse: bool, through: bool) -> None:
    """Of the last of two couplings no gradient arrives, so its inputs are computed without one."""
    couplings = [AdditiveCoupling(Counting(2, 2, 1)) for _ in range(2)]
    state: Any = tuple(torch.rand(1, 2, 4, 4, requires_grad=True) for _ in range(2))
    states = [state]
    for coupling in couplings:
        states.append(coupling.inverse(*states[-1]) if inverse else coupling(*states[-1]))
    loss = sum(part.square().sum() for part in states[-1 if through else 1])
    with pytest.raises(RuntimeError, match=SAID):
        loss.backward()


@pytest.mark.parametrize("size", [(1, 4, 2, 2), (3, 4, 34, 6)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_branches_that_repeat_themselves_are_not_accused(scale: float, size: tuple[int, ...]) -> None:
    """Whether they add little to large states, or much to small ones."""
    for weight in (1e-6, 1.0, 3.0):
        torch.manual_seed(0)
        network = IUNet(2, (4, 8), couplings=4, make_branch=counting(0.0))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    parameter.mul_(weight)
        network(scale * torch.randn(size)).square().mean().backward()


def test_states_that_rounding_changes_are_said_too() -> None:
    torch.manual_seed(0)
    network = IUNet(2, (4, 8), couplings=4, make_branch=counting(0.0))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.mul_(10)
    value = network(torch.randn(3, 4, 34, 6)).square().mean()
    with pytest.raises(RuntimeError, match=r"so large that rounding changes states\. .* normalize it"):
        value.backward()


def test_of_no_images_nothing_is_compared() -> None:
    coupling = AdditiveCoupling(Counting(2, 2, 1))
    sum(part.sum() for part in coupling(*torch.rand(2, 0, 2, 4, 4, requires_grad=True))).backward()


def test_what_is_no_number_is_left_to_others() -> None:
    network = IUNet(2, (4, 8), make_branch=counting(0.0))
    image = torch.rand(1, 4, 8, 8)
    image[0, 0, 2, 2] = torch.nan
    network(image).sum().backward()


def test_in_16_bits_rounding_is_no_accusation() -> None:
    network = SegIUNet(2, 1, 2, (8, 16), couplings=12, make_branch=counting(0.0))
    with torch.autocast("cpu", torch.bfloat16):
        value = network(torch.rand(1, 1, 16, 16)).float().square().sum()
    value.backward()
    network.to(torch.bfloat16)(torch.rand(1, 1, 16, 16, dtype=torch.bfloat16)).float().sum().backward()


class Amplifying(TorchDispatchMode):
    """Emulates a device whose convolutions are too large."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 1.5 * result if function is torch.ops.aten.convolution.default else result


@pytest.mark.parametrize("both", [False, True])
def test_a_dispatch_mode_that_is_left_before_the_backward_pass(both: bool) -> None:
    network = IUNet(2, (4, 8), norm=None)
    mode = Amplifying()
    with mode:
        value = network(torch.rand(1, 4, 8, 8)).square().sum()
        if both:
            value.backward()
    if not both:
        with pytest.raises(RuntimeError, match="a dispatch mode that has changed meanwhile"):
            value.backward()
