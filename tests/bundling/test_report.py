"""Pictures for a bundle's README, from its log and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from typer.testing import CliRunner

from monai_iunet import InputError, SegIUNet
from monai_iunet.bundling import report as report_module
from monai_iunet.bundling.evaluation_data import bundle_cases
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.bundling.report import draw_cases, read_log
from monai_iunet.cli import app
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

DICE = {"made_0": 0.9, "made_1": 0.1, "made_2": 0.5, "made_3": 0.6, "made_4": 0.4}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_hippocampus_data(tmp_path / "data", training=5)
    listed = json.loads((folder / "dataset.json").read_text())["training"][: len(DICE)]
    (folder / "dataset.json").write_text(json.dumps({"training": [], "validation": listed}))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with weights, a log and an evaluation, in which every case has the same Dice for both structures."""
    folder = write_bundle(SMALL_TASK, tmp_path / "bundle")
    network = SegIUNet(3, 1, 3, SMALL_TASK.channels, couplings=SMALL_TASK.couplings)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    with SummaryWriter(str(folder / "train")) as writer:
        for step in range(1, 201):
            writer.add_scalar("train_loss", 1 / step, step)
        for epoch in (5, 10):
            writer.add_scalar("val_mean_dice", epoch / 20, epoch)
    (folder / "eval").mkdir()
    rows = [f"{case}.nii.gz,{name},{dice}" for case, dice in DICE.items() for name in SMALL_TASK.classes]
    (folder / "eval" / "cases.csv").write_text("\n".join(["case,structure,dice", *rows]))
    return folder


def report(bundle: Path, data: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", "--bundle", str(bundle), "--dataset-dir", str(data)])
    return result.exit_code, result.output


def test_a_log_is_that_of_the_last_training(tmp_path: Path) -> None:
    # The second one was begun anew, and the third one goes on with it after a kill.
    for number, steps in enumerate([range(1, 9), range(1, 5), range(4, 6)]):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{number}") as writer:
            for step in steps:
                writer.add_scalar("train_loss", number, step)
    assert read_log(tmp_path, "train_loss") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0}


def test_the_best_the_median_and_the_worst_case_are_drawn(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    draw = report_module.draw_overlay

    def note(*arguments: Any, **options: Any) -> None:
        titles.append(options["title"])
        assert options["reference"].max() == 2
        draw(*arguments, **options)

    monkeypatch.setattr(report_module, "draw_overlay", note)
    code, output = report(bundle, data)
    assert code == 0, output
    assert titles == [
        "best: made_0.nii.gz, mean Dice 0.900",
        "median: made_2.nii.gz, mean Dice 0.500",
        "worst: made_1.nii.gz, mean Dice 0.100",
    ]
    assert plt.imread(bundle / "docs" / "training.png")[..., :3].std() > 0.05
    cases = plt.imread(bundle / "docs" / "cases.png")[..., :3]
    rows = cases.shape[0] // 3
    for number in range(3):
        assert cases[number * rows : (number + 1) * rows].std() > 0.1


def test_cases_without_contours_have_no_rank(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(report_module, "draw_overlay", lambda *_, title, **options: titles.append(title))
    cases = bundle / "eval" / "cases.csv"
    cases.write_text(cases.read_text().replace("0.5", "nan"))
    assert report(bundle, data)[0] == 0
    assert [title.split(".")[0] for title in titles] == ["best: made_0", "median: made_3", "worst: made_1"]
    cases.write_text("case,structure,dice\nmade_0.nii.gz,tumor,nan\n")
    code, output = report(bundle, data)
    assert (code, "no structure was contoured in any case" in output) == (2, True)


def test_what_is_missing_is_said(bundle: Path, data: Path) -> None:
    listed = json.loads((data / "dataset.json").read_text())["validation"]
    (data / "dataset.json").write_text(json.dumps({"training": [], "validation": listed[1:]}))
    code, output = report(bundle, data)
    assert (code, "of other cases than" in output) == (2, True)
    (bundle / "eval" / "cases.csv").unlink()
    code, output = report(bundle, data)
    assert (code, "Evaluate the bundle first" in output) == (2, True)
    for log in (bundle / "train").iterdir():
        log.unlink()
    code, output = report(bundle, data)
    assert (code, "Train the bundle first" in output) == (2, True)


def test_what_a_fit_keeps_elsewhere_is_drawn(bundle: Path, data: Path) -> None:
    for part in ("train", "eval"):
        (bundle / part).rename(bundle / "kept")
        (bundle / part).mkdir()
        (bundle / "kept").rename(bundle / part / "fold_1")
    for damaged in ("{", '{"drawn": 3}'):
        (bundle / "fit.json").write_text(damaged)
        code, output = report(bundle, data)
        assert (code, "fit.json: not the state of a fit" in output) == (2, True)
    (bundle / "fit.json").write_text(json.dumps({"asked": {}}))
    code, output = report(bundle, data)
    assert (code, "its fit is not finished. Call `monai-iunet fit`" in output) == (2, True)
    drawn = {"log": "train/fold_1", "cases": "eval/fold_1/cases.csv"}
    (bundle / "fit.json").write_text(json.dumps({"asked": {}, "finished": True, "drawn": drawn}))
    assert report(bundle, data)[0] == 0
    assert (bundle / "docs" / "cases.png").is_file()


@pytest.mark.parametrize("content", [b"case,structure\nx,y\n", b"case,dice\nx,y\n", b"case,dice\nx\n", b"\xff\xfe"])
def test_a_damaged_table_is_said_in_a_line(content: bytes, tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_bytes(content)
    with pytest.raises(InputError, match=r"cases\.csv: not the table of an evaluation"):
        draw_cases(tmp_path, tmp_path, table, tmp_path / "cases.png")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_config_is_said_in_a_line(content: str, tmp_path: Path) -> None:
    config = tmp_path / "configs" / "evaluate.json"
    config.parent.mkdir()
    config.write_text(content)
    with pytest.raises(InputError, match=r"evaluate\.json: not a config"):
        bundle_cases(tmp_path, tmp_path)
