"""The README shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "monai_iunet" / "benchmark" / "results" / "cpu.json"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def spread(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}-{value['high']:.{digits}f})"


def test_the_tables_are_those_of_the_committed_benchmark() -> None:
    results = json.loads(RESULTS.read_text())
    rows = {cells(line)[0]: cells(line)[1:] for line in (ROOT / "README.md").read_text().splitlines() if "|" in line}
    depth = {(row["network"], row["couplings"]): row for row in results["depth"]}
    names = {name for name, _ in depth}
    for name in names:
        shown = depth[name, 10]
        assert rows[name] == [
            *(f"{depth[name, couplings]['training_memory']:.1f}" for couplings in (5, 10, 20, 30)),
            f"{shown['inference_memory']:.1f}",
            spread(shown["training_over_store"], 2),
            spread(shown["training_over_iunets"], 2),
        ]
    for row in results["per_voxel"]:
        assert rows[row["network"]] == [
            f"{row['kmac_per_voxel']:.0f}",
            f"{row['training_bytes_per_voxel']:.0f}",
            f"{row['inference_bytes_per_voxel']:.0f}",
            spread(row["training_microseconds_per_voxel"], 1),
            spread(row["inference_microseconds_per_voxel"], 1),
        ]
    assert {"ours, invert", "iunets", "memcnn", "revlib"} <= names
    assert len(results["per_voxel"]) == 5
