"""The error for what a user hands in."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Says that something a user handed in cannot be used; the message names it and the remedy in one line.

    Example:
        >>> raise InputError("scan.nii.gz: no such file. Check the path.")
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: scan.nii.gz: no such file. Check the path.
    """
