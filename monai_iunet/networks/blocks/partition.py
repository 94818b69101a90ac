"""Cutting the channels into pieces and joining them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_iunet.reversible import InvertibleLayer, OptionalTensors, Recall, Tensors, fill

__all__ = ["ChannelPartition"]


class ChannelPartition(InvertibleLayer):
    """Cut channels anew: from pieces of some sizes to pieces of others, in the same order.

    Args:
        in_sizes: channels of the pieces before.
        out_sizes: channels of the pieces after; the sum is the same.

    Example:
        >>> halves = ChannelPartition((5,), (2, 3))
        >>> [half.shape[1] for half in halves(torch.zeros(1, 5, 4))]
        [2, 3]
    """

    def __init__(self, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> None:
        super().__init__()
        self.in_sizes = tuple(in_sizes)
        self.out_sizes = tuple(out_sizes)

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        return _cut(inputs, self.out_sizes)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        return _cut(outputs, self.in_sizes)

    def pull_back(
        self, outputs: list[Tensor], grad_outputs: OptionalTensors, call: Recall
    ) -> tuple[Tensors, OptionalTensors, OptionalTensors]:
        sizes = self.out_sizes if call.inverse else self.in_sizes
        # Copies, so that one piece does not keep the memory of the whole alive.
        gradients = tuple(
            piece.clone() if piece._is_view() else piece for piece in _cut(fill(grad_outputs, outputs), sizes)
        )
        return _cut(tuple(outputs), sizes) if call.inputs_wanted else (), gradients, ()


def _cut(pieces: Tensors, sizes: Sequence[int]) -> Tensors:
    if tuple(piece.shape[1] for piece in pieces) == tuple(sizes):
        return pieces
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return (whole,) if len(sizes) == 1 else whole.split(tuple(sizes), 1)
