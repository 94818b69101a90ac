"""Normalization and activation in one operation have the values and gradients of one after the other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import monai_iunet.networks.layers.normalized_activation as normalization
from monai_iunet.networks.blocks.branch import Branch
from monai_iunet.networks.layers.normalized_activation import can_be_joined, normalized_activation

NORMS: dict[int, type[nn.Module]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ACTIVATIONS = {"LeakyReLU": nn.LeakyReLU(0.01), "ReLU": nn.ReLU(), "falling": nn.LeakyReLU(-0.3), "1": nn.LeakyReLU(1)}


def layers(dims: int, channels: int, dtype: torch.dtype = torch.float64) -> Any:
    norm: Any = NORMS[dims](channels, affine=True, dtype=dtype)  # type: ignore[call-arg]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def one_after_the_other(x: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
    y: Tensor = act(norm(x))
    return y


@pytest.fixture(params=["whole rows", "rows in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on rows as on a CPU, and as on a GPU."""
    if request.param == "rows in parts":
        monkeypatch.setattr(normalization, "_parts", lambda x: x.shape[2])


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 5, 4, 6), (2, 6, 3, 4, 5), (1, 8, 32, 32, 32)], ids=str)
def test_values_and_gradients_are_those_of_one_after_the_other(shape: tuple[int, ...], act: nn.Module) -> None:
    norm = layers(len(shape) - 2, shape[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)
    assert can_be_joined(x, norm, act)
    found = []
    for compute in (normalized_activation, one_after_the_other):
        y = compute(x, norm, act)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x, norm.weight, norm.bias])))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("frozen", ["nothing", "x", "parameters"])
def test_finite_differences(frozen: str) -> None:
    norm, act = layers(2, 3), nn.LeakyReLU(0.2)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=frozen != "x")
    for parameter in norm.parameters():
        parameter.requires_grad_(frozen != "parameters")

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normalized_activation(x, norm, act)

    assert torch.autograd.gradcheck(function, (x, norm.weight, norm.bias))
    assert torch.autograd.gradgradcheck(function, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_behind_a_convolution_under_autocast(dtype: torch.dtype) -> None:
    norm, act = layers(3, 4, torch.float32), nn.LeakyReLU(0.01)
    x = torch.randn(1, 4, 6, 6, 6, dtype=dtype, requires_grad=True)
    found = []
    for compute in (normalized_activation, one_after_the_other):
        with torch.autocast("cpu", dtype):
            y = compute(x, norm, act)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [x, norm.weight, norm.bias])))
    for ours, expected in zip(*found):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


def test_it_saves_the_input_alone() -> None:
    norm, act = layers(2, 3), nn.LeakyReLU()
    x, saved = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda kept: kept):
        normalized_activation(x, norm, act)
    assert [tensor.numel() for tensor in saved if tensor.numel() > 3] == [x.numel()]


def test_who_looks_between_them_is_not_passed_over() -> None:
    act, x = nn.LeakyReLU(), torch.randn(1, 3, 8, 8, requires_grad=True)
    for look in (
        lambda norm: norm.register_forward_hook(lambda *_: None),
        lambda norm: norm.register_forward_pre_hook(lambda *_: None),
        lambda norm: norm.register_full_backward_hook(lambda *_: None),
        lambda norm: setattr(norm, "forward", norm.forward),
    ):
        norm = layers(2, 3, torch.float32)
        assert can_be_joined(x, norm, act)
        look(norm)
        assert not can_be_joined(x, norm, act)


@pytest.mark.parametrize("channels", [4, 6])
def test_a_single_image_is_no_batch(channels: int) -> None:
    """As many rows as channels make it look like one."""
    layers = nn.Conv2d(4, channels, 3, padding=1), nn.InstanceNorm2d(channels, affine=True), nn.LeakyReLU()
    image = torch.randn(4, channels, 6)
    torch.testing.assert_close(Branch(*layers)(image), nn.Sequential(*layers)(image))
    torch.testing.assert_close(Branch(*layers)(image[None])[0], nn.Sequential(*layers)(image))


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_of_parts_are_those_of_the_whole(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts differ, are constant, or are far from zero."""
    x = mean + torch.randn(1, 3, 6, 8, 8, dtype=torch.float64) * torch.tensor([0, 1e-4, 1, 3, 0, 10.0])[:, None, None]
    rows = normalization._rows(x)
    found = []
    for parts in (1, 6):
        cut = normalization._rows(x, parts)
        found.append(normalization._normalized(cut, torch.ones(3).double(), torch.zeros(3).double(), parts, 1e-5))
    torch.testing.assert_close(found[1][0].view_as(rows), found[0][0].view_as(rows), atol=1e-8, rtol=1e-8)
    for ours, expected in zip(found[1][1:], found[0][1:]):
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_in_parts_round_no_more_than_whole_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, act = layers(3, 4, torch.float32), nn.LeakyReLU(0.01)
    x, weights = (torch.randn(2, 4, 6, 8, 10).to(dtype) for _ in range(2))
    found = []
    for kind, cut in ((torch.float64, False), (dtype, False), (dtype, True)):
        monkeypatch.setattr(normalization, "_parts", lambda x, cut=cut: x.shape[2] if cut else 1)
        copy = deepcopy(norm).to(torch.promote_types(kind, torch.float32))
        leaf = x.to(kind).requires_grad_()
        y = normalized_activation(leaf, copy, act)
        found.append((y, *torch.autograd.grad(y, [leaf, copy.weight, copy.bias], weights.to(kind))))
    for expected, whole, parts in zip(*found):
        assert parts.dtype == whole.dtype
        errors = [float((tensor.double() - expected).norm() / expected.norm()) for tensor in (whole, parts)]
        assert errors[1] < 1.5 * errors[0] + 1e-6
