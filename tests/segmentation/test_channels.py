"""Images of several channels, however their files lay them out, and those of other channels than a bundle takes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, InputError, segment
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.bundling.task import Task
from monai_iunet.cli import app
from monai_iunet.io.channels import group_channels
from monai_iunet.io.read import read_image
from monai_iunet.training.cases import check_images

CHANNELS = 2
SHAPE = (14, 17, 12)
AFFINE = np.diag([-1.5, 1, 2, 1])  # which is turned and resampled


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose small network of random weights takes two channels."""
    task = Task("two", "MR", ("a", "b"), "data", (1.0, 1.0, 1.0), (16, 16, 16), channels=(8, 16), couplings=(1, 1))
    folder = write_bundle(Task(**{**vars(task), "in_channels": CHANNELS}), tmp_path_factory.mktemp("bundles") / "two")
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def image() -> nibabel.Nifti1Image:
    """An image of two channels that differ, the channels last."""
    values = np.random.default_rng(0).normal(100, 20, (*SHAPE, CHANNELS)).astype(np.float32)
    return nibabel.Nifti1Image(values, AFFINE)


def save_channels(image: nibabel.Nifti1Image, folder: Path, name: str) -> list[Path]:
    """Write a file per channel, as nnU-Net names them."""
    paths = [folder / f"{name}_{number:04}.nii.gz" for number in range(image.shape[3])]
    for number, path in enumerate(paths):
        nibabel.save(image.slicer[..., number], path)
    return paths


def labels_of(path: Path) -> np.ndarray:
    found = nibabel.load(path)
    assert np.allclose(found.affine, AFFINE)
    return np.asarray(found.dataobj)


def test_every_way_to_an_image_of_several_channels_gives_the_same_labels(
    bundle: Path, image: nibabel.Nifti1Image, tmp_path: Path
) -> None:
    segmenter = BundleSegmenter(bundle, "cpu")
    expected = segmenter.segment(image).labels
    assert expected.shape == SHAPE
    assert len(np.unique(expected)) > 1
    turned = nibabel.Nifti1Image(np.asarray(image.dataobj)[..., ::-1], AFFINE)
    assert (segmenter.segment(turned).labels != expected).any()  # the order of channels matters
    images = tmp_path / "images"
    images.mkdir()
    paths = save_channels(image, images, "split")
    nibabel.save(image, images / "joint.nii.gz")
    values = np.moveaxis(np.asarray(image.dataobj), -1, 0)
    for found in (
        segment(paths, segmenter).dataobj,
        segment(images / "joint.nii.gz", segmenter).dataobj,
        segment(image, segmenter).dataobj,
        segment(values, segmenter, affine=AFFINE)[0],
        segment(MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(AFFINE)), segmenter)[0],
    ):
        assert np.array_equal(found, expected)
    words = ["segment", *map(str, sorted(images.iterdir(), reverse=True)), "--bundle", str(bundle), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "results"), "--volumes", "csv"])
    assert result.exit_code == 0, result.output
    run(
        config_file=str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
        dataset_dir=str(images),
        output_dir=str(tmp_path / "run"),
        device="$torch.device('cpu')",
        save_probabilities=True,
    )
    for folder in ("results", "run"):
        for name in ("joint", "split"):
            assert np.array_equal(labels_of(tmp_path / folder / f"{name}_seg.nii.gz"), expected)
            assert (tmp_path / "results" / f"{name}_seg.png").is_file()
            assert (tmp_path / "run" / f"{name}_prob.nii.gz").is_file()
    assert len(list((tmp_path / "run").glob("*_seg.nii.gz"))) == 2


def test_a_list_of_images_may_name_the_channels(bundle: Path, image: nibabel.Nifti1Image, tmp_path: Path) -> None:
    save_channels(image, tmp_path, "other")
    names = ["other_0001.nii.gz", "other_0000.nii.gz"]  # in this order
    (tmp_path / "list.json").write_text(json.dumps([{"image": names}]))
    run(
        config_file=str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "list.json"),
        output_dir=str(tmp_path / "run"),
        device="$torch.device('cpu')",
    )
    expected = segment([tmp_path / name for name in names], bundle, device="cpu")
    assert np.array_equal(labels_of(tmp_path / "run" / "other_0001_seg.nii.gz"), np.asarray(expected.dataobj))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([0], r"scan_0000.nii.gz: has 1 channel, 2 are needed"),
        ([0, 2], r"scan: has the channels 0, 2, 0 to 1 are needed"),
        ([0, 1, 2], r"scan: has the channels 0, 1, 2, 0 to 1 are needed"),
    ],
)
def test_a_wrong_number_of_channels_is_one_line(
    channels: Sequence[int], message: str, bundle: Path, tmp_path: Path
) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(0, 1, (*SHAPE, 3)).astype(np.float32), AFFINE)
    paths = [save_channels(image, tmp_path, "scan")[number] for number in channels]
    words = ["segment", *map(str, paths), "--bundle", str(bundle), "--device", "cpu", "--output", str(tmp_path / "r")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code != 0
    assert re.search(message, " ".join(result.output.split())), result.output
    assert "Traceback" not in result.output


def test_a_channel_in_two_formats_is_one_line() -> None:
    paths = [Path(f"scan_{name}") for name in ("0000.nii", "0000.nii.gz", "0001.nii.gz")]
    with pytest.raises(InputError, match=r"scan_0000\.nii\.gz: is there as scan_0000\.nii too"):
        group_channels(paths, 2)
    assert group_channels([*paths[1:], paths[1]], 2) == [tuple(paths[1:])]  # named twice


def test_other_channels_are_refused_by_every_way(bundle: Path, image: nibabel.Nifti1Image, tmp_path: Path) -> None:
    three = nibabel.Nifti1Image(np.random.default_rng(0).random((*SHAPE, 3), np.float32), AFFINE)
    nibabel.save(three, tmp_path / "three.nii.gz")
    segmenter = BundleSegmenter(bundle, "cpu")
    for wrong in (three, tmp_path / "three.nii.gz"):
        with pytest.raises(InputError, match="has 3 channels, 2 are needed"):
            segment(wrong, segmenter)
    with pytest.raises(InputError, match=r"has 1 channel, two takes 2"):
        segmenter.segment(image.slicer[..., 0])
    with pytest.raises(InputError, match="3D volume is needed"):  # which the hippocampus bundle takes
        segment(image, device="cpu")
    with pytest.raises(InputError, match=r"three.nii.gz: has 3 channels, 2 are needed"):
        check_images([{"image": str(tmp_path / "three.nii.gz")}], channels=2)
    paths = save_channels(image, tmp_path, "moved")
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[..., 1], np.eye(4)), paths[1])
    with pytest.raises(InputError, match=r"moved_0001.nii.gz: its grid and that of the first channel are up to"):
        read_image(paths)
    empty = np.asarray(image.dataobj).copy()
    empty[..., 1] = 0
    with pytest.raises(InputError, match="all voxels of channel 1 have the same value"):
        segment(nibabel.Nifti1Image(empty, AFFINE), segmenter)
