"""Networks side by side, by the configs of a bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from monai_iunet.benchmark import comparison
from monai_iunet.benchmark.comparison import as_markdown, check_asked, compare_networks
from monai_iunet.bundling.new_bundle import bundle_configs, write_bundle
from monai_iunet.cli import app
from monai_iunet.errors import InputError
from monai_iunet.io.files import hold_folder
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

ROOT = Path(__file__).parents[2]


@pytest.mark.long
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

    assert difference["low"] is difference["high"] is None  # of one case

    # What is done is not done again.
    weights = tmp_path / "out" / "2_epochs" / "SegIUNet" / "model.pt"
    before = weights.stat().st_mtime_ns
    assert CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).exit_code == 0
    assert weights.stat().st_mtime_ns == before

    # The results are not taken for those of another data set.
    other = shutil.copytree(data, tmp_path / "other")
    words[words.index(data)] = other
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert (refused.exit_code, "a comparison with another dataset is there" in refused.stderr) == (2, True)


def test_results_of_something_else_are_not_taken(tmp_path: Path) -> None:
    check_asked(tmp_path, {"dataset": "a", "cases": ["x"]})
    check_asked(tmp_path, {"dataset": "a", "cases": ["x"]})
    with pytest.raises(InputError, match="a comparison with another dataset and another cases is there"):
        check_asked(tmp_path, {"dataset": "b", "cases": ["y"]})
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        check_asked(tmp_path, {"dataset": "a"})


def test_a_damaged_state_of_a_training_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"last\.pt: not a state of a training"):
        comparison._train(tmp_path, tmp_path, {}, 1)


def test_a_training_that_was_killed_when_it_was_done_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called again it writes its last weights, and refuses to train any further."""
    final, fails = tmp_path / "model_final.pt", True
    torch.save({"epoch": 1}, tmp_path / "last.pt")

    def refuses(*_: Any) -> None:
        if not fails:
            final.touch()
        raise InputError("train.json: failed with code 1.")

    monkeypatch.setattr(comparison, "run_config", refuses)
    with pytest.raises(InputError, match="failed with code 1"):
        comparison._train(tmp_path, tmp_path, {}, 1)
    fails = False
    comparison._train(tmp_path, tmp_path, {}, 1)
    assert final.is_file()


def test_a_structure_that_no_case_has_is_no_part_of_the_mean() -> None:
    rows = [
        {"structure": "liver", "dice": "0.8", "hausdorff95_mm": "2"},
        {"structure": "tumor", "dice": "nan", "hausdorff95_mm": "nan"},
    ]
    found = comparison.scores(rows)
    assert found == {
        "dice": {"liver": 0.8, "tumor": None},
        "hausdorff95_mm": {"liver": 2, "tumor": None},
        "mean_dice": 0.8,
    }
    costs = {"parameters": 1, "training_bytes": 1, "training_step_seconds": 1, "inference_seconds": 1}
    text = as_markdown({"networks": {"SegIUNet": {**found, **costs}}, "ours_minus": {}})
    assert "| tumor, Dice / HD95 | none / none |" in text
    with pytest.raises(InputError, match="No case has a structure"):
        comparison.scores(rows[1:])


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seconds": 60.0}, "is trained for a time"),
        ({"roi_size": (16, 16, 20)}, "DynUNet: takes no images of 16 x 16 x 20 voxels"),
        ({"roi_size": "whole"}, "DynUNet: takes no images of 12 x 12 x 12 voxels"),
    ],
)
def test_what_would_go_wrong_after_hours_is_refused_before(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bundle = write_bundle(replace(SMALL_TASK, **changes), tmp_path / "bundle")
    (tmp_path / "dataset.json").write_text("{}")
    words = ["compare", "--bundle", bundle, "--dataset-dir", tmp_path, "--max-epochs", 1]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_other_networks_take_as_many_channels_as_ours() -> None:
    config = bundle_configs(replace(SMALL_TASK, in_channels=3))["train.json"]
    definitions = comparison._definitions(ConfigParser(config), list(comparison.NETWORKS))
    assert {definition["in_channels"] for definition in definitions.values()} == {3}


def test_unknown_networks_are_refused(tmp_path: Path) -> None:
    words = ["compare", "--bundle", tmp_path, "--dataset-dir", tmp_path, "--max-epochs", 1]
    words += ["--networks", "DynUNet,VNet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert "one or several of DynUNet,SegResNet are needed" in result.stderr


def test_two_comparisons_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=4)
    bundle = write_bundle(SMALL_TASK, tmp_path / "bundle")
    monkeypatch.setattr(comparison, "hold_folder", partial(hold_folder, patience=0))
    (tmp_path / "out").mkdir()
    with hold_folder(tmp_path / "out"), pytest.raises(InputError, match="another process works in this folder"):
        compare_networks(bundle, data, tmp_path / "out", 1)
    assert not list((tmp_path / "out" / "1_epochs").iterdir())
