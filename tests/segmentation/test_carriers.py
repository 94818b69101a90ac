"""Whatever carries an image, in whatever space and orientation: the same labels at the same places of the patient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys

from monai_iunet import BundleSegmenter, segment, to_simpleitk
from monai_iunet.errors import InputError
from monai_iunet.io.geometry import RAS_TO_LPS, from_simpleitk

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*axes)
]


@pytest.fixture(scope="module")
def crop(left_hippocampus: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(left_hippocampus.get_fdata(dtype=np.float32), left_hippocampus.affine)
    image.set_sform(image.affine, code=1)
    return image


@pytest.fixture(scope="module")
def expected(crop: nibabel.Nifti1Image, segmenter: BundleSegmenter) -> nibabel.Nifti1Image:
    return segment(crop, segmenter)


def turned(image: nibabel.Nifti1Image, axcodes: str) -> nibabel.Nifti1Image:
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(axcodes)
    )
    return image.as_reoriented(turn)


def as_ras(labels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(labels.astype(np.uint8), affine)).dataobj)


def by_nibabel(image: nibabel.Nifti1Image, segmenter: BundleSegmenter, _: Path) -> np.ndarray:
    labels = segment(image, segmenter)
    return as_ras(np.asarray(labels.dataobj), labels.affine)


def by_file(suffix: str) -> Callable[..., np.ndarray]:
    def through_a_file(image: nibabel.Nifti1Image, segmenter: BundleSegmenter, folder: Path) -> np.ndarray:
        path = folder / f"image{suffix}"
        if suffix.startswith(".nii"):
            nibabel.save(image, path)
        else:
            SimpleITK.WriteImage(to_simpleitk(image), path)
        labels = segment(path, segmenter)
        return as_ras(np.asarray(labels.dataobj), labels.affine)

    return through_a_file


def by_simpleitk(image: nibabel.Nifti1Image, segmenter: BundleSegmenter, _: Path) -> np.ndarray:
    carrier = to_simpleitk(image)
    labels = segment(carrier, segmenter)
    assert labels.GetDirection() == carrier.GetDirection()
    converted = from_simpleitk(labels)
    return as_ras(np.asarray(converted.dataobj), converted.affine)


def by_meta_tensor(space: Any) -> Callable[..., np.ndarray]:
    def through_a_tensor(image: nibabel.Nifti1Image, segmenter: BundleSegmenter, _: Path) -> np.ndarray:
        to_space = RAS_TO_LPS if space == SpaceKeys.LPS else np.eye(4)
        meta = {} if space is None else {MetaKeys.SPACE: space}
        tensor = torch.from_numpy(image.get_fdata(dtype=np.float32).copy())[None]
        labels = segment(MetaTensor(tensor, affine=torch.from_numpy(to_space @ image.affine), meta=meta), segmenter)
        assert labels.shape == tensor.shape
        assert (space is None) or labels.meta[MetaKeys.SPACE] == space
        np.testing.assert_allclose(labels.affine, to_space @ image.affine)
        return as_ras(labels[0].numpy(), to_space @ labels.affine.numpy())

    return through_a_tensor


def by_array(image: nibabel.Nifti1Image, segmenter: BundleSegmenter, _: Path) -> np.ndarray:
    labels = segment(image.get_fdata(dtype=np.float32), segmenter, affine=image.affine)
    return as_ras(labels, image.affine)


CARRIERS: dict[str, Callable[..., np.ndarray]] = {
    "nibabel": by_nibabel,
    "SimpleITK": by_simpleitk,
    "MetaTensor in RAS": by_meta_tensor(SpaceKeys.RAS),
    "MetaTensor in LPS": by_meta_tensor(SpaceKeys.LPS),
    "MetaTensor without a space": by_meta_tensor(None),
    "array": by_array,
    "NIfTI": by_file(".nii"),
}


@pytest.mark.parametrize(
    "carrier",
    [pytest.param(name, marks=() if name in ("NIfTI", "SimpleITK") else pytest.mark.long) for name in CARRIERS],
)
def test_six_orientations_by_all_carriers(
    carrier: str, crop: nibabel.Nifti1Image, expected: nibabel.Nifti1Image, segmenter: BundleSegmenter, tmp_path: Path
) -> None:
    wanted = as_ras(np.asarray(expected.dataobj), expected.affine)
    assert wanted.max() == 2
    for axcodes in ("RAS", "LPS", "PIR", "SRA", "ALS", "ILP"):
        np.testing.assert_array_equal(CARRIERS[carrier](turned(crop, axcodes), segmenter, tmp_path), wanted, axcodes)


@pytest.mark.slow
@pytest.mark.parametrize("carrier", [*CARRIERS, ".nrrd", ".mha", ".nii.gz"])
def test_all_48_orientations_by_all_carriers(
    carrier: str, crop: nibabel.Nifti1Image, expected: nibabel.Nifti1Image, segmenter: BundleSegmenter, tmp_path: Path
) -> None:
    assert len(set(ORIENTATIONS)) == 48
    wanted = as_ras(np.asarray(expected.dataobj), expected.affine)
    way = CARRIERS.get(carrier) or by_file(carrier)
    for axcodes in ORIENTATIONS:
        np.testing.assert_array_equal(way(turned(crop, axcodes), segmenter, tmp_path), wanted, axcodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int16, torch.int64])
def test_tensors_of_all_types(dtype: torch.dtype, segmenter: BundleSegmenter, crop: nibabel.Nifti1Image) -> None:
    tensor = torch.from_numpy(crop.get_fdata(dtype=np.float32) * 200 / crop.get_fdata().max()).to(dtype)
    labels = segment(tensor, segmenter, affine=crop.affine)
    assert labels.dtype == torch.uint8
    assert labels.shape == tensor.shape
    assert labels.max() == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: (data.astype(object), np.eye(4)), "voxels of type object, real numbers are needed"),
        (lambda data: (data.astype(complex), np.eye(4)), "voxels of type complex128"),
        (lambda data: (data.astype(str), np.eye(4)), "voxels of type <U"),
        (lambda data: (data, np.full((4, 4), np.nan)), "no valid affine"),
        (lambda data: (data, np.diag([1, 1, np.inf, 1])), "no valid affine"),
        (lambda data: (data, np.zeros((4, 4))), "no valid affine"),
        (lambda data: (data, np.eye(3)), "no valid affine"),
        (lambda data: (data, "affine"), "no valid affine"),
        (lambda data: (data, nibabel.affines.from_matvec(np.eye(3), [1, 2, 3]).T), "no valid affine"),
        (lambda data: (data, None), "no valid affine"),
        (lambda data: (data[0], np.eye(4)), "a 3D volume is needed"),
        (lambda data: (np.stack([data, data]), np.eye(4)), "a 3D volume is needed"),
    ],
)
def test_arrays_that_are_no_image_are_refused(
    make: Callable[[np.ndarray], tuple[Any, Any]], message: str, segmenter: BundleSegmenter
) -> None:
    data, affine = make(np.random.default_rng(0).random((30, 40, 30)))
    with pytest.raises(InputError, match=message) as caught:
        segment(data, segmenter, affine=affine)
    assert "\n" not in str(caught.value)


def test_the_longest_floats_are_taken(segmenter: BundleSegmenter, crop: nibabel.Nifti1Image) -> None:
    labels = segment(crop.get_fdata().astype(np.longdouble), segmenter, affine=crop.affine)
    assert labels.max() == 2


def test_an_unknown_space_is_refused(segmenter: BundleSegmenter) -> None:
    tensor = MetaTensor(torch.rand(1, 30, 40, 30), affine=torch.eye(4), meta={MetaKeys.SPACE: "scanner"})
    with pytest.raises(InputError, match="space 'scanner', RAS or LPS is needed"):
        segment(tensor, segmenter)
