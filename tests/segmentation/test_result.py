"""Volumes of structures, and of what they are parts of."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from monai_iunet.errors import InputError
from monai_iunet.segmentation.result import Segmentation


def volumes(*names: str) -> dict[str, float]:
    labels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    labels[labels > len(names)] = 0
    image = nibabel.Nifti1Image(labels, np.diag([1.0, 2.0, 3.0, 1.0]))
    return Segmentation(image, labels, dict(enumerate(names, 1))).volumes()


def test_parts_of_one_organ_have_a_whole_on_each_side() -> None:
    found = volumes("left front lobe", "left back lobe", "right front lobe", "right back lobe")
    assert found["left back lobe"] == 6
    assert found["left, whole"] == found["right, whole"] == 12


def test_organs_of_a_side_are_no_whole() -> None:
    assert volumes("left putamen", "left thalamus", "right putamen", "right thalamus") == {
        "left putamen": 6, "left thalamus": 6, "right putamen": 6, "right thalamus": 6,
    }  # fmt: skip


def test_another_grid_and_labels_without_a_name_are_refused() -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.eye(4))
    for labels, probabilities in (((3, 2, 4), None), ((2, 3, 4), (2, 3, 2, 4))):
        with pytest.raises(InputError, match="one grid is needed"):
            Segmentation(
                image, np.zeros(labels, np.uint8), {1: "a"}, np.zeros(probabilities) if probabilities else None
            )
    with pytest.raises(InputError, match="labels 3, 7 have no name"):
        Segmentation(image, np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 5 // 3 * 4 + 3, {1: "a"}).volumes()


def test_labels_that_share_a_name_are_refused() -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4))
    with pytest.raises(InputError, match="two labels of a segmentation share a name"):
        Segmentation(image, np.ones((2, 2, 2), np.uint8), {1: "liver", 2: "liver"})


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.float32])
def test_labels_of_other_types_are_converted_or_refused(kind: type) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.diag([1.0, 2.0, 3.0, 1.0]))
    segmentation = Segmentation(image, np.full((2, 2, 2), 7, kind), {7: "liver"})
    assert (segmentation.labels.dtype, segmentation.volumes()) == (np.uint8, {"liver": 48.0})
    for value in (300, -1) if kind != np.uint16 else (300,):
        with pytest.raises(InputError, match="labels must be whole numbers from 0 to 255"):
            Segmentation(image, np.full((2, 2, 2), value, kind), {1: "liver"})
