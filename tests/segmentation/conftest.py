"""Fixtures for segmentation: the hippocampus bundle, and an image for it."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from monai_iunet import BundleSegmenter, bundle_folder, load_template
from monai_iunet.segmentation.whole_head import LEFT_BOX


@pytest.fixture(scope="session")
def segmenter() -> BundleSegmenter:
    return BundleSegmenter(bundle_folder("hippocampus"), "cpu")


@pytest.fixture(scope="session")
def left_hippocampus() -> nibabel.Nifti1Image:
    """The region of the left hippocampus in the template, float64."""
    template = load_template()
    low, high = (np.linalg.inv(template.affine) @ [*corner, 1] for corner in LEFT_BOX)
    image = template.slicer[tuple(slice(int(a), int(b) + 1) for a, b in zip(low[:3], high[:3]))]
    return nibabel.Nifti1Image(image.get_fdata(), image.affine)
