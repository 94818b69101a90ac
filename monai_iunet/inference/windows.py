"""Where sliding windows lie in an image, and how much each of them counts.

Positions and weights are those of MONAI's `sliding_window_inference`. One thing differs: where the image is smaller
than the window, the window shrinks, so that little or no padding is left. Padding changes what an instance norm sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data.utils import compute_importance_map
from monai.utils import ensure_tuple_rep, fall_back_tuple
from torch import Tensor

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """The windows of an image.

    Attributes:
        roi_size: what the network gets.
        size: the part of it that is image.
        padding: per axis, the padding before that part and behind it.
        starts: per axis, where windows begin.
        weights: of the voxels of a window, of the shape `size`.

    Example:
        >>> windows = Windows.of((100, 40), roi_size=(64, 64), divisible_by=16)
        >>> windows.roi_size, windows.padding, windows.starts
        ((64, 48), ((0, 0), (4, 4)), ((0, 36), (0,)))
    """

    roi_size: tuple[int, ...]
    size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, ...], ...]
    weights: Tensor

    @classmethod
    def of(
        cls,
        image_size: Sequence[int],
        roi_size: Sequence[int] | int,
        overlap: Sequence[float] | float = 0.25,
        mode: str = "constant",
        sigma_scale: Sequence[float] | float = 0.125,
        shrink: bool = True,
        divisible_by: Sequence[int] | int | None = None,
    ) -> Windows:
        """Lay windows over an image.

        Args:
            image_size: voxels per axis.
            roi_size: of the windows; an axis that is not positive takes the image's.
            overlap: of neighboring windows, as a fraction.
            mode: "constant" or "gaussian".
            sigma_scale: width of the Gaussian in windows.
            shrink: whether a window that is larger than the image shrinks to it.
            divisible_by: what the sizes of a window that shrinks shall divide by; by default the largest power of 2
                that divides its axis, with which any network is content that takes `roi_size`. One that does not
                shrink gets longer where the network would pad it to this size.

        Raises:
            ValueError: when the arguments do not fit each other.
        """
        axes = len(image_size)
        if isinstance(roi_size, Sequence) and len(roi_size) != axes:
            raise ValueError(f"roi_size {tuple(roi_size)}: must have {axes} axes, as the image does, or be one number.")
        overlaps = ensure_tuple_rep(overlap, axes)
        if not all(0 <= part < 1 for part in overlaps):
            raise ValueError(f"overlap {overlap}: must be at least 0 and below 1.")
        roi = tuple(int(extent) for extent in fall_back_tuple(roi_size, image_size))
        if shrink:
            powers = [extent & -extent for extent in roi]
            factors = powers if divisible_by is None else ensure_tuple_rep(divisible_by, axes)
            roi = _shrunken(roi, image_size, factors)
        elif divisible_by is not None:
            roi = _of_two_coarse_voxels(roi, ensure_tuple_rep(divisible_by, axes))
        size = tuple(min(extent, whole) for extent, whole in zip(roi, image_size))
        missing = [extent - part for extent, part in zip(roi, size)]
        padding = tuple((part // 2, part - part // 2) for part in missing)
        weights: Any = compute_importance_map(roi, mode=mode, sigma_scale=sigma_scale)
        return cls(
            roi,
            size,
            padding,
            tuple(_starts(whole, part, share) for whole, part, share in zip(image_size, size, overlaps)),
            weights[tuple(slice(before, before + part) for (before, _), part in zip(padding, size))],
        )

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(starts) for starts in self.starts)

    @property
    def pads(self) -> list[int]:
        """The padding as `torch.nn.functional.pad` takes it: the last axis first."""
        return [part for pair in reversed(self.padding) for part in pair]

    def without_padding(self, output: Tensor) -> Tensor:
        """Cut what belongs to the image out of the output of a network, `(batch, channels, *roi_size)`."""
        inside = (slice(before, before + part) for (before, _), part in zip(self.padding, self.size))
        place = (slice(None), slice(None), *inside)
        return output[place]

    def regions(self, axis: int, start: int | None = None) -> list[tuple[slice, ...]]:
        """Return the windows that begin at one place along an axis; without `start` the first one of each place."""
        starts = [part[:1] for part in self.starts] if start is None else [*self.starts]
        starts[axis] = self.starts[axis] if start is None else (start,)
        return [
            tuple(slice(first, first + part) for first, part in zip(corner, self.size))
            for corner in itertools.product(*starts)
        ]

    def covered(self, axis: int) -> Tensor:
        """Return the sum of the weights of all windows that begin at the same place along an axis."""
        shape = [starts[-1] + part for starts, part in zip(self.starts, self.size)]
        shape[axis] = self.size[axis]
        total = torch.zeros(shape)
        for region in self.regions(axis, start=0):
            total[region] += self.weights
        return total


def _shrunken(roi_size: Sequence[int], image_size: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    """Return the size of a window that is not larger than the image, rounded up to multiples of the factors."""
    sizes = [min(roi, -(-image // factor) * factor) for roi, image, factor in zip(roi_size, image_size, factors)]
    if sizes == list(factors):
        sizes[0] = min(roi_size[0], 2 * factors[0])
    return tuple(sizes)


def _of_two_coarse_voxels(roi_size: tuple[int, ...], factors: Sequence[int]) -> tuple[int, ...]:
    """Return the size of a window, or a longer one: an instance norm of one voxel on the coarsest level is none."""
    small = all(extent <= factor for extent, factor in zip(roi_size, factors))
    return (2 * factors[0], *roi_size[1:]) if small else roi_size


def _starts(image_size: int, window: int, overlap: float) -> tuple[int, ...]:
    """Return where windows begin along an axis: in equal steps, the last one moved back into the image."""
    last = image_size - window
    step = max(1, int(window * (1 - overlap)))
    return tuple(min(number * step, last) for number in range(1 - (-last // step)))
