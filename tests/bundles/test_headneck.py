"""The head-and-neck bundle, through MONAI's own entry points, end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.bundles.helpers import losses, run
from tests.bundles.made_data import HEADNECK as BUNDLE
from tests.bundles.made_data import make_headneck_data


@pytest.mark.long
def test_trains_on_partial_labels_and_tells_right_from_left(tmp_path: Path) -> None:
    data = make_headneck_data(tmp_path / "data", validation=2)
    small = {"network_def__channels": [8, 32, 64], "network_def__couplings": 1, "dataset_dir": data, "amp": False}
    small["roi_size"] = [40, 36, 32]
    weights = tmp_path / "weights"
    run(
        BUNDLE, "train.json", **small, max_epochs=16, val_interval=16, batch_size=1, learning_rate=0.02, seed=3,
        ckpt_dir=weights, output_dir=tmp_path / "log",
    )  # fmt: skip
    found = losses(tmp_path / "log")
    assert len(found) == 16 * 4
    assert np.mean(found[-4:]) < 0.7 * np.mean(found[:4])

    run(BUNDLE, "evaluate.json", **small, checkpoint=weights / "model.pt", output_dir=tmp_path / "eval")
    with (tmp_path / "eval" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7
    dice = {(row["case"], row["structure"]): float(row["dice"]) for row in rows}
    assert dice["pt_4.nii.gz", "right parotid"] > 0.3
    assert dice["pt_4.nii.gz", "left parotid"] > 0.3
    assert np.isnan(dice["pt_5.nii.gz", "mandible"])  # there, but not contoured

    source = data / "imagesTr" / "pt_5.nii.gz"
    options = {**small, "dataset_dir": source, "checkpoint": weights / "model.pt", "test_time_flips": True}
    run(BUNDLE, "inference.json", **options, output_dir=tmp_path / "out")
    result = nibabel.load(tmp_path / "out" / "pt_5_seg.nii.gz")
    np.testing.assert_allclose(result.affine, nibabel.load(source).affine)
    labels = np.asarray(result.dataobj)
    # Found although it was not contoured in half of the cases.
    assert (labels == 7).sum() > 100
    right, left = (np.argwhere(labels == value)[:, 0].mean() for value in (3, 4))
    assert right > left + 10


def evaluate(data: Path, output: Path, **options: object) -> dict[str, float]:
    """Mean Dice of each structure with the committed weights."""
    run(BUNDLE, "evaluate.json", dataset_dir=data, output_dir=output, amp=False, check_data=False, **options)
    with (output / "summary.csv").open() as file:
        return {row["structure"]: float(row["dice_mean"]) for row in csv.DictReader(file)}


@pytest.mark.long
def test_the_committed_weights_segment_a_real_patient(headneck_data: Path, tmp_path: Path) -> None:
    listed = json.loads((headneck_data / "dataset.json").read_text())["validation"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [], "validation": listed[:1]}))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).symlink_to(headneck_data / folder)
    dice = evaluate(tmp_path, tmp_path / "eval", test_time_flips=False)
    assert np.mean([dice[name] for name in ("right parotid", "left parotid", "mandible")]) > 0.7


@pytest.mark.slow
def test_the_committed_weights_reach_their_dice_on_the_validation_cases(headneck_data: Path, tmp_path: Path) -> None:
    dice = evaluate(headneck_data, tmp_path)
    stated = json.loads((BUNDLE / "configs" / "metadata.json").read_text())["eval_metrics"]
    for name, value in dice.items():
        assert value == pytest.approx(stated[f"dice_{name.replace(' ', '_')}"], abs=0.002)
