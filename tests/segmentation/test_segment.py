"""`monai_iunet.segment` and what the command adds to it: kinds of images, formats, tables, probabilities, bundles."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, Orientationd, Spacingd
from torch import nn

import monai_iunet
from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.dicom_series import series_files
from monai_iunet.io.geometry import from_simpleitk, simpleitk_affine, to_simpleitk
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.dicom_seg import write_dicom_seg
from monai_iunet.segmentation.segmenter import BundleSegmenter, Segmentation
from monai_iunet.segmentation.whole_head import load_template
from monai_iunet.system import describe_system
from tests.io.dicom_files import write_series
from tests.test_cli import call

EXAMPLES = Path(__file__).parents[3] / "shared" / "data" / "examples"


@pytest.fixture(scope="module")
def crop(left_hippocampus: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """The left hippocampus of the template, with its axes to the left, to the back and up, as SimpleITK likes them."""
    image = left_hippocampus.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    return nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) * 1000, image.affine)


@pytest.fixture(scope="module")
def expected(segmenter: BundleSegmenter, crop: nibabel.Nifti1Image) -> np.ndarray:
    labels = segmenter.segment(crop).labels
    assert (labels == 1).sum() > 800
    assert (labels == 2).sum() > 800
    return labels


def test_every_kind_of_image_comes_back_as_its_kind(
    segmenter: BundleSegmenter, crop: nibabel.Nifti1Image, expected: np.ndarray, tmp_path: Path
) -> None:
    data, affine = crop.get_fdata(dtype=np.float32), crop.affine
    nibabel.save(crop, tmp_path / "crop.nii.gz")
    for path in (tmp_path / "crop.nii.gz", str(tmp_path / "crop.nii.gz")):
        found = monai_iunet.segment(path, segmenter)
        np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
        np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    found = monai_iunet.segment(crop, segmenter)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    assert found.get_data_dtype() == np.uint8
    found = monai_iunet.segment(nibabel.MGHImage(data, affine.astype(np.float32)), segmenter)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)

    image = to_simpleitk(crop)
    found = monai_iunet.segment(image, segmenter)
    assert found.GetSpacing() == image.GetSpacing()
    assert found.GetOrigin() == image.GetOrigin()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(found).T, expected)

    found = monai_iunet.segment(data, segmenter, affine=affine)
    np.testing.assert_array_equal(found, expected)
    found = monai_iunet.segment(torch.from_numpy(data)[None], segmenter, affine=affine)
    np.testing.assert_array_equal(found[0].numpy(), expected)
    tensor = MetaTensor(torch.from_numpy(data)[None], affine=affine)
    found = monai_iunet.segment(tensor, segmenter)
    assert isinstance(found, MetaTensor)
    np.testing.assert_array_equal(found.affine.numpy(), affine)
    np.testing.assert_array_equal(found[0].numpy(), expected)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((5, 5, 5)), {}, "has no valid affine"),
        (np.zeros((5, 5)), {"affine": np.eye(4)}, r"shape \(5, 5\), a 3D volume"),
        (np.full((5, 5, 5), np.nan), {"affine": np.eye(4)}, "125 voxels are NaN"),
        (np.zeros((5, 5, 5)), {"affine": np.zeros((4, 4))}, "has no valid affine"),
        (MetaTensor(torch.zeros(1, 5, 5, 5)), {"affine": np.eye(3)}, "has no valid affine"),
        (SimpleITK.Image(5, 5, SimpleITK.sitkFloat32), {}, "3D volume of scalars"),
        (nibabel.Nifti1Image(np.zeros((5, 5, 5)), np.eye(4)), {"affine": np.eye(4)}, "has an affine of its own"),
        ([1, 2, 3], {}, "a path, a nibabel or SimpleITK image"),
        (np.eye(100, 25).reshape(100, 5, 5), {"affine": np.eye(4)}, "no head found"),
        (np.zeros((5, 5, 5)), {"affine": np.eye(4)}, "all voxels have the same value"),
        ("nowhere.nii", {}, "no such file"),
    ],
)
def test_what_cannot_be_segmented_is_refused(
    image: Any, options: dict[str, Any], message: str, segmenter: BundleSegmenter
) -> None:
    with pytest.raises(InputError, match=message):
        monai_iunet.segment(image, segmenter, **options)


def without_codes(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    return image


def in_meters(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    image.header.set_xyzt_units("meter")
    return image


def with_nan(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(np.where(np.arange(image.shape[2]) > 0, image.get_fdata(), np.nan), image.affine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_codes, "scan: has no orientation"),
        (in_meters, "scan: its header gives voxels .* in the unit meter"),
        (with_nan, "scan: .* voxels are NaN or infinite"),
        (lambda image: image.slicer[..., :1], "scan: all voxels have the same value"),
        (lambda image: image.get_fdata(), "scan: a nibabel image is needed, got ndarray"),
        (lambda _: "scan.nii.gz", "scan: a nibabel image is needed, got str"),
    ],
)
def test_a_segmenter_refuses_what_a_file_of_it_would_be_refused_for(
    change: Any, message: str, segmenter: BundleSegmenter
) -> None:
    data = np.zeros((8, 9, 10), np.float32)
    data[2:5, 2:5, 2:5] = 1
    with pytest.raises(InputError, match=message):
        segmenter.segment(change(nibabel.Nifti1Image(data, np.diag([1, 1, 2, 1]))), "scan")


@pytest.mark.parametrize("shape", [(35, 51, 1), (1, 51, 36), (1, 2, 1)])
def test_thin_volumes_are_segmented(shape: tuple[int, ...], segmenter: BundleSegmenter) -> None:
    image = np.random.default_rng(0).random(shape) > 0.5
    image.flat[:2] = False, True
    labels = monai_iunet.segment(image, segmenter, affine=np.eye(4))
    assert labels.shape == shape
    assert labels.dtype == np.uint8


def test_the_scale_of_the_intensities_does_not_matter(segmenter: BundleSegmenter, crop: nibabel.Nifti1Image) -> None:
    data = crop.get_fdata(dtype=np.float32)
    expected = monai_iunet.segment(data, segmenter, affine=crop.affine)
    for factor in (1e-6, 1e6):
        found = monai_iunet.segment(data * np.float32(factor), segmenter, affine=crop.affine)
        assert (found == expected).mean() > 0.9999


def test_a_dicom_series_and_its_formats(crop: nibabel.Nifti1Image, expected: np.ndarray, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", crop.get_fdata(), spacing=(1, 1, 1), modality="MR")
    SimpleITK.WriteImage(to_simpleitk(crop), tmp_path / "one.nrrd")
    SimpleITK.WriteImage(to_simpleitk(crop), tmp_path / "two.mhd")
    images = [folder, tmp_path / "one.nrrd", tmp_path / "two.mhd"]
    code, printed, error = call(
        "segment", *images, "--output", tmp_path / "out", "--no-overlay", "--volumes", "csv", "--device", "cpu"
    )
    assert code == 0, error
    records = [f"{name}_seg.json" for name in ("one", "series", "two")]
    names = sorted([*records, "one_seg.nii.gz", "series_seg.nii.gz", "two_seg.nii.gz", "volumes.csv"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    labels = nibabel.load(tmp_path / "out" / "one_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), expected)
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open()))
    assert [row["image"] for row in rows] == ["series", "series", "one", "one", "two", "two"]
    assert float(rows[2]["volume_mm3"]) == (expected == 1).sum()
    assert f"{(expected == 1).sum()} mm³" in printed


def test_labels_in_the_format_of_the_input(crop: nibabel.Nifti1Image, expected: np.ndarray, tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "series", crop.get_fdata(), spacing=(1, 1, 1), modality="MR")
    for name in ("one.nrrd", "two.mhd", "three.mha", "four.nii"):
        SimpleITK.WriteImage(to_simpleitk(crop), tmp_path / name)
    images = [folder, *(tmp_path / name for name in ("one.nrrd", "two.mhd", "three.mha", "four.nii"))]
    code, _, error = call(
        "segment", *images, "--format", "input", "--output", tmp_path / "out", "--no-overlay", "--volumes", "json"
    )
    assert code == 0, error
    out = tmp_path / "out"
    written = ["four_seg.nii", "one_seg.nrrd", "series_seg.dcm", "three_seg.mha", "two_seg.mha"]
    names = sorted([*written, *(f"{name.partition('_')[0]}_seg.json" for name in written), "volumes.json"])
    assert sorted(path.name for path in out.iterdir()) == names
    for name in ("one_seg.nrrd", "two_seg.mha", "three_seg.mha"):
        image = SimpleITK.ReadImage(out / name)
        np.testing.assert_allclose(simpleitk_affine(image), crop.affine, atol=1e-5)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, expected)
    volumes = json.loads((out / "volumes.json").read_text())
    assert volumes["one"]["anterior hippocampus"]["volume_mm3"] == (expected == 1).sum()

    written = highdicom.seg.segread(out / "series_seg.dcm")
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    slices = sorted((SimpleITK.ReadImage(name) for name in series), key=lambda image: image.GetOrigin()[2])
    uids = [image.GetMetaData("0008|0018") for image in slices]
    pixels = written.get_pixels_by_source_instance(uids, combine_segments=True)
    assert (pixels > 0).sum() > 1600
    descriptions = [written.get_segment_description(number) for number in (1, 2)]
    assert [each.SegmentLabel for each in descriptions] == ["anterior hippocampus", "posterior hippocampus"]
    assert descriptions[0].segmented_property_type.meaning == "Hippocampus"
    # The series is the crop, moved and with its gray values rounded.
    assert (expected == pixels.T).mean() > 0.995


def test_probabilities(crop: nibabel.Nifti1Image, expected: np.ndarray, tmp_path: Path) -> None:
    nibabel.save(crop, tmp_path / "crop.nii.gz")
    code, _, _ = call("segment", tmp_path / "crop.nii.gz", "--output", tmp_path / "out", "--probabilities")
    assert code == 0
    image = nibabel.load(tmp_path / "out" / "crop_prob.nii.gz")
    probabilities = image.get_fdata()
    assert probabilities.shape == (*crop.shape, 3)
    np.testing.assert_allclose(image.affine, crop.affine, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-3)
    assert (probabilities.argmax(-1) == expected).mean() > 0.999


@pytest.mark.long
def test_probabilities_of_both_sides() -> None:
    segmenter = BundleSegmenter(bundle_folder(), "cpu", probabilities=True)
    found = segmenter.segment(load_template(), region=np.eye(4))
    assert found.probabilities is not None
    assert found.probabilities.shape == (5, *found.labels.shape)
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    for value in found.names:
        assert found.probabilities[value][found.labels == value].mean() > 0.7
    mirrored = segmenter.segment_crop(found.image.slicer[:40, :40, :40], mirrored=True)[1]
    assert mirrored is not None
    assert mirrored.shape == (3, 40, 40, 40)
    segmenter.probabilities_dtype = np.dtype(np.float16)
    rounded = segmenter.segment(found.image, region=np.eye(4))
    np.testing.assert_array_equal(rounded.labels, found.labels)
    assert rounded.probabilities is not None
    assert rounded.probabilities.dtype == np.float16
    np.testing.assert_allclose(rounded.probabilities, found.probabilities, atol=1e-3)


def test_a_network_that_tells_left_from_right_sees_no_mirror_image(crop: nibabel.Nifti1Image, tmp_path: Path) -> None:
    nibabel.save(crop, tmp_path / "crop.nii.gz")
    words = ("--bundle", "headneck", "--mirror", "--output", tmp_path / "out")
    code, _, error = call("segment", tmp_path / "crop.nii.gz", *words)
    message = "tells right parotid from left parotid, whose labels would change places in the mirror image"
    assert code == 2
    assert message in error
    assert not (tmp_path / "out" / "crop_seg.nii.gz").exists()
    with pytest.raises(InputError, match=message):
        monai_iunet.segment(crop, "headneck", mirrored=True, device="cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, torch.float16, "half precision"])
def test_types_that_probabilities_cannot_have_are_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match=r"probabilities_dtype .*: float32 or float16, of NumPy, is needed"):
        BundleSegmenter(bundle_folder(), "cpu", probabilities=True, probabilities_dtype=dtype)


@pytest.mark.parametrize("options", [{"softmax": True}, {"argmax": True, "to_onehot": 3}, {"threshold": 0.5}])
def test_a_bundle_whose_postprocessing_makes_no_labels_is_refused(options: dict[str, Any]) -> None:
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    segmenter.network = nn.Conv3d(1, 3, 1)
    segmenter.inferer = SimpleInferer()
    transform = Activationsd if "softmax" in options else AsDiscreted
    segmenter.postprocessing = Compose([transform("pred", **options)])
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((16, 16, 16), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"inference\.json gives 3 channels of .*, one with whole numbers"):
        segmenter.segment(image)


@pytest.mark.parametrize("spacing", [None, (2, 2, 2)])
@pytest.mark.parametrize("flips", [(-1, -1, 1), (-1, 1, 1), (1, 1, 1)])
def test_labels_that_a_bundle_leaves_on_the_grid_of_its_network_are_refused(
    flips: tuple[int, ...], spacing: tuple[int, ...] | None
) -> None:
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    segmenter.network, segmenter.inferer, segmenter.quality = nn.Conv3d(1, 2, 1), SimpleInferer(), None
    with torch.no_grad():
        segmenter.network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1))
        segmenter.network.bias.copy_(torch.tensor([0.5, 0.0]))
    turn = Orientationd("image", "RAS", labels=None)
    segmenter.preprocessing = Compose([turn, *([] if spacing is None else [Spacingd("image", spacing)])])
    discrete = AsDiscreted("pred", argmax=True)
    back = Invertd("pred", segmenter.preprocessing, "image", nearest_interp=True, to_tensor=True)
    data = np.zeros((12, 12, 12), np.float32)
    data[2:4] = 1
    image = nibabel.Nifti1Image(data, np.diag([*flips, 1]))
    segmenter.postprocessing = Compose([discrete, back])
    np.testing.assert_array_equal(segmenter.segment(image).labels[[1, 2, 3, 9]], data[[1, 2, 3, 9]])
    segmenter.postprocessing = Compose([discrete])
    if flips == (1, 1, 1) and spacing is None:  # whose grids are one
        np.testing.assert_array_equal(segmenter.segment(image).labels, data)
        return
    with pytest.raises(InputError, match=r"leaves labels on the grid of the network, not on that of the image\. Add"):
        segmenter.segment(image)


def test_bundles_by_name() -> None:
    assert bundle_folder().name == bundle_folder("hippocampus").name == "iunet_hippocampus_mri_segmentation"
    assert bundle_folder(bundle_folder("iunet_headneck_ct_segmentation")).name == "iunet_headneck_ct_segmentation"
    for name in ("iunet", "liver"):
        with pytest.raises(InputError, match=f"{name}: neither a bundle folder nor the name of one bundle"):
            bundle_folder(name)


def test_installed_bundles_come_before_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("headneck", "hippocampus", "mine"):
        (tmp_path / name).mkdir()
    assert bundle_folder("headneck").name == "iunet_headneck_ct_segmentation"
    assert bundle_folder("./headneck") == Path("headneck")
    assert bundle_folder(Path("./headneck")) == Path("headneck")
    assert bundle_folder(tmp_path / "headneck") == tmp_path / "headneck"
    assert bundle_folder("mine") == Path("mine")
    for name in ("", "missing/", "nothing"):
        with pytest.raises(InputError, match="neither a bundle folder nor the name of one bundle"):
            bundle_folder(name)


def break_bundle(folder: Path, config: str, change: Any) -> Path:
    """A copy of a bundle with a config that was changed."""
    shutil.copytree(bundle_folder("hippocampus"), folder, ignore=shutil.ignore_patterns("eval", "train"))
    path = folder / "configs" / config
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def without(*keys: str) -> Any:
    def leave_out(config: dict[str, Any]) -> dict[str, Any]:
        place = config
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return config

    return leave_out


INVERSION = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
FOREIGN: dict[str, tuple[str, Any, str]] = {
    "no preprocessing": ("inference.json", without("preprocessing"), "has no preprocessing, by which"),
    "no network_def": ("inference.json", without("network_def"), "has no network_def, by which"),
    "no inferer": ("inference.json", without("inferer"), "has no inferer, by which"),
    "other network": (
        "inference.json",
        lambda config: {**config, "network_def": {"_target_": "no_such.Network"}},
        "its inference.json cannot be used here",
    ),
    "other reference": (
        "inference.json",
        lambda config: {**config, "inferer": "$@nothing"},
        "its inference.json cannot be used here",
    ),
    "labels that are brought back twice": (
        "inference.json",
        lambda config: {**config, "postprocessing": {"_target_": "Compose", "transforms": [INVERSION]}},
        "labels of a LabelInferer are on the grid of the image already",
    ),
    "not JSON": ("inference.json", lambda _: "{", "not a config"),
    "metadata not JSON": ("metadata.json", lambda _: "{", "does not describe a segmentation"),
    "metadata a list": ("metadata.json", lambda _: "[]", "does not describe a segmentation"),
    "no classes": (
        "metadata.json",
        without("network_data_format", "outputs", "pred", "channel_def"),
        "does not describe a segmentation",
    ),
    "classes by name": (
        "metadata.json",
        lambda config: json.loads(json.dumps(config).replace('"1": "anterior', '"one": "anterior')),
        "channel_def must name each class by its number",
    ),
    "a name for two classes": (
        "metadata.json",
        lambda config: json.loads(json.dumps(config).replace('"2": "posterior', '"2": "anterior')),
        "as many different names",
    ),
    "a class left out": (
        "metadata.json",
        lambda config: json.loads(json.dumps(config).replace('"2": "posterior', '"3": "posterior')),
        "must have the numbers 0, 1, 2",
    ),
    "no input": ("metadata.json", without("network_data_format", "inputs"), "does not describe a segmentation"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_bundle_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    config, change, message = FOREIGN[name]
    folder = break_bundle(tmp_path / "bundle", config, change)
    with pytest.raises(InputError, match=message) as caught:
        BundleSegmenter(folder, "cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_class_without_a_name_is_said(tmp_path: Path) -> None:
    # Quality models know the names too.
    folder = break_bundle(
        tmp_path / "bundle", "metadata.json", without("network_data_format", "outputs", "pred", "channel_def", "2")
    )
    for model in (folder / "models").glob("*quality.json"):
        model.unlink()
    segmenter = BundleSegmenter(folder, "cpu")
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((35, 50, 36), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"labels 2 have no name in its metadata\.json, which names 1"):
        segmenter.describe_crop(image)


def test_a_name_without_a_class_is_said(tmp_path: Path) -> None:
    def named(metadata: dict[str, Any]) -> dict[str, Any]:
        metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["3"] = "amygdala"
        return metadata

    folder = break_bundle(tmp_path / "bundle", "metadata.json", named)
    for model in (folder / "models").glob("*quality.json"):
        model.unlink()
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((35, 50, 36), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"metadata\.json names 4 classes, its network tells 3 apart"):
        BundleSegmenter(folder, "cpu").segment(image)


def test_the_list_of_bundles_says_what_the_metadata_say() -> None:
    code, printed, _ = call("bundles")
    assert code == 0
    text = "".join(printed.split())
    for folder in (bundle_folder("headneck"), bundle_folder("hippocampus")):
        metadata = json.loads((folder / "configs" / "metadata.json").read_text())
        assert f"{metadata['eval_metrics']['mean_dice']:.3f}" in text
        assert f"{metadata['resources']['training_step_mib_beside_parameters_and_gradients']}MiB" in text


def test_info_names_versions() -> None:
    code, printed, _ = call("info")
    assert code == 0
    assert f"torch            {torch.__version__}" in printed
    assert describe_system()["processor"] in printed


def test_the_series_of_a_folder_can_be_chosen(crop: nibabel.Nifti1Image, tmp_path: Path) -> None:
    for number in (1, 2):
        write_series(tmp_path / "ct", crop.get_fdata(), spacing=(1, 1, 1), number=number)
    code, _, error = call("segment", tmp_path / "ct", "--output", tmp_path / "out")
    assert code == 2
    assert "choose one with --series UID" in error
    code, _, _ = call("segment", tmp_path / "ct", "--series", ".2", "--output", tmp_path / "out", "--no-overlay")
    assert code == 0


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs ../shared/data/examples")
@pytest.mark.parametrize(
    ("name", "bundle", "format", "written"),
    [
        ("ct_dicom", "headneck", "nifti", "ct_dicom_seg.nii.gz"),
        ("ct_torso.nii.gz", "headneck", "input", "ct_torso_seg.nii.gz"),
        ("mr_dicom_hippocampus_crop", "hippocampus", "input", "mr_dicom_hippocampus_crop_seg.dcm"),
    ],
)
def test_images_of_scanners(name: str, bundle: str, format: str, written: str, tmp_path: Path) -> None:
    code, printed, error = call(
        "segment", EXAMPLES / name, "--bundle", bundle, "--output", tmp_path, "--format", format
    )
    assert code == 0, error
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([written, written.split("_seg")[0] + "_seg.png"])
    if bundle == "hippocampus":
        volumes = [float(line.split("mm³")[0].split()[-1]) for line in printed.splitlines() if "mm³" in line]
        assert all(500 < volume < 3500 for volume in volumes)
    else:
        assert nibabel.load(tmp_path / written).shape == read_image(EXAMPLES / name).shape


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs ../shared/data/examples")
def test_a_series_without_identity_gives_no_dicom_seg(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    folder = EXAMPLES / "ct_dicom"  # an anonymizer has emptied its UIDs
    image = read_image(folder)
    found = Segmentation(image, np.zeros(image.shape, np.uint8), {1: "mandible"})
    with pytest.raises(InputError, match="lacks what a DICOM SEG has to refer to"):
        write_dicom_seg(series_files(folder), found, tmp_path / "labels.dcm")


def test_simpleitk_geometry_survives(crop: nibabel.Nifti1Image) -> None:
    np.testing.assert_allclose(from_simpleitk(to_simpleitk(crop)).affine, crop.affine)


def test_the_example_is_no_ct() -> None:
    code, _, error = call("segment", "--example", "--bundle", "headneck")
    assert code == 2
    assert "the example is a head" in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
@pytest.mark.long
def test_a_disk_that_is_full_leaves_no_part_of_a_file(crop: nibabel.Nifti1Image, tmp_path: Path) -> None:
    import resource

    nibabel.save(crop, tmp_path / "crop.nii.gz")
    words = ["segment", "crop.nii.gz", "--output", "out", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-c", "from monai_iunet.cli import main; main()", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},  # it writes, too
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),  # bytes that a file may have
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []
