"""Data sets in the Decathlon's layout, made by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

from monai_iunet.bundling.task import Task
from tests.bundles.helpers import BUNDLES

HIPPOCAMPUS = BUNDLES / "iunet_hippocampus_mri_segmentation"
BRAIN = BUNDLES / "iunet_brain_mri_segmentation"
HEADNECK = BUNDLES / "iunet_headneck_ct_segmentation"

# For a bundle that learns `make_hippocampus_data` quickly.
SMALL_TASK = Task(
    name="small",
    modality="MR",
    classes=("front", "back"),
    dataset="data",
    spacing=(1.0, 1.0, 1.0),
    roi_size=(24, 32, 24),
    channels=(8, 16, 32),
    couplings=(1, 1, 1),
)


def ball(shape: np.ndarray, center: np.ndarray, radius: float) -> np.ndarray:
    """Mask of a ball."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return ((grid - center.reshape(3, 1, 1, 1)) ** 2).sum(0) < radius**2


def save(folder: Path, section: str, name: str, image: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> dict:
    """Write a case and return its entry in `dataset.json`."""
    for kind, data in (("images", image), ("labels", labels)):
        path = folder / f"{kind}{section}" / f"{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return {"image": f"./images{section}/{name}", "label": f"./labels{section}/{name}"}


def make_hippocampus_data(folder: Path, training: int = 4, validation: int = 1) -> Path:
    """Two bright balls in noise; the validation cases have the names of the bundle's."""
    rng = np.random.default_rng(0)
    names = json.loads((HIPPOCAMPUS / "configs" / "validation_cases.json").read_text())[:validation]
    entries = []
    for name in (*(f"made_{index}.nii.gz" for index in range(training)), *names):
        shape = rng.integers((30, 44, 28), (40, 56, 40))
        labels = np.zeros(shape, np.uint8)
        for value, shift in ((1, 0.62), (2, 0.38)):
            labels[ball(shape, shape * [0.5, shift, 0.5] + rng.uniform(-2, 2, 3), 6)] = value
        image = (100 * rng.normal(labels * 1.0, 0.3)).astype(np.float32)
        entries.append(save(folder, "Tr", name, image, labels, np.eye(4)))
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return folder


def make_headneck_data(folder: Path, training: int = 4, validation: int = 1) -> Path:
    """A right and a left ball as parotids, a mandible between, contoured in every other case only, and small balls.

    All are there in every image. Beyond a part of it nothing was scanned.
    """
    rng = np.random.default_rng(0)
    shape, affine = np.array([40, 36, 32]), np.diag([3.9, 3.9, 2.5, 1.0])
    # Place, Hounsfield units and radius of each structure.
    places = {
        1: ([0.5, 0.2, 0.8], 150.0, 3),
        2: ([0.5, 0.2, 0.35], 150.0, 3),
        3: ([0.7, 0.4, 0.5], 60.0, 5),
        4: ([0.3, 0.4, 0.5], 60.0, 5),
        5: ([0.5, 0.8, 0.35], 150.0, 3),
        6: ([0.5, 0.8, 0.8], 150.0, 3),
        7: ([0.5, 0.6, 0.55], 400.0, 5),
    }
    sections: dict[str, list[dict]] = {"training": [], "validation": []}
    for number in range(training + validation):
        image = rng.normal(-100, 20, shape)
        labels = np.zeros(shape, np.uint8)
        for value, (place, hounsfield, radius) in places.items():
            mask = ball(shape, shape * place + rng.uniform(-1, 1, 3), radius)
            image[mask] = rng.normal(hounsfield, 20, mask.sum())
            if value != 7 or number % 2 == 0:
                labels[mask] = value
        image[:, :, :4] = -1000
        labels[:, :, :4] = 0
        section = "training" if number < training else "validation"
        case = save(folder, "Tr", f"pt_{number}.nii.gz", image.astype(np.int16), labels, affine)
        sections[section].append(case)
    (folder / "dataset.json").write_text(json.dumps(sections))
    return folder


def make_head_label_maps(folder: Path, heads: int = 4) -> Path:
    """Maps with FreeSurfer's numbers: in skin, skull and fluid two hemispheres with a ball as hippocampus in each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shape = np.array([64, 72, 64])
    for number in range(heads):
        middle = shape / 2 + rng.uniform(-2, 2, 3)
        labels = np.zeros(shape, np.int32)
        for value, radius in ((511, 30), (515, 27), (24, 24)):
            labels[ball(shape, middle, radius)] = value
        inner = ball(shape, middle, 21)
        right = np.arange(shape[0])[:, None, None] >= middle[0]
        labels[inner & ~right], labels[inner & right] = 2, 41
        for value, side in ((17, -1), (53, 1)):
            labels[ball(shape, middle + [9 * side, 0, -4], 6)] = value
        nibabel.save(nibabel.Nifti1Image(labels, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"head_{number}.nii.gz")
    return folder
