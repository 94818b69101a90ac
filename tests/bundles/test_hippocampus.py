"""The hippocampus bundle, through MONAI's own entry points, end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow

BUNDLE = Path(__file__).parents[2] / "bundles" / "iunet_hippocampus_mri_segmentation"
CONFIGS = BUNDLE / "configs"


def run(*configs: str, **overrides: object) -> str:
    """`python -m monai.bundle run`, as the README of the bundle says."""
    files = str([str(CONFIGS / name) for name in configs])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files]
    command += ["--meta_file", str(CONFIGS / "metadata.json"), "--logging_file", str(CONFIGS / "logging.conf")]
    for name, value in {"bundle_root": BUNDLE, **overrides}.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def made_data(tmp_path: Path) -> Path:
    """A data set in the Decathlon's layout: two bright ellipsoids in noise; one case is a validation case."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    validation = json.loads((CONFIGS / "validation_cases.json").read_text())
    training = []
    for name in (*(f"made_{index}.nii.gz" for index in range(4)), validation[0]):
        shape = rng.integers((30, 44, 28), (40, 56, 40))
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
        labels = np.zeros(shape, np.uint8)
        for value, shift in ((1, 0.62), (2, 0.38)):
            center = shape * [0.5, shift, 0.5] + rng.uniform(-2, 2, 3)
            labels[((grid - center.reshape(3, 1, 1, 1)) ** 2).sum(0) < 36] = value
        image = (100 * rng.normal(labels * 1.0, 0.3)).astype(np.float32)
        for kind, data in (("images", image), ("labels", labels)):
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / f"{kind}Tr" / name)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (folder / "dataset.json").write_text(json.dumps({"training": training}))
    return folder


def test_trains_evaluates_and_segments_what_it_has_learned(made_data: Path, tmp_path: Path) -> None:
    small = {"network_def#channels": [8, 16], "network_def#couplings": 1, "dataset_dir": made_data, "amp": False}
    weights = tmp_path / "weights"
    log = run(
        "train.json", **small, max_epochs=12, val_interval=6, batch_size=1, learning_rate=0.02, seed=3,
        ckpt_dir=weights, output_dir=tmp_path / "log", roi_size=[24, 32, 24],
    )  # fmt: skip
    losses = [float(line.split("train_loss:")[1]) for line in log.splitlines() if "train_loss:" in line]
    assert len(losses) == 12 * 4
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert (weights / "model.pt").is_file()

    run("train.json", "evaluate.json", **small, checkpoint=weights / "model.pt", output_dir=tmp_path / "eval")
    with (tmp_path / "eval" / "val_mean_dice_raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1  # the one validation case
    assert float(rows[0]["mean"]) > 0.3

    image = nibabel.load(made_data / "imagesTr" / "made_0.nii.gz")
    turned = image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nibabel.save(turned, made_data / "imagesTs" / "new.nii.gz")
    run("inference.json", **small, checkpoint=weights / "model.pt", output_dir=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new_seg.nii.gz"]
    result = nibabel.load(tmp_path / "out" / "new_seg.nii.gz")
    assert result.shape == turned.shape
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_allclose(result.affine, turned.affine)
    truth = np.asarray(nibabel.load(made_data / "labelsTr" / "made_0.nii.gz").dataobj)
    found = np.asarray(nibabel.as_closest_canonical(result).dataobj)
    overlap = 2 * ((truth > 0) & (found > 0)).sum() / ((truth > 0).sum() + (found > 0).sum())
    assert overlap > 0.3


def test_the_committed_weights_reach_their_dice_on_the_validation_cases(hippocampus_data: Path, tmp_path: Path) -> None:
    run("train.json", "evaluate.json", dataset_dir=hippocampus_data, output_dir=tmp_path, amp=False)
    with (tmp_path / "val_mean_dice_raw.csv").open() as file:
        scores = [[float(row["class0"]), float(row["class1"])] for row in csv.DictReader(file)]
    stated = json.loads((CONFIGS / "metadata.json").read_text())["eval_metrics"]
    assert len(scores) == 42
    assert np.mean(scores) > 0.84
    assert np.mean(scores) == pytest.approx(stated["mean_dice"], abs=0.002)
    assert np.mean(scores, axis=0) == pytest.approx(
        [stated["dice_anterior_hippocampus"], stated["dice_posterior_hippocampus"]], abs=0.002
    )


def test_the_validation_cases_are_none_of_the_training_cases(hippocampus_data: Path) -> None:
    parser = ConfigParser()
    parser.read_config(CONFIGS / "train.json")
    parser.update({"bundle_root": str(BUNDLE), "dataset_dir": str(hippocampus_data)})
    validation = parser.get_parsed_content("validation_cases")
    names = {
        part: {Path(case["image"]).name for case in parser.get_parsed_content(f"{part}#dataset#data")}
        for part in ("train", "validate")
    }
    assert names["validate"] == set(validation)
    assert not names["train"] & names["validate"]
    assert len(names["train"]) + len(validation) == len(list((hippocampus_data / "imagesTr").glob("*.nii.gz")))


def test_the_network_and_the_preprocessing_are_the_same_everywhere() -> None:
    train, inference = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("train", "inference"))
    assert train["network_def"] == inference["network_def"]
    assert train["roi_size"] == inference["roi_size"]
    pairs = zip(train["preprocessing"], inference["preprocessing"]["transforms"], strict=True)
    for for_both, for_image in pairs:
        shared = {name: value for name, value in for_both.items() if name not in ("keys", "mode")}
        assert shared == {name: value for name, value in for_image.items() if name not in ("keys", "mode")}


@pytest.mark.parametrize(("name", "purpose"), [("train", "train"), ("inference", "infer")])
def test_the_configs_have_the_properties_that_monai_asks_for(name: str, purpose: str, made_data: Path) -> None:
    workflow = ConfigWorkflow(
        str(CONFIGS / f"{name}.json"),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        workflow_type=purpose,
        bundle_root=str(BUNDLE),
        dataset_dir=str(made_data),
        device="cpu",
    )
    workflow.initialize()
    assert not workflow.check_properties()


def test_every_file_that_a_bundle_needs_is_there() -> None:
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt", "configs/logging.conf"):
        assert (BUNDLE / name).stat().st_size > 0, name
    assert (BUNDLE / "models" / "model.pt").stat().st_size < 25e6
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
