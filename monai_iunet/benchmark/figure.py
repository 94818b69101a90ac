"""The figure of the benchmark: memory and time in float32 (filled, solid) and under bf16 autocast (hollow, dashed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_iunet.benchmark.report import read_json
from monai_iunet.benchmark.section import Row
from monai_iunet.benchmark.sections.inference import LONG
from monai_iunet.io.files import write_atomically
from monai_iunet.planning.budget import WAYS

__all__ = ["draw"]

STYLES: dict[str, dict[str, Any]] = {
    "float32": {"linestyle": "-", "marker": "o"},
    "bf16 autocast": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
}


def draw(results: Path, path: Path) -> bool:
    """Draw what the results hold, and return whether there was anything to draw."""
    from matplotlib.figure import Figure

    found = read_json(results)
    sections: dict[str, list[Row]] = {
        name: [row for row in rows if not row.keys() & {"skipped", "failed"}]
        for name, rows in found["sections"].items()
    }
    panels = [
        (key, paint)
        for key, paint in (
            ("memory", _memory),
            ("time", _time),
            ("depth_memory", _depth),
            ("budgets", _budgets),
            ("losses", _losses),
            ("resampling", _resampling),
            ("inference", _classes),
            ("inference", _length),
        )
        if sections.get(key)
    ]
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4 * lines), layout="constrained", dpi=130)
    places = figure.subplots(lines, columns, squeeze=False).flat
    for (key, paint), axes in zip(panels, places):
        paint(sections[key], axes)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    sizes, versions = found["sizes"], found["versions"]
    depth = f"{sizes['depth_channels'][0]} x {sizes['depth_size']} cubed, channels {tuple(sizes['depth_channels'])}"
    others = f"memory at {sizes['memory_size']} cubed, time at {sizes['time_size']}"
    caption = f"3D; depth: {depth}; others: {others}; {found['device']}; torch {versions['torch']}; {found['date']}"
    figure.supxlabel(caption, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True


def _dtypes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in rows))


def _bars(rows: Sequence[Row], name: str, height: str, axes: Any, digits: int) -> None:
    """Draw a pair of bars, float32 and 16 bits, for each name."""
    names = list(dict.fromkeys(row[name] for row in rows))[::-1]
    for number, dtype in enumerate(_dtypes(rows)):
        own = {row[name]: row[height] for row in rows if row["dtype"] == dtype}
        values = {key: getattr(value, "median", value) for key, value in own.items()}
        places = [names.index(key) - 0.4 * number + 0.2 for key in values]
        bars = axes.barh(places, list(values.values()), 0.38, label=dtype, color=f"C{number}")
        axes.bar_label(bars, [f" {value:.{digits if value >= 1 else 3}f}" for value in values.values()], fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.5)  # the legend finds room beside the bars


def _memory(rows: Sequence[Row], axes: Any) -> None:
    """Draw what was allocated where that was measured, as the guide's table has it, else live bytes."""
    allocated = all("training_allocated_per_voxel" in row for row in rows)
    _bars(rows, "network", f"training_{'allocated' if allocated else 'bytes'}_per_voxel", axes, 0)
    axes.set(title="Peak memory of a training step, networks of equal cost", xlabel="bytes per voxel")


def _time(rows: Sequence[Row], axes: Any) -> None:
    _bars(rows, "network", "training_microseconds_per_voxel", axes, 1)
    axes.set(title="Time of a training step, the same networks", xlabel="µs per voxel")


def _resampling(rows: Sequence[Row], axes: Any) -> None:
    _bars(rows, "layer", "forward_milliseconds", axes, 1)
    axes.set(title="Orthogonal downsampling", xlabel="ms forward")


def _depth(rows: Sequence[Row], axes: Any) -> None:
    for number, name in enumerate(dict.fromkeys(row["network"] for row in rows)):
        for dtype in _dtypes(rows):
            own = sorted(
                (row["couplings"], row["training_memory"])
                for row in rows
                if row["network"] == name and row["dtype"] == dtype
            )
            if own:
                label = name if dtype == "float32" else None
                width = 3 if name == "ours, invert" else 1.5
                axes.plot(*zip(*own), label=label, color=f"C{number}", linewidth=width, **STYLES[dtype])
    axes.set(
        title="Peak memory against depth (dashed: bf16 autocast)",
        xlabel="couplings per level",
        ylabel="bytes, in units of the float32 input's",
        ylim=(0, None),
    )


def _budgets(rows: Sequence[Row], axes: Any) -> None:
    for number, dtype in enumerate(_dtypes(rows)):
        own = [row for row in rows if row["dtype"] == dtype]
        memory = [row["training_bytes_per_voxel"] for row in own]
        spreads = [row["training_microseconds_per_voxel"] for row in own]
        times = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.plot([memory[0], memory[-1]], [times[0], times[-1]], ":", color=f"C{number}")
        axes.errorbar(memory, times, errors, fmt="o", capsize=3, label=f"SegIUNet, {dtype}", color=f"C{number}")
        for row, x, y in zip(own, memory, times):
            if row["activations"] in WAYS:  # the mixtures are many, and close to each other
                place = {"xytext": (0, -14), "ha": "center", "textcoords": "offset points"}
                axes.annotate(row["activations"], (x, y), fontsize=8, **place)
    axes.set(title="What levels keep (dotted: the ends)", xlabel="bytes per voxel", ylabel="µs per voxel")
    axes.margins(x=0.15, y=0.2)


def _classes(rows: Sequence[Row], axes: Any) -> None:
    shortest = min(row["length"] for row in rows)
    own = _segmentations([row for row in rows if row["length"] == shortest], "classes", axes)
    axes.set(title=f"Segmentation of {own[0]['image']} voxels", xlabel="classes")


def _length(rows: Sequence[Row], axes: Any) -> None:
    own = _segmentations([row for row in rows if row["classes"] == LONG], "length", axes)
    image = sorted({(row["length"], row["image_and_labels_mebibytes"]) for row in own})
    axes.plot(*zip(*image), ":", color="gray", label="image and labels")
    axes.set(title=f"Segmentation into {own[0]['classes']} classes", xlabel="length of the image, voxels")


def _segmentations(rows: Sequence[Row], by: str, axes: Any) -> list[Row]:
    """Draw the memory of each inferer, and return the rows in their order along the axis."""
    rows = sorted(rows, key=lambda row: row[by])
    for name in dict.fromkeys(row["inferer"] for row in rows):
        axes.plot(*zip(*((row[by], row["mebibytes"]) for row in rows if row["inferer"] == name)), "o-", label=name)
    axes.set(ylabel="resident memory, MiB", xscale="log", yscale="log")
    axes.set_xticks(places := sorted({row[by] for row in rows}), [str(place) for place in places], minor=False)
    axes.minorticks_off()
    return rows


def _losses(rows: Sequence[Row], axes: Any) -> None:
    labeled = [{**row, "name": f"{row['loss']}, {row['classes']} classes"} for row in rows]
    _bars(labeled, "name", "memory", axes, 1)
    axes.set(title="Dice and cross-entropy, peak memory", xlabel="in units of the logits'")
