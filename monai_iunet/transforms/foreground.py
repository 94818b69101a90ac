"""What belongs to a CT and what was never scanned."""

from __future__ import annotations

import torch

__all__ = ["is_scanned"]

AIR = -999.0  # HU; what lies around the scanned region is air, or filled with less


def is_scanned(image: torch.Tensor) -> torch.Tensor:
    """Return where a CT in Hounsfield units is denser than air, as `select_fn` of MONAI's `CropForegroundd`.

    It is a named function because data loaders pickle what they hand to other processes.

    Args:
        image: of any shape.

    Example:
        >>> is_scanned(torch.tensor([-1024.0, -1000.0, -500.0, 40.0])).tolist()
        [False, False, True, True]
    """
    return image > AIR
