"""Orthogonal mixing of channels: a 1x1 convolution whose matrix Q is orthogonal.

    forward  y = Q x        inverse  x = Q^T y        per voxel, over the channels

The state is in pieces; Q is applied block by block, y_i = sum_j Q_ij x_j, so that no piece is ever copied into a whole.
Gradients: grad x = Q^T grad y, grad Q = sum over voxels of grad y x^T. One product rebuilds x, one more each gives a
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_iunet.engine.reversible import Tensors, is_recorded_by_autograd_alone
from monai_iunet.networks.blocks.orthogonal_layer import OrthogonalLayer
from monai_iunet.networks.layers.full_precision import full_precision
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix

__all__ = ["ChannelMixing"]


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

    def __init__(self, in_sizes: Sequence[int], out_sizes: Sequence[int], orthogonal_map: str = "cayley") -> None:
        super().__init__()
        self.in_sizes = tuple(in_sizes)
        self.out_sizes = tuple(out_sizes)
        self.matrix = OrthogonalMatrix(sum(self.in_sizes), orthogonal_map=orthogonal_map)

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        return _apply(matrix.mT, pieces, self.in_sizes) if transposed else _apply(matrix, pieces, self.out_sizes)

    def matrix_gradient(
        self, states: Tensors, grad_inputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> Tensor:
        blocks = [[_outer(gradient, piece) for piece in states] for gradient in grad_outputs]
        gradient = torch.cat([torch.cat(row, 1) for row in blocks], 0)
        return (gradient.mT if inverse else gradient).to(matrix.dtype)


def _apply(matrix: Tensor, pieces: Tensors, sizes: Sequence[int]) -> Tensors:
    """Pieces of the given sizes of `matrix` times the channels that `pieces` make up."""
    batch, shape = pieces[0].shape[0], pieces[0].shape[2:]
    columns = [piece.shape[1] for piece in pieces]
    results = []
    with full_precision(matrix.device.type):
        for rows in matrix.to(pieces[0].dtype).split(tuple(sizes), 0):
            blocks = [block.expand(batch, -1, -1) for block in rows.split(columns, 1)]
            result = torch.bmm(blocks[0], pieces[0].flatten(2))
            for block, piece in zip(blocks[1:], pieces[1:]):
                # Under `torch.func` a result may be one of several that its terms are not.
                add = torch.baddbmm if is_recorded_by_autograd_alone(*pieces, matrix) else Tensor.baddbmm_
                result = add(result, block, piece.flatten(2))
            results.append(result.unflatten(2, shape))
    return tuple(results)


def _outer(gradient: Tensor, piece: Tensor) -> Tensor:
    """Sum the outer products of the channels over batch and voxels.

    On a GPU plane by plane of the first spatial axis, since the sum over all voxels would be one multiprocessor's work.
    """
    with full_precision(piece.device.type):
        if not piece.is_cuda or piece.ndim < 4:
            return torch.bmm(gradient.flatten(2), piece.flatten(2).mT).sum(0)
        planes = [[each.flatten(2).movedim(1, 0) for each in sample] for sample in zip(gradient, piece)]
        return torch.stack([torch.bmm(left, right.mT).sum(0) for left, right in planes]).sum(0)
