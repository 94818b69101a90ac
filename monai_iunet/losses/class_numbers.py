"""Whether labels are the numbers of classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from monai_iunet.errors import InputError

__all__ = ["check_labels", "check_one_channel"]


def check_labels(labels: Tensor, classes: int | None, name: str) -> None:
    """Check that labels are whole numbers from 0, to `classes - 1` where the number of classes is known.

    Args:
        labels: of any shape and type.
        classes: number of classes; None for any.
        name: of the labels in the error.

    Raises:
        ValueError: when a label is none of these numbers.

    Example:
        >>> check_labels(torch.tensor([0.0, 2.0]), 3, "target")
    """
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which PyTorch does not compare
        labels = labels.long()
    largest = math.inf if classes is None else classes - 1
    if not (labels.is_floating_point() or labels.dtype == torch.bool):
        # A number that the type does not hold would be compared as another one.
        largest = min(largest, torch.iinfo(labels.dtype).max)
    wrong = (labels < 0) | (labels > largest)
    if labels.is_floating_point():
        wrong |= labels != labels.floor()  # NaN too
    if wrong.any():
        values = ", ".join(f"{value:g}" for value in labels[wrong].unique()[:5].tolist())
        if classes is None:
            raise ValueError(f"{name} must hold whole numbers from 0, got {values}. Map or resample the labels first.")
        raise ValueError(
            f"{name} must hold the numbers of {classes} classes, 0 to {classes - 1}, got {values}. Map the labels, for "
            "example by MONAI's MapLabelValued, resample them to the nearest one, or give the network more classes."
        )


def check_one_channel(labels: Any, name: str) -> None:
    """Check that a label map has one channel: of a one-hot one the first is taken for the labels, and read as such.

    Args:
        labels: `(channels, *spatial)`, a tensor or an array.
        name: of the labels in the error.

    Raises:
        InputError: when there are more channels, or none.

    Example:
        >>> import torch
        >>> check_one_channel(torch.zeros(1, 4, 4), "label")
    """
    if len(labels) != 1:
        raise InputError(
            f"{name}: a label map of one channel is needed, got {tuple(labels.shape)}. Take the argmax of what is "
            "one-hot, or of logits, first."
        )
