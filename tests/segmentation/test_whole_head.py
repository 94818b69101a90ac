"""Hippocampi of a whole head, however it lies, agree with those of the template."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from monai_iunet.cli import app
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.segmentation.regions import CoarseSegmenter, Labels
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.whole_head import LEFT_BOX, WholeHead, load_template


@pytest.fixture(scope="module")
def segmenter() -> BundleSegmenter:
    return BundleSegmenter(bundle_folder(), "cpu")


@pytest.fixture(scope="module")
def expected(segmenter: BundleSegmenter) -> np.ndarray:
    return segmenter.segment(load_template(), region=np.eye(4)).labels


def no_brain() -> CoarseSegmenter:
    raise AssertionError("asked for, although the region is given")


def with_skull(brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dark skull, a bright scalp and a neck of blobs around a brain, whose values are up to 1."""
    inside = ndimage.binary_closing(brain > 0.05, iterations=3)
    distance = ndimage.distance_transform_edt(~inside)
    head = brain.copy()
    head[(distance > 0) & (distance <= 4)] = 0.1
    head[(distance > 4) & (distance <= 11)] = 0.9
    neck = np.zeros_like(inside)
    center = np.array(brain.shape[:2]) / 2
    x, y = np.meshgrid(*map(np.arange, brain.shape[:2]), indexing="ij")
    neck[((x - center[0]) ** 2 + (y - center[1]) ** 2) < 45**2, :30] = True
    texture = ndimage.gaussian_filter(rng.normal(size=brain.shape), 4)
    return np.where(neck & (head == 0), 0.5 + texture / texture.std() * 0.15, head).astype(np.float32)


def moved(data: np.ndarray, affine: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The head rotated, shifted and scaled in a larger, anisotropic grid, with a bias field and noise.

    Returns:
        The data, their affine, and the matrix from the template's millimeters to those of the image.
    """
    angles = np.deg2rad(rng.uniform(-30, 30, 3))
    rotation = nibabel.eulerangles.euler2mat(*angles) @ np.diag(rng.uniform(0.88, 1.12, 3))
    to_image = nibabel.affines.from_matvec(rotation, rng.uniform(-20, 20, 3))
    spacing = rng.uniform(0.9, 1.6, 3)
    size = np.ceil(260 / spacing).astype(int)
    grid = nibabel.affines.from_matvec(np.diag(spacing), -spacing * size / 2 + [0, -15, 5])
    to_template = np.linalg.inv(affine) @ np.linalg.inv(to_image) @ grid
    image = ndimage.affine_transform(data, to_template, output_shape=tuple(size), order=1)
    ramp = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    bias = 1 + sum(weight * axis for weight, axis in zip(rng.uniform(-0.2, 0.2, 3), ramp))
    return 1000 * (image * bias + rng.normal(0, 0.03, image.shape)), grid, to_image


def agreement(labels: np.ndarray, grid: np.ndarray, to_image: np.ndarray, expected: np.ndarray) -> list[float]:
    """Dice of each label with the template's, on the grid of the template."""
    template = load_template()
    to_grid = np.linalg.inv(grid) @ to_image @ template.affine
    back = ndimage.affine_transform(labels, to_grid, output_shape=template.shape, order=0)
    return [
        2 * ((back == value) & (expected == value)).sum() / ((back == value).sum() + (expected == value).sum())
        for value in range(1, 5)
    ]


def check(seed: int, skull: bool, segmenter: BundleSegmenter, expected: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    template = load_template()
    data = template.get_fdata(dtype=np.float32) / template.get_fdata().max()
    data, grid, to_image = moved(with_skull(data, rng) if skull else data, template.affine, rng)
    image = nibabel.Nifti1Image(data.astype(np.float32), grid)
    if seed % 2:  # stored with axes in another order and direction
        turned = image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
        labels = segmenter.segment(turned).labels
        labels = np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(labels, turned.affine)).dataobj)
    else:
        labels = segmenter.segment(image).labels
    assert min(agreement(labels, grid, to_image, expected)) > 0.85


@pytest.mark.slow
def test_a_head_that_was_moved(segmenter: BundleSegmenter, expected: np.ndarray) -> None:
    check(3, True, segmenter, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, *range(4, 11)])
def test_more_heads_that_were_moved(seed: int, segmenter: BundleSegmenter, expected: np.ndarray) -> None:
    check(seed, seed % 4 > 1, segmenter, expected)


@pytest.mark.parametrize("with_probabilities", [False, True])
@pytest.mark.parametrize("size", [0.8, 1.0, 1.2])
def test_a_crop_is_as_large_as_it_is_in_the_head(size: float, with_probabilities: bool) -> None:
    rotation = nibabel.eulerangles.euler2mat(0.2, -0.3, 0.1)
    region = nibabel.affines.from_matvec(size * rotation, [3.0, -2.0, 5.0])
    grid = nibabel.affines.from_matvec(np.diag([-1.5, 1.2, 1.0]), [70.0, -80.0, -60.0])
    shape, middle, radius = (100, 120, 100), np.mean(LEFT_BOX, axis=0), 9.0
    places = nibabel.affines.apply_affine(grid, np.moveaxis(np.indices(shape), 0, -1))
    centers = [nibabel.affines.apply_affine(region, middle * sign) for sign in ([1, 1, 1], [-1, 1, 1])]
    truth = [np.linalg.norm(places - center, axis=-1) < radius for center in centers]
    image = nibabel.Nifti1Image(np.any(truth, axis=0).astype(np.float32), grid)
    volumes = []

    def segment_crop(crop: nibabel.Nifti1Image, mirrored: bool) -> Labels:
        data = np.asarray(crop.dataobj)
        volumes.append(data.sum())
        found = (data > 0.5).astype(np.uint8)
        found[:, data.shape[1] // 2 :] *= 2
        probabilities = np.stack([1 - data, data * (found == 1), data * (found == 2)]) if with_probabilities else None
        return Labels(found, probabilities, None, {1: "model", 2: "model"})

    head = WholeHead({1: "front", 2: "back"}, no_brain)
    result = head.segment(image, region, segment_crop, probabilities=with_probabilities)
    np.testing.assert_allclose(volumes, 4 / 3 * np.pi * radius**3, rtol=0.02)
    for values, true in zip(((1, 2), (3, 4)), truth):
        found = np.isin(result.labels, values)
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.97
    assert result.weights == dict.fromkeys((1, 2, 3, 4), "model")
    assert (result.probabilities is not None) == with_probabilities
    if with_probabilities:
        np.testing.assert_allclose(result.probabilities.sum(0), 1, atol=1e-5)


def test_a_crop_may_reach_beyond_the_image() -> None:
    template = load_template(resolution=2)
    cut = template.slicer[:40, :, :30]  # the box of the right side is not in it, that of the left in part

    def everything(crop: nibabel.Nifti1Image, mirrored: bool) -> Labels:
        return Labels(np.ones(crop.shape, np.uint8), None, None, {1: "model"})

    labels = WholeHead({1: "all"}, no_brain).segment(cut, np.eye(4), everything).labels
    places = nibabel.affines.apply_affine(cut.affine, np.argwhere(labels == 1))
    low, high = np.array(LEFT_BOX)
    assert (places >= low - 1).all()
    assert (places <= high + 1).all()
    assert len(places) > 1000
    assert not (labels == 2).any()


def test_the_command_tells_the_sides_apart(tmp_path: Path) -> None:
    nibabel.save(load_template(resolution=2), tmp_path / "head.nii.gz")
    words = ["segment", str(tmp_path / "head.nii.gz"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "left anterior hippocampus" in result.output
    assert "right, whole" in result.output
    found = nibabel.load(tmp_path / "out" / "head_seg.nii.gz")
    labels = np.asarray(found.dataobj)
    for value, sign in ((1, -1), (2, -1), (3, 1), (4, 1)):
        center = nibabel.affines.apply_affine(found.affine, np.argwhere(labels == value).mean(0))
        assert 15 < sign * center[0] < 40
