"""A convolution in slabs has the values and gradients of the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import SegIUNet
from monai_iunet.engine.slabs import slices
from monai_iunet.networks.layers import slab_convolution
from monai_iunet.networks.layers.slab_convolution import convolve

LAYERS: dict[str, Any] = {
    "1D": lambda: nn.Conv1d(3, 4, 5, padding="same", dtype=torch.float64),
    "2D, dilated": lambda: nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2, bias=False, dtype=torch.float64),
    "3D": lambda: nn.Conv3d(3, 4, 3, padding=1, dtype=torch.float64),
    "3D, grouped": lambda: nn.Conv3d(3, 6, (3, 1, 3), padding="same", groups=3, dtype=torch.float64),
    "3D, kernel of 1": lambda: nn.Conv3d(3, 2, 1, dtype=torch.float64),
}


@pytest.fixture
def in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small_tensors(monkeypatch)


def cut_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small tensors too, on a CPU, into slabs of two indices, fewer than some kernels reach."""
    monkeypatch.setattr(slab_convolution, "LARGE", 200)
    monkeypatch.setattr(slab_convolution, "slabs", lambda size, *_: slices(size, 2))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))


def count_slabs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    slabs = slab_convolution._slabs

    def counted(*args: Any) -> Any:
        found = list(slabs(*args))
        counts.append(len(found))
        return found

    monkeypatch.setattr(slab_convolution, "_slabs", counted)
    return counts


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch, in_slabs: None) -> None:
    layer = LAYERS[name]()
    dims = layer.weight.ndim - 2
    x = torch.randn(2, 3, *{1: (300,), 2: (30, 20), 3: (11, 7, 8)}[dims], dtype=torch.float64, requires_grad=True)
    counts = count_slabs(monkeypatch)
    found = []
    for compute in (convolve, lambda x, layer: layer(x)):
        y = compute(x, layer)
        weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])))
    assert len(counts) == 2
    assert min(counts) > 4
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("frozen", ["nothing", "x", "parameters"])
def test_finite_differences(frozen: str, monkeypatch: pytest.MonkeyPatch, in_slabs: None) -> None:
    monkeypatch.setattr(slab_convolution, "LARGE", 20)
    layer = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=frozen != "x")
    for parameter in layer.parameters():
        parameter.requires_grad_(frozen != "parameters")
    counts = count_slabs(monkeypatch)
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda x, *_: convolve(x, layer), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: convolve(x, layer), inputs)
    assert counts


def test_a_layer_used_twice_counts_twice_where_a_graph_of_gradients_is_created(in_slabs: None) -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    y = convolve(convolve(torch.randn(1, 2, 12, 12, dtype=torch.float64), layer), layer).sin().sum()
    expected = torch.autograd.grad(y, [*layer.parameters()], retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(y, [*layer.parameters()], create_graph=True), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(2, 3, 4, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(2, 3, 3, padding=1),
        nn.Identity(),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Module, monkeypatch: pytest.MonkeyPatch, in_slabs: None) -> None:
    counts = count_slabs(monkeypatch)
    x = torch.randn(1, 2, 30, 20)
    torch.testing.assert_close(convolve(x, layer), layer(x))
    assert not counts


def test_hooks_of_a_layer_see_it(in_slabs: None) -> None:
    layer, seen = nn.Conv2d(2, 3, 3, padding=1), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    convolve(torch.randn(1, 2, 30, 20), layer)
    assert seen


@pytest.mark.parametrize("name", ["2D, dilated", "3D"])
def test_a_single_image_is_no_batch(name: str, in_slabs: None) -> None:
    layer = LAYERS[name]()
    x = torch.randn(3, *[12] * (layer.weight.ndim - 2), dtype=torch.float64)
    assert torch.equal(convolve(x, layer), layer(x))


def test_autocast_leaves_double_precision_alone(in_slabs: None) -> None:
    layer, x = LAYERS["3D"](), torch.randn(1, 3, 12, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = convolve(x, layer), layer(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_autocast_as_of_the_whole(monkeypatch: pytest.MonkeyPatch, in_slabs: None) -> None:
    layer, x = nn.Conv3d(2, 3, 3, padding=1), torch.randn(1, 2, 12, 8, 8, requires_grad=True)
    found = []
    for compute in (convolve, lambda x, layer: layer(x)):
        with torch.autocast("cpu", torch.bfloat16):
            y = compute(x, layer)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])))
    for ours, expected in zip(*found):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_trains_as_without(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stem, branches and head in slabs, with rebuilt activations, and rows of the normalization in parts."""
    torch.manual_seed(0)
    net = SegIUNet(3, 1, 2, (4, 8), couplings=2, exact=exact).double()
    x = torch.rand(1, 1, 12, 8, 8, dtype=torch.float64)
    found = []
    for slabs in (False, True):
        if slabs:
            cut_small_tensors(monkeypatch)
        counts = count_slabs(monkeypatch)
        y = net(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))))
        assert bool(counts) == slabs
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, atol=1e-3 if exact else 1e-9, rtol=1e-3 if exact else 1e-8)
