"""Orthogonal resampling: from few channels at a high resolution to many at a low one, without loss.

A block of n = prod(stride) neighboring voxels of one channel becomes one voxel of n channels, multiplied by an
orthogonal matrix K of that channel (n x n):

    down  y[c n + j, v] = sum_k K_c[j, k] x[c, v * stride + offset_k]        up  its transpose

so the number of values and their norm stay. With K the Haar matrix, channel c n holds scaled block means and the others
differences; with the identity this is the pixel unshuffle.

Source: Etmann, Ke, Schönlieb 2020 (arXiv 2005.05220), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_iunet.engine.reversible import Tensors
from monai_iunet.engine.slabs import slices
from monai_iunet.networks.blocks.orthogonal_layer import OrthogonalLayer, as_one_expression
from monai_iunet.networks.layers.full_precision import full_precision
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix

__all__ = ["OrthogonalDownsampling", "resampling_base"]

# Of matrices that training starts from: the same wherever, and in whatever precision, a network is built.
KIND: dict[str, Any] = {"dtype": torch.double, "device": "cpu"}


def resampling_base(init: Any, stride: Sequence[int], count: int) -> Tensor:
    """Return the orthogonal matrix that a resampling starts from.

    Args:
        init: "haar", "pixel_shuffle", "random" (one matrix per channel), or a matrix as tensor, array or nested lists.
        stride: factor per axis.
        count: number of channels at the high resolution.

    Returns:
        `(n, n)` or `(count, n, n)` with n = prod(stride); rows are output channels, columns run over the voxels of a
        block, the last axis fastest.

    Raises:
        ValueError: unknown `init`, "haar" for a stride other than 1, 2 and 4, a matrix of the wrong shape.

    Example:
        >>> (resampling_base("haar", (2,), 1) * 2**0.5).round().tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    size = math.prod(stride)
    if isinstance(init, str):
        if init == "haar":
            return _haar(stride)
        if init == "pixel_shuffle":
            return torch.eye(size, **KIND)
        if init == "random":
            return torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float32, device="cpu").double()).Q
        raise ValueError(
            f'resampling_init must be "haar", "pixel_shuffle", "random" or an orthogonal matrix, got {init!r}.'
        )
    matrix = torch.as_tensor(init if isinstance(init, Tensor) else np.asarray(init), **KIND)
    if matrix.shape not in ((size, size), (count, size, size)):
        raise ValueError(
            f"A resampling_init matrix for stride {tuple(stride)} on {count} channels must have the shape "
            f"{(size, size)} or {(count, size, size)}, got {tuple(matrix.shape)}."
        )
    return matrix


def _haar(stride: Sequence[int]) -> Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **KIND) / math.sqrt(2)
    # Twice by 2: the finer bit of the position becomes the coarser bit of the channel.
    twice = torch.kron(pair, pair)[[0, 2, 1, 3]]
    along = {1: torch.eye(1, **KIND), 2: pair, 4: twice}
    if any(factor not in along for factor in stride):
        raise ValueError(
            f'resampling_init="haar" needs strides of 1, 2 or 4 per axis, got {tuple(stride)}; use "pixel_shuffle" or '
            '"random".'
        )
    matrix = torch.eye(1, **KIND)
    for factor in stride:
        matrix = torch.kron(matrix, along[factor])
    return matrix


class OrthogonalDownsampling(OrthogonalLayer):
    """Downsample a tensor into pieces of the channels; `inverse` is the orthogonal upsampling.

    Args:
        in_channels: channels c at the high resolution; n c come out, n = prod(stride).
        stride: factor per axis.
        out_sizes: channels of the pieces at the low resolution.
        init: see `resampling_base`.
        orthogonal_map: see `OrthogonalMatrix`.
        learnable: whether the matrices are trained.

    Example:
        >>> down = OrthogonalDownsampling(1, (2, 2), (2, 2))
        >>> pieces = down(torch.rand(1, 1, 6, 4))
        >>> [tuple(piece.shape) for piece in pieces], tuple(down.inverse(*pieces)[0].shape)
        ([(1, 2, 3, 2), (1, 2, 3, 2)], (1, 1, 6, 4))
    """

    def __init__(
        self,
        in_channels: int,
        stride: Sequence[int],
        out_sizes: Sequence[int],
        init: Any = "haar",
        orthogonal_map: str = "cayley",
        learnable: bool = True,
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.in_sizes = (in_channels,)
        self.out_sizes = tuple(out_sizes)
        base = resampling_base(init, stride, in_channels)
        self.matrix = OrthogonalMatrix(math.prod(stride), in_channels, base, orthogonal_map, learnable)

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        return self._up(pieces, matrix) if transposed else self._down(pieces, matrix)

    def matrix_gradient(
        self, states: Tensors, grad_inputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> Tensor:
        whole = as_one_expression(*states, *grad_inputs, *grad_outputs)
        if inverse:
            # y grad_x^T, and grad_x = K^T grad_y, so (y grad_y^T) K, at the low resolution.
            return self._outer(states, lambda group: self._blocks(grad_inputs, group), whole).to(matrix.dtype) @ matrix
        return self._outer(grad_outputs, lambda group: self._unshuffle(states[0][:, group]), whole).to(matrix.dtype)

    def _down(self, high: Tensors, matrix: Tensor) -> Tensors:
        (whole,) = high
        size = [extent // factor for extent, factor in zip(whole.shape[2:], self.stride)]
        with full_precision(matrix.device.type):
            matrix = matrix.to(whole.dtype)
            if as_one_expression(whole, matrix):
                low = matrix @ self._unshuffle(whole)
            else:
                low = whole.new_empty((*whole.shape[:2], math.prod(self.stride), math.prod(size)))
                for group in _groups(whole.shape, whole.device):
                    torch.matmul(matrix[group], self._unshuffle(whole[:, group]), out=low[:, group])
        low = low.flatten(1, 2).unflatten(2, size)
        return (low,) if len(self.out_sizes) == 1 else low.split(self.out_sizes, 1)

    def _up(self, low: Tensors, matrix: Tensor) -> Tensors:
        size = low[0].shape[2:]
        with full_precision(matrix.device.type):
            matrix = matrix.to(low[0].dtype).mT
            if as_one_expression(*low, matrix):
                return (self._shuffle(matrix @ self._blocks(low, slice(0, len(matrix))), size),)
            extents = (extent * factor for extent, factor in zip(size, self.stride))
            high = low[0].new_empty((len(low[0]), len(matrix), *extents))
            for group in _groups(high.shape, high.device):
                high[:, group] = self._shuffle(matrix[group] @ self._blocks(low, group), size)
        return (high,)

    def _outer(self, left: Tensors, right: Callable[[slice], Tensor], whole: bool) -> Tensor:
        """Return outer products of the n values of each channel, summed over samples and blocks: `(channels, n, n)`.

        Args:
            left: at the low resolution.
            right: gives a group of channels, `(batch, channels, n, blocks)`.
            whole: whether to take all channels at once.
        """
        batch, *size = left[0].shape[0], *left[0].shape[2:]
        channels, count = len(self.matrix.weight), math.prod(self.stride)

        def product(group: slice) -> Tensor:
            return (self._blocks(left, group) @ right(group).mT).sum(0)

        with full_precision(left[0].device.type):
            if whole:
                return product(slice(0, channels))
            products = left[0].new_empty((channels, count, count))
            for group in _groups((batch, channels, count, *size), left[0].device):
                products[group] = product(group)
        return products

    def _blocks(self, low: Tensors, group: slice) -> Tensor:
        """Return a group of channels at the low resolution, `(batch, channels, n, blocks)`."""
        count = math.prod(self.stride)
        return _narrow(low, group.start * count, group.stop * count).flatten(2).unflatten(1, (-1, count))

    def _unshuffle(self, high: Tensor) -> Tensor:
        """Rearrange `(batch, channels, *spatial)` to `(batch, channels, n, blocks)`."""
        axes = len(self.stride)
        for axis, factor in enumerate(self.stride):
            high = high.unflatten(2 + 2 * axis, (-1, factor))
        within = [3 + 2 * axis for axis in range(axes)]
        across = [2 + 2 * axis for axis in range(axes)]
        return high.permute(0, 1, *within, *across).flatten(2, 1 + axes).flatten(3)

    def _shuffle(self, blocks: Tensor, size: Sequence[int]) -> Tensor:
        """Undo `_unshuffle`, for a low resolution of `size`."""
        axes = len(self.stride)
        high = blocks.unflatten(3, tuple(size)).unflatten(2, self.stride)
        order = [place for axis in range(axes) for place in (2 + axes + axis, 2 + axis)]
        high = high.permute(0, 1, *order)
        for axis in range(axes):
            high = high.flatten(2 + axis, 3 + axis)
        return high


def _groups(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Yield groups of the channels of `(batch, channels, ...)` to work on one after another.

    What lies between the reordering and the product then fits into the cache of a CPU, or takes little of the memory
    of a GPU, where the groups are large enough to keep it busy.
    """
    at_once = max(1, (2**18 if device.type == "cpu" else 2**26) * shape[1] // max(1, math.prod(shape)))
    return slices(shape[1], at_once)


def _narrow(pieces: Tensors, start: int, stop: int) -> Tensor:
    """Return channels from `start` to `stop` of what the pieces make up; a copy only where they lie in several."""
    parts = []
    for piece in pieces:
        if start < piece.shape[1] and stop > 0:
            parts.append(piece[:, max(0, start) : stop])
        start, stop = start - piece.shape[1], stop - piece.shape[1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
