"""The random number generators that a module may draw from.

Those of PyTorch, and, for modules of one's own and hooks, that of Python's `random`, that of NumPy, and those that they
keep as attributes, also in lists, tuples, dictionaries and sets, and in random transforms of MONAI.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import hooks_of, without_modes

__all__ = ["RandomNumbers", "generators", "is_same_state"]


@dataclass(frozen=True)
class RandomNumbers:
    """A generator.

    Attributes:
        state: returns its state.
        go_to: gives it a state.
        is_of_pytorch: whether it is one of those that PyTorch has by itself.
    """

    state: Callable[[], Any]
    go_to: Callable[[Any], Any]
    is_of_pytorch: bool = False


def generators(device: torch.device, foreign: Sequence[nn.Module]) -> list[RandomNumbers]:
    """Return the generators that a module on a device may draw from.

    Args:
        device: of the module.
        foreign: those of its parts that are not known, see `foreign_code.py`.

    Example:
        >>> (of_pytorch,) = generators(torch.device("cpu"), [])
        >>> before, first = of_pytorch.state(), torch.rand(3)
        >>> of_pytorch.go_to(before)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    found = [_of_torch(torch.get_rng_state, torch.set_rng_state, True)]
    if device.type not in ("cpu", "meta"):
        of_device = torch.get_device_module(device)
        state, go_to = partial(of_device.get_rng_state, device), partial(of_device.set_rng_state, device=device)
        found.append(_of_torch(state, go_to, True))
    if foreign:
        found.append(RandomNumbers(random.getstate, random.setstate))
        found.append(RandomNumbers(partial(np.random.get_state, legacy=False), np.random.set_state))
    kept: dict[int, Any] = {}
    for module in foreign:
        _collect(vars(module), kept)
        for hook in (hook for hooks in hooks_of(module).values() for hook in hooks.values()):
            _collect(getattr(getattr(hook, "__self__", hook), "__dict__", {}), kept)
    return [*found, *(generator for attribute in kept.values() for generator in _of_attribute(attribute))]


def _collect(attributes: dict[str, Any], kept: dict[int, Any]) -> None:
    """Note attributes by their identity, and what is in containers and in random transforms."""
    pending: list[Any] = [*attributes.values()]
    while pending:
        value = pending.pop()
        if id(value) not in kept:
            kept[id(value)] = value
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, (list, tuple, deque, set)):
                pending += value
            elif isinstance(value, Randomizable):
                pending += vars(value).values()


def is_same_state(one: Any, other: Any) -> bool:
    """Return whether two states of a generator are the same, with the arrays in them.

    Example:
        >>> is_same_state({"key": np.array([1, 2])}, {"key": np.array([1, 3])})
        False
    """
    if isinstance(one, dict):
        return all(is_same_state(part, other[name]) for name, part in one.items())
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def _of_attribute(attribute: Any) -> Iterator[RandomNumbers]:
    """Yield the generator that an attribute is, if it is one."""
    if isinstance(attribute, torch.Generator):
        yield _of_torch(attribute.get_state, attribute.set_state)
    elif isinstance(attribute, random.Random) and not isinstance(attribute, random.SystemRandom):
        yield RandomNumbers(attribute.getstate, attribute.setstate)
    elif isinstance(attribute, np.random.RandomState):
        yield RandomNumbers(partial(attribute.get_state, legacy=False), attribute.set_state)
    elif isinstance(attribute, np.random.Generator):
        bits = attribute.bit_generator
        yield RandomNumbers(partial(getattr, bits, "state"), partial(setattr, bits, "state"))


def _of_torch(get: Callable[[], Tensor], put: Callable[[Tensor], Any], is_of_pytorch: bool = False) -> RandomNumbers:
    """Return a generator of PyTorch; its state are bytes, in whatever mode tensors are made."""

    def state() -> bytes:
        return without_modes(lambda: get().numpy().tobytes())

    def go_to(state: bytes) -> None:
        without_modes(lambda: put(torch.frombuffer(bytearray(state), dtype=torch.uint8)))

    return RandomNumbers(state, go_to, is_of_pytorch)
