"""A ruler for memory that gives the same figure on every run and every device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensor storages that are alive: repeats exactly, unlike resident memory.

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
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def now(self) -> int:
        """Bytes that are alive now."""
        storages = [reference() for reference in self._alive.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._ignored:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage)
        self._alive = {key: reference for key, reference in self._alive.items() if reference() is not None}
        self.peak = max(self.peak, self.now())
        return result
