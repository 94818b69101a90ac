"""nnU-Net's own commands with our network: planning, two short epochs, prediction, and what else its users do.

`monai_iunet/guides/nnunet.md` says how it is installed. Its search for a trainer (`-tr`) imports all of its trainers,
those of transformers too, which need timm and with it torchvision; here empty stand-ins take their place, unless they
are there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from tests.test_cli import call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("nnunetv2", "batchgeneratorsv2", "blosc2", "seaborn")),
        reason="needs nnunetv2, see monai_iunet/guides/nnunet.md",
    ),
]
PROGRAMS = Path(sys.executable).parent

# nnU-Net's command for training, with epochs that are short.
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
STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""
SHAPE = (24, 28, 26)
Labels = dict[str, Any]


@dataclass
class NnUNet:
    """The folders of an nnU-Net, and its commands."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, *words: object) -> str:
        program = (
            [sys.executable, self.folder / "train.py"] if command == "train" else [PROGRAMS / f"nnUNetv2_{command}"]
        )
        result = subprocess.run(
            [*map(str, program), *map(str, words)], capture_output=True, text=True, check=False, env=self.environment
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout

    def train(self, dataset: int, configuration: str, *words: object) -> Path:
        """Train fold 0; return the folder of the results."""
        self.run("train", dataset, configuration, 0, "-device", "cpu", *words)
        trainer = words[words.index("-tr") + 1] if "-tr" in words else "nnUNetTrainer"
        plans = words[words.index("-p") + 1] if "-p" in words else "nnUNetPlans"
        (results,) = (self.folder / "nnUNet_results").glob(
            f"Dataset{dataset:03}_*/{trainer}__{plans}__{configuration}/fold_0"
        )
        assert "Epoch 1" in next(results.glob("training_log_*.txt")).read_text()
        assert (results / "validation" / "summary.json").is_file()
        return results

    def predict(self, dataset: int, configuration: str, output: Path) -> list[np.ndarray]:
        """Segment the images of a data set; return the labels."""
        (images,) = (self.folder / "nnUNet_raw").glob(f"Dataset{dataset:03}_*/imagesTr")
        options = ("-f", 0, "-npp", 1, "-nps", 1, "--disable_tta", "-device", "cpu")
        self.run("predict", "-d", dataset, "-c", configuration, "-i", images, "-o", output, *options)
        return [nibabel.load(file).get_fdata() for file in sorted(output.glob("c*.nii.gz"))]

    def make_data(self, dataset: int, labels: Labels, draw: Callable[[np.ndarray], np.ndarray], **extra: Any) -> Path:
        """Make cubes of 10 voxels, cores of 4 in them; `draw` makes labels of both, 1 and 2. Return the plans file."""
        name = f"Dataset{dataset:03}_Made"
        raw = self.folder / "nnUNet_raw" / name
        rng = np.random.default_rng(0)
        for number in range(5):
            cubes = np.zeros(SHAPE, np.uint8)
            low = rng.integers(4, 10, 3)
            cubes[tuple(slice(start, start + 10) for start in low)] = 1
            cubes[tuple(slice(start + 3, start + 7) for start in low)] = 2
            image = (cubes + rng.normal(0, 0.3, SHAPE)).astype(np.float32)
            for folder, file, data in (("imagesTr", f"c{number}_0000", image), ("labelsTr", f"c{number}", draw(cubes))):
                (raw / folder).mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), raw / folder / f"{file}.nii.gz")
        facts = {"channel_names": {"0": "made"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
        (raw / "dataset.json").write_text(json.dumps({**facts, **extra}))
        return self.folder / "nnUNet_preprocessed" / name / "nnUNetPlans.json"

    def plan(self, dataset: int, *configurations: str, **options: object) -> None:
        words = [word for key, value in options.items() for word in (f"-{key}", value)]
        self.run("plan_and_preprocess", "-d", dataset, "-c", *configurations, "-np", 1, "-npfp", 1, *words)


def add_plans(plans: Path, configuration: str = "3d_fullres") -> None:
    code, printed, error = call("nnunet-plans", plans, "--configuration", configuration, "--couplings", 1)
    assert code == 0, error
    assert printed.split() == [f"{configuration}_iunet", f"{configuration}_iunet_large"]


def one_class(cubes: np.ndarray) -> np.ndarray:
    return (cubes > 0).astype(np.uint8)


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> NnUNet:
    folder = tmp_path_factory.mktemp("nnunet")
    (folder / "train.py").write_text(TRAIN)
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        for name in ("timm/__init__", "timm/layers", "timm/models/__init__", "timm/models/eva", "einops"):
            file = folder / "stand_ins" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(STAND_IN)
    paths = [str(folder / "stand_ins"), str(Path(__file__).parents[2])]
    environment = {
        **os.environ,
        **{name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    made = NnUNet(folder, environment)
    plans = made.make_data(1, {"background": 0, "cube": 1}, one_class)
    made.plan(1, "2d", "3d_fullres")
    add_plans(plans)
    add_plans(plans, "2d")
    return made


def test_in_3d_and_its_archive(nnunet: NnUNet, tmp_path: Path) -> None:
    results = nnunet.train(1, "3d_fullres_iunet")
    weights = torch.load(results / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert any(name.startswith("iunet.encoder.0") for name in weights)
    labels = nnunet.predict(1, "3d_fullres_iunet", tmp_path / "out")
    assert len(labels) == 5
    assert labels[0].shape == SHAPE

    # Exported, and installed where there are no results.
    options = ("-d", 1, "-o", tmp_path / "model.zip", "-c", "3d_fullres_iunet", "-f", 0)
    nnunet.run("export_model_to_zip", *options)
    elsewhere = NnUNet(nnunet.folder, {**nnunet.environment, "nnUNet_results": str(tmp_path / "installed")})
    elsewhere.run("install_pretrained_model_from_zip", tmp_path / "model.zip")
    again = elsewhere.predict(1, "3d_fullres_iunet", tmp_path / "again")
    for found, expected in zip(again, labels, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_in_2d_and_with_the_largest_patch(nnunet: NnUNet, tmp_path: Path) -> None:
    nnunet.train(1, "2d_iunet")
    assert nnunet.predict(1, "2d_iunet", tmp_path / "out")[0].shape == SHAPE
    nnunet.train(1, "3d_fullres_iunet_large")


def test_regions(nnunet: NnUNet, tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    plans = nnunet.make_data(2, labels, lambda cubes: cubes, regions_class_order=[1, 2])
    nnunet.plan(2, "3d_fullres")
    add_plans(plans)
    nnunet.train(2, "3d_fullres_iunet")
    assert set(np.unique(nnunet.predict(2, "3d_fullres_iunet", tmp_path / "out")[0])) <= {0, 1, 2}


def test_an_ignore_label(nnunet: NnUNet, tmp_path: Path) -> None:
    def partly(cubes: np.ndarray) -> np.ndarray:
        labels = one_class(cubes)
        labels[..., : SHAPE[2] // 2] = 2
        return labels

    plans = nnunet.make_data(3, {"background": 0, "cube": 1, "ignore": 2}, partly)
    nnunet.plan(3, "3d_fullres")
    add_plans(plans)
    nnunet.train(3, "3d_fullres_iunet")
    assert set(np.unique(nnunet.predict(3, "3d_fullres_iunet", tmp_path / "out")[0])) <= {0, 1}


def test_pretrained_weights_of_other_classes(nnunet: NnUNet) -> None:
    """As its documentation says: the plans of the first data set are moved to the second, which is preprocessed so."""
    pretrained = nnunet.train(1, "3d_fullres_iunet") / "checkpoint_final.pth"
    nnunet.make_data(4, {"background": 0, "cube": 1, "core": 2}, lambda cubes: cubes)
    nnunet.plan(4, "3d_fullres")
    nnunet.run("move_plans_between_datasets", "-s", 1, "-t", 4, "-sp", "nnUNetPlans", "-tp", "moved")
    nnunet.run("preprocess", "-d", 4, "-plans_name", "moved", "-c", "3d_fullres", "-np", 1)
    results = nnunet.train(4, "3d_fullres_iunet", "-p", "moved", "-pretrained_weights", pretrained)
    weights = [
        torch.load(file, weights_only=False)["network_weights"]
        for file in (pretrained, results / "checkpoint_final.pth")
    ]
    assert [w["decoder.seg_layers.0.weight"].shape[0] for w in weights] == [2, 3]


@pytest.mark.parametrize(
    "trainer",
    ["nnUNetTrainerCELoss", "nnUNetTrainerNoDeepSupervision", "nnUNetTrainerDA5", "nnUNetTrainerAdam"],
)
def test_variants_of_the_trainer(nnunet: NnUNet, trainer: str) -> None:
    nnunet.train(1, "3d_fullres_iunet", "-tr", trainer)


def test_stages_of_a_cascade(nnunet: NnUNet) -> None:
    """The first stage stands alone; the second, which would read another network's labels, is refused."""
    plans = nnunet.make_data(5, {"background": 0, "cube": 1}, one_class)
    nnunet.plan(5, "3d_fullres")
    # nnU-Net plans a cascade for images that are much larger than its patches.
    planned = json.loads(plans.read_text())
    low = {"inherits_from": "3d_fullres", "data_identifier": "nnUNetPlans_3d_lowres", "spacing": [1.5, 1.5, 1.5]}
    low |= {"patch_size": [16, 16, 16], "median_image_size_in_voxels": [16, 18, 17], "next_stage": "3d_cascade_fullres"}
    second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    planned["configurations"] |= {"3d_lowres": low, "3d_cascade_fullres": second}
    plans.write_text(json.dumps(planned))
    nnunet.run("preprocess", "-d", 5, "-plans_name", "nnUNetPlans", "-c", "3d_lowres", "-np", 1)
    add_plans(plans, "3d_lowres")
    nnunet.train(5, "3d_lowres_iunet")
    code, _, error = call("nnunet-plans", plans, "--configuration", "3d_cascade_fullres")
    assert code == 2
    assert "second stage of a cascade" in error


def test_monai_s_runner(nnunet: NnUNet, tmp_path: Path) -> None:
    """MONAI's `nnUNetV2Runner` converts, plans, trains and predicts by nnU-Net's commands; the plans are added between.

    Its command for training finds the short one of this test, on a CPU: the runner itself trains on a GPU only.
    """
    (images,) = (nnunet.folder / "nnUNet_raw").glob("Dataset001_*")
    cases = [
        {"image": f"imagesTr/c{number}_0000.nii.gz", "label": f"labelsTr/c{number}.nii.gz", "fold": number}
        for number in range(5)
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases, "testing": [{"image": cases[0]["image"]}]}))
    settings = {"modality": "MR", "datalist": str(tmp_path / "list.json"), "dataroot": str(images)}
    (tmp_path / "input.yaml").write_text(json.dumps({**settings, "dataset_name_or_id": 6}))
    shim = tmp_path / "bin" / "nnUNetv2_train"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} {nnunet.folder / "train.py"} "$@" -device cpu\n')
    shim.chmod(0o755)
    program = f"""
from monai.apps.nnunet import nnUNetV2Runner

if __name__ == "__main__":
    runner = nnUNetV2Runner({str(tmp_path / "input.yaml")!r}, work_dir={str(tmp_path / "work")!r})
    runner.convert_dataset()
    runner.plan_and_process(c=("3d_fullres",), n_proc=(1,), npfp=1)
    from monai_iunet import add_configurations
    from pathlib import Path

    (plans,) = Path(runner.nnunet_preprocessed).glob("Dataset006_*/nnUNetPlans.json")
    add_configurations(plans, couplings=1)
    runner.train_single_model("3d_fullres_iunet", 0)
"""
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(shim.parent), str(PROGRAMS), nnunet.environment["PATH"]])
    environment = {**nnunet.environment, "PATH": path}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    name = "nnUNet_trained_models/Dataset006_*/nnUNetTrainer__nnUNetPlans__3d_fullres_iunet/fold_0/checkpoint_final.pth"
    assert list((tmp_path / "work").glob(name))
