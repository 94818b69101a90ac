"""Cutting the channels into pieces and joining them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_iunet.engine.pytorch_private import is_view
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.reversible import Call, InvertibleLayer, Tensors

__all__ = ["ChannelPartition", "join_rounded"]


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

    is_function_of_weights = True

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        return self._partition(inputs, self.in_sizes, self.out_sizes)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        return self._partition(outputs, self.out_sizes, self.in_sizes)

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        return _separate(outputs, self.out_sizes if inverse else self.in_sizes)

    def rebuild(self, outputs: list[Tensor], overwrite: Sequence[bool], call: Call) -> tuple[Tensors, list[Tensor]]:
        return self.recover(tuple(outputs), (), (), call.inverse), []

    def _partition(self, pieces: Tensors, before: Sequence[int], after: Sequence[int]) -> Tensors:
        if tuple(before) == tuple(after) or needs_plain_operators(*pieces):
            return _cut(pieces, after)
        return _Partition.apply(before, after, *pieces)  # type: ignore[no-untyped-call]


def join_rounded(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the whole that pieces make up, rounded to a type, without a copy of it in the type of the pieces.

    Example:
        >>> join_rounded([torch.ones(1, 2, 4), torch.ones(1, 3, 4)], torch.bfloat16).shape
        torch.Size([1, 5, 4])
    """
    whole: Tensor = _RoundedWhole.apply(dtype, *pieces)  # type: ignore[no-untyped-call]
    return whole


class _RoundedWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *pieces: Tensor) -> Tensor:
        ctx.sizes = [piece.shape[1] for piece in pieces]
        ctx.dtype = pieces[0].dtype
        return torch.cat(pieces, 1, out=pieces[0].new_empty((0,), dtype=dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, *(piece.to(ctx.dtype) for piece in gradient.split(ctx.sizes, 1))


class _Partition(torch.autograd.Function):
    """A partition whose gradients are pieces with a memory of their own."""

    @staticmethod
    def forward(ctx: Any, before: Sequence[int], after: Sequence[int], *pieces: Tensor) -> Tensors:
        ctx.before = before
        return _cut(pieces, after)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *_separate(gradients, ctx.before)


def _separate(pieces: Tensors, sizes: Sequence[int]) -> Tensors:
    """Cut anew, into pieces with a memory of their own, not views that keep the whole alive."""
    return tuple(piece.clone() if is_view(piece) else piece for piece in _cut(pieces, sizes))


def _cut(pieces: Tensors, sizes: Sequence[int]) -> Tensors:
    if tuple(piece.shape[1] for piece in pieces) == tuple(sizes):
        return pieces
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return (whole,) if len(sizes) == 1 else whole.split(tuple(sizes), 1)
