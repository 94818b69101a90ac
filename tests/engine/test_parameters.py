"""Parameters that are replaced, frozen or parametrized between the passes."""

from __future__ import annotations

import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import SegIUNet
from tests.engine.helpers import MODES, compare, image, largest_error, loss, network, plain, spectral, weighted


def test_parameters_replaced_between_the_passes() -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        x = image().requires_grad_()
        value = loss(net(x))
        before = list(net.parameters())
        for module in net.iunet.encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(torch.zeros_like(module.weight))
        value.backward()
        found.append([x.grad, *(parameter.grad for parameter in before)])
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("frozen", ["forward", "backward"])
def test_parameters_that_are_frozen_in_one_of_the_passes(frozen: str) -> None:
    """As those of a discriminator are, around the loss of a generator; what a linear layer saves depends on it."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).tanh().movedim(-1, 1)

    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return nn.Sequential(Linear(inputs, 5), Linear(5, outputs))

    def run(net: nn.Module, x: Tensor) -> None:
        net.requires_grad_(frozen == "backward")
        value = loss(net(x))
        net.requires_grad_(frozen == "forward")
        value.backward()
        net.requires_grad_()
        plain(net, x)

    compare(run, make_branch=make)


def test_a_bias_that_changes_between_the_passes_is_noticed() -> None:
    """Plain autograd does not need it, but computing activations again does."""
    net = network(norm=None)
    value = loss(net(image()))
    with torch.no_grad():
        net.iunet.encoder[0][0].branch[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_other_memory_of_a_parameter_is_noticed(name: str) -> None:
    """Plain autograd has saved the values of before, where neither the parameter nor its version changes."""
    net = network(norm=None)
    value = loss(net(image()))
    parameter = getattr(net.iunet.encoder[0][0].branch[0], name)
    parameter.data = parameter.data + 1
    with pytest.raises(RuntimeError, match=r"was given other memory"):
        value.backward()


def test_a_network_that_is_saved_between_the_passes_is_as_it_was() -> None:
    net = network()
    value = loss(net(image()))
    torch.save(net.state_dict(), io.BytesIO())
    gc.collect()  # before PyTorch 2.13 that takes the objects of the storages with it
    value.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_state_dict_that_is_assigned_between_the_passes_changes_no_gradient() -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        x = image().requires_grad_()
        value, before = loss(net(x)), list(net.parameters())
        net.load_state_dict({name: tensor + 0.1 for name, tensor in net.state_dict().items()}, assign=True)
        value.backward()
        found.append([x.grad, *(parameter.grad for parameter in before)])
    assert largest_error(found) < 1e-10


def parametrized(net: SegIUNet) -> list[nn.Module]:
    """Convolutions of the branches, whose weights are the products of two parameters from now on."""
    convolutions = [module for module in net.iunet.modules() if isinstance(module, nn.Conv2d)]
    return [nn.utils.parametrizations.weight_norm(module) for module in convolutions]


@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize("make", [spectral, weighted], ids=["spectral", "weighted"])
def test_parametrizations_that_are_cached(make: Any, backward_within: bool) -> None:
    def run(net: Any, x: Tensor) -> None:
        with nn.utils.parametrize.cached():
            value = loss(net(x) + net(2 * x))
            if backward_within:
                value.backward()
        if not backward_within:
            value.backward()
        plain(net, x)

    compare(run, make_branch=make)


def test_parametrizations_that_come_between_the_passes() -> None:
    found = []
    for activations in MODES:
        net, x = network(activations=activations, norm=None), image().requires_grad_()
        used = list(net.parameters())
        value = loss(net(x))
        parametrized(net)
        found.append(torch.autograd.grad(value, [x, *used]))
    assert largest_error(found) < 1e-10


def test_parametrizations_that_go_between_the_passes_are_noticed() -> None:
    net = network()
    convolutions = parametrized(net)
    value = loss(net(image()))
    for module in convolutions:
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    with pytest.raises(RuntimeError, match="ParametrizedConv2d has lost its parametrizations"):
        value.backward()
