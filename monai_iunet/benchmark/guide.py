"""The tables of the guide to memory and speed, from the stored results.

In a clone, `python -m monai_iunet.benchmark.guide` measures anew.

Each stands between `<!-- benchmark: NAME -->` and `<!-- end -->`. A cell is empty where nothing was measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from monai_iunet.benchmark.figure import draw
from monai_iunet.benchmark.measure import DTYPES
from monai_iunet.benchmark.report import read_json
from monai_iunet.benchmark.run import run_benchmark
from monai_iunet.benchmark.section import Row, number, spread
from monai_iunet.benchmark.sections.inference import BUFFERED, MONAI, OURS
from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text

__all__ = ["RESULTS", "refresh", "with_tables"]

RESULTS = Path(__file__).parent / "results" / "cpu.json"
FLOAT32, AUTOCAST = DTYPES

Sections = dict[str, list[Row]]


def with_tables(text: str, results: dict[str, Any]) -> str:
    """Return a text with what stands between its markers replaced.

    Raises:
        InputError: for a marker that is missing, unknown or not ended.
    """
    sections: Sections = {
        name: [row for row in rows if not row.keys() & {"skipped", "failed"}]
        for name, rows in results["sections"].items()
    }
    found = re.findall(r"<!-- benchmark: (.*?) -->", text)
    if sorted(found) != sorted(BLOCKS) or text.count("<!-- end -->") != len(BLOCKS):
        raise InputError(f"benchmark.md: needs one block each of {', '.join(BLOCKS)}, with an end; found {found}.")

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{BLOCKS[match[2]](sections)}\n\n{match[3]}"

    return re.sub(r"(<!-- benchmark: (.*?) -->).*?(<!-- end -->)", block, text, flags=re.DOTALL)


def refresh(root: Path, console: Console) -> list[str]:
    """Measure what has changed since the stored results, draw the figure, write the tables; return what failed."""
    page = root / "monai_iunet" / "guides" / "benchmark.md"
    with_tables(page.read_text(encoding="utf-8"), {"sections": {}})  # fails now rather than after the measurements
    run = partial(run_benchmark, torch.device("cpu"), RESULTS, console, peers=True)
    try:
        failures = run()
    except InputError:  # results of another machine, or of other versions
        failures = run(overwrite=True)
    if not failures:
        draw(RESULTS, RESULTS.with_suffix(".png"))
        write_text(page, with_tables(page.read_text(encoding="utf-8"), read_json(RESULTS)))
    return failures


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(headings), ["---"] * len(headings), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(rows: Sequence[Row], key: str, write: Callable[[Any], str], **where: Any) -> str:
    """Write the value of the one row with these values; nothing if there is none."""
    for row in rows:
        if all(row.get(name) == value for name, value in where.items()):
            return write(row[key]) if row.get(key) is not None else ""
    return ""


def _different(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _depth(sections: Sections) -> str:
    memory, time = sections.get("depth_memory", []), sections.get("depth_time", [])
    depths = sorted(_different(memory, "couplings"))
    headings = [""] + [f"{couplings}" for couplings in depths] + ["time over store"]
    headings += [f"{couplings}, bf16" for couplings in depths] + ["time over store, bf16"]
    rows = []
    for network in _different(memory, "network"):
        cells = [network]
        for dtype in DTYPES:
            which = {"network": network, "dtype": dtype}
            cells += [_cell(memory, "training_memory", number(1), couplings=depth, **which) for depth in depths]
            cells.append(_cell(time, "training_over_store", spread(), **which))
        rows.append(cells)
    return _table(headings, rows)


def _equal_cost(sections: Sections) -> str:
    memory, time = sections.get("memory", []), sections.get("time", [])
    headings = ["", "kMAC per voxel", "training, bytes per voxel", "bf16", "`no_grad`, bytes per voxel", "bf16"]
    headings += ["training step, µs per voxel", "bf16", "`no_grad`, µs per voxel", "bf16"]
    rows = []
    for network in _different(memory, "network"):
        cells = [network, _cell(memory, "kmac_per_voxel", number(0), network=network)]
        for rows_of, quantity, write in (
            (memory, "training_bytes_per_voxel", number(0)),
            (memory, "inference_bytes_per_voxel", number(0)),
            (time, "training_microseconds_per_voxel", spread(digits=1)),
            (time, "inference_microseconds_per_voxel", spread(digits=1)),
        ):
            cells += [_cell(rows_of, quantity, write, network=network, dtype=dtype) for dtype in DTYPES]
        rows.append(cells)
    return _table(headings, rows)


def _budgets(sections: Sections) -> str:
    headings = ["activations", "", "training, bytes per voxel", "training step, µs per voxel", "time over store"]
    headings.append("time over the line")
    rows = [
        [
            row["activations"],
            row["dtype"],
            number(0)(row["training_bytes_per_voxel"]),
            spread(digits=1)(row["training_microseconds_per_voxel"]),
            spread()(row["training_over_store"]),
            spread()(row["training_over_line"]),
        ]
        for row in sections.get("budgets", [])
    ]
    return _table(headings, rows)


def _gradient_errors(sections: Sections) -> str:
    errors = sections.get("gradient_errors", [])
    couplings = _different(errors, "couplings")
    rows = []
    for dtype in DTYPES:
        for activations in _different(errors, "activations"):
            which = {"dtype": dtype, "activations": activations}
            cells = [_cell(errors, "relative_error", "{:.1e}".format, couplings=count, **which) for count in couplings]
            rows.append([dtype, activations, *cells])
    return _table(["", "activations", *(f"{count} couplings" for count in couplings)], rows)


def _losses(sections: Sections) -> str:
    losses = sections.get("losses", [])
    headings = ["classes", "logits", "memory, `ChunkedDiceCELoss`", "memory, MONAI's `DiceCELoss`", "time over MONAI's"]
    rows = []
    for classes in _different(losses, "classes"):
        for dtype in _different(losses, "dtype"):
            ours, monai = ({"loss": loss, "classes": classes, "dtype": dtype} for loss in ("ours, chunked", "MONAI"))
            rows.append(
                [
                    str(classes),
                    dtype,
                    _cell(losses, "memory", number(2), **ours),
                    _cell(losses, "memory", number(2), **monai),
                    _cell(losses, "over_monai", spread(), **ours),
                ]
            )
    return _table(headings, rows)


def _inference(sections: Sections) -> str:
    found = sections.get("inference", [])
    if not found:
        return "Segmentations have not been measured."
    headings = ["classes", "image", "image and labels", "`SlidingWindowInferer`", "`buffer_steps=2`", "`LabelInferer`"]
    headings += ["planned", "CPU time over MONAI's"]
    rows = []
    for classes, image in dict.fromkeys((row["classes"], row["image"]) for row in found):
        which = {"classes": classes, "image": image}
        ours = {**which, "inferer": OURS}
        cells = [str(classes), image, _cell(found, "image_and_labels_mebibytes", number(0), **ours)]
        cells += [_cell(found, "mebibytes", number(0), **which, inferer=name) for name in (MONAI, BUFFERED, OURS)]
        cells += [_cell(found, "planned_mebibytes", number(0), **ours), _cell(found, "over_monai", spread(), **ours)]
        rows.append(cells)
    return _table(headings, rows)


def _plans(sections: Sections) -> str:
    errors = [abs(row["planned_over_measured"] - 1) for row in sections.get("plans", [])]
    if not errors:
        return "How near `plan_training` comes has not been measured."
    return (
        "For these networks, in float32 and under bfloat16 autocast, `plan_training` is right within "
        f"{100 * max(errors):.1f} % of what a step with AdamW then holds."
    )


def _voxels(sections: Sections) -> str:
    """Compare the bytes per voxel of the two networks, in each precision."""
    memory = {(row["network"], row["dtype"]): row["training_bytes_per_voxel"] for row in sections.get("memory", [])}
    times = {
        dtype: memory["DynUNet", dtype] / memory["SegIUNet", dtype]
        for dtype in DTYPES
        if {("DynUNet", dtype), ("SegIUNet", dtype)} <= memory.keys()
    }
    words = {FLOAT32: "in float32", AUTOCAST: "under bfloat16 autocast"}
    said = " and ".join(f"{value:.1f} times {words[dtype]}" for dtype, value in times.items()) or "not measured"
    return (
        "So where memory decides the size of a patch, it can have more voxels than with the `DynUNet`, beside "
        f"optimizer and loss: {said}."
    )


BLOCKS: dict[str, Callable[[Sections], str]] = {
    "depth": _depth,
    "equal cost": _equal_cost,
    "budgets": _budgets,
    "gradient errors": _gradient_errors,
    "losses": _losses,
    "inference": _inference,
    "plans": _plans,
    "voxels": _voxels,
}


if __name__ == "__main__":
    console = Console()
    console.width = max(console.width, 150)
    failed = refresh(Path(__file__).parents[2], console)
    for line in failed:
        typer.echo(f"Error: {line}", err=True)
    sys.exit(bool(failed))
