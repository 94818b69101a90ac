"""From images and labels to a bundle."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from rich.console import Console
from typer.testing import CliRunner

from monai_iunet import InputError, TimedDecay, fit, segment, verify_bundle
from monai_iunet.cli import app
from monai_iunet.fitting import fit as fitting
from monai_iunet.fitting.cross_validation import Score, choose_clean_up, mean_dice, read_scores, summarize
from monai_iunet.fitting.fit import parse_seconds
from tests.fitting.made_sets import make_set


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, planned for a machine of a given speed."""
    monkeypatch.setattr("monai_iunet.fitting.plan.CHANNELS", (8, 16, 32))
    monkeypatch.setattr("monai_iunet.fitting.plan.LONG_STEPS", 150)
    monkeypatch.setattr(fitting, "measure_speed", lambda *_: 1e6)


def dice_of(labels: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (labels & truth).sum() / (labels.sum() + truth.sum()))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_data_set_becomes_a_bundle(tmp_path: Path) -> None:
    data, folder = make_set(tmp_path / "data", shape=(24, 24, 24), count=6), tmp_path / "made_bundle"
    assert fit(data, folder, folds=2, gpu_memory="1 GiB", device="cpu") == folder
    assert [check for check in verify_bundle(folder) if check.problem] == []
    plan = json.loads((folder / "docs" / "plan.json").read_text())
    assert plan["folds"] == [0, 1]
    page = (folder / "docs" / "README.md").read_text()
    for choice in plan["choices"]:
        assert choice["reason"] in page
    scores = read_scores([folder / "eval" / f"fold_{fold}" / "cases.csv" for fold in (0, 1)])
    assert len(scores) == 6
    stated = float(re.search(r"\| structure 1 \| 6 \| ([0-9.]+) \|", page)[1])
    assert stated > 0.7
    # The bundle segments like the network of its fold.
    image = nibabel.load(data / "imagesTr" / "case_00.nii.gz")
    truth = np.asarray(nibabel.load(data / "labelsTr" / "case_00.nii.gz").dataobj)
    assert dice_of(np.asarray(segment(image, folder, device="cpu").dataobj), truth) > 0.7
    # Called again there is nothing left to do; with other options it is another fit.
    before = (folder / "models" / "fold_0" / "last.pt").stat().st_mtime
    fit(data, folder, folds=2, device="cpu")
    assert (folder / "models" / "fold_0" / "last.pt").stat().st_mtime == before
    with pytest.raises(InputError, match="a fit with another folds is there"):
        fit(data, folder, folds=3, device="cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "kind",
    [
        {"channels": 4, "classes": 2},
        {"spacing": (0.5, 0.5, 6), "shape": (40, 40, 10)},
        {"modality": "CT", "classes": 2},
        {"classes": 30, "shape": (24, 68, 24)},
    ],
    ids=["four channels", "thick slices", "CT with gaps in its labels", "30 classes"],
)
def test_data_sets_of_every_kind_become_bundles(kind: dict[str, Any], tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", **kind)
    if kind.get("modality") == "CT":  # labels 3 and 7
        description = json.loads((data / "dataset.json").read_text())
        description["labels"] = {"0": "background", "3": "front", "7": "back"}
        (data / "dataset.json").write_text(json.dumps(description))
        for path in (data / "labelsTr").iterdir():
            image = nibabel.load(path)
            values = np.array([0, 3, 7], np.uint8)[np.asarray(image.dataobj)]
            nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    fit(data, tmp_path / "bundle", fold=0, gpu_memory="1 GiB", device="cpu")
    assert [check for check in verify_bundle(tmp_path / "bundle") if check.problem] == []
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["mean_dice"] > (0.3 if kind.get("classes", 1) < 30 else 0.01)


@pytest.mark.usefixtures("quick")
def test_the_command_plans(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", shape=(12, 12, 12), count=5)
    words = ["fit", str(data), "--output", str(tmp_path / "bundle"), "--time", "1min", "--plan-only", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "whole image" in result.output
    assert not (tmp_path / "bundle" / "models" / "model.pt").exists()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    bad = CliRunner().invoke(app, ["fit", str(tmp_path), "--output", str(tmp_path / "other")])
    assert bad.exit_code == 2
    # What is left out of the plan is left out of the training too.
    (data / "imagesTr" / "case_01.nii.gz").write_bytes(b"no image")
    words[3] = str(tmp_path / "four")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "case_01.nii.gz" in refused.output
    assert CliRunner().invoke(app, [*words, "--skip-bad-cases"]).exit_code == 0
    parser = ConfigParser()
    parser.read_config(tmp_path / "four" / "configs" / "train.json")
    parser.update({"bundle_root": str(tmp_path / "four"), "dataset_dir": str(data)})
    used = [case for part in parser.get_parsed_content("datalist").values() for case in part]
    assert sorted(Path(case["image"]).name for case in used) == [f"case_{n:02}.nii.gz" for n in (0, 2, 3, 4)]
    assert "not a data set" in bad.output
    assert not (tmp_path / "other").exists()


def test_a_training_that_diverges_goes_on_with_a_lower_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fit.json").write_text(json.dumps({"trained": [], "evaluated": []}))
    run = fitting._Fit(tmp_path, tmp_path, fitting.FitOptions(device="cpu"), Console(quiet=True))
    factors: list[float] = []

    def diverge(fold: int, factor: float) -> None:
        factors.append(factor)
        if len(factors) < limit:
            raise FloatingPointError("Epoch 3: the loss is nan.")

    monkeypatch.setattr(run, "_run_training", diverge)
    limit = 3
    run._train_fold(0)
    assert factors == [1, 0.5, 0.25]
    assert json.loads((tmp_path / "fit.json").read_text())["learning_rate_factors"] == {"fold_0": 0.25}
    limit = 100
    with pytest.raises(InputError, match="fold_1: still diverges after 3 restarts"):
        run._train_fold(1)


@pytest.mark.parametrize("duration", ["", "12", "12 hours", "-1h", "h", "0h", "1..h"])
def test_a_time_that_is_none_is_refused(duration: str) -> None:
    with pytest.raises(InputError, match="must be such as 12h"):
        parse_seconds(duration)


def test_a_training_lasts_for_its_time_across_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("monai_iunet.training.time_limit.time.monotonic", lambda: clock[0])

    validated: list[int] = []

    class Validator:
        def run(self, epoch: int) -> None:
            validated.append(epoch)

    def run(state: dict[str, Any] | None, epochs: int) -> tuple[Engine, TimedDecay, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = TimedDecay(optimizer, 100, power=1, validator=Validator())
        if state is not None:
            schedule.load_state_dict(state)

        def step(*_: Any) -> None:
            clock[0] += 10

        def end_epoch(*_: Any) -> None:
            optimizer.step()
            schedule.step()

        trainer = Engine(step)
        trainer.add_event_handler("EPOCH_COMPLETED", end_epoch)
        schedule.attach(trainer)
        trainer.run([0], max_epochs=epochs)
        return trainer, schedule, optimizer

    _, schedule, optimizer = run(None, 4)
    assert schedule.share == pytest.approx(0.4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.7)  # as of the beginning of the epoch
    assert validated == []
    clock[0] += 1e6  # nothing runs
    trainer, schedule, _ = run(schedule.state_dict(), 1000)
    assert trainer.state.epoch == 6
    assert schedule.share == 1
    assert validated == [6]


def score(case: str, dice: float, apart: float = 1.0, structure: str = "a") -> Score:
    return Score(case, structure, {"dice": dice, "hausdorff95_mm": apart, "surface_distance_mm": apart})


def test_clean_up_is_chosen_where_it_helps() -> None:
    before = [score(f"{number}", 0.8, 9, name) for number in range(8) for name in "abc"]
    after = [
        *(score(f"{number}", 0.82, 5, "a") for number in range(8)),
        *(score(f"{number}", 0.9 if number == 0 else 0.79, 5, "b") for number in range(8)),
        *(score(f"{number}", 0.82, 12, "c") for number in range(8)),
    ]
    assert choose_clean_up(before, after, ["a", "b", "c"]) == [1]


def test_the_interval_holds_the_mean_and_shrinks_with_cases() -> None:
    values = np.random.default_rng(0).uniform(0.7, 1, 100)
    few, many = (summarize([score(str(i), v) for i, v in enumerate(values[:n])], ["a"])[0] for n in (10, 100))
    for row in (few, many):
        assert row["dice_low"] < row["dice"] < row["dice_high"]
    assert many["dice_high"] - many["dice_low"] < few["dice_high"] - few["dice_low"]
    assert mean_dice([score("1", 0.5), score("1", 1.0, structure="b")], ["a", "b"]) == pytest.approx(0.75)


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", shape=(16, 16, 16), count=4)
    script = (
        "import sys; from monai_iunet.fitting import fit, plan; plan.CHANNELS = (8, 16); plan.LONG_STEPS = 60; "
        "fit.fit(sys.argv[1], sys.argv[2], folds=2, fold=0, gpu_memory='1 GiB', device='cpu')"
    )

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(data), str(tmp_path / name)])

    begun = time.monotonic()
    assert start("whole").wait() == 0
    duration = time.monotonic() - begun
    rng = np.random.default_rng()
    for _ in range(5):
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, 1) * duration)
        process.kill()
        process.wait()
    assert start("killed").wait() == 0
    for name in ("eval/cross_validation.csv", "docs/plan.json", "models/training.json"):
        whole, killed = ((tmp_path / part / name).read_text() for part in ("whole", "killed"))
        assert killed.replace("killed", "whole") == whole
    whole, killed = (torch.load(tmp_path / part / "models/model.pt", weights_only=True) for part in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
