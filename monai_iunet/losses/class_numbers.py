"""Whether labels are the numbers of classes."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_labels"]


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Check that labels are whole numbers from 0 to `classes - 1`.

    Args:
        labels: of any shape and type.
        classes: number of classes.
        name: of the labels in the error.

    Raises:
        ValueError: when a label is none of these numbers.

    Example:
        >>> import torch
        >>> check_labels(torch.tensor([0.0, 2.0]), 3, "target")
    """
    wrong = (labels < 0) | (labels >= classes)
    if labels.is_floating_point():
        wrong |= labels != labels.floor()  # NaN too
    if wrong.any():
        values = ", ".join(f"{value:g}" for value in labels[wrong].unique()[:5].tolist())
        raise ValueError(
            f"{name} must hold the numbers of {classes} classes, 0 to {classes - 1}, got {values}. Map the labels, for "
            "example by MONAI's MapLabelValued, resample them to the nearest one, or give the network more classes."
        )
