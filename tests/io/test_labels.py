"""Labels are written as they are, or not at all."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor

from monai_iunet import InputError, Segmentation, draw_overlay, label_image, to_simpleitk

LIKE = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
def test_whole_numbers_of_any_type_stay_what_they_are(dtype: type) -> None:
    labels = np.zeros((4, 5, 6), dtype)
    labels[1, 2, 3] = 1
    image = label_image(labels, LIKE)
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(image.dataobj), labels)
    assert np.array_equal(image.affine, LIKE.affine)


@pytest.mark.parametrize("value", [1.7, -3, 256, 70000, np.nan, np.inf])
def test_what_a_byte_does_not_hold_is_refused(value: float) -> None:
    labels = np.zeros((4, 5, 6), type(value) if isinstance(value, float) else np.int32)
    labels[3, 4, 5] = value
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        label_image(labels, LIKE)


@pytest.mark.parametrize("dtype", [complex, str, object])
def test_labels_that_are_no_numbers_are_refused(dtype: type) -> None:
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        label_image(np.ones((4, 5, 6)).astype(dtype), LIKE)


def test_an_image_of_another_format_gives_its_affine() -> None:
    affine = np.array([[-1.0, 0, 0, 90], [0, 0, 1.2, -120], [0, -1, 0, 80], [0, 0, 0, 1]])
    image = label_image(np.ones((4, 5, 6), np.uint8), nibabel.MGHImage(np.zeros((4, 5, 6), np.float32), affine))
    np.testing.assert_allclose(image.affine, affine)
    assert int(image.header["sform_code"]) > 0


@pytest.mark.parametrize("kind", [torch.Tensor, MetaTensor])
def test_labels_may_be_a_tensor(kind: type) -> None:
    tensor = kind(torch.arange(120).reshape(4, 5, 6).float())
    expected = np.arange(120).reshape(4, 5, 6)
    np.testing.assert_array_equal(np.asarray(label_image(tensor, LIKE).dataobj), expected)
    segmentation = Segmentation(LIKE, tensor.to(torch.uint8), {number: f"{number}" for number in range(1, 120)})
    assert segmentation.volumes()["7"] == 2
    figure = Figure()
    draw_overlay(figure, LIKE, tensor > 50, {1: "high"})
    assert len(figure.axes) == 3


def test_another_grid_is_refused() -> None:
    with pytest.raises(InputError, match=r"labels have the shape \(5, 4, 6\), but their image \(4, 5, 6\)"):
        label_image(np.zeros((5, 4, 6), np.uint8), LIKE)
    with pytest.raises(InputError, match="one 3D grid is needed"):
        to_simpleitk(LIKE, np.zeros((5, 4, 6)))
    with pytest.raises(InputError, match="one 3D grid is needed"):
        to_simpleitk(nibabel.Nifti1Image(np.zeros((4, 5, 6, 2)), np.eye(4)))


def test_shear_stays_in_simpleitk() -> None:
    affine = np.array([[1, 0.4, 0, 3], [0, 1.2, 0.1, 4], [0.2, 0, 2, 5], [0, 0, 0, 1.0]])
    point = to_simpleitk(nibabel.Nifti1Image(np.zeros((4, 5, 6)), affine)).TransformIndexToPhysicalPoint((3, 4, 5))
    np.testing.assert_allclose(np.array(point) * [-1, -1, 1], (affine @ [3, 4, 5, 1])[:3])


@pytest.mark.parametrize("dtype", [bool, ">i2", ">f8", np.float16, np.int64, np.uint8])
def test_voxels_of_any_type_become_a_simpleitk_image(dtype: Any) -> None:
    data = np.arange(120).reshape(4, 5, 6).astype(dtype)
    image = to_simpleitk(LIKE, data)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, data)
