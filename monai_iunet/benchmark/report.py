"""How the results are shown: tables in the terminal, a JSON file with everything, a figure."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from monai_iunet.benchmark.measure import Spread
from monai_iunet.benchmark.sections import Row
from monai_iunet.io.files import write_atomically, write_text
from monai_iunet.system import processor_name

__all__ = ["COLUMNS", "draw", "header", "show", "write_json"]

Column = tuple[str, str, Callable[[Any], str]]


def _spread(scale: float = 1.0, digits: int = 2) -> Callable[[Spread], str]:
    return lambda value: value.text(scale, digits)


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


# Per section: heading, key in the row, how to write the value.
COLUMNS: dict[str, list[Column]] = {
    "depth": [
        ("network", "network", str),
        ("couplings", "couplings", str),
        ("training", "training_memory", _number(2)),
        ("no_grad", "inference_memory", _number(2)),
        ("training, s", "training_seconds", _spread()),
        ("over store", "training_over_store", _spread()),
        ("over iunets", "training_over_iunets", _spread()),
        ("no_grad, s", "inference_seconds", _spread()),
        ("over store", "inference_over_store", _spread()),
    ],
    "per_voxel": [
        ("network", "network", str),
        ("kMAC/voxel", "kmac_per_voxel", _number(0)),
        ("parameters, M", "parameters", lambda value: f"{value / 1e6:.1f}"),
        ("training, B/voxel", "training_bytes_per_voxel", _number(0)),
        ("no_grad, B/voxel", "inference_bytes_per_voxel", _number(0)),
        ("training step, µs/voxel", "training_microseconds_per_voxel", _spread()),
        ("no_grad, µs/voxel", "inference_microseconds_per_voxel", _spread()),
    ],
    "choices": [
        ("activations", "activations", str),
        ("training, B/voxel", "training_bytes_per_voxel", _number(0)),
        ("training step, µs/voxel", "training_microseconds_per_voxel", _spread()),
        ("over store", "training_over_store", _spread()),
        ("over the line", "training_over_line", _spread()),
    ],
    "plans": [
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("planned, MiB", "planned_mebibytes", _number(1)),
        ("measured, MiB", "measured_mebibytes", _number(1)),
        ("planned over measured", "planned_over_measured", _number(3)),
    ],
    "losses": [
        ("loss", "loss", str),
        ("classes", "classes", str),
        ("over the logits", "memory", _number(2)),
        ("B/voxel", "bytes_per_voxel", _number(0)),
        ("forward and backward, ms", "milliseconds", _spread(digits=1)),
        ("over MONAI", "over_monai", _spread()),
    ],
    "resampling": [
        ("layer", "layer", str),
        ("forward, ms", "forward_milliseconds", _spread(digits=1)),
        ("backward, ms", "backward_milliseconds", _spread(digits=1)),
        ("forward over a copy", "forward_over_copy", _spread()),
    ],
    "largest_cubes": [("network", "network", str), ("largest cube", "largest_cube", str)],
    "whole_volume": [
        ("spatial size", "spatial_size", str),
        ("fits", "fits", str),
        ("allocated, GiB", "gibibytes", _number(1)),
    ],
}

TITLES = {
    "depth": "One training step of 3D U-Nets, memory in units of the input's bytes (the loss alone: 7)",
    "per_voxel": "Segmentation networks of about equal cost: one training step, batch 1, float32",
    "choices": "SegIUNet with activations rebuilt, stored, or as a memory budget allows; the line joins the two ends",
    "plans": "Peak of a training step with AdamW, Dice and cross-entropy, batch 1: planned and measured",
    "losses": "Dice and cross-entropy: memory with logits and their gradient, in units of the logits",
    "resampling": "Orthogonal downsampling by 2 per axis",
    "largest_cubes": "Largest cube that trains, bf16 autocast, Adam, batch 1",
    "whole_volume": "One training step of SegIUNet on a whole volume, bf16 autocast, Adam",
}


def header(device: torch.device, peers: dict[str, str]) -> dict[str, Any]:
    """Machine and versions."""
    packages = {"monai-iunet": version("monai-iunet"), "torch": torch.__version__}
    packages |= {name: version(name) for name in ("monai", "numpy")} | peers
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": packages,
    }


def show(section: str, rows: Sequence[Row], console: Console) -> None:
    """Print a section as a table; columns that no row has are left out."""
    table = Table(title=TITLES[section], title_justify="left", header_style="bold")
    columns = [column for column in COLUMNS[section] if any(column[1] in row for row in rows)]
    for heading, key, _ in columns:
        table.add_column(
            heading,
            justify="left" if key in ("network", "layer", "loss", "activations", "dtype") else "right",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*(write(row[key]) if key in row else "" for _, key, write in columns))
    console.print(table)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Write all results so far."""
    write_text(path, json.dumps(_for_json(results), indent=2, allow_nan=False) + "\n")


def _for_json(value: Any) -> Any:
    """Return results as JSON knows them: spreads as dictionaries, and None for what is not a number."""
    if isinstance(value, Spread):
        return _for_json(value.as_dict())
    if isinstance(value, dict):
        return {key: _for_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(results: dict[str, Any], caption: str, path: Path) -> None:
    """Memory and time against depth, a line for everyone; below, what a budget and many classes do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained", dpi=150)
    (memory, time), (choices, losses) = figure.subplots(2, 2)
    _draw_depth(results["depth"], memory, time)
    _draw_choices(results["choices"], choices)
    _draw_losses(results["losses"], losses)
    for axes in (memory, time, choices, losses):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    time.legend_.remove()
    figure.supxlabel(caption, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_depth(rows: Sequence[Row], memory: Any, time: Any) -> None:
    for number, name in enumerate(dict.fromkeys(row["network"] for row in rows)):
        own = [row for row in rows if row["network"] == name]
        depths = [row["couplings"] for row in own]
        style: dict[str, Any] = {
            "color": f"C{number}",
            "marker": "o",
            "linewidth": 3 if name == "ours, invert" else 1.5,
        }
        memory.plot(depths, [row["training_memory"] for row in own], label=name, **style)
        seconds = [row["training_seconds"] for row in own]
        time.plot(depths, [spread.median for spread in seconds], label=name, **style)
        low, high = [spread.low for spread in seconds], [spread.high for spread in seconds]
        time.fill_between(depths, low, high, alpha=0.2, color=f"C{number}")
    memory.set(title="Peak memory of a training step", ylabel="bytes, in units of the input's")
    time.set(title="Time of a training step", ylabel="seconds")
    for axes in (memory, time):
        axes.set(xlabel="couplings per level", ylim=(0, None))


def _draw_choices(rows: Sequence[Row], axes: Any) -> None:
    memory = [row["training_bytes_per_voxel"] for row in rows]
    spreads = [row["training_microseconds_per_voxel"] for row in rows]
    times = [spread.median for spread in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.plot([memory[0], memory[-1]], [times[0], times[-1]], "--", color="gray", label="line between the ends")
    axes.errorbar(memory, times, errors, fmt="o", capsize=3, label="SegIUNet")
    for row, x, y in zip(rows, memory, times):
        # Below the points, where the line between the ends is not.
        axes.annotate(row["activations"], (x, y), xytext=(0, -16), textcoords="offset points", fontsize=8, ha="center")
    axes.set(title="Rebuilding or storing, level by level", xlabel="bytes per voxel", ylabel="µs per voxel")
    axes.margins(x=0.2, y=0.2)


def _draw_losses(rows: Sequence[Row], axes: Any) -> None:
    names = list(dict.fromkeys(row["loss"] for row in rows))
    classes = list(dict.fromkeys(row["classes"] for row in rows))
    for number, name in enumerate(names):
        heights = [row["memory"] for row in rows if row["loss"] == name]
        places = [place + 0.4 * number for place in range(len(classes))]
        bars = axes.bar(places, heights, 0.38, label=name)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8)
    axes.set_xticks([place + 0.2 * (len(names) - 1) for place in range(len(classes))], map(str, classes))
    axes.set(title="Peak memory of Dice and cross-entropy", xlabel="classes", ylabel="bytes, in units of the logits'")
    axes.margins(y=0.25)
