"""The rules of nnU-Net beside its own planner, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet.fitting.nnunet_rules import plan_like_nnunet


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_the_rules_of_nnunet_are_those_of_its_planner(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, part in (
        ("nnUNet_raw", "raw"),
        ("nnUNet_preprocessed", "preprocessed"),
        ("nnUNet_results", "results"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / part))
    paths = pytest.importorskip("nnunetv2.paths", reason="nnunetv2 is not installed")
    planner = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.default_experiment_planner")
    monkeypatch.setattr(paths, "nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setattr(planner, "nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setattr(planner, "nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    rng = np.random.default_rng(seed)
    count, classes = int(rng.integers(5, 200)), int(rng.integers(1, 20))
    extent, spacing = rng.uniform(30, 400, 3), rng.choice([0.5, 0.8, 1.0, 1.5, 3.0, 5.0], 3)
    spacings = [(spacing * rng.uniform(0.9, 1.1, 3)).round(3).tolist() for _ in range(count)]
    shapes = [np.maximum(extent * rng.uniform(0.8, 1.2, 3) / size, 9).round().astype(int).tolist() for size in spacings]
    for part in ("raw/Dataset001_Made/imagesTr", "raw/Dataset001_Made/labelsTr", "preprocessed/Dataset001_Made"):
        (tmp_path / part).mkdir(parents=True)
    raw, preprocessed = tmp_path / "raw" / "Dataset001_Made", tmp_path / "preprocessed" / "Dataset001_Made"
    volume = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
    for number in range(count):
        (raw / "imagesTr" / f"c{number:03}_0000.nii.gz").touch()
        (raw / "labelsTr" / f"c{number:03}.nii.gz").touch()
    nibabel.save(volume, raw / "imagesTr" / "c000_0000.nii.gz")
    nibabel.save(volume, raw / "labelsTr" / "c000.nii.gz")
    labels = {"background": 0, **{f"structure {value}": value for value in range(1, classes + 1)}}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    names = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    fingerprint = {
        "spacings": [size[::-1] for size in spacings],  # its axes run from the last to the first
        "shapes_after_crop": [shape[::-1] for shape in shapes],
        "foreground_intensity_properties_per_channel": {"0": dict.fromkeys(names, 1.0)},
        "median_relative_size_after_cropping": 1.0,
    }
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    plans = planner.ExperimentPlanner(1, gpu_memory_target_in_gb=8).plan_experiment()
    theirs = plans["configurations"]["3d_fullres"]
    ours = plan_like_nnunet(spacings, shapes, classes + 1)

    def turned(values: Sequence[float]) -> list[float]:
        """Values of the axes in nnU-Net's order: backward, and then that of the thickest slices first."""
        return [list(values)[::-1][axis] for axis in plans["transpose_forward"]]

    assert turned(ours.spacing) == pytest.approx(theirs["spacing"], abs=1e-4)
    assert turned(ours.patch) == list(theirs["patch_size"])
    assert ours.batch_size == theirs["batch_size"]
    strides = theirs["architecture"]["arch_kwargs"]["strides"][1:]
    assert [turned(stride) for stride in ours.strides] == [list(stride) for stride in strides]
