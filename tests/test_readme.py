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
    rows = {
        cells(line)[0]: cells(line)[1:]
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if "|" in line
    }
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


def test_budgets_losses_and_plans_too() -> None:
    results = json.loads(RESULTS.read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {cells(line)[0]: cells(line)[1:] for line in text.splitlines() if "|" in line}
    for row in results["choices"]:
        assert rows[row["activations"]] == [
            f"{row['training_bytes_per_voxel']:.0f}",
            spread(row["training_microseconds_per_voxel"], 1),
            spread(row["training_over_line"], 2),
        ]
    losses = {(row["loss"], row["classes"]): row for row in results["losses"]}
    for classes in (3, 8, 118):
        ours = losses["ours, chunked", classes]
        monai = losses["MONAI", classes]["memory"]
        assert rows[str(classes)] == [f"{ours['memory']:.2f}", f"{monai:.2f}", spread(ours["over_monai"], 2)]
    error = max(abs(row["planned_over_measured"] - 1) for row in results["plans"])
    assert f"`plan_training` is right within {100 * error:.1f} %" in text


def test_the_features_are_measured() -> None:
    results = json.loads(RESULTS.read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    depth = {(row["network"], row["couplings"]): row["training_memory"] for row in results["depth"]}
    for name, title in (("ours, invert", "ours"), ("iunets", "iunets")):
        assert f"{depth[name, 5]:.1f}" == f"{depth[name, 30]:.1f}", title
    stored = f"plain autograd: {depth['ours, store', 5]:.1f} to {depth['ours, store', 30]:.1f}"
    memory = f"| {depth['ours, invert', 30]:.1f} | {depth['iunets', 30]:.1f} |"
    assert stored in text
    assert memory in text
    voxel = {row["network"]: f"{row['training_bytes_per_voxel']:.0f}" for row in results["per_voxel"]}
    features = next(line for line in text.splitlines() if "at equal cost" in line)
    for name in ("SegIUNet", "CheckpointUNet", "DynUNet"):
        assert voxel[name] in features
