"""Gradients of convolutions of small images on a CPU in bfloat16, where oneDNN reads memory that nobody has written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import AutocastInferer, IUNet, SegIUNet
from tests.helpers import relative_errors

ROUNDING = 0.15  # of bfloat16, in these networks; memory that nobody has written is far from it


def gradients(network: nn.Module, images: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Gradients of the parameters, after memory that is free was filled with NaN."""
    filled = [torch.full((size,), torch.nan) for size in (1_000, 10_000, 100_000, 1_000_000)]
    del filled
    network.zero_grad()
    run(network, images).float().square().mean().backward()
    return [parameter.grad.float() for parameter in network.parameters() if parameter.grad is not None]


def under_autocast(network: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = network(images)
    return found


def check(network: nn.Module, images: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = under_autocast) -> None:
    """Compare three times with what float32 gives."""
    expected = gradients(copy.deepcopy(network).float(), images.float(), lambda network, images: network(images))
    for _ in range(3):
        assert max(relative_errors(gradients(network, images, run), expected)) < ROUNDING


def small(**options: object) -> SegIUNet:
    return SegIUNet(3, 1, 2, channels=(16, 32), norm=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("activations", ["invert", "convolutions", "store"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 16, 16), {}),  # 2 slices at the coarser level
        ((2, 16, 16), {"strides": ((1, 2, 2),)}),  # in the stem, too
        ((8, 16, 16), {"kernel_size": 5}),
        ((4, 16, 16), {"branch": "residual"}),
        ((4, 16, 16), {"exact": True}),
        ((16, 2, 16), {"kernel_size": 5}),  # 1 row at the coarser level
        ((16, 4, 16), {"kernel_size": 7}),
    ],
)
def test_gradients_of_few_slices_are_right(activations: str, size: Sequence[int], options: dict[str, object]) -> None:
    check(small(activations=activations, **options), torch.rand(1, 1, *size))


def test_gradients_of_a_branch_of_ones_own_are_right() -> None:
    def branch(_: int, in_channels: int, out_channels: int, *_others: object) -> nn.Module:
        inner = nn.Sequential(nn.Conv3d(in_channels, 16, (3, 1, 1), padding=(1, 0, 0)), nn.Tanh())
        return nn.Sequential(inner, nn.Conv3d(16, out_channels, 3, padding=1))

    check(IUNet(3, (16, 32), make_branch=branch), torch.rand(1, 16, 4, 16, 16))


def test_gradients_of_a_network_of_bfloat16_are_right() -> None:
    network = small().bfloat16()
    check(network, torch.rand(1, 1, 4, 16, 16).bfloat16(), lambda network, images: network(images))


def test_gradients_of_other_networks_are_right_with_the_inferer() -> None:
    network = nn.Sequential(
        nn.Conv3d(1, 16, 3, padding="same"), nn.Tanh(), nn.ConvTranspose3d(16, 16, 3, padding=1), nn.Conv3d(16, 2, 1)
    )
    check(network, torch.rand(2, 1, 2, 16, 16), lambda network, images: AutocastInferer()(images, network))


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        (nn.Conv1d, (1,), {"kernel_size": 3, "stride": 2}),
        (nn.Conv2d, (11, 1), {"kernel_size": (5, 3), "stride": (1, 2)}),
        (nn.Conv3d, (8, 1, 2), {"kernel_size": (1, 3, 3), "stride": (1, 2, 1)}),  # of which the interpreter may crash
        (nn.Conv3d, (5, 6, 1), {"kernel_size": 3, "dilation": 2}),
        (nn.ConvTranspose3d, (6, 4, 1), {"kernel_size": (3, 4, 5), "stride": (1, 1, 3)}),
    ],
)
def test_gradients_of_small_images_are_right(
    kind: type[nn.Module], size: Sequence[int], options: dict[str, Any]
) -> None:
    kernels = options["kernel_size"] if isinstance(options["kernel_size"], tuple) else (options["kernel_size"],) * 3
    padding = tuple(extent // 2 * options.get("dilation", 1) for extent in kernels[: len(size)])
    network = kind(16, 17, padding=padding, **options)
    check(network, torch.randn(2, 16, *size), lambda network, images: AutocastInferer()(images, network))


def test_what_is_compiled_has_right_gradients() -> None:
    network = small()
    compiled = torch.compile(network, backend="aot_eager")
    check(network, torch.rand(1, 1, 4, 16, 16), lambda _, images: under_autocast(compiled, images))
