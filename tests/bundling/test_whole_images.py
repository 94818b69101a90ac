"""Bundles that are trained on whole images: what they see is what they were trained with, whatever uses them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import CropForegroundd
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, InputError, TrainingPatchd, read_image, verify_bundle, write_bundle
from monai_iunet.bundling.task import BRAIN
from monai_iunet.cli import app
from monai_iunet.training.evaluation import compare
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_headneck_data, make_hippocampus_data

QUICK: dict[str, Any] = {"max_epochs": 2, "val_interval": 2, "device": "$torch.device('cpu')", "learning_rate": 0.02}


def dice_of(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "cases.csv").open() as file:
        return {(row["case"], row["structure"]): float(row["dice"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("by_override", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_bundle_trained_whole_gives_the_same_dice_by_every_path(by_override: bool, tmp_path: Path) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=5, validation=0)
    bundle = write_bundle(SMALL_TASK if by_override else replace(SMALL_TASK, roi_size="whole"), tmp_path / "small")
    changes = {"roi_size": "whole"} if by_override else {}
    run(bundle, "train.json", dataset_dir=data, batch_size=2 if by_override else 1, **changes, **QUICK)
    record = json.loads((bundle / "models" / "training.json").read_text())
    assert record["roi_size"] == "whole"
    run(bundle, "evaluate.json", dataset_dir=data, device=QUICK["device"])
    dice = dice_of(bundle / "eval")
    image = data / "imagesTr" / "made_0.nii.gz"
    run(bundle, "inference.json", dataset_dir=image, device=QUICK["device"])
    labels = nibabel.load(bundle / "eval" / "made_0_seg.nii.gz").get_fdata()
    segmenter = BundleSegmenter(bundle, "cpu")
    np.testing.assert_array_equal(labels, segmenter.segment(read_image(image)).labels)
    truth = torch.from_numpy(nibabel.load(data / "labelsTr" / "made_0.nii.gz").get_fdata())
    for row in compare(torch.from_numpy(labels), truth, (1, 1, 1), ["front", "back"]):
        assert row["dice"] == pytest.approx(dice["made_0.nii.gz", row["structure"]], abs=1e-3)
    # As the network sees an image in training.
    seen: list[torch.Size] = []
    segmenter.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    segmenter.segment(read_image(image))
    shape = read_image(image).shape
    assert seen[0][2:] == tuple(-(-extent // 4) * 4 for extent in shape)
    if not by_override:
        problems = {check.name for check in verify_bundle(bundle) if check.problem}
        assert problems == {"sections of docs/README.md"}  # which are to be written by hand


def test_whole_ct_are_padded_with_air(tmp_path: Path) -> None:
    data = make_headneck_data(tmp_path / "data", training=3, validation=1)
    structures = tuple(f"organ {number}" for number in range(1, 8))
    spacing = (3.9, 3.9, 2.5)
    task = replace(
        SMALL_TASK, modality="CT", classes=structures, spacing=spacing, roi_size="whole", partial_labels=True
    )
    parser = ConfigParser()
    parser.read_config(write_bundle(task, tmp_path / "small") / "configs" / "train.json")
    parser.update({"dataset_dir": str(data), "batch_size": 2})
    transforms = parser.get_parsed_content("train#preprocessing").transforms
    assert any(isinstance(transform, CropForegroundd) for transform in transforms)  # so sizes differ
    patch = next(step for step in transforms if isinstance(step, TrainingPatchd))
    patch.divisible_by = 16
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape[1:] == (1, 48, 48, 32)
    corner = batch["image"][:, 0, 0, 0, 0]
    assert (corner < -0.5).all()  # air, up to contrast and noise
    assert batch["label"].shape[1:] == (8, 48, 48, 32)


def test_a_plan_of_whole_images_asks_for_the_size_of_one(tmp_path: Path) -> None:
    bundle = write_bundle(replace(SMALL_TASK, roi_size="whole"), tmp_path / "small")
    refused = CliRunner().invoke(app, ["plan", "--bundle", str(bundle)])
    assert refused.exit_code == 2
    assert "--patch 128,128,80" in refused.output
    planned = CliRunner().invoke(app, ["plan", "--bundle", str(bundle), "--patch", "16,16,16"])
    assert planned.exit_code == 0, planned.output


def test_made_images_are_never_whole() -> None:
    with pytest.raises(InputError, match="Name it"):
        replace(BRAIN, roi_size="whole")


def test_a_bundle_is_begun_for_whole_images(tmp_path: Path) -> None:
    words = ["--name", "mine", "--modality", "MR", "--classes", "liver", "--roi-size", "whole"]
    assert CliRunner().invoke(app, ["init-bundle", *words, "--output", str(tmp_path)]).exit_code == 0
    config = json.loads((tmp_path / "mine" / "configs" / "train.json").read_text())
    assert config["roi_size"] == "whole"
