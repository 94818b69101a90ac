"""The type that autocast computes in, and the copies of weights that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["autocast_type", "without_autocast", "without_cast_copies"]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type of autocast on a device, None where it is off or there is none.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_type(torch.device("cpu"))
        torch.bfloat16
    """
    kind = device.type
    return torch.get_autocast_dtype(kind) if _is_available(kind) and torch.is_autocast_enabled(kind) else None


def _is_available(kind: str) -> bool:
    """Return whether a kind of devices has autocast, as "meta" has not."""
    # What is compiled is on one that has, and the compiler of PyTorch 2.8 does not know this question.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """Return a context without autocast on a kind of devices, which may know none.

    Example:
        >>> with torch.autocast("cpu"), without_autocast("cpu"):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    is_on = _is_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


@contextmanager
def without_cast_copies(device: torch.device) -> Iterator[None]:
    """Let autocast keep no copies of the weights that it casts, which it would hold until it is left.

    Where each weight is used once, they would only take memory.
    """
    if (dtype := autocast_type(device)) is None or not torch.is_autocast_cache_enabled():
        yield
    else:
        with torch.autocast(device.type, dtype, cache_enabled=False):
            yield
