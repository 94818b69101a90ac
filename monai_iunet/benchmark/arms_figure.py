"""The figure of a comparison of arms: how the trainings went, and what each arm reaches in each test case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from monai_iunet.io.files import write_atomically

__all__ = ["draw_arms", "save_arms"]


def draw_arms(result: Mapping[str, Any], figure: Figure) -> None:
    """Draw what `compare_arms` returned.

    Args:
        result: of the comparison.
        figure: to draw into.
    """
    losses, dice = figure.subplots(1, 2, width_ratios=[2, 3])
    names = list(result["arms"])
    found = {
        name: {case: _number(means["dice"]) for case, means in result["arms"][name]["cases"].items()} for name in names
    }
    order = sorted(found[names[0]], key=lambda case: (math.isnan(found[names[0]][case]), found[names[0]][case]))
    for number, name in enumerate(names):
        # Of steps, not of time: those of patches that grow become longer.
        values = result["arms"][name]["losses"]
        losses.plot([100 * (part + 0.5) / len(values) for part in range(len(values))], values, label=name)
        places = [place + 0.7 * (number / max(1, len(names) - 1) - 0.5) for place in range(len(order))]
        dice.plot(places, [found[name][case] for case in order], ".", label=name)
    losses.set(xlabel="steps of the training, %", ylabel="training loss", yscale="log")
    dice.set(xlabel=f"test case, in the order of {names[0]}", ylabel="Dice", xticks=range(len(order)))
    dice.set_xticklabels([case.split(".")[0] for case in order], rotation=90, fontsize=7, parse_math=False)
    for axes in (losses, dice):
        axes.grid(alpha=0.3)
    losses.legend(frameon=False, fontsize=8)


def _number(value: float | None) -> float:
    """Return a value to draw: one that is unknown is left out."""
    return math.nan if value is None else value


def save_arms(result: Mapping[str, Any], path: Path) -> Path:
    """Write the figure as PNG."""
    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=110)
    draw_arms(result, figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
