"""Colors of labels, the same in all pictures."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["label_colors"]

# Matplotlib's "tab10", then the lighter halves of its "tab20"; further labels begin again.
COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5"),
)


def label_colors(labels: Iterable[int]) -> dict[int, str]:
    """Return a color for each label, in the order of the labels.

    Example:
        >>> label_colors([1, 2])
        {1: '#1f77b4', 2: '#ff7f0e'}
    """
    return {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
