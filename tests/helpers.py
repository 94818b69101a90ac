"""Measures that several tests use."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def randomize(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Parameters far from their initial values, where nothing vanishes by symmetry."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Norms of the differences, relative to each expected norm, or to the largest norm where that one vanishes."""
    largest = max(float(tensor.norm()) for tensor in expected)
    return [
        float((a - b).norm()) / (float(b.norm()) if float(b.norm()) > 1e-8 * largest else largest)
        for a, b in zip(got, expected, strict=True)
    ]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensor storages that are alive: repeats exactly, unlike resident memory.

    `peak` is the most that was alive after any operator; `now()` is what is alive now. Tensors that no operator has
    touched inside the context do not count.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
        self._alive: dict[int, weakref.ref] = {}

    def now(self) -> int:
        storages = [reference() for reference in self._alive.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._ignored:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage)
        self._alive = {key: reference for key, reference in self._alive.items() if reference() is not None}
        self.peak = max(self.peak, self.now())
        return result
