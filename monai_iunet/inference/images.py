"""Images of which windows are cut: whole tensors, and images that are resampled where a window is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from monai_iunet.inference.linear import LinearAxis

__all__ = ["Image", "ResampledImage", "WholeImage"]

Region = tuple[slice, ...]


class Image(Protocol):
    """An image for a network.

    Attributes:
        shape: `(channels, *spatial)`.
        device: where its windows are to be.
    """

    shape: tuple[int, ...]
    device: torch.device

    def cut(self, region: Region) -> Tensor:
        """Return a window, `(channels, *size)`, of floats."""


class WholeImage:
    """An image that is in memory as the network shall see it; integers become floats where a window is cut.

    Args:
        tensor: `(channels, *spatial)`.

    Example:
        >>> WholeImage(torch.arange(4, dtype=torch.int16)[None]).cut((slice(1, 3),))
        tensor([[1., 2.]])
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.device = tensor, tuple(tensor.shape), tensor.device

    def cut(self, region: Region) -> Tensor:
        """Return a window, `(channels, *size)`."""
        place = (slice(None), *region)
        window = self.tensor[place]
        return window if window.is_floating_point() else window.float()


class ResampledImage:
    """An image that stays as it was read, such as int16; where a window is cut it is brought to the network's grid.

    Args:
        tensor: `(channels, *spatial)`, on the grid of the file.
        axes: per axis of the network's grid, where its voxels lie in `tensor`.
        finish: what is done to the intensities of a window then, voxel by voxel.
        device: where its windows are to be; by default where `tensor` is.

    Example:
        >>> axis = LinearAxis.of(scale=0.5, offset=0.0, source=3, target=5)
        >>> ResampledImage(torch.tensor([[0, 2, 4]], dtype=torch.int16), [axis]).cut((slice(1, 4),))
        tensor([[1., 2., 3.]])
    """

    def __init__(
        self,
        tensor: Tensor,
        axes: Sequence[LinearAxis],
        finish: Callable[[Tensor], Tensor] = lambda window: window,
        device: torch.device | str | None = None,
    ) -> None:
        self.tensor, self.axes, self.finish = tensor, tuple(axes), finish
        self.shape = (len(tensor), *(axis.target for axis in axes))
        self.device = tensor.device if device is None else torch.device(device)

    def cut(self, region: Region) -> Tensor:
        """Return a window, `(channels, *size)`, float32."""
        parts = [axis.part(section) for axis, section in zip(self.axes, region)]
        # In float64, as MONAI's Spacing interpolates.
        place = (slice(None), *(needed for needed, _ in parts))
        box = self.tensor[place].double()
        for dim, (_, axis) in enumerate(parts, 1):
            box = axis.interpolate(box, dim)
        return self.finish(box.float())
