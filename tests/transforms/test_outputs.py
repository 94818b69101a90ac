"""Labels come back to the grid of the image, however it lies."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, LoadImaged, Orientationd, Spacingd

from monai_iunet.errors import InputError
from monai_iunet.planning.live_bytes import LiveBytes
from monai_iunet.transforms.outputs import LabelsOnImageGridd, SaveImageLabelsd

PREPROCESSING = Compose(
    [
        LoadImaged("image", ensure_channel_first=True),
        Orientationd("image", "RAS", labels=None),
        CropForegroundd("image", "image", allow_smaller=True),
        Spacingd("image", (2.0, 2.0, 2.0)),
    ]
)


def ball() -> tuple[np.ndarray, np.ndarray]:
    """An image in which the right half of a ball is 2 and the left 1, and its affine, oblique and anisotropic."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (30, 26, 22)), indexing="ij"))
    inside = ((grid - np.array([15, 13, 11]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 81
    image = np.where(inside, 1 + (grid[0] > 15), 0).astype(np.float32)
    affine = np.diag([1.0, 1.2, 1.5, 1.0])
    affine[:3, 3] = [-20, 30, 5]
    return image, affine


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_every_axis_flip_and_permutation(order: tuple[int, ...], flips: tuple[int, ...], tmp_path: Path) -> None:
    data, affine = ball()
    turned = nibabel.Nifti1Image(data, affine).as_reoriented(np.array(list(zip(order, flips))))
    nibabel.save(turned, tmp_path / "image.nii.gz")
    case = PREPROCESSING({"image": str(tmp_path / "image.nii.gz")})
    # A network that says what it sees.
    seen = torch.as_tensor(case["image"])[0]
    case["pred"] = torch.stack([1 - (seen - number).abs().clamp(max=1) for number in range(3)])
    case = LabelsOnImageGridd("pred", PREPROCESSING)(case)
    SaveImageLabelsd("pred", tmp_path / "out")(case)
    result = nibabel.load(tmp_path / "out" / "image_seg.nii.gz")
    assert result.shape == turned.shape
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_allclose(result.affine, turned.affine)
    truth, found = np.asarray(turned.dataobj), np.asarray(result.dataobj)
    for value in (1, 2):
        dice = 2 * ((truth == value) & (found == value)).sum() / ((truth == value).sum() + (found == value).sum())
        assert dice > 0.85


def test_what_is_no_number_is_no_background(tmp_path: Path) -> None:
    data, affine = ball()
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "image.nii.gz")
    case = PREPROCESSING({"image": str(tmp_path / "image.nii.gz")})
    case["pred"] = torch.rand(3, *case["image"].shape[1:])
    case["pred"][2, 1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite, of which no labels can be made"):
        LabelsOnImageGridd("pred", PREPROCESSING)(case)


@pytest.mark.parametrize("shape", [(1, 5, 5, 5), (3, 9, 9, 9), (3, 5, 5)], ids=str)
def test_what_are_no_probabilities_of_classes_on_the_grid_is_refused(shape: tuple[int, ...]) -> None:
    spacing = Spacingd("image", (2, 2, 2))
    case = spacing({"image": MetaTensor(torch.rand(1, 9, 9, 9), affine=torch.eye(4))})
    with pytest.raises(
        ValueError, match=rf"on the grid of the preprocessed image, \(5, 5, 5\), got {re.escape(str(shape))}"
    ):
        LabelsOnImageGridd("pred", spacing)({**case, "pred": torch.rand(shape)})


def test_memory_does_not_grow_with_the_number_of_classes(tmp_path: Path) -> None:
    data, affine = ball()
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "image.nii.gz")
    case = PREPROCESSING({"image": str(tmp_path / "image.nii.gz")})
    peaks = []
    for classes in (3, 12):
        case["pred"] = torch.rand(classes, *case["image"].shape[1:])
        with LiveBytes(ignore=[case["pred"]]) as live:
            LabelsOnImageGridd("pred", PREPROCESSING)(case)
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]


def test_one_hot_maps_are_not_written(tmp_path: Path) -> None:
    data, affine = ball()
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "image.nii.gz")
    case = LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "image.nii.gz")})
    case["pred"] = torch.ones(3, *data.shape, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"pred: a label map of one channel is needed, got \(3, 30, 26, 22\)"):
        SaveImageLabelsd("pred", tmp_path / "out")(case)


def test_labels_replace_neither_their_image_nor_those_of_another(tmp_path: Path) -> None:
    data, affine = ball()
    load, save = LoadImaged("image", ensure_channel_first=True), SaveImageLabelsd("pred", tmp_path / "out")

    def case(folder: str) -> dict[str, MetaTensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / folder / "T1w.nii.gz")
        item = load({"image": str(tmp_path / folder / "T1w.nii.gz")})
        return {**item, "pred": (item["image"] > int(folder == "two")).to(torch.uint8)}

    for _ in range(2):  # those of the same image do
        save(case("one"))
    before = (tmp_path / "out" / "T1w_seg.nii.gz").read_bytes()
    with pytest.raises(InputError, match=r"two.T1w.nii.gz and .*one.T1w.nii.gz: the result of both would be"):
        save(case("two"))
    assert (tmp_path / "out" / "T1w_seg.nii.gz").read_bytes() == before
    with pytest.raises(InputError, match="the result would replace its image"):
        SaveImageLabelsd("pred", tmp_path / "two", suffix="")(case("two"))
    assert np.ptp(nibabel.load(tmp_path / "two" / "T1w.nii.gz").get_fdata()) == 2


def test_several_label_maps_would_be_one_file() -> None:
    with pytest.raises(InputError, match=r"keys \['pred', 'label'\]: all would be NAME_seg.nii.gz"):
        SaveImageLabelsd(["pred", "label"], "out")


def test_labels_that_were_not_brought_back_are_not_written(tmp_path: Path) -> None:
    data, affine = ball()
    turned = nibabel.Nifti1Image(data[:22, :22, :22], affine @ np.diag([-1, -1, 1, 1]))
    nibabel.save(turned, tmp_path / "image.nii.gz")
    load = Compose([LoadImaged("image", ensure_channel_first=True), Orientationd("image", "RAS", labels=None)])
    case = load({"image": str(tmp_path / "image.nii.gz")})
    case["pred"] = (case["image"] > 0).to(torch.uint8)
    with pytest.raises(InputError, match="pred: the labels are on another grid than"):
        SaveImageLabelsd("pred", tmp_path / "out")(case)
    case["pred"] = load.inverse({"image": case["pred"]})["image"]
    SaveImageLabelsd("pred", tmp_path / "out")(case)
    written = nibabel.load(tmp_path / "out" / "image_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(turned.dataobj) > 0)
