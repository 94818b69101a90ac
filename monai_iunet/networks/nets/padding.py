"""Padding images to sizes that divide by the factors of a network, and cropping back.

Half of what an axis lacks goes before, the rest behind. A network that `torch.jit.trace` records takes these functions
in as they are, with their conditions, and so works for sizes other than that of its example.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PADDING_MODES", "crop", "crop_like", "pad"]

PADDING_MODES = ("constant", "reflect", "replicate", "circular")


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def pad(x: Tensor, factors: list[int], mode: str | None) -> Tensor:
    """Pad images `(batch, channels, *spatial)`.

    Args:
        x: the images.
        factors: what each spatial axis shall divide by.
        mode: as in `torch.nn.functional.pad`; None to refuse sizes that do not divide.

    Raises:
        ValueError: when `mode` is None and a size does not divide.
    """
    sides: list[int] = []
    needed = False
    for axis in range(len(factors)):
        missing = -x.shape[x.dim() - 1 - axis] % factors[len(factors) - 1 - axis]
        sides += [missing // 2, missing - missing // 2]
        needed = needed or missing > 0
    if not needed:
        # To a tracer the same tensor would be the padded one from here on.
        return x.view_as(x) if torch.jit.is_scripting() else x
    if mode is None:
        raise ValueError(
            f"padding_mode is None: the spatial size must be divisible by {factors}, got {list(x.shape[2:])}. "
            "Pad it, or set padding_mode."
        )
    return functional.pad(x, sides, mode)


def crop(y: Tensor, spatial_size: list[int], factors: list[int]) -> Tensor:
    """Undo the padding of images that had a spatial size.

    Raises:
        ValueError: when an image of that size is not padded to that of `y`.
    """
    if len(spatial_size) != len(factors):
        raise ValueError(f"spatial_size must have {len(factors)} axes, got {spatial_size}.")
    padded = [spatial_size[axis] + -spatial_size[axis] % factors[axis] for axis in range(len(factors))]
    for axis in range(len(factors)):
        if y.shape[2 + axis] != padded[axis]:
            raise ValueError(
                f"An image of spatial size {spatial_size} is padded to {padded}, but this one has {list(y.shape[2:])}."
            )
    for axis in range(len(factors)):
        if padded[axis] != spatial_size[axis]:
            y = y.narrow(2 + axis, (padded[axis] - spatial_size[axis]) // 2, spatial_size[axis])
    return y


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def crop_like(y: Tensor, x: Tensor, factors: list[int]) -> Tensor:
    """Undo the padding of images `x`."""
    return crop(y, list(x.shape[2:]), factors)
