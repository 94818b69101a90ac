"""The tables of the guide to memory and speed, from the stored results.

In a clone, `python -m monai_iunet.benchmark.guide` measures anew on the CPU, with `cuda` behind it on a GPU.

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

__all__ = ["RESULTS", "refresh", "stored", "with_tables"]

RESULTS = {kind: Path(__file__).parent / "results" / f"{kind}.json" for kind in ("cpu", "gpu")}
FLOAT32, AUTOCAST = DTYPES

Sections = dict[str, list[Row]]


def stored() -> dict[str, Sections]:
    """Return the sections of the stored results, of the CPU and of the GPU."""
    return {kind: read_json(path)["sections"] for kind, path in RESULTS.items()}


def with_tables(text: str, results: dict[str, Sections]) -> str:
    """Return a text with what stands between its markers replaced.

    Args:
        text: of the guide.
        results: the sections of "cpu" and of "gpu".

    Raises:
        InputError: for a marker that is missing, unknown or not ended.
    """
    measured: dict[str, Sections] = {
        kind: {name: [row for row in rows if not row.keys() & {"skipped", "failed"}] for name, rows in sections.items()}
        for kind, sections in results.items()
    }
    found = re.findall(r"<!-- benchmark: (.*?) -->", text)
    if sorted(found) != sorted(BLOCKS) or text.count("<!-- end -->") != len(BLOCKS):
        raise InputError(f"benchmark.md: needs one block each of {', '.join(BLOCKS)}, with an end; found {found}.")

    def block(match: re.Match[str]) -> str:
        kind, write = BLOCKS[match[2]]
        return f"{match[1]}\n\n{write(measured[kind])}\n\n{match[3]}"

    return re.sub(r"(<!-- benchmark: (.*?) -->).*?(<!-- end -->)", block, text, flags=re.DOTALL)


def refresh(root: Path, device: torch.device, console: Console) -> list[str]:
    """Measure what has changed since the stored results, draw the figure, write the tables; return what failed."""
    page = root / "monai_iunet" / "guides" / "benchmark.md"
    with_tables(page.read_text(encoding="utf-8"), {"cpu": {}, "gpu": {}})  # fails now rather than after measuring
    results = RESULTS["cpu" if device.type == "cpu" else "gpu"]
    run = partial(run_benchmark, device, results, console, peers=True)
    try:
        failures = run()
    except InputError:  # results of another machine, or of other versions
        failures = run(overwrite=True)
    if not failures:
        draw(results, results.with_suffix(".png"))
        write_text(page, with_tables(page.read_text(encoding="utf-8"), stored()))
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


def _budgets(sections: Sections, unit: str = "µs", of_microsecond: float = 1, digits: int = 1) -> str:
    headings = ["activations", "", "training, bytes per voxel", f"training step, {unit} per voxel", "time over store"]
    headings.append("time over the line")
    rows = [
        [
            row["activations"],
            row["dtype"],
            number(0)(row["training_bytes_per_voxel"]),
            spread(of_microsecond, digits)(row["training_microseconds_per_voxel"]),
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


def _voxels(sections: Sections, key: str = "training_bytes_per_voxel") -> str:
    """Compare the bytes per voxel of the two networks, in each precision."""
    memory = {(row["network"], row["dtype"]): row[key] for row in sections.get("memory", [])}
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


def _equal_cost_on_gpu(sections: Sections) -> str:
    memory, time = sections.get("memory", []), sections.get("time", [])
    headings = ["", "training, bytes per voxel", "bf16", "`no_grad`, bytes per voxel", "bf16"]
    headings += ["training step, ns per voxel", "bf16", "over DynUNet", "bf16", "`no_grad`, ns per voxel", "bf16"]
    rows = []
    for network in _different(memory, "network"):
        cells = [network]
        for rows_of, quantity, write in (
            (memory, "training_allocated_per_voxel", number(0)),
            (memory, "inference_allocated_per_voxel", number(0)),
            (time, "training_microseconds_per_voxel", spread(1e3, digits=0)),
            (time, "training_over_dynunet", spread()),
            (time, "inference_microseconds_per_voxel", spread(1e3, digits=0)),
        ):
            cells += [_cell(rows_of, quantity, write, network=network, dtype=dtype) for dtype in DTYPES]
        rows.append(cells)
    return _table(headings, rows)


def _whole_volume(sections: Sections) -> str:
    headings = ["", "", "training, planned, GiB", "allocated", "`no_grad`, planned, GiB", "allocated"]
    keys = ("planned_gibibytes", "gibibytes", "planned_inference_gibibytes", "inference_gibibytes")
    rows = [
        [row["network"], row["dtype"], *(number(1)(row[key]) if key in row else "" for key in keys)]
        for row in sections.get("whole_volume", [])
    ]
    return _table(headings, rows)


def _small_gpus(sections: Sections) -> str:
    headings = ["", "", "", "planned, GiB", "allocated", "runs on a GPU of, GiB", "s"]
    rows = [
        [
            *(row[key] for key in ("network", "dtype", "action")),
            *(write(row[key]) if key in row else "" for key, write in SMALL_GPUS.items()),
        ]
        for row in sections.get("small_gpus", [])
    ]
    return _table(headings, rows)


SMALL_GPUS: dict[str, Callable[[Any], str]] = {
    "planned": number(1),
    "allocated": number(1),
    "gpu": number(0),
    "seconds": spread(digits=1),
}


def _cuda_graphs(sections: Sections) -> str:
    found = sections.get("cuda_graphs", [])
    headings = ["", "", "one by one, ns per voxel", "over DynUNet", "CUDA graph, ns per voxel", "over DynUNet"]
    times = {(row["network"], row["dtype"], row["way"]): row["nanoseconds_per_voxel"] for row in found}
    rows = []
    for dtype in DTYPES:
        for network in _different(found, "network"):
            cells = [network, dtype]
            for way in ("one by one", "graph"):
                time = times[network, dtype, way]
                cells += [spread(digits=1)(time), f"{time.median / times['DynUNet', dtype, way].median:.2f}"]
            rows.append(cells)
    return _table(headings, rows)


def _bundles(sections: Sections) -> str:
    found = sections.get("bundles", [])
    if not found:
        return "Not measured on a GPU yet."
    rows = [
        [row["bundle"], row["image"], number(0)(row["mebibytes"]), spread(digits=1)(row["seconds"])] for row in found
    ]
    return _table(["bundle", "image", "MiB, weights included", "s"], rows)


def _convolutions(sections: Sections) -> str:
    headings = ["channels", "", "", "tensors beside input and gradient", "ms", "time over at once"]
    rows = [
        [
            *(str(row[key]) for key in ("channels", "dtype", "way")),
            number(1)(row["tensors"]),
            spread(digits=0)(row["milliseconds"]),
            spread()(row["over_at_once"]),
        ]
        for row in sections.get("convolutions", [])
    ]
    return _table(headings, rows)


def _exactness(sections: Sections) -> str:
    found = sections.get("exactness", [])
    headings = ["settings", "", "stored twice: equal", "`exact` and stored: equal", "not `exact`: relative difference"]
    rows = []
    for settings in _different(found, "settings"):
        for dtype in DTYPES:
            which = {"settings": settings, "dtype": dtype}
            exact = {**which, "network": "exact"}
            cells = [_cell(found, "stored_repeats", _yes_or_no, **exact), _cell(found, "equal", _yes_or_no, **exact)]
            difference = _cell(found, "difference", "{:.1e}".format, **which, network="not exact")
            rows.append([settings, dtype, *cells, difference])
    return _table(headings, rows)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _resampling(sections: Sections) -> str:
    headings = ["", "", "forward, ms", "backward, ms"]
    rows = [
        [row["layer"], row["dtype"], *(spread(digits=1)(row[f"{way}_milliseconds"]) for way in ("forward", "backward"))]
        for row in sections.get("resampling", [])
        if row["layer"] != "copy"
    ]
    return _table(headings, rows)


BLOCKS: dict[str, tuple[str, Callable[[Sections], str]]] = {
    "depth": ("cpu", _depth),
    "equal cost": ("cpu", _equal_cost),
    "budgets": ("cpu", _budgets),
    "gradient errors": ("cpu", _gradient_errors),
    "losses": ("cpu", _losses),
    "inference": ("cpu", _inference),
    "plans": ("cpu", _plans),
    "voxels": ("cpu", _voxels),
    "equal cost on a GPU": ("gpu", _equal_cost_on_gpu),
    "voxels on a GPU": ("gpu", partial(_voxels, key="training_allocated_per_voxel")),
    "whole volume": ("gpu", _whole_volume),
    "small GPUs": ("gpu", _small_gpus),
    "CUDA graphs": ("gpu", _cuda_graphs),
    "bundles on a GPU": ("gpu", _bundles),
    "convolutions": ("gpu", _convolutions),
    "budgets on a GPU": ("gpu", partial(_budgets, unit="ns", of_microsecond=1e3, digits=0)),
    "exactness": ("gpu", _exactness),
    "resampling": ("gpu", _resampling),
}


if __name__ == "__main__":
    console = Console()
    console.width = max(console.width, 150)
    failed = refresh(Path(__file__).parents[2], torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu"), console)
    for line in failed:
        typer.echo(f"Error: {line}", err=True)
    sys.exit(bool(failed))
