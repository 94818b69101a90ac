"""Labels of real cases are those of MONAI's inferer and `Invertd`, up to ties; slow, with the count in the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Invertd
from torch import Tensor

from monai_iunet import BundleSegmenter, bundle_folder, read_image
from monai_iunet.inference.image_grid import ImageGrid
from tests.conftest import SHARED_DATA

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow
TIE = 1e-4  # difference of probabilities
SECTIONS = {"hippocampus": ("Task04_Hippocampus", "training"), "headneck": ("OpenKBP_HeadNeck", "validation")}


def validation_images(bundle: str) -> list[Path]:
    name, section = SECTIONS[bundle]
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the {name} data is not beside the checkout (in ../shared/data)")
    cases = json.loads((folder / "dataset.json").read_text())[section]
    listed = bundle_folder(bundle) / "configs" / "validation_cases.json"
    names = json.loads(listed.read_text()) if listed.is_file() else None
    paths = [(folder / case["image"]).resolve() for case in cases]
    return [path for path in paths if names is None or path.name in names]


def examples(bundle: str) -> list[Path]:
    names = {"hippocampus": ["mr_dicom_hippocampus_crop"], "headneck": ["ct_dicom", "ct_torso.nii.gz"]}[bundle]
    return [path for path in (SHARED_DATA / "examples" / name for name in names) if path.exists()]


@torch.no_grad()
def reference(segmenter: BundleSegmenter, image: Any) -> Tensor:
    """Probabilities on the grid of the image, all classes at once."""
    ours, transform = segmenter.inferer.inferer, segmenter.preprocessing
    plain = SlidingWindowInferer(ours.roi_size, ours.sw_batch_size, ours.overlap, ours.mode, cval=ours.cval)
    data = np.asarray(image.dataobj).astype(np.float32)
    meta = {"original_channel_dim": 0, "original_affine": image.affine}
    tensor = MetaTensor(torch.from_numpy(data)[None], affine=torch.from_numpy(image.affine), meta=meta)
    prepared = transform({"image": tensor})["image"]
    views = []
    for view in ours.views:
        flipped = view.flip(prepared.as_tensor()[None], 2)
        views.append(view.flip_back(plain(flipped, segmenter.network)))
    probabilities = MetaTensor(torch.softmax(torch.stack(views).mean(0)[0], 0))
    assert ImageGrid.of(prepared) is not None
    item = {"pred": probabilities, "image": prepared}
    return torch.as_tensor(Invertd("pred", transform, "image", nearest_interp=False, to_tensor=True)(item)["pred"])


@pytest.mark.parametrize("bundle", SECTIONS)
def test_labels_of_real_cases_are_those_of_monai(bundle: str) -> None:
    segmenter, voxels, differing = BundleSegmenter(bundle_folder(bundle), "cpu"), 0, 0
    segmenter.postprocessing.transforms = ()  # largest components of labels that differ by a tie may differ by more
    for path in validation_images(bundle) + examples(bundle):
        image = read_image(path)
        labels = segmenter.segment_crop(image)[0]
        probabilities = reference(segmenter, image)
        first, second = probabilities.topk(2, dim=0).values
        differs = torch.from_numpy(np.ascontiguousarray(labels)) != probabilities.argmax(0)
        assert not differs[(first - second) > TIE].any(), path.name
        voxels, differing = voxels + labels.size, differing + int(differs.sum())
    logger.info("%s: %d of %d voxels differ", bundle, differing, voxels)
    assert differing <= 1e-5 * voxels
