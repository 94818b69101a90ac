"""The attributes of a module: which are its settings, how they are noted, and how they are compared.

Settings are numbers, texts and switches, arrays, lists, tuples, dictionaries, sets and records (dataclasses and
SimpleNamespaces) of them.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["is_equal", "is_plain", "is_setting", "knows_no_module", "noted", "parts_of", "tensors_in"]

SETTINGS = (bool, int, float, complex, np.generic, str, Enum, type(None), torch.dtype)
# What may change inside, as arrays do; beside them records and all kinds of tuples.
LISTS = (list, deque, set)
DICTIONARIES = (dict, OrderedDict, defaultdict)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield a tensor itself, and those in containers and records."""
    if isinstance(value, Tensor):
        yield value
    for part in (parts_of(value) or {}).values():
        yield from tensors_in(part)


def is_setting(value: Any) -> bool:
    """Return whether an attribute of a module is a number, a text, a switch or nothing, or a tuple of them."""
    return isinstance(value, SETTINGS) or (isinstance(value, tuple) and all(map(is_setting, value)))


def is_plain(value: Any) -> bool:
    """Return whether a setting, an array, a container or a record is made of settings all through."""
    parts = parts_of(value)
    if parts is not None:
        return all(map(is_plain, parts.values()))
    return is_setting(value) or type(value) is np.ndarray


def parts_of(value: Any) -> Mapping[Any, Any] | None:
    """Return what a container or a record holds, by its place or name; None for anything else.

    Records are dataclasses and SimpleNamespaces of tensors, arrays and settings. One that holds other objects, such as
    itself, is an object like any other.
    """
    kind = type(value)
    if kind in DICTIONARIES:
        return dict(value)
    if kind in LISTS or isinstance(value, tuple):
        return dict(enumerate(value))
    if not (dataclasses.is_dataclass(kind) or isinstance(value, SimpleNamespace)):
        return None
    names = vars(value) if hasattr(value, "__dict__") else [field.name for field in dataclasses.fields(value)]
    parts = {name: getattr(value, name, None) for name in names}
    is_flat = all(isinstance(part, (Tensor, LetGo, np.ndarray)) or is_setting(part) for part in parts.values())
    return parts if is_flat else None


def knows_no_module(value: Any) -> bool:
    """Return whether an attribute is data, or a function that knows nothing but what it is given."""
    parts = parts_of(value)
    if parts is not None:
        return all(map(knows_no_module, parts.values()))
    if isinstance(value, FunctionType):
        return value.__closure__ is None and all(map(knows_no_module, value.__defaults__ or ()))
    if isinstance(value, BuiltinFunctionType):
        return not isinstance(value.__self__, Tensor)
    return isinstance(value, (Tensor, torch.Generator)) or is_plain(value)


def noted(value: Any, with_graphs: bool = True) -> Any:
    """Return copies of arrays, containers and records, also of those in them, and anything else as it is.

    Args:
        value: an attribute.
        with_graphs: whether tensors that have a graph are kept, too; stand-ins if not.
    """
    if isinstance(value, Tensor):
        return value if with_graphs or value.is_leaf else LetGo()
    if type(value) is np.ndarray:
        return value.copy()
    parts = parts_of(value)
    if parts is None:
        return value
    parts = {name: noted(part, with_graphs) for name, part in parts.items()}
    if isinstance(value, tuple):
        if all(map(operator.is_, parts.values(), value)):
            return value
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if isinstance(value, set):
        return set(parts.values())
    copied = copy.copy(value)
    for name, part in parts.items():
        if type(value) in (*LISTS, *DICTIONARIES):
            copied[name] = part
        else:
            object.__setattr__(copied, name, part)  # a frozen dataclass refuses setattr
    return copied


def is_equal(now: Any, then: Any) -> bool:
    """Return whether a setting has the same value, or is the same object; what it became need not be a setting."""
    if type(now) is type(then) is np.ndarray:
        return (now.dtype, now.shape, now.tobytes()) == (then.dtype, then.shape, then.tobytes())
    parts, parts_then = (parts_of(now), parts_of(then)) if type(now) is type(then) else (None, None)
    if parts is None or parts_then is None:
        return now is then or (is_setting(now) and is_setting(then) and bool(now == then))
    if isinstance(now, set):
        return bool(now == then)
    return list(parts) == list(parts_then) and all(
        part is parts_then[name] or is_equal(part, parts_then[name]) for name, part in parts.items()
    )


class LetGo:
    """Stands for a tensor with a graph that an evaluation has replaced: to keep it would keep all steps before.

    An evaluation that only puts something in its place, such as an output that is looked at later, does not use it.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "A module reads a tensor of its former evaluation, with the graph of that, which is not there when it is "
            "evaluated once more in the backward pass. Let it keep what is detached from the graph, or store "
            'activations (activations="store").'
        )

    def __getattr__(self, name: str) -> Any:
        return self.__torch_function__()

    def __bool__(self) -> bool:
        return bool(self.__torch_function__())

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__()
