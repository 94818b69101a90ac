"""The conversion of OpenKBP, on files in its format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.bundles.helpers import BUNDLES

SCRIPT = BUNDLES / "iunet_headneck_ct_segmentation" / "scripts" / "convert_openkbp.py"


def convert(clone: Path, output: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(clone), str(output)], capture_output=True, text=True, check=False
    )


def write_sparse(path: Path, voxels: list[tuple[int, int, int]], values: list[float] | None = None) -> None:
    """Voxels are [row, column, slice] of the challenge's arrays."""
    numbers = [int(np.ravel_multi_index(voxel, (128, 128, 128))) for voxel in voxels]
    texts = [""] * len(numbers) if values is None else values
    path.write_text(",data\n" + "".join(f"{number},{text}\n" for number, text in zip(numbers, texts)))


def make_patient(folder: Path) -> None:
    folder.mkdir(parents=True)
    region = [(row, column, 40) for row in range(60, 70) for column in range(50, 80)]
    write_sparse(folder / "possible_dose_mask.csv", region)
    write_sparse(folder / "ct.csv", [*region, (10, 10, 10)], [1050.0] * len(region) + [5000.0])
    # The patient's right is where columns are few.
    write_sparse(folder / "RightParotid.csv", [(64, 52, 40), (64, 53, 40), (10, 10, 10)])
    write_sparse(folder / "LeftParotid.csv", [(64, 77, 40)])
    (folder / "voxel_dimensions.csv").write_text("3.9\n3.8\n2.5\n")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("train-pats/pt_2", "train-pats/pt_10", "validation-pats/pt_201", "test-pats/pt_241"):
        make_patient(tmp_path / "clone" / "provided-data" / name)
    return tmp_path / "clone"


def test_patients_become_volumes(clone: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    result = convert(clone, output)
    assert result.returncode == 0, result.stderr
    dataset = json.loads((output / "dataset.json").read_text())
    assert [entry["image"] for entry in dataset["training"]] == ["imagesTr/pt_2.nii.gz", "imagesTr/pt_10.nii.gz"]
    assert len(dataset["validation"]) == len(dataset["test"]) == 1
    image = nibabel.load(output / dataset["training"][0]["image"])
    labels = nibabel.load(output / dataset["training"][0]["label"])
    np.testing.assert_allclose(image.affine, np.diag([3.9, 3.8, 2.5, 1]), rtol=1e-6)
    data, found = np.asarray(image.dataobj), np.asarray(labels.dataobj)
    assert data.dtype == np.int16
    assert (data > -1000).sum() == 300
    assert data[data > -1000].max() == 50
    assert dict(zip(*np.unique(found, return_counts=True))) == {0: 128**3 - 3, 3: 2, 4: 1}
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    # Larger x is further to the right; the voxel outside the region is gone.
    assert np.argwhere(found == 3)[:, 0].min() > np.argwhere(found == 4)[:, 0].max()
    assert np.argwhere(found == 4).tolist() == [[127 - 77, 127 - 64, 127 - 40]]


def test_what_is_done_is_not_done_again(clone: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    assert convert(clone, output).returncode == 0
    before = (output / "imagesTr" / "pt_2.nii.gz").stat().st_mtime_ns
    (output / "imagesTr" / "pt_10.nii.gz").unlink()
    assert convert(clone, output).returncode == 0
    assert (output / "imagesTr" / "pt_2.nii.gz").stat().st_mtime_ns == before
    assert (output / "imagesTr" / "pt_10.nii.gz").is_file()


def test_bad_files_are_named(clone: Path, tmp_path: Path) -> None:
    patient = clone / "provided-data" / "train-pats" / "pt_2"
    for name, content, message in (
        ("ct.csv", ",data\n1,2\n99999999,3\n", "voxel numbers outside"),
        ("ct.csv", ",data\nx,y\n", "not a sparse volume"),
        ("voxel_dimensions.csv", "3.9\n3.9\n", "three lengths"),
        ("voxel_dimensions.csv", None, "voxel_dimensions missing"),
    ):
        original = (patient / name).read_text()
        (patient / name).unlink()
        if content is not None:
            (patient / name).write_text(content)
        result = convert(clone, tmp_path / "data")
        assert result.returncode == 1
        assert message in result.stderr
        assert "pt_2" in result.stderr
        assert "Traceback" not in result.stderr
        (patient / name).write_text(original)
    result = convert(tmp_path, tmp_path / "data")
    assert "no folder provided-data" in result.stderr
    assert not (tmp_path / "data" / "dataset.json").exists()
