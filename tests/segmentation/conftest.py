"""Fixtures for segmentation: the hippocampus bundle, and an image for it."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet import BundleSegmenter, bundle_folder, load_template
from monai_iunet.io import bundles
from monai_iunet.segmentation.whole_head import LEFT_BOX
from tests.bundles.helpers import copy_bundle


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


@pytest.fixture(scope="session")
def bundle_of_small_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hippocampus bundle with windows of 16 voxels per axis, which take a twentieth of the time."""
    folder = copy_bundle(tmp_path_factory.mktemp("bundles") / bundles.DEFAULT_BUNDLE)
    config = folder / "configs" / "inference.json"
    text = config.read_text()
    assert "[40, 56, 40]" in text
    config.write_text(text.replace("[40, 56, 40]", "[16, 16, 16]"))
    return folder


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch, bundle_of_small_windows: Path) -> None:
    """Segment by that bundle where it is the default one: for tests of what is around the network."""
    installed = {**bundles.installed_bundles(), bundles.DEFAULT_BUNDLE: bundle_of_small_windows}
    monkeypatch.setattr(bundles, "installed_bundles", lambda: installed)
