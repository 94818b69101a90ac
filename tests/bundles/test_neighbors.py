"""What MONAI Label and MONAI Deploy read of a bundle, done as they do it, without either.

Sources: `monailabel/tasks/infer/bundle.py` and `monailabel/tasks/train/bundle.py` of MONAI Label;
`monai_bundle_inference_operator.py` of the MONAI Deploy App SDK.
"""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged
from monai.utils import MetaKeys, SpaceKeys

from monai_iunet.bundling.task import Task
from monai_iunet.segmentation.segmenter import BundleSegmenter
from tests.bundles.helpers import BUNDLES, TRAINED
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data

BY_NAME = pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Something roundish in noise, stored as a scanner does: axes to the left and to the back, in int16."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (36, 40, 30)), indexing="ij"))
    data = 300 * np.exp(-3 * (grid**2).sum(0)) - 100 + np.random.default_rng(0).normal(0, 20, grid.shape[1:])
    affine = np.diag([-1.0, -1.0, 1.2, 1.0])
    affine[:3, 3] = [18, 20, -18]
    nibabel.save(nibabel.Nifti1Image(data.astype(np.int16), affine), tmp_path / "image.nii.gz")
    return tmp_path / "image.nii.gz"


def expected(task: Task, image: Path) -> np.ndarray:
    labels = BundleSegmenter(BUNDLES / task.name, "cpu").segment_crop(nibabel.load(image)).labels
    return labels


@BY_NAME
def test_monai_label_infers(task: Task, image: Path, tmp_path: Path) -> None:
    bundle = BUNDLES / task.name
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser.config.update({"bundle_root": str(bundle)})
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    input_key, output_key = (next(iter(metadata["network_data_format"][part])) for part in ("inputs", "outputs"))
    names = metadata["network_data_format"]["outputs"][output_key]["channel_def"]
    assert {name for name in names.values() if name != "background"} == set(BundleSegmenter(bundle).labels.values())

    network = copy.deepcopy(parser.get_parsed_content("network_def", instantiate=True))
    checkpoint = torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(checkpoint.get("model", checkpoint))
    network.eval()
    before, inferer, after = (parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "postprocessing"))
    case = before({input_key: str(image)})
    with torch.no_grad():
        case[output_key] = inferer(case[input_key][None], network)[0]
    kept = [transform for transform in after.transforms if not isinstance(transform, SaveImaged)]
    assert len(kept) == len(after.transforms) - 1
    case = Compose(kept)(case)
    assert case[output_key].any()
    np.testing.assert_array_equal(case[output_key][0].numpy(), expected(task, image))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz"]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, id=task.name, marks=pytest.mark.slow if "brain" in task.name else ())  # whole heads
        for task in TRAINED
    ],
)
def test_monai_deploy_infers_from_the_exported_file(task: Task, image: Path, tmp_path: Path) -> None:
    bundle = BUNDLES / task.name
    exported = tmp_path / "model.ts"
    ckpt_export(
        "network_def",
        filepath=str(exported),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        use_trace=True,
        input_shape=[1, 1, *task.roi_size],
    )
    parser = ConfigParser()
    with zipfile.ZipFile(exported) as archive:
        parser.read_meta(json.loads(archive.read("model/extra/metadata.json")))
        parser.read_config(json.loads(archive.read("model/extra/inference.json")))
    parser.parse()
    before, inferer, after = (parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "postprocessing"))
    for transforms in (before, after):
        # It reads and writes images itself, and leaves out what would, by these names.
        transforms.transforms = tuple(
            each
            for each in transforms.transforms
            if "LoadImage" not in type(each).__name__ and "SaveImage" not in type(each).__name__
        )
    case: dict[str, Any] = {"image": deploy_image(nibabel.load(image))}
    case = before(case)
    network = torch.jit.load(exported).eval()
    with torch.no_grad():
        case["pred"] = inferer(inputs=case["image"][None], network=network)[0]
    labels = np.squeeze(after(case)["pred"].numpy(), 0)
    np.testing.assert_array_equal(labels, expected(task, image))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz", "model.ts"]


def deploy_image(image: nibabel.Nifti1Image) -> MetaTensor:
    """An image as its operator passes it on: without channels, with an affine to RAS under the name of LPS."""
    meta = {
        MetaKeys.AFFINE: image.affine,
        MetaKeys.ORIGINAL_AFFINE: image.affine,
        MetaKeys.SPACE: SpaceKeys.LPS,
        MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape),
        MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel",
    }
    return MetaTensor.ensure_torch_and_prune_meta(image.get_fdata(dtype=np.float32), meta)


def test_monai_label_trains(tmp_path: Path) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=2)
    pairs = [
        {key: str(data / case[key]) for key in case}
        for case in json.loads((data / "dataset.json").read_text())["training"]
    ]
    config = HIPPOCAMPUS / "configs" / "train.json"
    parser = ConfigParser()
    parser.read_config(config)
    handlers = parser["train#handlers"]
    pretrained = str(HIPPOCAMPUS / "models" / "model.pt")
    handlers.insert(
        0,
        {"_target_": "CheckpointLoader", "load_path": pretrained, "load_dict": {"model": "$@network"}, "strict": False},
    )
    monai.bundle.run(
        run_id="run",
        meta_file=str(HIPPOCAMPUS / "configs" / "metadata.json"),
        config_file=str(config),
        **{
            "bundle_root": str(HIPPOCAMPUS),
            "train#trainer#max_epochs": 1,
            "train#dataset#data": pairs[:2],
            "validate#dataset#data": pairs[2:],
            "train#handlers": handlers,
            "device": "cpu",
            # As it does not: so as not to write into the bundle, and to validate at once.
            "ckpt_dir": str(tmp_path / "models"),
            "output_dir": str(tmp_path / "train"),
            "val_interval": 1,
            "optimizer#lr": 0.0,
        },
    )
    weights = torch.load(pretrained, weights_only=True)
    found = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name])
