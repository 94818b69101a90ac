"""Networks side by side, by the configs of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from monai_iunet.benchmark import comparison
from monai_iunet.benchmark.comparison import as_markdown
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.cli import app
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

ROOT = Path(__file__).parents[2]


def test_all_networks_are_trained_evaluated_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=2)
    listed = json.loads((data / "dataset.json").read_text())["training"]
    (data / "dataset.json").write_text(json.dumps({"training": listed[:2], "validation": listed[2:]}))
    bundle = write_bundle(SMALL_TASK, tmp_path / "bundle")
    small = {**comparison.NETWORKS["SegResNet"], "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
    monkeypatch.setattr(comparison, "NETWORKS", {"SegResNet": small})
    # One of them in a process of its own, as all are; each takes seconds to import what it needs.
    ways: list[Any] = [comparison.run_config]
    here = lambda bundle, config, settings: run(bundle, config, **settings)  # noqa: E731
    monkeypatch.setattr(comparison, "run_config", lambda *arguments: (ways.pop() if ways else here)(*arguments))
    words = ["compare", "--bundle", bundle, "--dataset-dir", data, "--max-epochs", 2, "--output", tmp_path / "out"]
    words += ["--networks", "SegResNet"]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert as_markdown(found) in result.stdout
    assert found["steps"] == 2
    assert found["cases"] == 1
    assert set(found["networks"]) == {"SegIUNet", "SegResNet"}
    for network in found["networks"].values():
        assert set(network["dice"]) == {"front", "back"}
        assert network["parameters"] > 1000
        assert network["training_bytes"] > 2 * 24 * 32 * 24 * 4 * 8  # the first feature maps at least
    difference = found["ours_minus"]["SegResNet"]
    ours, other = (found["networks"][name]["mean_dice"] for name in ("SegIUNet", "SegResNet"))
    assert difference["mean"] == pytest.approx(ours - other, abs=1e-4)

    # What is done is not done again.
    weights = tmp_path / "out" / "2_epochs" / "SegIUNet" / "model.pt"
    before = weights.stat().st_mtime_ns
    assert CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).exit_code == 0
    assert weights.stat().st_mtime_ns == before


def test_a_difference_that_all_cases_share_is_certain() -> None:
    rng = np.random.default_rng(1)
    other = rng.uniform(0.7, 0.9, 40)
    found = comparison.difference(other + rng.normal(0.02, 0.005, 40), other)
    assert found["low"] < found["mean"] < found["high"]
    assert found["low"] > 0.015
    assert found["high"] < 0.025
    assert comparison.difference(other, other) == {"mean": 0, "low": 0, "high": 0}


def test_a_folder_without_configs_is_no_bundle(tmp_path: Path) -> None:
    words = ["compare", "--bundle", tmp_path, "--dataset-dir", tmp_path, "--max-epochs", 1]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert "train.json: no such file" in result.stderr


def test_unknown_networks_are_refused(tmp_path: Path) -> None:
    words = ["compare", "--bundle", tmp_path, "--dataset-dir", tmp_path, "--max-epochs", 1]
    words += ["--networks", "DynUNet,VNet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert "one or several of DynUNet,SegResNet are needed" in result.stderr
