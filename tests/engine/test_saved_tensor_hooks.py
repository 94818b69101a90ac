"""Hooks on saved tensors and checkpoints change no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from monai_iunet import IUNet
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import MODES, compare, image, largest_error, loss, network, plain, same


def through_numpy(tensor: Tensor) -> Any:
    return tensor.detach().numpy().copy()


HOOKS: dict[str, Callable[[], Any]] = {
    "identity": lambda: saved_tensors_hooks(same, same),
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(through_numpy, torch.from_numpy),
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_outside(hooks: str) -> None:
    def run(net: Any, x: Tensor) -> None:
        with HOOKS[hooks]():
            y = net(x)
        loss(y).backward()

    compare(run)


def test_hooks_nested() -> None:
    def run(net: Any, x: Tensor) -> None:
        with saved_tensors_hooks(through_numpy, torch.from_numpy), save_on_cpu():
            y = net(x)
        loss(y).backward()

    compare(run)


def test_hooks_around_both_passes() -> None:
    def run(net: Any, x: Tensor) -> None:
        with save_on_cpu():
            loss(net(x)).backward()

    compare(run)


class Within(nn.Sequential):
    """A branch that evaluates itself within something."""

    way: Callable[..., Any]

    def forward(self, x: Tensor) -> Tensor:
        return type(self).way(super().forward, x)


def under_hooks(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with save_on_cpu():
        return forward(x)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "way",
    [under_hooks, partial(checkpoint, use_reentrant=False), partial(checkpoint, use_reentrant=True)],
    ids=["hooks", "checkpoint", "reentrant checkpoint"],
)
def test_hooks_and_checkpoints_within_a_branch(way: Callable[..., Any], outside: bool) -> None:
    branch = type("Branch", (Within,), {"way": staticmethod(way)})

    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return branch(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.Tanh())

    def run(net: Any, x: Tensor) -> None:
        with save_on_cpu() if outside else saved_tensors_hooks(same, same):
            y = net(x)
        loss(y).backward()

    compare(run, make_branch=make)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"norm": "BATCH"}], ids=str)
def test_a_checkpoint_around(use_reentrant: bool, options: dict[str, Any]) -> None:
    compare(lambda net, x: loss(checkpoint(net, x, use_reentrant=use_reentrant)).backward(), **options)


def test_a_checkpoint_wrapper_of_each_part() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def run(net: Any, x: Tensor) -> None:
        apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, AdditiveCoupling | IUNet))
        loss(net(x)).backward()

    found = []
    for activations in MODES:
        net = network(activations=activations)
        parameters = list(net.parameters())
        x = image().requires_grad_()
        run(net, x)
        found.append([x.grad, *(parameter.grad for parameter in parameters)])
    assert largest_error(found) < 1e-10


def test_saved_tensor_hooks_that_are_forbidden() -> None:
    def run(net: Any, x: Tensor) -> None:
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            plain(net, x)

    compare(run)


def test_saved_tensor_hooks_that_are_forbidden_in_the_backward_pass() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            value.backward()
            with pytest.raises(RuntimeError, match="none here"), saved_tensors_hooks(same, same):
                pass

    compare(run, dropout=0.3)


class AsksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x = ctx.saved_tensors[0]
        weight = ctx.saved_tensors[1]
        return gradient * weight, (gradient * x).sum()


class Scaling(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(AsksTwice.apply(x, self.scale)).tanh()


@pytest.mark.parametrize("retain", [False, True])
def test_a_function_that_asks_twice_for_what_it_has_saved(retain: bool) -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        if retain:
            value.backward(retain_graph=True)
        value.backward()

    compare(run, make_branch=lambda _, before, after, *__: Scaling(before, after, 3, 1, 1))


def test_hooks_around_the_backward_pass_see_nothing_of_the_engine() -> None:
    net = network()
    value = loss(net(image()))
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor), same):
        value.backward()
    assert not seen
