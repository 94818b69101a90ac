"""Work on one part of a tensor after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice

import torch

__all__ = ["slabs", "slices", "two_slices"]

_MOST: ContextVar[int | None] = ContextVar("most", default=None)


def slabs(size: int, others: int, device: torch.device, most: int = 32) -> Iterator[slice]:
    """Cut an axis into slices to work on one after another, so that what is computed between is small.

    Args:
        size: of the axis.
        others: number of values per index of the axis.
        device: a slice has enough values to keep it busy.
        most: number of slices at most, since each takes time of its own.

    Example:
        >>> list(slabs(5, others=2**18, device=torch.device("cpu"), most=3))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    at_once = max(-(-size // most), (2**18 if device.type == "cpu" else 2**24) // max(1, others), 1)
    return slices(size, at_once)


def slices(size: int, at_once: int) -> Iterator[slice]:
    """Cut an axis into slices of so many indices, the last one of what is left.

    Example:
        >>> list(slices(5, 2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return islice((slice(start, min(start + at_once, size)) for start in range(0, size, at_once)), _MOST.get())


@contextmanager
def two_slices() -> Iterator[None]:
    """Have an axis end after two slices, where tensors have no values.

    The second takes the memory that each further one takes: its own, and what is left of the one before.
    """
    token = _MOST.set(2)
    try:
        yield
    finally:
        _MOST.reset(token)
