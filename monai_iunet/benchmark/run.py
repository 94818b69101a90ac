"""The benchmark as a whole: which sections, at which sizes, and where the results go."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from monai_iunet.benchmark import report, sections
from monai_iunet.benchmark.peers import CONTESTANTS, INSTALL, PEERS, available_peers

__all__ = ["FULL", "QUICK", "Sizes", "run_benchmark"]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    depths: tuple[int, ...]
    depth_channels: tuple[int, ...]
    depth_size: int
    voxels_size: int
    resampling_channels: int
    resampling_size: int
    loss_size: int
    rounds: int


FULL = Sizes((5, 10, 20, 30), (32, 64, 128), 32, 64, 32, 64, 96, rounds=5)
QUICK = Sizes((2, 4), (8, 16, 32), 16, 32, 8, 32, 32, rounds=2)
WHOLE_VOLUME = (512, 512, 304)


def run_benchmark(device: torch.device, peers: bool, sizes: Sizes, output: Path, console: Console) -> dict[str, Any]:
    """Measure, show and write `benchmark.json` and `benchmark.png`.

    Args:
        device: where the networks run.
        peers: whether other packages take part, those that can be imported.
        sizes: how much is measured.
        output: folder of the results, which exists.
        console: where the tables go.

    Returns:
        What `benchmark.json` holds.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="memcnn")
        return _run_sections(device, peers, sizes, output, console)


def _run_sections(device: torch.device, peers: bool, sizes: Sizes, output: Path, console: Console) -> dict[str, Any]:
    versions = available_peers() if peers else {}
    missing = [name for name in PEERS if name not in versions]
    if peers and missing:
        console.print(f"Not importable, so left out: {', '.join(missing)}. Install with: {INSTALL}")
    results: dict[str, Any] = report.header(device, versions)
    console.print(f"{results['device']}, {results['threads']} threads, {results['system']}, {results['date']}")
    console.print(f"Python {results['python']}, " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()))
    console.print(f"Times: median (range) of {sizes.rounds} rounds, in which all take turns.\n")

    def finish(section: str, rows: list[sections.Row]) -> None:
        results[section] = rows
        report.show(section, rows, console)
        report.write_json(results, output / "benchmark.json")

    names = [name for name in CONTESTANTS if name not in PEERS or name in versions]
    rows: list[sections.Row] = []
    for couplings in sizes.depths:
        with console.status(f"{couplings} couplings per level"):
            rows += sections.depth(names, couplings, sizes.rounds, device, sizes.depth_channels, sizes.depth_size)
    finish("depth", rows)
    with console.status("networks of equal cost"):
        finish("per_voxel", sections.per_voxel(sections.EQUAL_COST, sizes.voxels_size, sizes.rounds, device))
    with console.status("activations by budget"):
        make = sections.EQUAL_COST["SegIUNet"]
        finish("choices", sections.choices(make, sizes.voxels_size, sizes.rounds, device))
    with console.status("plans"):
        finish("plans", sections.plans(sections.EQUAL_COST, sizes.voxels_size, device))
    with console.status("losses"):
        finish("losses", sections.losses(sizes.loss_size, sizes.rounds, device))
    report.draw(results, _caption(results, sizes), output / "benchmark.png")
    with console.status("resampling"):
        finish(
            "resampling",
            sections.resampling(4 * sizes.rounds, device, sizes.resampling_channels, sizes.resampling_size),
        )
    if device.type == "cuda":
        with console.status("largest cubes"):
            finish("largest_cubes", sections.largest_cubes(sections.EQUAL_COST, device))
        with console.status("whole volume"):
            whole = sections.whole_volume(sections.EQUAL_COST["SegIUNet"], WHOLE_VOLUME, device)
            finish("whole_volume", [whole])
    return results


def _caption(results: dict[str, Any], sizes: Sizes) -> str:
    versions = results["versions"]
    return (
        f"top: 3D, input {sizes.depth_channels[0]} x {sizes.depth_size} cubed, channels {sizes.depth_channels}; "
        f"{results['device']}; torch {versions['torch']}; {results['date']}"
    )
