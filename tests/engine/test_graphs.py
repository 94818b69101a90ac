"""Graphs that are walked twice, in part or to the second order, and hooks on what is within."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import IUNet
from tests.engine.helpers import MODES, compare, image, largest_error, loss, network, plain
from tests.helpers import randomize


def test_retained_graphs() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        for last in (False, False, True):
            value.backward(retain_graph=not last)

    compare(run)


def test_two_forward_passes_then_two_backward_passes() -> None:
    def run(net: Any, x: Tensor) -> None:
        first, second = loss(net(x)), loss(net(2 * x))
        first.backward()
        second.backward()

    compare(run)
    compare(run, dropout=0.3)


def test_second_derivatives() -> None:
    def run(net: Any, x: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss(net(x)), x, create_graph=True)
        (gradient.square().sum() + loss(net(x))).backward()

    compare(run)
    net = randomize(IUNet(1, (2, 2), couplings=1, act="TANH", norm=None)).double()
    x = torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(net, (x,))


@pytest.mark.parametrize("options", [{}, {"channel_mixing": 1, "norm": None}, {"act": "LEAKYRELU"}], ids=str)
def test_second_derivatives_by_parameters(options: dict[str, Any]) -> None:
    """The graph of the first ones holds what was rebuilt, which nothing else may be written over."""

    def run(net: Any, x: Tensor) -> None:
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(loss(net(x)), inputs, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()

    compare(run, **options)


def test_second_derivatives_beside_gradients_of_the_first_order() -> None:
    """What a pass that records its gradients has rebuilt, another one in the same graph may take."""

    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        first = torch.autograd.grad(value, list(net.iunet.decoder.parameters()), create_graph=True)
        torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        (sum(gradient.square().sum() for gradient in first) + value).backward()

    compare(run)


def test_gradients_of_a_part_then_of_the_rest() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        torch.autograd.grad(value, list(net.iunet.decoder.parameters()), retain_graph=True)
        torch.autograd.grad(value, net.stem.weight, retain_graph=True)
        value.backward()

    compare(run)


@pytest.mark.parametrize("keep_output", [False, True])
@pytest.mark.parametrize(
    "place", ["encoder.0.0", "encoder.1.0", "decoder.1.1", "encoder.0.1.branch.0", "downsamplings.0"]
)
def test_a_loss_on_what_a_hook_caught(place: str, keep_output: bool) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any, caught: list[Tensor] = caught) -> None:
            caught.extend(output if isinstance(output, tuple) else [output])

        handle = net.iunet.get_submodule(place).register_forward_hook(catch)
        x = image().requires_grad_()
        y = net(x)
        handle.remove()
        if not keep_output:
            del y
        inner = sum(tensor.sin().sum() for tensor in caught)
        for retain in (True, False):
            inner.backward(retain_graph=retain)
        found.append([tensor.grad for tensor in (x, *net.stem.parameters())])
    assert largest_error(found) < 1e-10


def test_a_loss_on_the_inside_after_the_one_on_the_output() -> None:
    def run(net: Any, x: Tensor) -> None:
        caught = []
        handle = net.iunet.encoder[1][0].register_forward_hook(lambda module, args, output: caught.extend(output))
        y = net(x)
        handle.remove()
        loss(y).backward(retain_graph=True)
        del y
        caught[1].sin().sum().backward()

    compare(run)


def test_what_a_hook_caught_while_rebuilding_says_so() -> None:
    net, caught = network(), []
    net.iunet.encoder[0][0].branch.register_forward_hook(lambda module, args, output: caught.append(output))
    plain(net, image())
    assert len(caught) == 2
    with pytest.raises(RuntimeError, match="computed while activations were rebuilt"):
        caught[1].sum().backward()


def test_tensor_hooks_and_module_hooks_see_the_same_gradients() -> None:
    seen: dict[str, list[Tensor]] = {}
    for activations in MODES:
        net, noted = network(activations=activations), []
        for part in (net.iunet.encoder[0][0], net.iunet.decoder[1][1].branch, net.iunet.upsamplings[0]):
            part.register_full_backward_hook(lambda module, grads, outs, noted=noted: noted.extend([*grads, *outs]))
        plain(net, image().requires_grad_())
        seen[activations] = [gradient for gradient in noted if gradient is not None]
    assert largest_error(list(seen.values())) < 1e-10


def test_a_backward_pass_in_inference_mode() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        with torch.inference_mode():
            value.backward()

    compare(run, dropout=0.3)
