"""A ruler for memory that gives the same figure on every run and every device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage

from monai_iunet.engine.pytorch_private import TorchDispatchMode, tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are alive; repeats exactly, unlike resident memory.

    Scratch memory inside an operator and the allocator's rounding are not in it. Tensors that no operator has touched
    inside the context do not count.

    Args:
        ignore: tensors that do not count, such as parameters.

    Attributes:
        peak: the most that was alive after any operator.

    Example:
        >>> import torch
        >>> with LiveBytes() as live:
        ...     total = torch.zeros(1000).sum()
        >>> live.peak, live.now()
        (4004, 4)
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._ignored = weakref.WeakSet(tensor.untyped_storage() for tensor in ignore)
        self._alive: dict[weakref.ref[UntypedStorage], int] = {}  # bytes of each storage
        self._total = 0

    def now(self) -> int:
        """Return the bytes that are alive now."""
        for reference in list(self._alive):
            if (storage := reference()) is not None:
                self._note(storage)
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._ignored:
                self._note(leaf.untyped_storage())
        # `storage.resize_(0)` empties a storage without an operator: what seems to be a new peak is counted anew.
        if self._total > self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def _note(self, storage: UntypedStorage) -> None:
        reference = weakref.ref(storage, self._forget)
        size = storage.nbytes()
        self._total += size - self._alive.get(reference, 0)
        self._alive.setdefault(reference, 0)
        self._alive[reference] = size

    def _forget(self, reference: weakref.ref[UntypedStorage]) -> None:
        self._total -= self._alive.pop(reference, 0)
