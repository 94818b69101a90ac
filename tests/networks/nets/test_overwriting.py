"""States are written over, in inference and in backward passes, only where nobody else can hold them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_iunet import IUNet, SegIUNet, plan_training
from monai_iunet.engine.pytorch_private import frees_gradients_before_converting
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.networks.blocks.mixing import ChannelMixing

Seen = list[tuple[Tensor, Tensor]]


def net_of(dims: int = 2, **options: Any) -> IUNet:
    net = IUNet(dims, (5, 12, 30), couplings=2, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("dims", "batch"), [(1, 1), (2, 2), (3, 1)])
def test_the_output_is_that_with_gradients_and_the_image_stays(
    dims: int, batch: int, exact: bool, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    net, image = net_of(dims, exact=exact), torch.randn(batch, 5, *[16] * dims)
    expected = net(image.clone().requires_grad_()).detach()
    for made in (Tensor.clone, lambda x: MetaTensor(x.clone()), lambda x: torch.cat([x, x], 1)[:, :5]):
        with mode():
            x = made(image)
            y = net(x)
        torch.testing.assert_close(torch.as_tensor(y).clone(), expected, rtol=1e-5, atol=0 if exact else 1e-5)
        assert torch.equal(torch.as_tensor(x).clone(), image)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_windows_that_share_memory_stay(mode: Callable[[], AbstractContextManager[None]]) -> None:
    net = net_of()
    with mode():
        whole = torch.randn(5, 20, 8)
        windows = whole.unfold(1, 8, 1).permute(1, 0, 3, 2)
        expected, before = net(windows.clone()), whole.clone()
        torch.testing.assert_close(net(windows), expected)
        assert torch.equal(whole, before)


def keep(seen: Seen, tensors: Any) -> None:
    seen.extend((tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, Tensor))


class Keeping(nn.Conv2d):
    """Keeps what goes into it, in all evaluations: a list of its own would be that of the first alone."""

    keep: Callable[[list[Tensor]], None]

    def forward(self, x: Tensor) -> Tensor:
        self.keep([x])
        return super().forward(x)


def hook_of_couplings(net: IUNet, seen: Seen) -> None:
    for module in net.modules():
        if isinstance(module, AdditiveCoupling):
            module.register_forward_hook(lambda _, inputs, outputs: keep(seen, [*inputs, *outputs]))


def hook_in_branches(net: IUNet, seen: Seen) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: keep(seen, inputs))


def forward_of_an_instance(net: IUNet, seen: Seen) -> None:
    for module in net.modules():
        if isinstance(module, (AdditiveCoupling, ChannelMixing)):
            forward = module.forward

            def watched(*state: Tensor, forward: Any = forward, **options: Any) -> Any:
                keep(seen, state)
                return forward(*state, **options)

            module.forward = watched  # type: ignore[method-assign]


def layer_of_ones_own(net: IUNet, seen: Seen) -> None:
    for module in net.modules():
        if isinstance(module, AdditiveCoupling):
            layer = Keeping(module.branch[0].in_channels, module.branch[0].out_channels, 3, padding=1)
            layer.keep = partial(keep, seen)
            module.branch[0] = layer


@pytest.mark.parametrize("watch", [hook_of_couplings, hook_in_branches, forward_of_an_instance, layer_of_ones_own])
def test_what_is_watched_is_not_written_over(watch: Callable[[IUNet, Seen], None]) -> None:
    net, seen = net_of(), []
    watch(net, seen)
    with torch.no_grad():
        net(torch.randn(1, 5, 16, 16))
    assert len(seen) > 8
    assert all(torch.equal(tensor, then) for tensor, then in seen)


def test_what_a_branch_of_ones_own_keeps_is_not_written_over() -> None:
    seen: Seen = []

    def make_branch(_: int, before: int, after: int, *place: Any) -> nn.Module:
        branch = Keeping(before, after, 3, padding=1)
        branch.keep = partial(keep, seen)
        return branch

    net = net_of(make_branch=make_branch)
    seen.clear()
    with torch.no_grad():
        net(torch.randn(1, 5, 16, 16))
    assert len(seen) > 8
    assert all(torch.equal(tensor, then) for tensor, then in seen)


def test_inference_under_autocast_holds_less_than_two_states_of_float32() -> None:
    net = SegIUNet(3, 1, 2, (24, 112, 416), couplings=1)
    plan = plan_training(net, (64, 64, 64), dtype=torch.bfloat16)
    assert plan.inference_peak - plan.parameters < 1.75 * 24 * 4 * 64**3


@pytest.mark.parametrize("exact", [False, True])
def test_logits_under_autocast_are_those_with_gradients(exact: bool) -> None:
    net = SegIUNet(3, 1, 3, (8, 16, 32), couplings=1, exact=exact).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x).detach()
        with torch.no_grad():
            found = net(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("watch", [hook_of_couplings, hook_in_branches, forward_of_an_instance, layer_of_ones_own])
def test_what_is_watched_is_not_written_over_by_the_backward_pass(watch: Callable[[IUNet, Seen], None]) -> None:
    net, seen = net_of(), []
    watch(net, seen)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(1, 5, 16, 16).bfloat16())
    watched = len(seen)
    (y * torch.randn_like(y)).sum().backward()
    assert watched > 8
    assert all(torch.equal(tensor, then) for tensor, then in seen[:watched])


def branches_of_ones_own(net: IUNet, seen: Seen) -> None:
    for module in net.modules():
        if isinstance(module, AdditiveCoupling):
            convolution = module.branch[0]
            module.branch = Keeping(convolution.in_channels, convolution.out_channels, 3, padding=1)
            module.branch.keep = partial(keep, seen)  # type: ignore[assignment]


@pytest.mark.parametrize("watch", [hook_in_branches, branches_of_ones_own])
def test_what_is_seen_of_the_second_evaluation_is_not_written_over(watch: Callable[[IUNet, Seen], None]) -> None:
    """As a loop does that takes statistics of what goes into convolutions, for a preconditioned optimizer."""
    net, seen = net_of(), []
    watch(net, seen)
    y = net(torch.randn(1, 5, 16, 16))
    watched = len(seen)
    y.square().sum().backward()
    assert len(seen) > watched > 8
    assert all(torch.equal(tensor, then) for tensor, then in seen)


def gradients(net: nn.Module, x: Tensor, backward_passes: int = 1) -> list[Tensor]:
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().mean()
    for remaining in reversed(range(backward_passes)):
        net.zero_grad()
        loss.backward(retain_graph=remaining > 0)
    return [parameter.grad.clone() for parameter in net.parameters()]


def offloaded(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return gradients(net, x)


def checkpointed(net: nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(torch.nn.Sequential(Checkpointed(net)), x)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.net, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("way", [lambda net, x: gradients(net, x, backward_passes=3), offloaded, checkpointed])
def test_gradients_of_states_that_may_be_asked_for_again(way: Callable[[nn.Module, Tensor], list[Tensor]]) -> None:
    net = SegIUNet(3, 1, 3, (8, 16, 32), couplings=2)
    x = torch.randn(1, 1, 16, 16, 16)
    for found, expected in zip(way(net, x), gradients(net, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_under_autocast_are_as_near_to_float64_as_with_stored_activations() -> None:
    net = SegIUNet(3, 1, 3, (8, 16, 32), couplings=2)
    x = torch.randn(1, 1, 16, 16, 16)
    double = copy.deepcopy(net).double()
    double(x.double()).square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in double.parameters()])
    errors = []
    for net.activations in ("invert", "store"):
        found = torch.cat([gradient.flatten() for gradient in gradients(net, x)])
        errors.append(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    assert errors[0] < 1.5 * errors[1] < 0.03


def test_a_step_under_autocast_holds_less_than_three_states_of_float32() -> None:
    most = 2.95 if frees_gradients_before_converting() else 3.1
    net = SegIUNet(3, 1, 2, (24, 112, 416), couplings=1)
    plan = plan_training(net, (64, 64, 64), dtype=torch.bfloat16, optimizer=None)
    assert plan.training_peak - plan.parameters - plan.gradients < most * 24 * 4 * 64**3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_the_output_has_the_type_of_the_image_under_autocast_too(exact: bool, dtype: torch.dtype) -> None:
    net = net_of(exact=exact)
    x = torch.randn(1, 5, 16, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = net(x)
        with torch.no_grad():
            without = net(x)
        hook_of_couplings(net, [])
        watched = net(x)
        levels = net.forward_levels(x)
    assert {y.dtype for y in (with_gradients, without, watched, *levels)} == {dtype}
