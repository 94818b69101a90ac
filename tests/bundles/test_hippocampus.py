"""The hippocampus bundle, through MONAI's own entry points, end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy import ndimage

from tests.bundles.helpers import command, losses, run
from tests.bundles.made_data import HIPPOCAMPUS as BUNDLE
from tests.bundles.made_data import make_hippocampus_data

CONFIGS = BUNDLE / "configs"


def test_trains_evaluates_and_segments_what_it_has_learned(tmp_path: Path) -> None:
    made_data = make_hippocampus_data(tmp_path / "data")
    small = {"network_def__channels": [8, 16], "network_def__couplings": 1, "dataset_dir": made_data, "amp": False}
    weights = tmp_path / "weights"
    run(
        BUNDLE, "train.json", **small, max_epochs=12, val_interval=6, batch_size=1, learning_rate=0.02, seed=3,
        average__momentum=0.1, ckpt_dir=weights, output_dir=tmp_path / "log", roi_size=[24, 32, 24],
    )  # fmt: skip
    found = losses(tmp_path / "log")
    assert len(found) == 12 * 4
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:4])
    assert {path.name for path in weights.iterdir()} == {"model.pt", "model_final.pt", "last.pt", "training.json"}

    run(BUNDLE, "evaluate.json", **small, checkpoint=weights / "model.pt", output_dir=tmp_path / "eval")
    with (tmp_path / "eval" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2  # the structures of the one validation case
    assert np.mean([float(row["dice"]) for row in rows]) > 0.3

    image = nibabel.load(made_data / "imagesTr" / "made_0.nii.gz")
    turned = image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    (made_data / "imagesTs").mkdir()
    nibabel.save(turned, made_data / "imagesTs" / "new.nii.gz")
    options = {**small, "checkpoint": weights / "model.pt", "output_dir": tmp_path / "out"}
    run(BUNDLE, "inference.json", **options, largest_component=True, save_probabilities=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"new_seg.nii.gz", "new_prob.nii.gz"}
    result = nibabel.load(tmp_path / "out" / "new_seg.nii.gz")
    assert result.shape == turned.shape
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_allclose(result.affine, turned.affine)
    truth = np.asarray(nibabel.load(made_data / "labelsTr" / "made_0.nii.gz").dataobj)
    labels = np.asarray(nibabel.as_closest_canonical(result).dataobj)
    overlap = 2 * ((truth > 0) & (labels > 0)).sum() / ((truth > 0).sum() + (labels > 0).sum())
    assert overlap > 0.3
    assert nibabel.load(tmp_path / "out" / "new_prob.nii.gz").shape == (*turned.shape, 3)
    for value in (1, 2):
        assert ndimage.label(np.asarray(result.dataobj) == value, np.ones((3, 3, 3)))[1] <= 1


@pytest.mark.long
def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = {
        "network_def__channels": [4, 8],
        "network_def__couplings": 1,
        "dataset_dir": make_hippocampus_data(tmp_path / "data", training=2),
        "amp": False,
        "max_epochs": 3,
        "val_interval": 1,
        "output_dir": tmp_path / "log",
        "roi_size": [24, 32, 24],
    }
    run(BUNDLE, "train.json", **recipe, ckpt_dir=tmp_path / "whole")
    words = [sys.executable, *command(BUNDLE, "train.json", **recipe, ckpt_dir=tmp_path / "killed")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed" / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    run(BUNDLE, "train.json", **recipe, ckpt_dir=tmp_path / "killed", resume=True)
    for name in ("last.pt", "model.pt"):
        whole, killed = (torch.load(tmp_path / part / name, weights_only=True) for part in ("whole", "killed"))
        if name == "last.pt":
            assert whole["epoch"] == killed["epoch"] == 3
            whole, killed = whole["network"], killed["network"]
        assert all(torch.equal(killed[key], tensor) for key, tensor in whole.items())


def test_fine_tuning_starts_from_the_committed_weights_with_other_classes(tmp_path: Path) -> None:
    run(
        BUNDLE, "train.json", pretrained=BUNDLE / "models" / "model.pt", num_classes=4, learning_rate=0, max_epochs=1,
        val_interval=1, dataset_dir=make_hippocampus_data(tmp_path / "data", training=2), roi_size=[24, 32, 24],
        ckpt_dir=tmp_path, output_dir=tmp_path / "log",
    )  # fmt: skip
    before, after = (
        torch.load(path, weights_only=True) for path in (BUNDLE / "models" / "model.pt", tmp_path / "model.pt")
    )
    assert after["head.weight"].shape[0] == 4
    # The average of equal weights is equal but for rounding.
    changed = {
        name
        for name, tensor in after.items()
        if before[name].shape != tensor.shape or not torch.allclose(before[name], tensor, rtol=1e-5, atol=1e-6)
    }
    assert changed == {"head.weight", "head.bias"}


def evaluate(data: Path, output: Path) -> list[dict[str, str]]:
    """Rows of the table of cases with the committed weights."""
    run(BUNDLE, "evaluate.json", dataset_dir=data, output_dir=output, amp=False, check_data=False)
    with (output / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_committed_weights_segment_real_cases(hippocampus_data: Path, tmp_path: Path) -> None:
    names = json.loads((CONFIGS / "validation_cases.json").read_text())[:6]
    listed = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": listed}))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).symlink_to(hippocampus_data / folder)
    rows = evaluate(tmp_path, tmp_path / "eval")
    assert len(rows) == 2 * 6
    assert np.mean([float(row["dice"]) for row in rows]) > 0.84


@pytest.mark.slow
def test_the_committed_weights_reach_their_dice_on_the_validation_cases(hippocampus_data: Path, tmp_path: Path) -> None:
    rows = evaluate(hippocampus_data, tmp_path)
    stated = json.loads((CONFIGS / "metadata.json").read_text())["eval_metrics"]
    assert len(rows) == 2 * 42
    means = {
        part: np.mean([float(row["dice"]) for row in rows if row["structure"] == f"{part} hippocampus"])
        for part in ("anterior", "posterior")
    }
    assert np.mean(list(means.values())) > 0.84
    assert np.mean(list(means.values())) == pytest.approx(stated["mean_dice"], abs=0.002)
    for part, mean in means.items():
        assert mean == pytest.approx(stated[f"dice_{part}_hippocampus"], abs=0.002)


def test_the_validation_cases_are_none_of_the_training_cases(hippocampus_data: Path) -> None:
    parser = ConfigParser()
    parser.read_config(CONFIGS / "train.json")
    parser.update({"bundle_root": str(BUNDLE), "dataset_dir": str(hippocampus_data), "check_data": False})
    validation = parser.get_parsed_content("validation_cases")
    names = {
        part: {Path(case["image"]).name for case in cases}
        for part, cases in parser.get_parsed_content("datalist").items()
    }
    assert names["validation"] == set(validation)
    assert not names["training"] & names["validation"]
    assert len(names["training"]) + len(validation) == len(list((hippocampus_data / "imagesTr").glob("*.nii.gz")))
