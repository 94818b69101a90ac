"""Linear interpolation along one axis after another, between grids whose axes are parallel.

It is what `torch.nn.functional.grid_sample` does with `mode="bilinear"` and `padding_mode="border"` where the axes of
both grids are parallel, in place of eight neighbors two at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LinearAxis", "parallel_axes"]

TOLERANCE = 1e-4  # voxels, over the whole extent of the image
UNCHANGED = 1e-3  # as MONAI's SpatialResample, which leaves an image whose grid differs by less as it is


@dataclass(frozen=True)
class LinearAxis:
    """Where the voxels of one grid, the target, lie between those of another, the source, along an axis.

    Attributes:
        low: the source voxel before each target voxel.
        high: the one behind it.
        weight: of the one behind, from 0 to 1.
        source: voxels of the source.
    """

    low: Tensor
    high: Tensor
    weight: Tensor
    source: int

    @classmethod
    def of(cls, scale: float, offset: float, source: int, target: int) -> LinearAxis:
        """Return the axis on which target voxel `i` lies at `scale * i + offset`, or at the border if that is outside.

        Example:
            >>> LinearAxis.of(scale=0.5, offset=0.25, source=2, target=3).weight.tolist()
            [0.25, 0.75, 0.0]
        """
        places = (torch.arange(target, dtype=torch.float64) * scale + offset).clamp_(0, source - 1)
        low = places.floor().long()
        return cls(low, (low + 1).clamp_(max=source - 1), places - low, source)

    @property
    def target(self) -> int:
        """Number of voxels of the target."""
        return len(self.low)

    @property
    def is_identity(self) -> bool:
        """Whether both grids have the same voxels."""
        return bool(self.source == self.target and not self.weight.any() and (self.low.diff() == 1).all())

    def padded(self, before: int, source: int) -> LinearAxis:
        """Return the axis from a source that has as many voxels more in front, and `source` voxels in all."""
        return LinearAxis(self.low + before, self.high + before, self.weight, source)

    def part(self, section: slice) -> tuple[slice, LinearAxis]:
        """Return which source voxels a section of the target needs, and the axis from those to that section."""
        low, high, weight = self.low[section], self.high[section], self.weight[section]
        first, last = int(low[0]), int(high[-1]) + 1
        return slice(first, last), LinearAxis(low - first, high - first, weight, last - first)

    def interpolate(self, values: Tensor, dim: int) -> Tensor:
        """Interpolate along a dimension of a tensor, from the source to the target."""
        if self.is_identity:
            return values
        low, high, weight = (part.to(values.device) for part in (self.low, self.high, self.weight))
        weight = weight.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1 - dim))
        return _select(values, dim, low).lerp_(_select(values, dim, high), weight)


def _select(values: Tensor, dim: int, places: Tensor) -> Tensor:
    """Return a copy of what lies at some places along a dimension."""
    if values.device.type != "cpu":
        return values.index_select(dim, places)
    # Several times as fast as PyTorch's index_select, most of all along the last dimension.
    return torch.from_numpy(values.detach().numpy().take(places.numpy(), axis=dim))


def parallel_axes(
    matrix: np.ndarray, source: tuple[int, ...], target: tuple[int, ...]
) -> tuple[LinearAxis, ...] | None:
    """Return the axes between two grids, if they are parallel and run the same way.

    Args:
        matrix: from voxels of the target to voxels of the source, with a row and a column more than there are axes.
        source: voxels per axis.
        target: voxels per axis.

    Returns:
        One per axis; None if the grids are turned or sheared against each other.

    Example:
        >>> axes = parallel_axes(np.diag([2.0, 1.0]), source=(5,), target=(3,))
        >>> axes[0].low.tolist()
        [0, 2, 4]
        >>> parallel_axes(np.diag([-1.0, 1.0]), (5,), (5,)) is None
        True
    """
    if source == target and np.allclose(matrix, np.eye(len(matrix)), rtol=0, atol=UNCHANGED):
        matrix = np.eye(len(matrix))
    linear, offset = matrix[:-1, :-1], matrix[:-1, -1]
    scale = np.diag(linear)
    turned = np.abs(linear - np.diag(scale)) @ np.array(target)
    if (scale <= 0).any() or (turned > TOLERANCE).any():
        return None
    return tuple(LinearAxis.of(*values) for values in zip(scale.tolist(), offset.tolist(), source, target))
