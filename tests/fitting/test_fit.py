"""From images and labels to a bundle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, run
from rich.console import Console
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, InputError, TimedDecay, fit, segment, verify_bundle
from monai_iunet.bundling.new_bundle import write_bundle, write_configs
from monai_iunet.bundling.report import write_report
from monai_iunet.bundling.task import Task
from monai_iunet.bundling.workflows import inference_config
from monai_iunet.cli import app
from monai_iunet.fitting import fit as fitting
from monai_iunet.fitting.cross_validation import Score, best_fold, choose_clean_up, mean_dice, read_scores, summarize
from monai_iunet.fitting.ensemble import Comparison, Judged, write_ensemble
from monai_iunet.fitting.fit import parse_seconds
from monai_iunet.fitting.page import write_results
from monai_iunet.fitting.plan import read_plan
from monai_iunet.io.read import read_image
from monai_iunet.training.dataset import list_cases
from monai_iunet.training.record import record_file, trained_value
from monai_iunet.training.seen_cases import image_digests
from tests.bundles.made_data import SMALL_TASK
from tests.fitting.made_sets import make_set, number_labels


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, planned for a machine of a given speed."""
    monkeypatch.setattr("monai_iunet.fitting.planner.CHANNELS", (8, 16, 32))
    monkeypatch.setattr("monai_iunet.fitting.planner.LONG_STEPS", 150)
    monkeypatch.setattr("monai_iunet.fitting.limits.measure_speed", lambda *_: 1e6)


# Fits a small network, noting its steps; arguments are the data set and the bundle.
SMALL_FIT = """
import sys
import torch
from monai_iunet.fitting import fit, limits, planner
from monai_iunet.training.checkpoints import Checkpoints

planner.CHANNELS, planner.LONG_STEPS, planner.STEPS_TO_VALIDATION = (8, 16), {steps}, 10
limits.measure_speed = lambda device, dtype, size=48: 1e5 if dtype == torch.float32 else 2e5  # the same in each process
check = Checkpoints._stop_at_nan


def note(self, trainer):
    with open(sys.argv[2] + ".steps", "a") as file:
        file.write(f"{{trainer.state.iteration}}\\n")
    check(self, trainer)


Checkpoints._stop_at_nan = note
fit.fit(sys.argv[1], sys.argv[2], folds={folds}, fold={fold}, gpu_memory="1 GiB", device="cpu")
"""


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
    pictures = [folder / "docs" / name for name in ("training.png", "cases.png")]
    drawn = [picture.read_bytes() for picture in pictures]
    assert write_report(folder, data) == pictures
    assert [picture.read_bytes() for picture in pictures] == drawn
    # Called again there is nothing left to do; with other options it is another fit.
    before = (folder / "models" / "fold_0" / "model.pt").stat().st_mtime
    fit(data, folder, folds=2, gpu_memory="1 GiB", device="cpu")
    assert (folder / "models" / "fold_0" / "model.pt").stat().st_mtime == before
    assert not (folder / "models" / "fold_0" / "last.pt").exists()
    with pytest.raises(InputError, match="a fit with another folds is there"):
        fit(data, folder, folds=3, gpu_memory="1 GiB", device="cpu")
    with pytest.raises(InputError, match="a fit with another memory is there"):
        fit(data, folder, folds=2, device="cpu")


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_one_more_network_is_trained_on_all_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("monai_iunet.fitting.planner.LONG_STEPS", 60)
    data, folder = make_set(tmp_path / "data", shape=(16, 16, 16), count=6), tmp_path / "bundle"
    options: dict[str, Any] = {"fold": 0, "gpu_memory": "1 GiB", "device": "cpu"}
    fit(data, folder, **options)
    models = folder / "models"
    of_fold, table = ((folder / name).read_bytes() for name in ("models/fold_0/model.pt", "eval/cross_validation.csv"))
    assert trained_value(models / "model.pt", "trained_on", None) == image_digests(list_cases(data, "training", 0))
    # A fit that is finished goes on with it; nothing of it is trained again.
    fit(data, folder, **options, all_cases=True)
    assert (models / "fold_0" / "model.pt").read_bytes() == of_fold != (models / "model.pt").read_bytes()
    assert (models / "all_cases" / "model.pt").read_bytes() == (models / "model.pt").read_bytes()
    assert trained_value(models / "model.pt", "trained_on", None) == image_digests(list_cases(data))
    assert not list(models.glob("*/last.pt"))
    assert [check for check in verify_bundle(folder) if check.problem] == []
    # The figures are those of the fold; what predicts the quality is the new network's.
    assert (folder / "eval" / "cross_validation.csv").read_bytes() == table
    assert "one that was trained on all cases after them" in (folder / "docs" / "README.md").read_text()
    assert (models / "quality.json").is_file() == (BundleSegmenter(folder, "cpu").quality is not None)
    image = nibabel.load(data / "imagesTr" / "case_00.nii.gz")
    truth = np.asarray(nibabel.load(data / "labelsTr" / "case_00.nii.gz").dataobj)
    assert dice_of(np.asarray(segment(image, folder, device="cpu").dataobj), truth) > 0.5
    # No case is left to show it in a picture, or to evaluate it without a warning.
    assert write_report(folder, data) == [folder / "docs" / "training.png"]
    configs = {"config_file": str(folder / "configs" / "evaluate.json"), "bundle_root": str(folder)}
    run(**configs, dataset_dir=str(data), output_dir=str(tmp_path / "eval"), fit_quality=False, logging_file=False)
    assert "was trained on 2 of these 2 cases" in caplog.text
    before = (models / "all_cases" / "model.pt").stat().st_mtime_ns
    fit(data, folder, **options, all_cases=True)
    fit(data, folder, **options)
    assert (models / "all_cases" / "model.pt").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("better", [True, False])
def test_the_ensemble_is_used_where_it_is_better(better: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iunet.fitting.planner.JUDGED_FROM", 8)
    monkeypatch.setattr("monai_iunet.fitting.planner.JUDGES", 3)
    monkeypatch.setattr("monai_iunet.fitting.planner.LONG_STEPS", 40)
    monkeypatch.setattr(Comparison, "ensemble_is_better", better)
    data, folder = make_set(tmp_path / "data", shape=(16, 16, 16), count=8, channels=2), tmp_path / "bundle"
    fit(data, folder, folds=2, gpu_memory="1 GiB", device="cpu")
    assert [check for check in verify_bundle(folder) if check.problem] == []
    # No network was trained or validated on those that judge both.
    judges = {f"case_{number:02}" for number in (1, 4, 7)}
    tables = {path.parent.name: path for path in (folder / "eval").glob("*/cases.csv")}
    found = {name: {score.case[:7] for score in read_scores([path])} for name, path in tables.items()}
    assert {name for name, cases in found.items() if cases == judges} >= {"judged_ensemble"}
    for name, cases in found.items():
        assert cases == judges if name.startswith("judged") else cases.isdisjoint(judges)
    page = (folder / "docs" / "README.md").read_text()
    assert "Neither was trained or chosen by these 3 cases" in page
    assert ("The bundle has all networks, as an ensemble" in page) is better
    assert re.search(r"\| ensemble \| [01]\.\d+ \| .* \| \d+\.\d\d \|", page)
    # What evaluate.json finds with the bundle's weights is what was compared.
    judged = f"judged_{'ensemble' if better else re.search(r'the network of (fold_.)', page)[1]}"
    run(
        config_file=str(folder / "configs" / "evaluate.json"),
        bundle_root=str(folder),
        dataset_dir=str(data),
        output_dir=str(tmp_path / "eval"),
        device="$torch.device('cpu')",
        **({} if better else {"datalist#validation": [case for case in list_cases(data) if "_01" in case["label"]]}),
    )
    again, before = (
        {(score.case, score.structure): score.measures["dice"] for score in read_scores([path])}
        for path in (tmp_path / "eval" / "cases.csv", tables[judged])
    )
    assert again == {key: dice for key, dice in before.items() if key in again}
    assert len(again) == (3 if better else 1)
    if better:
        # Its probabilities are the mean of those of the members, since an image is one window.
        volume = read_image([data / "imagesTr" / f"case_01_{number:04}.nii.gz" for number in (0, 1)])
        single = tmp_path / "single"
        shutil.copytree(folder, single)
        write_configs(read_plan(folder / "docs" / "plan.json").task, single)
        members = []
        for fold in (0, 1):
            for name in ("model.pt", "training.json"):
                shutil.copyfile(folder / "models" / f"fold_{fold}" / name, single / "models" / name)
            members.append(BundleSegmenter(single, "cpu", probabilities=True).segment(volume).probabilities)
        together = BundleSegmenter(folder, "cpu", probabilities=True).segment(volume).probabilities
        np.testing.assert_allclose(together, np.mean(members, 0), atol=1e-4)


@pytest.mark.slow
def test_processes_share_the_folds(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", shape=(16, 16, 16), count=6)
    script = tmp_path / "script.py"
    script.write_text(SMALL_FIT.format(steps=8, folds=3, fold=None))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, str(script), str(data), str(tmp_path / "shared")], check=True)
    subprocess.run([sys.executable, str(script), str(data), str(tmp_path / "alone")], check=True)
    for fold in range(3):
        shared, alone = (
            torch.load(tmp_path / name / "models" / f"fold_{fold}" / "model.pt", weights_only=True)
            for name in ("shared", "alone")
        )
        assert all(torch.equal(tensor, alone[name]) for name, tensor in shared.items())
    tables = [(tmp_path / name / "eval" / "cross_validation.csv").read_text() for name in ("shared", "alone")]
    assert tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_data_set_is_fitted_on_growing_patches_and_whole_images(tmp_path: Path) -> None:
    data, folder = make_set(tmp_path / "data", shape=(22, 26, 24), count=6), tmp_path / "made_bundle"
    options: dict[str, Any] = {"fold": 0, "roi_size": "whole", "growing": True, "spacing": (1.1, 1.0, 1.0)}
    fit(data, folder, gpu_memory="1 GiB", device="cpu", **options)
    assert [check for check in verify_bundle(folder) if check.problem] == []
    page = (folder / "docs" / "README.md").read_text()
    assert re.search(r"\| patch \| whole images \| as asked. Each is padded to multiples of", page)
    assert re.search(r"\| growing patches \| .* then the patch \|", page)
    record = json.loads((folder / "models" / "training.json").read_text())
    assert (record["roi_size"], len(record["growing"])) == ("whole", 2)
    evaluated = read_scores([folder / "eval" / "fold_0" / "cases.csv"])
    assert np.mean([score.measures["dice"] for score in evaluated]) > 0.7
    kept = read_plan(folder / "docs" / "plan.json").task
    assert (kept.roi_size, kept.growing) == ("whole", tuple(map(tuple, record["growing"])))
    with pytest.raises(InputError, match="a fit with another roi_size"):
        fit(data, folder, gpu_memory="1 GiB", device="cpu", **{**options, "roi_size": None})


# What is made, and how much of it must be learned, in mean Dice: all of it is easy.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "four channels in a file": ({"channels": 4, "classes": 2, "in_one_file": True}, 0.8),
    "thick slices": ({"spacing": (0.5, 0.5, 6), "shape": (40, 40, 10)}, 0.8),
    "CT with gaps in its labels": ({"modality": "CT", "classes": 2}, 0.8),
    "8 cases of 20 voxels": ({"count": 8, "shape": (20, 20, 20)}, 0.8),
    "600 voxels": ({"shape": (16, 600, 16)}, 0.8),
    "half of the labels missing": ({"count": 10, "classes": 2}, 0.8),
    "30 classes, most of them rare": ({"count": 12, "classes": 30, "shape": (24, 50, 36)}, 0.9),
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_of_every_kind_become_bundles(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, least = KINDS[kind]
    data = make_set(tmp_path / "data", **options)
    monkeypatch.setattr("monai_iunet.fitting.planner.LONG_STEPS", 2000 if "30" in kind else 300)
    if "gaps" in kind:  # labels 3 and 7
        number_labels(data, {1: 3, 2: 7})
        description = json.loads((data / "dataset.json").read_text())
        description["labels"] = {"0": "background", "3": "front", "7": "back"}
        (data / "dataset.json").write_text(json.dumps(description))
    if "missing" in kind:
        number_labels(data, {2: 0}, cases=range(0, 10, 2))
    if "rare" in kind:  # all but five structures are in a half of the cases each
        for number in range(12):
            gone = [value for value in range(6, 31) if (value + number) % 2]
            number_labels(data, dict.fromkeys(gone, 0), cases=[number], erase=True)
    fit(data, tmp_path / "bundle", fold=0, gpu_memory="1 GiB", device="cpu")
    assert [check for check in verify_bundle(tmp_path / "bundle") if check.problem] == []
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["mean_dice"] > least
    task = read_plan(tmp_path / "bundle" / "docs" / "plan.json").task
    # Of like size in the others: labels do not tell what is absent from what was not contoured.
    assert task.partial_labels is ("missing" in kind or "rare" in kind)
    assert task.in_plane is ("thick" in kind)


@pytest.mark.usefixtures("quick")
def test_the_command_plans(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data [new]", shape=(12, 12, 12), count=5)
    bundle = tmp_path / "Größe 2"
    words = ["fit", str(data), "--output", str(bundle), "--time", "1min", "--plan-only", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "whole image" in result.output
    assert json.loads((bundle / "docs" / "plan.json").read_text())["task"]["name"] == "Gr_e_2"
    assert "Plan for data [new]" in result.output
    assert not (bundle / "models" / "model.pt").exists()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    for part in ("imagesTr", "labelsTr"):
        (data / part / "case_04.nii.gz").rename(tmp_path / part)
    description = (data / "dataset.json").read_text()
    entries = json.loads(description)
    (data / "dataset.json").write_text(json.dumps({**entries, "training": entries["training"][:4]}))
    fewer = CliRunner().invoke(app, words)
    assert fewer.exit_code == 2
    assert "case_04.nii.gz is gone since the fit" in " ".join(fewer.output.split())
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).rename(data / part / "case_04.nii.gz")
    (data / "dataset.json").write_text(description)
    assert CliRunner().invoke(app, words).exit_code == 0
    # Contents that changed are noticed; a file that was written again as it was is the same.
    for changed in (data / "labelsTr" / "case_02.nii.gz", data / "dataset.json"):
        before = changed.read_bytes()
        changed.write_bytes(before + b" ")
        other = CliRunner().invoke(app, words)
        assert other.exit_code == 2
        assert f"{changed.relative_to(data)} changed since the fit" in " ".join(other.output.split())
        changed.write_bytes(before)
    assert CliRunner().invoke(app, words).exit_code == 0
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


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("is_there", [False, True])
def test_of_two_fits_that_begin_at_once_the_later_one_says_so(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = make_set(tmp_path / "data", shape=(12, 12, 12), count=5), tmp_path / "bundle"
    if is_there:
        folder.mkdir()
    options: dict[str, Any] = {"gpu_memory": "1 GiB", "device": "cpu", "plan_only": True}
    make, begun = fitting.make_plan, []

    def begin_another(*arguments: Any, **others: Any) -> Any:
        if not begun:
            begun.append(True)
            fit(data, folder, **options)
        return make(*arguments, **others)

    monkeypatch.setattr(fitting, "make_plan", begin_another)
    with pytest.raises(InputError, match="another process has begun a fit in it meanwhile"):
        fit(data, folder, **options)
    assert fit(data, folder, **options) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "data"]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.usefixtures("quick")
def test_the_folder_may_be_a_link(is_there: bool, tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", shape=(12, 12, 12), count=5)
    disk, link = tmp_path / "disk" / "bundle", tmp_path / "link"
    disk.parent.mkdir()
    link.symlink_to(disk)
    if is_there:
        disk.mkdir()
    for _ in range(2):  # which goes on
        assert fit(data, link, gpu_memory="1 GiB", device="cpu", plan_only=True) == link
        assert link.is_symlink()
        assert (disk / "docs" / "plan.json").is_file()
    assert [path.name for path in disk.parent.iterdir()] == ["bundle"]


@contextlib.contextmanager
def no_room_for_files_of(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="Windows limits no files")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_an_ensemble_that_finds_no_room_is_an_error_of_the_disk(tmp_path: Path) -> None:
    task = replace(SMALL_TASK, members=2)
    network = ConfigParser(inference_config(SMALL_TASK)).get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    record_file(tmp_path / "model.pt").write_text("{}")
    with no_room_for_files_of(2**13), pytest.raises(OSError, match=r"model\.pt"):
        write_ensemble([tmp_path / "model.pt"] * 2, task, tmp_path / "ensemble" / "model.pt")
    assert [path.name for path in (tmp_path / "ensemble").iterdir()] == ["training.json"]


def test_weights_of_a_bundle_stay_where_others_find_no_room(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "all_cases").mkdir(parents=True)
    (models / "model.pt").write_text("of a fold")
    (models / "all_cases" / "model.pt").write_bytes(bytes(2**14))
    run = fitting._Fit(tmp_path, tmp_path, fitting.FitOptions(device="cpu"), Console(quiet=True))
    with no_room_for_files_of(2**13), pytest.raises(OSError, match="File too large") as caught:
        run._take_weights(models / "all_cases")
    assert caught.value.filename == str(models / "model.pt")
    assert (models / "model.pt").read_text() == "of a fold"
    assert sorted(path.name for path in models.iterdir()) == ["all_cases", "model.pt"]


@pytest.mark.usefixtures("quick")
def test_the_folder_may_be_the_root_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = make_set(tmp_path / "data", shape=(12, 12, 12), count=5), tmp_path / "disk"
    folder.mkdir()
    inode = folder.stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    for _ in range(2):  # which goes on
        assert fit(data, folder, gpu_memory="1 GiB", device="cpu", plan_only=True) == folder
        assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "configs", "docs", "fit.json", "models"]
    assert folder.stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


def test_a_place_that_cannot_be_written_to_is_refused_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(tmp_path / "data", shape=(12, 12, 12), count=5)
    (tmp_path / "file").touch()
    monkeypatch.setattr(fitting, "take_fingerprint", lambda *_: pytest.fail("images were read"))
    with pytest.raises(InputError, match="file"):
        fit(data, tmp_path / "file" / "bundle", gpu_memory="1 GiB", device="cpu", plan_only=True)


def test_a_fit_for_another_memory_is_not_gone_on_with(tmp_path: Path) -> None:
    asked = {"dataset": str(tmp_path.resolve()), "memory": 9000}
    (tmp_path / "fit.json").write_text(json.dumps({"asked": asked}))
    with pytest.raises(InputError, match="a fit with another memory is there"):
        fit(tmp_path, tmp_path, device="cpu", gpu_memory=20_000)
    with pytest.raises(InputError, match="not a plan"):  # which is read next
        fit(tmp_path, tmp_path, device="cpu", gpu_memory=10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing_labels": "absent"}, "missing_labels 'absent': must be background or unlabeled"),
        ({"modality": "ct"}, "modality 'ct': must be MR or CT"),
        ({"folds": 5}, "4 training cases cannot be split into 5 folds"),
        ({"folds": 2, "fold": 2}, "fold 2: of 2 folds, one from 0 to 1 is needed"),
    ],
)
def test_options_are_refused_before_the_images_are_read(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(tmp_path / "data", shape=(8, 8, 8), count=6)
    description = json.loads((data / "dataset.json").read_text())
    description["validation"] = description["training"][4:]
    description["training"] = description["training"][:4]
    (data / "dataset.json").write_text(json.dumps(description))
    read: list[Any] = []
    monkeypatch.setattr("monai_iunet.fitting.fingerprint._case_facts", lambda *arguments: read.append(arguments))
    with pytest.raises(InputError, match=message):
        fit(data, tmp_path / "out", device="cpu", **options)
    assert read == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"asked": {}, "files": 3}', '{"asked": {}, "files": {"a": null}}'])
def test_a_damaged_state_is_said_in_a_line(state: str, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(state)
    with pytest.raises(InputError, match=r"fit\.json: not the state of a fit .* Choose another --output"):
        fit(tmp_path, tmp_path, device="cpu")


def test_a_training_that_diverges_goes_on_with_a_lower_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert json.loads((tmp_path / "models" / "fold_0" / "learning_rate.json").read_text()) == {"factor": 0.25}
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

    def run(state: dict[str, Any] | None, stop_after: int) -> tuple[Engine, TimedDecay, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = TimedDecay(optimizer, 100, power=1, validator=Validator(), val_interval=10)
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
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), Engine.terminate)
        trainer.run([0], max_epochs=1000)
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


def test_validation_takes_about_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("monai_iunet.training.time_limit.time.monotonic", lambda: clock[0])

    class Validator:
        def __init__(self, seconds: float) -> None:
            self.seconds, self.epochs = seconds, list[int]()

        def run(self, epoch: int) -> None:
            clock[0] += self.seconds
            self.epochs.append(epoch)

    def step(*_: Any) -> None:
        clock[0] += 10

    for seconds, val_interval, expected in (
        (0.1, 7, [7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 84, 91, 98, 100]),  # a quick one: every so many epochs
        (20, 3, [3, 23, 43, 63, 83, 90]),  # then after 200 seconds; the last is at the end
        (29.5, 1, [1, 31, 61, 92]),  # none that would last to the end
    ):
        validator = Validator(seconds)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = TimedDecay(optimizer, 1000, validator=validator, val_interval=val_interval)
        trainer = Engine(step)
        schedule.attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=40), Engine.terminate)
        trainer.run([0], max_epochs=1000)
        state = schedule.state_dict()  # an interruption changes nothing
        schedule = TimedDecay(optimizer, 1000, validator=validator, val_interval=val_interval)
        schedule.load_state_dict(state)
        schedule.attach(trainer := Engine(step))
        trainer.state.max_epochs = None
        trainer.add_event_handler("STARTED", lambda engine: setattr(engine.state, "epoch", 40))
        trainer.run([0], max_epochs=1000)
        assert validator.epochs == expected


def test_a_training_may_be_timed_by_what_it_gets_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("monai_iunet.training.time_limit.time.process_time", lambda: clock[0])
    schedule = TimedDecay(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 100, clock="processor")

    def step(*_: Any) -> None:
        clock[0] += 30

    trainer = Engine(step)
    schedule.attach(trainer)
    trainer.run([0], max_epochs=2)
    assert schedule.used == 60
    # An epoch that would last longer than the time is ended.
    trainer = Engine(step)
    schedule.attach(trainer)
    trainer.run([0] * 100, max_epochs=3)
    assert schedule.used == 120
    assert (trainer.state.epoch, trainer.state.iteration) == (1, 2)
    assert "clock" not in schedule.state_dict()
    with pytest.raises(ValueError, match="wall"):
        TimedDecay(schedule.optimizer, 100, clock="sun")
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive number of seconds"):
            TimedDecay(schedule.optimizer, seconds)
    with pytest.raises(ValueError, match="at least 1 epoch"):
        TimedDecay(schedule.optimizer, 100, val_interval=0)


def score(case: str, dice: float, apart: float = 1.0, structure: str = "a") -> Score:
    return Score(case, structure, {"dice": dice, "hausdorff95_mm": apart, "surface_distance_mm": apart})


def test_what_no_case_shows_is_no_number_in_the_metadata(tmp_path: Path) -> None:
    task = Task("made", "MR", ("a", "b"), "data", (1, 1, 1), (32, 32, 32))
    folder = write_bundle(task, tmp_path / "made")
    write_results(folder, task, ["MRI"], summarize([score("1", 0.5)], task.classes))

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    metadata = json.loads((folder / "configs" / "metadata.json").read_text(), parse_constant=refuse)
    assert metadata["eval_metrics"] == {"dice_a": 0.5, "mean_dice": 0.5}


def test_clean_up_is_chosen_where_it_helps() -> None:
    before = [score(f"{number}", 0.8, 9, name) for number in range(8) for name in "abc"]
    after = [
        *(score(f"{number}", 0.82, 5, "a") for number in range(8)),
        *(score(f"{number}", 0.9 if number == 0 else 0.79, 5, "b") for number in range(8)),
        *(score(f"{number}", 0.82, 12, "c") for number in range(8)),
    ]
    assert choose_clean_up(before, after, ["a", "b", "c"]) == [1]


@pytest.mark.parametrize(
    ("gains", "fair", "better"),
    [((0.02, 0.03, 0.01), True, True), ((0.2, -0.05, -0.04), True, False), ((0.02, 0.03, 0.01), False, False)],
)
def test_the_ensemble_must_be_better_by_more_than_chance(gains: tuple[float, ...], fair: bool, better: bool) -> None:
    best = Judged("fold_2", [score(f"{number}", 0.8) for number in range(9)], 1.0)
    ensemble = Judged("ensemble", [score(f"{number}", 0.8 + gains[number % 3]) for number in range(9)], 5.0)
    found = Comparison(best, ensemble, ("a",), fair, "CPU s")
    assert found.ensemble_is_better is better
    text = found.as_markdown()
    assert ("the ensemble is used" if better else "fold_2 is used") in text
    assert ("cannot be compared" in text) is not fair
    assert "| ensemble |" in text
    assert "| 5.00 |" in text
    assert found.table().row_count == 2


def test_the_interval_holds_the_mean_and_shrinks_with_cases() -> None:
    values = np.random.default_rng(0).uniform(0.7, 1, 100)
    few, many = (summarize([score(str(i), v) for i, v in enumerate(values[:n])], ["a"])[0] for n in (10, 100))
    for row in (few, many):
        assert row["dice_low"] < row["dice"] < row["dice_high"]
    assert many["dice_high"] - many["dice_low"] < few["dice_high"] - few["dice_low"]
    assert mean_dice([score("1", 0.5), score("1", 1.0, structure="b")], ["a", "b"]) == pytest.approx(0.75)
    assert best_fold({0: [], 1: [score("1", 0.5)], 2: [score("2", 0.4)]}, ["a"]) == 1


def test_the_interval_of_the_mean_is_that_of_the_mean_of_the_structures() -> None:
    rng = np.random.default_rng(0)
    dice = {("a", case): 0.9 for case in range(20)} | {("b", case): rng.uniform(0, 0.2) for case in range(4)}
    row = summarize([score(str(case), value, structure=name) for (name, case), value in dice.items()], ["a", "b"])[-1]
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 20, 20)
        found = [[dice[name, case] for case in drawn if (name, case) in dice] for name in "ab"]
        means.append(np.mean([np.mean(values) for values in found if values]))
    assert row["cases"] == 20
    assert row["dice_low"] < row["dice"] < row["dice_high"]
    np.testing.assert_allclose([row["dice_low"], row["dice_high"]], np.percentile(means, [2.5, 97.5]), atol=0.01)


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data = make_set(tmp_path / "data", shape=(32, 32, 32), count=8)
    script = SMALL_FIT.format(steps=40, folds=2, fold=0)

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(data), str(tmp_path / name)])

    def steps(name: str) -> list[str]:
        return (tmp_path / f"{name}.steps").read_text().split()

    begun = time.monotonic()
    process = start("whole")
    while not (tmp_path / "whole.steps").exists() and process.poll() is None:
        time.sleep(0.05)
    first_step = time.monotonic() - begun
    assert process.wait() == 0
    rest = time.monotonic() - begun - first_step
    rng = np.random.default_rng()
    interruptions = 0
    for _ in range(10):
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(first_step / 2, first_step + rest / 5))
        interruptions += process.poll() is None
        process.kill()
        process.wait()
    assert start("killed").wait() == 0
    for name in ("eval/cross_validation.csv", "docs/plan.json", "models/training.json"):
        whole, killed = ((tmp_path / part / name).read_text() for part in ("whole", "killed"))
        assert killed.replace("killed", "whole") == whole
    whole, killed = (torch.load(tmp_path / part / "models/model.pt", weights_only=True) for part in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
    # An interruption costs the epoch that it is in, here two steps.
    assert len(steps("whole")) == len(set(steps("whole"))) == 40
    assert set(steps("killed")) == set(steps("whole"))
    repeated = len(steps("killed")) - 40
    record_property("cost", f"{interruptions} interruptions, {repeated} of 40 steps done again")
    assert repeated <= 2 * interruptions
