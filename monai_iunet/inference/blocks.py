"""Probabilities on the grid of an image, made block by block of the slabs of logits on the grid of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iunet.inference.linear import LinearAxis
from monai_iunet.inference.streaming import Slab

__all__ = ["Block", "probability_blocks"]

LARGEST_BLOCK = 2_000_000  # values


@dataclass(frozen=True)
class Block:
    """Probabilities of a part of an image.

    Attributes:
        region: the part.
        values: `(classes, *spatial)`.
        classes: numbers of the classes; None for all.
    """

    region: tuple[slice, ...]
    values: Tensor
    classes: Tensor | None

    def labels(self) -> Tensor:
        """Return the most probable class of each voxel, the first of several."""
        best = self.values.max(0).indices  # of a few classes ten times as fast as argmax
        return best if self.classes is None else self.classes[best]


def probability_blocks(slabs: Iterable[Slab], axes: Sequence[LinearAxis], all_classes: bool = False) -> Iterator[Block]:
    """Turn slabs of logits into probabilities, and bring these to another grid.

    The plane of a slab next to the following one is kept until that comes, because voxels between the two need both.

    Args:
        slabs: of logits, in their order.
        axes: per axis, from the slabs' grid to the other.
        all_classes: whether all classes are wanted. Else those are left out that cannot be the most probable one
            anywhere in a block: of C classes the most probable one has at least 1/C.

    Yields:
        Blocks, which cover the other grid.
    """
    kept: Tensor | None = None
    done = 0  # voxels of the other grid along the axis of the slabs
    for slab in slabs:
        across = [axis for axis in range(len(axes)) if axis != slab.axis]
        along = axes[slab.axis]
        first = slab.start - (0 if kept is None else 1)
        end = int(torch.searchsorted(along.high, slab.start + slab.length))
        if end > done:
            needed, section = along.part(slice(done, end))
            needed = slice(needed.start - first, needed.stop - first)
            for rows in row_sections(len(slab.values), axes, slab.axis, slab.length, end - done):
                source, part = axes[across[0]].part(rows)
                region = [slice(0, axis.target) for axis in axes]
                region[across[0]], region[slab.axis] = rows, slice(done, end)
                logits = _with_kept(kept, slab, across[0], source).narrow(
                    1 + slab.axis, needed.start, needed.stop - needed.start
                )
                values, classes = torch.softmax(logits.float(), 0), None
                if not all_classes:
                    values, classes = _possible(values)
                steps = {across[0]: part, slab.axis: section} | {axis: axes[axis] for axis in across[1:]}
                for axis, step in steps.items():
                    values = step.interpolate(values, 1 + axis)
                yield Block(tuple(region), values, classes)
            done = end
        kept = slab.values.narrow(1 + slab.axis, slab.length - 1, 1).clone()


def row_sections(classes: int, axes: Sequence[LinearAxis], slab_axis: int, source: int, target: int) -> Iterator[slice]:
    """Cut the first axis across a slab into parts that make no more than the largest block, on either grid.

    Args:
        classes: in the slab.
        axes: from the slabs' grid to the other.
        slab_axis: axis along which slabs follow each other.
        source: length of the slab along it.
        target: length of what is made of it.
    """
    rows, *others = (axis for number, axis in enumerate(axes) if number != slab_axis)
    of_source = classes * source * math.prod(axis.source for axis in others)
    of_target = classes * target * math.prod(axis.target for axis in others)
    step = max(1, min(LARGEST_BLOCK // of_target, LARGEST_BLOCK // of_source * rows.target // rows.source))
    for first in range(0, rows.target, step):
        yield slice(first, min(first + step, rows.target))


def _with_kept(kept: Tensor | None, slab: Slab, axis: int, source: slice) -> Tensor:
    """Return rows of a slab, behind those of the plane before it."""
    parts = [
        part.narrow(1 + axis, source.start, source.stop - source.start)
        for part in (kept, slab.values)
        if part is not None
    ]
    return torch.cat(parts, 1 + slab.axis)


def _possible(probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
    """Leave out the classes that are too improbable everywhere to be the most probable one in between."""
    least = 0.99 / len(probabilities)  # room for rounding
    possible = (probabilities.flatten(1).amax(1) >= least).nonzero()[:, 0]
    return (probabilities, None) if len(possible) == len(probabilities) else (probabilities[possible], possible)
