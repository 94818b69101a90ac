"""The figure of a comparison of arms: how the trainings went, and what each arm reaches in each test case."""

from __future__ import annotations

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
    first = result["arms"][names[0]]["cases"]
    order = sorted(first, key=lambda case: first[case]["dice"])
    for number, (name, arm) in enumerate(result["arms"].items()):
        minutes = result["minutes"]
        values = arm["losses"]
        losses.plot([minutes * (part + 0.5) / len(values) for part in range(len(values))], values, label=name)
        places = [place + 0.7 * (number / max(1, len(names) - 1) - 0.5) for place in range(len(order))]
        dice.plot(places, [arm["cases"][case]["dice"] for case in order], ".", label=name)
    losses.set(xlabel=f"minutes of the {result['clock']}", ylabel="training loss", yscale="log")
    dice.set(xlabel=f"test case, in the order of {names[0]}", ylabel="Dice", xticks=range(len(order)))
    dice.set_xticklabels([case.split(".")[0] for case in order], rotation=90, fontsize=7)
    for axes in (losses, dice):
        axes.grid(alpha=0.3)
    losses.legend(frameon=False, fontsize=8)


def save_arms(result: Mapping[str, Any], path: Path) -> Path:
    """Write the figure as PNG."""
    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=110)
    draw_arms(result, figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
