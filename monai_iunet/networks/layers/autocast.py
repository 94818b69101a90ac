"""The type that autocast computes in, and the copies of weights that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["autocast_type", "without_cast_copies"]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type of autocast on a device, None where it is off or there is none.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_type(torch.device("cpu"))
        torch.bfloat16
    """
    kind = device.type
    # What is compiled is on a device with autocast, and the compiler of PyTorch 2.8 does not know this question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


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
