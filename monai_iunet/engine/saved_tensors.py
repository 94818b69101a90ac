"""The tensors that autograd was to save in the evaluation of a layer, as the second evaluation gives them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage

from monai_iunet.engine.pytorch_private import version

__all__ = ["Caught", "Converted", "Kind", "Saved", "kind_of", "place_of", "version_of"]

Saved: TypeAlias = "Tensor | Converted"  # a tensor that autograd was to save
Kind = tuple[torch.Size, torch.dtype, torch.device]


class Caught(list[Saved]):
    """Collects the tensors that autograd is about to save.

    Args:
        changes: whether a tensor may change when everything is collected, so that it must be copied.

    Attributes:
        stands: a stand-in for one of them, which is collected in its place.
        versions: of the tensors when they were saved.
    """

    stands: Converted | None = None

    def __init__(self, changes: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self._changes = changes
        self.versions: list[int] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def catch(self, tensor: Tensor) -> None:
        stands = self.stands
        if self._changes is not None and self._changes(tensor):
            tensor = tensor.clone()
        self.append(stands if stands is not None and stands.is_of(tensor) else tensor.detach())
        self.versions.append(version_of(self[-1]))


class Converted:
    """Stands for a tensor that autograd is to have, until it asks, if the tensor follows from an input.

    Args:
        tensor: what it stands for, which is not held.
        source: the input.
        convert: computes the tensor from the input.
    """

    def __init__(self, tensor: Tensor, source: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
        self.shape, self.dtype, self.device = kind_of(tensor)
        self.source = source
        self._place = weakref.ref(tensor.untyped_storage()), place_of(tensor)
        self._convert = convert

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the one that this stands for."""
        storage, place = self._place
        return storage() is tensor.untyped_storage() and place == place_of(tensor)

    def untyped_storage(self) -> UntypedStorage:
        """Return the memory from which the tensor follows."""
        return self.source.untyped_storage()

    def tensor(self) -> Tensor:
        """Compute the tensor."""
        with torch.no_grad():
            return self._convert(self.source)


def kind_of(tensor: Saved) -> Kind:
    """Return by what a tensor is compared with that of the first evaluation."""
    return tensor.shape, tensor.dtype, tensor.device


def version_of(tensor: Saved) -> int:
    """Return how often a tensor was changed in place; 0 for what only stands for one."""
    return 0 if isinstance(tensor, Converted) else version(tensor)


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return where in its storage a tensor lies, and how it is to be read."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
