"""Damaged copies of images: labels go where the image goes, and intensities change where there is tissue."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from monai_iunet.bundling.damage import DAMAGES, INTENSITY, crop_case, damage_case
from tests.bundles.made_data import ball

SHAPE = np.array([32, 36, 28])
LABELS = ball(SHAPE, SHAPE * [0.5, 0.4, 0.5], 6).astype(np.uint8)
DATA = 100 + 400.0 * LABELS + np.random.default_rng(0).normal(0, 5, SHAPE)
DATA[:3] = 0  # air
IMAGE = nibabel.Nifti1Image(DATA.astype(np.float32), np.eye(4))


@pytest.mark.parametrize("kind", DAMAGES)
def test_labels_go_where_the_image_goes(kind: str) -> None:
    for seed in range(3):
        image, labels = damage_case(IMAGE, LABELS, kind, np.random.RandomState(seed))
        assert image.shape == labels.shape
        assert sorted(image.shape) == sorted(IMAGE.shape)
        assert np.isfinite(image.get_fdata()).all()
        assert labels.sum() == LABELS.sum()
        if kind in ("region", "side", "orientation", "none", "zoom"):
            assert (image.get_fdata()[labels == 1] > 400).all()
        again, _ = damage_case(IMAGE, LABELS, kind, np.random.RandomState(seed))
        np.testing.assert_array_equal(image.get_fdata(), again.get_fdata())
        same = np.array_equal(image.get_fdata(), IMAGE.get_fdata()) and np.array_equal(image.affine, IMAGE.affine)
        assert same == (kind == "none")
        if kind in INTENSITY:
            assert (image.get_fdata()[:3] == 0).all()


@pytest.mark.parametrize("kind", ["blur", "resolution", "ringing"])
def test_blurred_images_stay_in_place(kind: str) -> None:
    for seed in range(3):
        image, _ = damage_case(IMAGE, LABELS, kind, np.random.RandomState(seed))
        bright = np.clip(image.get_fdata() - 200, 0, None)
        center = [(bright * index).sum() / bright.sum() for index in np.indices(image.shape)]
        np.testing.assert_allclose(center, np.argwhere(LABELS).mean(0), atol=0.3)


def test_a_window_of_the_whole_image_crops_nothing() -> None:
    image = nibabel.Nifti1Image(np.zeros((20, 30, 40), np.float32), np.diag([2.0, 1.0, 1.0, 1.0]))
    labels = np.ones((20, 30, 40), np.uint8)
    cropped, left = crop_case(image, labels, np.array([-2.0, 10.0, -1.0]), np.random.RandomState(0))
    assert cropped.shape == left.shape == (20, 10, 40)
