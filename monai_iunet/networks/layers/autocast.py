"""The type that autocast computes in."""

from __future__ import annotations

import torch

__all__ = ["autocast_type"]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type of autocast on a device, None where it is off or there is none.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_type(torch.device("cpu"))
        torch.bfloat16
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
