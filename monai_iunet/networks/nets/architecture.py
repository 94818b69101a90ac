"""The architecture of an invertible U-Net: channels, strides and couplings per level, and what follows from them.

Of the `c` channels of a level, `k` are downsampled, with `1 <= k < c`, and the others skip to the decoder. A stride of
`n` voxels makes `n k` channels of the `k`, so these are the numbers that the next level can have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from monai_iunet.networks.nets.padding import PADDING_MODES

__all__ = ["Architecture", "is_positive_int", "reachable_channels"]

LARGEST_NUMBER = 2**31


@dataclass(frozen=True)
class Architecture:
    """Numbers that describe an invertible U-Net, checked.

    Attributes:
        spatial_dims: 1, 2 or 3.
        channels: per level, finest first.
        strides: per downsampling, the factor of each axis.
        couplings: per level.
        padding_mode: of images whose size does not divide; None to refuse them.
        factors: factor of each axis by which the network downsamples in all.
        skips: channels that skip to the decoder, per downsampling.

    Example:
        >>> architecture = Architecture.of(2, (4, 8, 16), strides=2, couplings=1, padding_mode="constant")
        >>> architecture.factors, architecture.skips
        ((4, 4), (2, 4))
    """

    spatial_dims: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    couplings: tuple[int, ...]
    padding_mode: str | None
    factors: tuple[int, ...] = field(init=False)
    skips: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        factors = (math.prod(stride[axis] for stride in self.strides) for axis in range(self.spatial_dims))
        skips = (
            total - following // math.prod(stride)
            for total, following, stride in zip(self.channels, self.channels[1:], self.strides)
        )
        # Not properties, which `torch.compile` would have to see through. The class is frozen.
        object.__setattr__(self, "factors", tuple(factors))
        object.__setattr__(self, "skips", tuple(skips))

    @classmethod
    def of(
        cls,
        spatial_dims: int,
        channels: Sequence[int],
        strides: int | Sequence[int | Sequence[int]],
        couplings: int | Sequence[int],
        padding_mode: str | None,
    ) -> Architecture:
        """Return the architecture that the arguments of `IUNet` describe; unreachable channels are replaced.

        Args:
            spatial_dims: 1, 2 or 3.
            channels: wanted per level.
            strides: one int, or one per downsampling, each an int or one per axis.
            couplings: one int, or one per level.
            padding_mode: as in `torch.nn.functional.pad`, or None.

        Raises:
            ValueError: when an argument describes no network.
        """
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}.")
        if padding_mode is not None and padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be None or one of {PADDING_MODES}, got {padding_mode!r}.")
        if len(channels) == 0 or not all(map(is_positive_int, channels)) or channels[0] < 2:
            raise ValueError(
                "channels must be positive ints, one per level, and the first at least 2 to be halved, "
                f"got {channels!r}."
            )
        factors = _strides(strides, spatial_dims, len(channels) - 1)
        built = reachable_channels(channels, factors)
        if built != tuple(channels):
            warnings.warn(
                f"channels={tuple(channels)} cannot be reached: with strides {factors} each level has "
                "prod(stride) * k channels, where k, the channels that are downsampled, is at least 1 and less than "
                f"the channels of the level above. Built instead, the nearest: {built}.",
                stacklevel=3,
            )
        return cls(spatial_dims, built, factors, _couplings(couplings, len(built)), padding_mode)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.channels)

    def halves(self, level: int, index: int = 0) -> tuple[int, int]:
        """Return the channels of the halves in front of a coupling of a level; halves change places with each."""
        small, large = self.channels[level] // 2, self.channels[level] - self.channels[level] // 2
        return (large, small) if index % 2 else (small, large)

    def last_halves(self, level: int) -> tuple[int, int]:
        """Return the channels of the two halves behind the last coupling of a level."""
        return self.halves(level, self.couplings[level])

    def check_images(self, x: Any, name: str, channels: int | None) -> None:
        """Check that a tensor holds images that the network takes.

        Args:
            x: the images.
            name: name of the argument in errors.
            channels: number of channels that the images must have; None for any.

        Raises:
            ValueError: when the tensor has another shape or type.
        """
        if torch.jit.is_tracing():  # would be of the example alone
            return
        expected = f"(batch, {channels or 'channels'}, {', '.join(['size'] * self.spatial_dims)})"
        is_batch = isinstance(x, Tensor) and x.ndim == self.spatial_dims + 2
        if not is_batch or channels not in (None, x.shape[1]):
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape {expected}, got {came}.")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with `.float()`.")
        if x.shape[0] == 0 or any(extent < factor for extent, factor in zip(x.shape[2:], self.factors)):
            raise ValueError(
                f"{name} must hold at least one image of at least {self.factors} voxels, the factors that the network "
                f"downsamples by, got {tuple(x.shape)}. Use larger images or fewer levels."
            )

    def check_number(self, shape: Sequence[int], channels: int, what: str) -> None:
        """Check that tensors which convolutions read or write have fewer than 2^31 values.

        Beyond, indices of 32 bits overflow, and convolutions have been seen to return zeros (PyTorch issue 87354).

        Args:
            shape: of images, `(batch, channels, *spatial)`.
            channels: of the tensors, which have the size of the padded images.
            what: name of the tensors in the error.

        Raises:
            ValueError: when they have more.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # where sizes are symbols
            return
        voxels = math.prod(-(-extent // factor) * factor for extent, factor in zip(shape[2:], self.factors))
        if shape[0] * channels * voxels >= LARGEST_NUMBER:
            raise ValueError(
                f"{what} of {channels} channels would have {shape[0] * channels * voxels} values, for images of shape "
                f"{tuple(shape)}; convolutions take fewer than 2^31. Use fewer images at once, smaller ones (inference "
                "in sliding windows), or fewer channels."
            )

    def check_divides(self, spatial_size: Sequence[int], method: str, remedy: str) -> None:
        """Check that a spatial size divides by the factors.

        Raises:
            ValueError: when it does not; it begins with the method and ends with the remedy.
        """
        if any(extent % factor for extent, factor in zip(spatial_size, self.factors)):
            raise ValueError(
                f"{method}: the spatial size must be divisible by {self.factors}, got {tuple(spatial_size)}. {remedy}"
            )

    def check_codes(self, codes: Sequence[Tensor]) -> None:
        """Check that tensors are codes of the network: one per level, of the shapes that `encode` returns.

        Raises:
            ValueError: when they are not.
        """
        channels = [*self.skips, self.channels[-1]]
        shapes = [tuple(code.shape) for code in codes]
        if len(codes) != len(channels) or any(
            len(shape) != self.spatial_dims + 2 or shape[1] != count for shape, count in zip(shapes, channels)
        ):
            raise ValueError(f"codes must be {len(channels)} tensors with {channels} channels, got shapes {shapes}.")
        size = tuple(codes[-1].shape[2:])
        for level in reversed(range(len(self.strides))):
            size = tuple(extent * factor for extent, factor in zip(size, self.strides[level]))
            if tuple(codes[level].shape[2:]) != size:
                raise ValueError(f"The code of level {level} must have the spatial size {size}, got shapes {shapes}.")

    def layout(self) -> str:
        """Return a picture in text: a row per level, a number of channels per coupling, each split as (skip/down)."""
        rows: list[str] = []
        for level in reversed(range(self.levels)):
            couplings = "-".join([str(self.channels[level])] * self.couplings[level])
            if not rows:
                rows.append(f"{couplings}--{couplings}")
                continue
            split = f"({self.skips[level]}/{self.channels[level] - self.skips[level]})"
            rows.append(f"{couplings}-{split}{'-' * max(len(rows[-1]) - len(split), 4)}{split}-{couplings}")
        width = len(rows[-1])
        # An odd rest goes to the right.
        return "\n".join(f"{'-' * ((width - len(row)) // 2)}{row}".ljust(width, "-") for row in reversed(rows))


def reachable_channels(channels: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the reachable numbers of channels that are nearest to the wanted ones, the smaller of two.

    Args:
        channels: wanted per level; the first is taken as it is.
        strides: per downsampling, the factor of each axis.

    Raises:
        ValueError: when a level would have fewer than 2 channels.

    Example:
        >>> reachable_channels((4, 20, 64), [(2, 2), (2, 2)])
        (4, 12, 44)
    """
    built = [channels[0]]
    for wanted, stride in zip(channels[1:], strides):
        factor = math.prod(stride)
        # The nearest multiple; of two equally near ones the smaller.
        nearest = math.ceil(wanted / factor - 0.5)
        downsampled = min(max(nearest, 1), built[-1] - 1)
        if factor * downsampled < 2:
            raise ValueError(
                f"From {built[-1]} channels, stride {tuple(stride)} reaches fewer than 2 channels; use more channels."
            )
        built.append(factor * downsampled)
    return tuple(built)


def is_positive_int(value: Any) -> bool:
    """Return whether a value is an int above 0, of NumPy too; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _strides(
    strides: int | Sequence[int | Sequence[int]], spatial_dims: int, count: int
) -> tuple[tuple[int, ...], ...]:
    """Return one tuple per downsampling, with one factor per axis."""
    entries = list(strides) if isinstance(strides, Iterable) else [strides] * count
    result = tuple(tuple(entry) if isinstance(entry, Iterable) else (entry,) * spatial_dims for entry in entries)
    if len(result) != count or any(
        len(stride) != spatial_dims or not all(map(is_positive_int, stride)) for stride in result
    ):
        raise ValueError(
            f"strides must be an int or {count} entries (one less than channels), each an int or {spatial_dims} "
            f"positive ints, got {strides!r}."
        )
    return result


def _couplings(couplings: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Return the number of couplings of each level."""
    result = tuple(couplings) if isinstance(couplings, Iterable) else (couplings,) * levels
    if len(result) != levels or not all(map(is_positive_int, result)):
        raise ValueError(f"couplings must be a positive int or {levels} of them (one per level), got {couplings!r}.")
    return result
