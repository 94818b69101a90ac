"""The brain bundle: from label maps to weights that segment images, through its scripts and MONAI's entry points."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy import ndimage

from monai_iunet import BundleSegmenter
from monai_iunet.errors import InputError
from monai_iunet.segmentation.whole_head import load_template
from monai_iunet.training.record import trained_value
from monai_iunet.transforms.head_labels import STRUCTURES
from tests.bundles.helpers import losses, run
from tests.bundles.made_data import BRAIN as BUNDLE
from tests.bundles.made_data import make_head_label_maps

LEFT, RIGHT = (list(STRUCTURES).index(f"{side} hippocampus") + 1 for side in ("left", "right"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BUNDLE / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    script("convert_label_maps").convert(make_head_label_maps(folder / "maps"), folder / "data")
    return folder / "data"


def test_label_maps_become_a_data_set(made_heads: Path) -> None:
    dataset = json.loads((made_heads / "dataset.json").read_text())
    assert len(dataset["training"]) == 1
    assert len(dataset["validation"]) == 6
    assert list(dataset["labels"].values()) == ["background", *STRUCTURES]
    tissues, labels = (nibabel.load(made_heads / dataset["training"][0][key]) for key in ("image", "label"))
    assert tissues.shape == labels.shape
    found = np.asarray(labels.dataobj)
    centers = [np.argwhere(found == side).mean(0)[0] for side in (LEFT, RIGHT)]
    assert centers[0] + 10 < centers[1]
    image, truth = (nibabel.load(made_heads / dataset["validation"][0][key]) for key in ("image", "label"))
    assert image.get_data_dtype() == np.float32
    assert {LEFT, RIGHT} <= set(np.unique(np.asarray(truth.dataobj)))


def test_too_few_label_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than 3 label maps"):
        script("convert_label_maps").convert(make_head_label_maps(tmp_path / "maps", heads=2), tmp_path / "data")


def test_each_step_makes_another_image_of_the_same_head(made_heads: Path) -> None:
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    parser.update({"bundle_root": str(BUNDLE), "dataset_dir": str(made_heads), "check_data": False})
    parser["roi_size"] = [48, 48, 48]
    dataset = parser.get_parsed_content("train#dataset")
    first, second = dataset[0], dataset[0]
    for item in (first, second):
        assert item["image"].shape == item["label"].shape
        assert item["image"].mean().item() == pytest.approx(0, abs=1e-3)
        assert item["image"].std().item() == pytest.approx(1, abs=1e-2)
        assert item["label"].max() < len(STRUCTURES) + 1
    assert first["image"].shape != second["image"].shape or not torch.equal(first["image"], second["image"])


def test_the_weights_of_a_running_training_are_taken(tmp_path: Path) -> None:
    weights = {"head.weight": torch.rand(3, 4), "head.bias": torch.rand(3)}
    torch.save({"model": weights, "epoch": 7, "record": {"spacing": [2, 2, 2]}}, tmp_path / "last.pt")
    take = script("take_weights").take
    assert take([tmp_path / "last.pt"], tmp_path / "model.pt") == 7
    taken = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(taken[name], tensor.half()) for name, tensor in weights.items())
    assert trained_value(tmp_path / "model.pt", "spacing", None) == [2, 2, 2]
    later = {name: 3 * tensor for name, tensor in weights.items()}
    torch.save({"model": later, "epoch": 9, "record": {"spacing": [1, 1, 1]}}, tmp_path / "later.pt")
    assert take([tmp_path / "last.pt", tmp_path / "later.pt"], tmp_path / "mean.pt") == 9
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert all(torch.equal(mean[name], (2 * tensor).half()) for name, tensor in weights.items())
    assert trained_value(tmp_path / "mean.pt", "spacing", None) == [1, 1, 1]
    torch.save({"model": {"other": torch.rand(3)}, "epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="of different networks"):
        take([tmp_path / "last.pt", tmp_path / "other.pt"], tmp_path / "model.pt")
    (tmp_path / "last.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"not the last\.pt of a training"):
        take([tmp_path / "last.pt"], tmp_path / "model.pt")


@pytest.mark.slow
def test_learns_from_label_maps(made_heads: Path, tmp_path: Path) -> None:
    run(
        BUNDLE, "train.json", network_def__channels=[8, 32, 64], network_def__couplings=1, dataset_dir=made_heads,
        amp=False, max_epochs=60, val_interval=30, learning_rate=0.01, seed=3, roi_size=[48, 48, 48],
        average__momentum=0.05, ckpt_dir=tmp_path / "weights", output_dir=tmp_path / "log",
    )  # fmt: skip
    found = losses(tmp_path / "log")
    assert len(found) == 60
    assert np.mean(found[-20:]) < 0.8 * np.mean(found[:20])
    assert {"model.pt", "last.pt", "training.json"} <= {path.name for path in (tmp_path / "weights").iterdir()}


@pytest.mark.parametrize("shape", [(20, 20, 20), (32, 9, 31), (1, 1, 1)])
def test_an_image_smaller_than_two_voxels_of_the_coarsest_level_is_segmented(shape: tuple[int, int, int]) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random(shape, np.float32), np.eye(4))
    segmenter = BundleSegmenter(BUNDLE, "cpu")
    assert segmenter.segment_crop(image).labels.shape == shape


@pytest.mark.long
def test_the_template_is_registered_to_heads_and_to_nothing_else() -> None:
    register = script("place_landmarks").register_template
    template = load_template(resolution=2)
    turned = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.1, -0.15, 0.2), [5.0, -8.0, 10.0])
    moved = nibabel.Nifti1Image(template.get_fdata(dtype=np.float32), turned @ template.affine)
    points = np.array([[0.0, 0, 0], [-25, -20, -15], [25, -20, -15], [0, 40, 30]])
    found, true = (nibabel.affines.apply_affine(matrix, points) for matrix in (register(moved), turned))
    assert np.abs(found - true).max() < 1  # mm
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(60, 70, 60)), 4).astype(np.float32)
    with pytest.raises(InputError, match="registration failed"):
        register(nibabel.Nifti1Image(blobs, np.diag([3.0, 3, 3, 1])))
