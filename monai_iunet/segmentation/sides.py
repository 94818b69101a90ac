"""Structures that lie on both sides of the body, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["side_pairs"]

SIDES = ("left", "right", "l", "r", "lt", "rt", "lh", "rh")  # with those of radiotherapy and of FreeSurfer


def side_pairs(structures: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return which structures are the left and the right one of a pair, and which have a side but no counterpart.

    Args:
        structures: names of the labels 1, 2, ...

    Returns:
        Pairs of labels, and names.

    Example:
        >>> side_pairs(["RightParotid", "brain stem", "left_parotid", "left atrium"])
        ([(1, 3)], ['left atrium'])
    """
    sides: dict[tuple[str, str], int] = {}
    for number, name in enumerate(structures, 1):
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)
        side = next((word.lower() for word in words if word.lower() in SIDES), None)
        if side is not None:
            rest = " ".join(word.lower() for word in words if word.lower() != side)
            sides[rest, side[0]] = number
    pairs = [
        (number, sides[rest, "l"]) for (rest, side), number in sides.items() if side == "r" and (rest, "l") in sides
    ]
    paired = {number for pair in pairs for number in pair}
    alone = [structures[number - 1] for number in sides.values() if number not in paired]
    return sorted((min(pair), max(pair)) for pair in pairs), alone
