"""Data sets in the Decathlon's layout, made by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

from tests.bundles.helpers import BUNDLES

HIPPOCAMPUS = BUNDLES / "iunet_hippocampus_mri_segmentation"


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
