"""An option of `monai.bundle run` that no config has is an error, for MONAI would add it where nobody reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from monai import bundle

from monai_iunet import check_overrides
from monai_iunet.errors import InputError
from tests.bundles.helpers import copy_bundle

PROGRAM = str(Path(bundle.__file__).with_name("__main__.py"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    train = {"_target_": "Trainer", "handlers": []}
    content = {"max_epochs": 3, "train": {"trainer": train, "handlers": [{"_target_": "Handler"}]}, "roi_size": [8, 8]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "more.json").write_text(json.dumps({"seed": 1}))
    return tmp_path / "train.json"


def check(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [PROGRAM, "run", *map(str, words)])
    check_overrides()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_epoch", "3"], r"--max_epoch: .*train.json has no max_epoch, .* Did you mean max_epochs\?"),
        (["--max-epoch=3"], "Did you mean max_epochs"),
        (["--train#trainr", "3"], "has no trainr, .* Did you mean trainer"),
        (["--train::trainr", "3"], "Did you mean trainer"),
        (["--trian#trainer#max_epochs", "3"], "has no trian, .* Did you mean train"),
        (["--+max_epochs", "3"], "Did you mean max_epochs"),
        (["--seed", "3"], "has no seed, .* There are max_epochs, roi_size, train"),
        (["--tracking_uri", "here"], "has no tracking_uri"),
    ],
)
def test_one_that_no_config_has_is_refused(
    words: list[str], message: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=message):
        check(monkeypatch, "--config_file", config, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--max_epochs", "3"],
        ["--max-epochs=-3"],
        ["--train#trainer#max_epochs", "3"],  # arguments of a component are for the component to check
        ["--train#handlers#0#more", "3"],
        ["--train::handlers", "[]"],
        ["--roi_size#0", "16"],
        ["--_meta_#version", "2"],
        ["--meta_file", "metadata.json", "--logging_file", "logging.conf", "--init_id", "initialize"],
        ["--workflow_type", "train", "--properties_path", "properties.json", "--workflow_name", "ConfigWorkflow"],
        ["--tracking", "mlflow", "--tracking_uri", "here", "--experiment_name", "first"],
    ],
)
def test_those_that_there_are_pass(words: list[str], config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "--config_file", config, *words)


def test_configs_count_together(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [str(config), str(config.with_name("more.json"))]
    check(monkeypatch, "--config_file", both, "--seed", 2)
    check(monkeypatch, "--config_file", ",".join(both), "--seed", 2)
    # Defaults in a file may be for several configs; what is typed is for this one.
    (config.parent / "args.json").write_text(json.dumps({"config_file": str(config), "other": 3}))
    check(monkeypatch, "--args_file", config.parent / "args.json", "--max_epochs", 2)
    with pytest.raises(InputError, match="Did you mean max_epochs"):
        check(monkeypatch, "--args_file", config.parent / "args.json", "--max_epoch", 2)


def test_the_config_may_be_named_by_its_position(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "run", "initialize", "finalize", "metadata.json", config
    check(monkeypatch, *words, "--max_epochs", 2)
    with pytest.raises(InputError, match="Did you mean max_epochs"):
        check(monkeypatch, *words, "--max_epoch", 2)


def test_a_tracking_of_ones_own_adds_its_names(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.with_name("tracking.json")
    settings.write_text(json.dumps({"handlers_id": {}, "configs": {"project": "atria"}}))
    check(monkeypatch, "--config_file", config, "--tracking", settings, "--project", "ventricles")
    with pytest.raises(InputError, match="has no run_name"):
        check(monkeypatch, "--config_file", config, "--tracking", settings, "--run_name", "first")


def test_other_programs_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["train.py", "--max_epoch", "3"], [PROGRAM, "ckpt_export", "--max_epoch", "3"], [PROGRAM], [""]):
        monkeypatch.setattr("sys.argv", words)
        check_overrides()


@pytest.mark.long
def test_a_bundle_evaluates_no_other_weights_than_those_that_were_meant(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    words = ["-m", "monai.bundle", "run", "--config_file", "configs/evaluate.json", "--checkpont", "mine.pt"]
    result = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "--checkpont: configs/evaluate.json has no checkpont" in result.stderr
    assert "Did you mean checkpoint?" in result.stderr
