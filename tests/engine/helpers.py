"""The ways in which gradients are compared with those of plain autograd with the same weights, in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monai_iunet import SegIUNet
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.helpers import randomize, relative_errors

MODES = ("store", "invert", "convolutions")  # the first is plain autograd


def network(**options: Any) -> SegIUNet:
    torch.manual_seed(0)
    return randomize(SegIUNet(2, 1, 3, (4, 8), **{"act": "TANH", **options})).double()


def image() -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
    """Gradients of the image and of all parameters, after a way that ends with backward passes."""
    net.zero_grad()
    x = image().requires_grad_()
    torch.manual_seed(5)
    run(net, x)
    found = [tensor.grad for tensor in (x, *net.parameters())]
    assert all(gradient is not None for gradient in found)
    return found


def compare(run: Callable[[Any, Tensor], Any], **options: Any) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, **options)
        before = dict(net.named_parameters()), {name: module.training for name, module in net.named_modules()}
        found.append(gradients(net, run))
        after = dict(net.named_parameters()), {name: module.training for name, module in net.named_modules()}
        assert all(before[0][name] is parameter for name, parameter in after[0].items())
        assert before[1] == after[1]
    assert largest_error(found) < 1e-10


def largest_error(found: list[Any]) -> float:
    """Of the gradients found in each of several ways, beside those of the first."""
    return max(error for others in found[1:] for error in relative_errors(others, found[0]))


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def plain(net: Any, x: Tensor) -> None:
    loss(net(x)).backward()


def same(tensor: Tensor) -> Tensor:
    return tensor


def gradients_of_a_branch(branch: nn.Module, change: Callable[[nn.Module], Any], rebuilds: bool) -> list[Tensor]:
    layer = AdditiveCoupling(nn.Sequential(branch)).double()
    layer.rebuilds = rebuilds
    inputs = [torch.ones(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    value = sum(map(loss, layer(*inputs)))
    change(branch)
    return list(torch.autograd.grad(value, [*inputs, *layer.parameters()]))


def spectral(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


def weighted(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


def values(net: nn.Module, scale: float) -> dict[str, Tensor]:
    return {name: (scale * tensor.detach()).requires_grad_() for name, tensor in net.named_parameters()}


def work_in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
