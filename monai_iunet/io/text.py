"""Text that several modules write: sizes, tables, and what an error says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

__all__ = ["csv_text", "first_line", "in_one_line", "times"]


def csv_text(rows: Iterable[Iterable[object]], delimiter: str = ",") -> str:
    """Return rows as the lines of a table, with a delimiter between the cells.

    Example:
        >>> csv_text([("name", "ml"), ("left, front", 1.5)])
        'name,ml\\n"left, front",1.5\\n'
    """
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_one_line(error: Exception) -> str:
    """Return an error's message without line breaks, cut where it is longer than 300 characters."""
    return " ".join(str(error).split())[:300]


def times(extents: Iterable[float]) -> str:
    """Return the extents along the axes, of an image or of a voxel, with " x " between them.

    Example:
        >>> times((96, 96, 1.5))
        '96 x 96 x 1.5'
    """
    return " x ".join(f"{extent:.5g}" for extent in extents)
