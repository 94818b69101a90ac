"""The guide to memory and speed, and the README, show what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from monai_iunet.benchmark.guide import stored, with_tables
from monai_iunet.errors import InputError

PAGE = Path(__file__).parents[1] / "monai_iunet" / "guides" / "benchmark.md"


def test_the_tables_are_those_of_the_committed_benchmark() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text, stored()) == text
    for row in ("ours, invert", "iunets", "SegIUNet", "DynUNet", "store", "118", "deterministic", "SegIUNet, exact"):
        assert f"\n| {row} |" in text


def test_the_readme_says_what_the_guide_says_of_larger_patches() -> None:
    said, on_a_gpu = re.findall(
        r"beside optimizer and loss: (.* float32 and .* autocast)\.", PAGE.read_text(encoding="utf-8")
    )
    readme = " ".join((PAGE.parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"more voxels than with the `DynUNet`, beside optimizer and loss: {said}." in readme
    assert f"On a GPU, the workspace of cuDNN included, it is [{on_a_gpu}]" in readme


def test_what_was_not_measured_is_an_empty_cell() -> None:
    memory = [
        {"job": "a", "network": "SegIUNet", "dtype": "float32", "training_bytes_per_voxel": 100.4},
        {"job": "b", "network": "DynUNet", "dtype": "float32", "training_bytes_per_voxel": 251.0},
        {"job": "c", "network": "DynUNet", "dtype": "bf16 autocast", "skipped": "no luck"},
    ]
    text = with_tables(PAGE.read_text(encoding="utf-8"), {"cpu": {"memory": memory}, "gpu": {}})
    assert "| DynUNet |  | 251 |  |  |  |  |  |  |  |" in text
    assert "beside optimizer and loss: 2.5 times in float32." in text
    assert "`plan_training` comes has not been measured" in text
    assert "| ours, invert |" not in text


def test_a_missing_marker_is_told() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for marker in ("<!-- benchmark: depth -->", "<!-- end -->"):
        with pytest.raises(InputError, match="needs one block each of depth, equal cost"):
            with_tables(text.replace(marker, "", 1), {"cpu": {}, "gpu": {}})


def test_two_features_are_measured() -> None:
    """The guide to other packages says of both that memory does not grow with depth."""
    rows = stored()["cpu"]["depth_memory"]
    memory = {
        (row["network"], row["couplings"], row.get("dtype")): row.get("training_memory")
        for row in rows
        if "network" in row
    }
    for name in ("ours, invert", "iunets"):
        assert f"{memory[name, 5, 'float32']:.1f}" == f"{memory[name, 30, 'float32']:.1f}"
