"""Orthogonal mixing of channels: a 1x1 convolution whose matrix Q is orthogonal.

    forward  y = Q x        inverse  x = Q^T y        per voxel, over the channels

The state is in pieces; Q is applied block by block, y_i = sum_j Q_ij x_j, so that no piece is ever copied into a whole.
Gradients: grad x = Q^T grad y, grad Q = sum over voxels of grad y x^T. One product rebuilds x, one more each gives a
gradient.

A GPU is busy with few large products rather than many small ones. There the pieces are joined, a slab of voxels at a
time, and the sum over voxels is cut into parts, since one sum would be one multiprocessor's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.reversible import Tensors
from monai_iunet.engine.slabs import slabs
from monai_iunet.networks.blocks.orthogonal_layer import OrthogonalLayer, as_one_expression
from monai_iunet.networks.layers.full_precision import full_precision
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix

__all__ = ["ChannelMixing"]

PART = 1024  # voxels of a part of a sum


class ChannelMixing(OrthogonalLayer):
    """Multiply the channels of each voxel by an orthogonal matrix, which starts as the identity.

    Args:
        in_sizes: channels of the pieces before.
        out_sizes: channels of the pieces after; the sum is the same.
        orthogonal_map: see `OrthogonalMatrix`.

    Example:
        >>> mixing = ChannelMixing((2, 2), (3, 1))
        >>> [piece.shape[1] for piece in mixing(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))]
        [3, 1]
    """

    rounds_gradients = True

    def __init__(self, in_sizes: Sequence[int], out_sizes: Sequence[int], orthogonal_map: str = "cayley") -> None:
        super().__init__()
        self.in_sizes = tuple(in_sizes)
        self.out_sizes = tuple(out_sizes)
        self.matrix = OrthogonalMatrix(sum(self.in_sizes), orthogonal_map=orthogonal_map)

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        return _apply(matrix.mT, pieces, self.in_sizes) if transposed else _apply(matrix, pieces, self.out_sizes)

    def multiply_in_place(self, pieces: list[Tensor], matrix: Tensor, transposed: bool) -> Tensors:
        sizes = self.in_sizes if transposed else self.out_sizes
        # Slab by slab, so one result can take the place of what it is computed from: of the piece with most channels.
        largest = max(pieces, key=lambda piece: piece.shape[1])
        fitting = [size for size in sizes if size <= largest.shape[1]]
        if len(largest) > 1 or not fitting or not all(piece.is_contiguous() for piece in pieces):
            del largest
            return super().multiply_in_place(pieces, matrix, transposed)
        place = sizes.index(max(fitting))
        results = [
            largest[:, :size] if number == place else largest.new_empty((1, size, *largest.shape[2:]))
            for number, size in enumerate(sizes)
        ]
        _multiply_into(tuple(results), matrix.mT if transposed else matrix, tuple(pieces))
        pieces.clear()
        if sizes[place] < largest.shape[1]:
            results[place] = results[place].clone()  # lest the channels that are left over stay
        return tuple(results)

    def matrix_gradient(
        self, states: Tensors, grad_inputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> Tensor:
        if _are_joined(*states, *grad_outputs):
            gradient = torch.stack([_outer(*pair) for _, *pair in _slabs(grad_outputs, states)]).sum(0)
        else:
            blocks = [[_outer_product(gradient, piece) for piece in states] for gradient in grad_outputs]
            gradient = torch.cat([torch.cat(row, 1) for row in blocks], 0)
        return (gradient.mT if inverse else gradient).to(matrix.dtype)


def _apply(matrix: Tensor, pieces: Tensors, sizes: Sequence[int]) -> Tensors:
    """Return `matrix` times the channels that `pieces` make up, in pieces of the given sizes."""
    batch, shape = pieces[0].shape[0], pieces[0].shape[2:]
    if not _are_joined(*pieces, matrix):
        matrices = matrix.to(pieces[0].dtype).expand(batch, -1, -1).split(tuple(sizes), 1)
        with full_precision(matrix.device.type):
            return tuple(_sum_of_products(rows, pieces).unflatten(2, shape) for rows in matrices)
    results = tuple(pieces[0].new_empty((batch, size, *shape)) for size in sizes)
    _multiply_into(results, matrix, pieces)
    return results


def _multiply_into(results: Tensors, matrix: Tensor, pieces: Tensors) -> None:
    """Write `matrix` times the channels that `pieces` make up into results, in whose memory the pieces may lie."""
    matrices = matrix.to(pieces[0].dtype).expand(len(pieces[0]), -1, -1).split([part.shape[1] for part in results], 1)
    with full_precision(matrix.device.type):
        for slab, whole in _slabs(pieces):
            for rows, result in zip(matrices, results):
                torch.bmm(rows, whole, out=result[:, :, slab].flatten(2))
            del whole


def _sum_of_products(rows: Tensor, pieces: Tensors) -> Tensor:
    """Return rows of a matrix times pieces, block by block."""
    blocks = rows.split([piece.shape[1] for piece in pieces], 2)
    result = torch.bmm(blocks[0], pieces[0].flatten(2))
    for block, piece in zip(blocks[1:], pieces[1:]):
        # Under `torch.func` a result may be one of several that its terms are not.
        add = torch.baddbmm if needs_plain_operators(rows, *pieces) else Tensor.baddbmm_
        result = add(result, block, piece.flatten(2))
    return result


def _outer_product(gradient: Tensor, piece: Tensor) -> Tensor:
    """Sum the outer products of the channels over batch and voxels."""
    with full_precision(piece.device.type):
        return torch.bmm(gradient.flatten(2), piece.flatten(2).mT).sum(0)


def _are_joined(*tensors: Tensor) -> bool:
    """Return whether to join pieces: on a GPU, where results may be written into tensors made before."""
    return tensors[0].is_cuda and not as_one_expression(*tensors)


def _slabs(*groups: Tensors) -> Iterator[tuple[Any, ...]]:
    """Yield slabs of the first spatial axis, each with the pieces of each group joined, `(batch, channels, voxels)`."""
    first = groups[0][0]
    size = first.shape[2]
    for slab in slabs(size, sum(piece.numel() for piece in groups[0]) // size, first.device):
        yield slab, *(torch.cat([piece[:, :, slab] for piece in pieces], 1).flatten(2) for pieces in groups)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum the outer products of the channels over batch and voxels, in parts of the voxels."""
    voxels = min(PART, left.shape[2])
    if missing := -left.shape[2] % voxels:
        left, right = (functional.pad(each, (0, missing)) for each in (left, right))
    parts = zip(*(each.unflatten(2, (-1, voxels)).movedim(2, 1) for each in (left, right)))
    with full_precision(left.device.type):
        return torch.stack([torch.bmm(one, other.mT).sum(0) for one, other in parts]).sum(0)
