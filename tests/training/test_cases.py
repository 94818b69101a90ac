"""What is wrong with a data set is said before the work begins, all of it at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet.errors import InputError
from monai_iunet.training.cases import check_cases, images_to_segment


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return str(path)


def case(folder: Path, name: str, label: np.ndarray | None = None, affine: np.ndarray | None = None) -> dict[str, str]:
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    label = (image > 10).astype(np.uint8) if label is None else label
    return {
        "image": save(folder / "images" / f"{name}.nii.gz", image),
        "label": save(folder / "labels" / f"{name}.nii.gz", label, affine),
    }


def damaged(folder: Path) -> dict[str, str]:
    made = case(folder, "damaged")
    path = Path(made["image"])
    path.write_bytes(path.read_bytes()[:-20])
    return made


def not_finite(folder: Path) -> dict[str, str]:
    made = case(folder, "nan")
    made["image"] = save(Path(made["image"]), np.full((2, 3, 4), np.nan, np.float32))
    return made


def blank(folder: Path) -> dict[str, str]:
    made = case(folder, "blank")
    made["image"] = save(Path(made["image"]), np.zeros((2, 3, 4), np.float32))
    return made


BAD = {
    "no_label": (lambda folder: {"image": case(folder, "no_label")["image"]}, "has no label"),
    "missing": (lambda folder: {**case(folder, "missing"), "label": str(folder / "gone.nii.gz")}, "no such file"),
    "shape": (lambda folder: case(folder, "shape", np.ones((2, 3, 5), np.uint8)), r"has the shape \(2, 3, 5\)"),
    "grid": (lambda folder: case(folder, "grid", None, np.diag([1, 1, 2, 1])), "4 mm apart"),
    "value": (
        lambda folder: case(folder, "value", np.full((2, 3, 4), 7, np.uint8)),
        "has the values 7, labels are 0 to 1",
    ),
    "almost": (
        lambda folder: case(folder, "almost", np.full((2, 3, 4), np.nextafter(np.float32(1), np.float32(0)))),
        "has the values 0.99999994, labels",
    ),
    "empty": (lambda folder: case(folder, "empty", np.zeros((2, 3, 4), np.uint8)), "is empty"),
    "damaged": (damaged, r"damaged\.nii\.gz: (not a readable|truncated)"),
    "nan": (not_finite, "24 voxels are NaN"),
    "blank": (blank, r"blank\.nii\.gz: all voxels have the same value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_case_is_named(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(InputError, match=message):
        check_cases([case(tmp_path, "good"), make(tmp_path)], 2)


def test_labels_that_would_be_turned_otherwise_than_their_image_are_refused(tmp_path: Path) -> None:
    image = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    angles = np.radians([44.999, 45.001])
    turned = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) for a in angles]
    affines = [nibabel.affines.from_matvec(matrix) for matrix in turned]
    paths = [save(tmp_path / f"image_{number}.nii", image, affine) for number, affine in enumerate(affines)]
    label = save(tmp_path / "label.nii", (image > 99).astype(np.uint8), affines[0])
    with pytest.raises(InputError, match=r"label.nii: its axes run to RAS, those of its image to ALS"):
        check_cases([{"image": paths[1], "label": label}], 2)
    assert check_cases([{"image": paths[0], "label": label}], 2)


def test_all_bad_cases_are_listed_together_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = [case(tmp_path, "good"), *(make(tmp_path) for make, _ in BAD.values())]
    with pytest.raises(InputError) as error:
        check_cases(cases, 2)
    lines = str(error.value).splitlines()
    assert lines[0] == "10 of 11 cases cannot be used:"
    assert len(lines) == 12
    with caplog.at_level(logging.WARNING):
        assert check_cases(cases, 2, skip_bad=True) == cases[:1]
    assert "10 of 11 cases are left out" in caplog.text
    assert check_cases(cases, 2, check=False) == cases
    with pytest.raises(InputError, match="no case to use"):
        check_cases(cases[1:], 2, skip_bad=True)


def test_images_in_every_way_that_they_can_be_named(tmp_path: Path) -> None:
    image = np.zeros((2, 2, 2), np.float32)
    first, second = (save(tmp_path / "some" / name, image) for name in ("a.nii.gz", "b.nii"))
    (tmp_path / "some" / "notes.txt").write_text("")
    inner = save(tmp_path / "task" / "imagesTs" / "c.nii.gz", image)
    (tmp_path / "list.json").write_text(json.dumps(["some/a.nii.gz", {"image": "task/imagesTs/c.nii.gz"}]))
    (tmp_path / "task" / "dataset.json").write_text(json.dumps({"test": ["./imagesTs/c.nii.gz"]}))
    out = tmp_path / "out"
    for source, expected in (
        (first, [first]),
        (tmp_path / "some", [first, second]),
        ([first, tmp_path / "task"], [first, inner]),
        (tmp_path / "list.json", [first, inner]),
        (tmp_path / "task" / "dataset.json", [inner]),
    ):
        found = images_to_segment(source, out)
        assert [Path(entry["image"]).resolve() for entry in found] == [Path(path) for path in expected]
    (tmp_path / "task" / "imagesTs" / "c.nii.gz").rename(tmp_path / "task" / "imagesTs" / "c_0000.nii.gz")  # nnU-Net
    (entry,) = images_to_segment(tmp_path / "task" / "dataset.json", out)
    assert Path(entry["image"]).name == "c_0000.nii.gz"


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, np.zeros((2, 2, 2), np.float32)) for name in ("a.nii.gz", "b.nii.gz")]
    save(tmp_path / "out" / "a_seg.nii.gz", np.zeros((2, 2, 2), np.uint8))
    assert [entry["image"] for entry in images_to_segment(paths, tmp_path / "out")] == paths[1:]
    assert len(images_to_segment(paths, tmp_path / "out", skip_done=False)) == 2


@pytest.mark.parametrize("skip_done", [True, False])
def test_results_in_the_folder_of_the_images_are_no_images(
    skip_done: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [save(tmp_path / name, np.zeros((2, 2, 2), np.float32)) for name in ("a.nii.gz", "b.nii.gz")]
    result = save(tmp_path / "a_seg.nii.gz", np.zeros((2, 2, 2), np.uint8))
    found = images_to_segment(tmp_path, tmp_path, skip_done=skip_done)
    assert [entry["image"] for entry in found] == paths[1 if skip_done else 0 :]
    assert f"Left out: 1 images, such as {result}, that are results" in caplog.text


def test_results_of_another_image_are_refused(tmp_path: Path) -> None:
    image = Path(save(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.float32)))
    result = Path(save(tmp_path / "out" / "a_seg.nii.gz", np.zeros((2, 3, 4), np.uint8)))
    for damage, reason in (
        (lambda: save(result, np.zeros((2, 3, 5), np.uint8)), r"shape \(2, 3, 5\), .*the result of another image"),
        (
            lambda: nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.diag([-1, 1, 1, 1])), result),
            "mm",
        ),
        (lambda: result.write_bytes(result.read_bytes()[:40]), "cannot be read, so its image is not done"),
    ):
        damage()
        with pytest.raises(InputError, match=rf"a_seg\.nii\.gz: .*{reason}.*--skip_done False"):
            images_to_segment(image, tmp_path / "out")
        assert len(images_to_segment(image, tmp_path / "out", skip_done=False)) == 1


def test_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no NIfTI image"):
        images_to_segment(tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"gone\.nii\.gz: no such file"):
        images_to_segment(tmp_path / "gone.nii.gz", tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="not a list of images"):
        images_to_segment(tmp_path / "bad.json", tmp_path)
    twice = [save(tmp_path / folder / "a.nii.gz", np.zeros((2, 2, 2), np.float32)) for folder in "xy"]
    with pytest.raises(InputError, match="Several images have the name a"):
        images_to_segment(twice, tmp_path)
