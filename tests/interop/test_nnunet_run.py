"""nnU-Net's own commands with our network: planning, two short epochs, prediction."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.test_cli import call

# nnU-Net's command for training, with epochs that are short. (A trainer class of one's own would do that too, but to
# look for one nnU-Net imports all of its own, and some of them need torchvision.)
TRAIN = """
import functools

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

initialize = nnUNetTrainer.__init__


@functools.wraps(initialize)
def shortened(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1


nnUNetTrainer.__init__ = shortened
if __name__ == "__main__":
    run_training_entry()
"""


def run(environment: dict[str, str], command: str, *words: object) -> str:
    result = subprocess.run([command, *map(str, words)], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nnunetv2", "batchgeneratorsv2", "blosc2", "seaborn")),
    reason="needs nnunetv2, see monai_iunet/guides/nnunet.md",
)
@pytest.mark.slow
def test_its_trainer_and_its_prediction_take_our_network(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    (tmp_path / "train.py").write_text(TRAIN)
    programs = Path(sys.executable).parent
    raw = folders["nnUNet_raw"] / "Dataset001_Made"
    rng = np.random.default_rng(0)
    for number in range(5):
        labels = np.zeros((24, 28, 26), np.uint8)
        low = rng.integers(4, 10, 3)
        labels[tuple(slice(start, start + 10) for start in low)] = 1
        image = (labels + rng.normal(0, 0.3, labels.shape)).astype(np.float32)
        for folder, name, data in (("imagesTr", f"c{number}_0000", image), ("labelsTr", f"c{number}", labels)):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), raw / folder / f"{name}.nii.gz")
    dataset = {
        "channel_names": {"0": "made"},
        "labels": {"background": 0, "cube": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    environment = {
        **os.environ,
        **{name: str(folder) for name, folder in folders.items()},
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
    }
    run(environment, str(programs / "nnUNetv2_plan_and_preprocess"), "-d", 1, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    plans = folders["nnUNet_preprocessed"] / "Dataset001_Made" / "nnUNetPlans.json"
    code, printed, error = call("nnunet-plans", plans, "--couplings", 1)
    assert code == 0, error
    assert printed.split() == ["3d_fullres_iunet", "3d_fullres_iunet_large"]

    run(environment, sys.executable, tmp_path / "train.py", 1, "3d_fullres_iunet", 0, "-device", "cpu")
    results = folders["nnUNet_results"] / "Dataset001_Made" / "nnUNetTrainer__nnUNetPlans__3d_fullres_iunet" / "fold_0"
    log = next(results.glob("training_log_*.txt")).read_text()
    assert "Epoch 1" in log
    weights = torch.load(results / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert any(name.startswith("iunet.encoder.0") for name in weights)

    words = ("-d", 1, "-c", "3d_fullres_iunet", "-f", 0, "-npp", 1, "-nps", 1, "--disable_tta", "-device", "cpu")
    run(environment, str(programs / "nnUNetv2_predict"), "-i", raw / "imagesTr", "-o", tmp_path / "out", *words)
    assert len(list((tmp_path / "out").glob("c*.nii.gz"))) == 5
    assert nibabel.load(tmp_path / "out" / "c0.nii.gz").shape == (24, 28, 26)
