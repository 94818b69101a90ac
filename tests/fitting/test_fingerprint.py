"""What is found out about a data set, and which cases are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from matplotlib.figure import Figure

from monai_iunet import InputError
from monai_iunet.fitting.fingerprint import (
    Fingerprint,
    draw_fingerprint,
    fingerprint_tables,
    read_fingerprint,
    take_fingerprint,
    write_fingerprint,
)
from monai_iunet.training.dataset import read_labeled_data
from tests.fitting.made_sets import make_set


def take(folder: Path, **options: Any) -> Fingerprint:
    return take_fingerprint(read_labeled_data(folder), **options)


def change(path: Path, function: Any) -> None:
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(function(np.asarray(image.dataobj)), image.affine), path)


def test_spacings_volumes_and_sides_are_those_of_the_data(tmp_path: Path) -> None:
    found = take(make_set(tmp_path, classes=2, spacing=(1, 2, 3)))
    assert found.structures == ("structure 1", "structure 2")
    assert found.labeled == (6, 6)
    labels = np.asarray(nibabel.load(tmp_path / "labelsTr" / "case_03.nii.gz").dataobj)
    case = found.cases[3]
    assert case.spacing == (1, 2, 3)
    assert case.extent == (24, 48, 72)
    assert case.volumes == tuple(6.0 * (labels == value).sum() for value in (1, 2))
    center = np.argwhere(labels == 1)[:, 0].mean() / 23 * 2 - 1
    assert case.centers[0] == pytest.approx(center)
    assert case.contrast[0] > 1 > abs(case.mirrored_contrast[0])


def test_volumes_of_sheared_voxels_are_theirs(tmp_path: Path) -> None:
    make_set(tmp_path, count=1)
    sheared = np.diag([1.0, 1, 2, 1])
    sheared[1, 2] = 0.5
    for path in tmp_path.glob("*Tr/*.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), sheared), path)
    labels = np.asarray(nibabel.load(next(tmp_path.glob("labelsTr/*.nii.gz"))).dataobj)
    assert take(tmp_path).cases[0].volumes[0] == pytest.approx(2.0 * (labels == 1).sum())


def test_voxels_of_micrometers_keep_their_size(tmp_path: Path) -> None:
    found = take(make_set(tmp_path, count=1, shape=(800, 8, 8), spacing=(0.00136, 0.0014, 0.02)))
    assert found.cases[0].spacing == pytest.approx((0.00136, 0.0014, 0.02), rel=1e-6)


def test_it_is_written_read_printed_and_drawn(tmp_path: Path) -> None:
    found = take(make_set(tmp_path / "data"))
    write_fingerprint(found, tmp_path / "fingerprint.json")
    assert read_fingerprint(tmp_path / "fingerprint.json") == found
    draw_fingerprint(replace(found, structures=("a $b^{$",)), tmp_path / "fingerprint.png")  # no formula
    assert (tmp_path / "fingerprint.png").stat().st_size > 1000
    assert fingerprint_tables(found).renderables[1].row_count == 1
    (tmp_path / "fingerprint.json").write_text("{}")
    with pytest.raises(InputError, match="not a fingerprint"):
        read_fingerprint(tmp_path / "fingerprint.json")


def test_names_of_many_structures_lie_below_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = take(make_set(tmp_path / "data", count=1))
    names = tuple(f"structure {number}" for number in range(60))
    case = replace(found.cases[0], volumes=found.cases[0].volumes[:1] * len(names))
    boxes: list[Any] = []

    def save(figure: Figure, *_: Any, **options: Any) -> None:
        figure.canvas.draw()
        boxes.extend(label.get_window_extent() for label in figure.axes[3].get_yticklabels())

    monkeypatch.setattr(Figure, "savefig", save)
    draw_fingerprint(replace(found, structures=names, cases=(case,)), tmp_path / "fingerprint.png")
    assert len(boxes) == len(names)
    assert all(lower.y1 <= upper.y0 + 2 for lower, upper in itertools.pairwise(boxes))


def test_it_says_what_became_of_regions(tmp_path: Path) -> None:
    path = make_set(tmp_path, classes=2) / "dataset.json"
    assert take(tmp_path).of_regions == ""
    description = json.loads(path.read_text(encoding="utf-8"))
    description["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    path.write_text(json.dumps(description))
    found = take(tmp_path)
    assert found.structures == ("whole", "core")  # the label 1, which is not the whole
    assert found.of_regions.endswith("add its labels up, by their numbers in the data set: whole: labels 1, 2.")
    assert fingerprint_tables(found).renderables[1].caption == found.of_regions


def test_it_says_that_no_label_is_ignored(tmp_path: Path) -> None:
    path = make_set(tmp_path, classes=2) / "dataset.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["labels"] = {"background": 0, "organ": 1, "ignore": 2}
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r'has the values 2, labels are 0 to 1\.\n(.|\n)*calls label 2 "ignore"\.'):
        take(tmp_path)


def test_a_mirrored_image_is_named(tmp_path: Path) -> None:
    change(make_set(tmp_path) / "imagesTr" / "case_02.nii.gz", lambda data: data[::-1])
    with pytest.raises(InputError) as error:
        take(tmp_path)
    assert "case_02.nii.gz: its image seems mirrored against its labels" in str(error.value)
    assert "1 problem in" in str(error.value)
    found = take(tmp_path, skip_bad=True)
    assert found.left_out == ("case_02.nii.gz",)
    assert len(found.cases) == 5


def test_a_ct_among_mr_images_is_named(tmp_path: Path) -> None:
    change(make_set(tmp_path) / "imagesTr" / "case_04.nii.gz", lambda data: data - 1000)
    with pytest.raises(InputError, match=r"case_04.nii.gz: its intensities are those of a CT, most others' are not"):
        take(tmp_path)


def test_a_copy_of_a_case_is_named(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    for part in ("imagesTr", "labelsTr"):
        shutil.copyfile(folder / part / "case_01.nii.gz", folder / part / "case_04.nii.gz")
    with pytest.raises(InputError, match=r"case_04.nii.gz: is a copy of .*case_01.nii.gz"):
        take(tmp_path)
    assert take(tmp_path, skip_bad=True).left_out == ("case_04.nii.gz",)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_unit_of_intensities_does_not_matter(scale: float, tmp_path: Path) -> None:
    contrast = take(make_set(tmp_path, count=1)).cases[0].contrast
    change(tmp_path / "imagesTr" / "case_00.nii.gz", lambda data: data * np.float32(scale))
    assert take(tmp_path).cases[0].contrast == pytest.approx(contrast, rel=1e-4)


def test_all_bad_cases_are_listed_together(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    description = json.loads((folder / "dataset.json").read_text())
    for number in (1, 3, 5):
        del description["training"][number]["label"]
    (folder / "dataset.json").write_text(json.dumps(description))
    change(folder / "labelsTr" / "case_00.nii.gz", lambda data: data * 7)
    (folder / "imagesTr" / "case_02.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        take(folder)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("5 problems")
    for number in range(6):
        assert sum(f"case_{number:02}" in line for line in lines) == (number != 4)


@pytest.mark.parametrize("channels", [1, 2])
def test_labels_are_no_image_of_their_case(channels: int, tmp_path: Path) -> None:
    path = make_set(tmp_path, channels=channels) / "dataset.json"
    description = json.loads(path.read_text())
    case = description["training"][3]
    case["image"] = case["label"] if channels == 1 else [case["image"][0], case["label"]]
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"1 problem in .*\n.*case_03\.nii\.gz: is image and label of one case"):
        take(tmp_path)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_section_of_which_nothing_is_left_is_refused(section: str, tmp_path: Path) -> None:
    folder = make_set(tmp_path, count=3)
    description = json.loads((folder / "dataset.json").read_text())
    first, *others = description.pop("training")
    other = {"training": "validation", "validation": "training"}[section]
    (folder / "dataset.json").write_text(json.dumps({**description, section: [first], other: others}))
    assert len(take(folder).cases) == 3
    change(folder / first["label"], lambda data: data * 0)
    with pytest.raises(InputError, match=f'of "{section}" in dataset.json no case is left'):
        take(folder, skip_bad=True)


def test_a_structure_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path, count=2)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["2"] = "tumor"
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="no label shows tumor, so nothing can be learned of it"):
        take(folder)


def test_several_channels_and_labels_that_nothing_names(tmp_path: Path) -> None:
    folder = make_set(tmp_path, channels=4, count=2)
    found = take(folder)
    assert found.channels == ("MRI 0", "MRI 1", "MRI 2", "MRI 3")
    description = json.loads((folder / "dataset.json").read_text())
    del description["labels"]
    (folder / "dataset.json").write_text(json.dumps(description))
    change(folder / "labelsTr" / "case_01.nii.gz", lambda data: data * 5)
    assert take(folder).label_values == (1, 5)
    assert take(folder).structures == ("label 1", "label 5")
    in_one_file = take(make_set(tmp_path / "joint", channels=4, count=2, in_one_file=True))
    assert in_one_file.channels == found.channels
    assert in_one_file.cases[1].intensities == found.cases[1].intensities
    change(tmp_path / "joint" / "imagesTr" / "case_01.nii.gz", lambda data: data[..., :3])
    with pytest.raises(InputError, match=r"case_01.nii.gz: has 3 channels, 4 are needed"):
        take(tmp_path / "joint")
    change(folder / "imagesTr" / "case_01_0003.nii.gz", lambda data: data[1:])
    with pytest.raises(InputError, match=r"case_01_0003.nii.gz: has the shape .*, the first channel"):
        take(folder)


@pytest.mark.parametrize(
    ("names", "second_is_ct", "modality"),
    [
        (["CT", "CT arterial"], True, "CT"),
        (["CT", "arterial"], True, "CT"),
        (["CT", "T1"], False, "MR"),
        (["CT", "dose"], False, "MR"),
        (None, False, "MR"),
        (None, True, "CT"),
    ],
)
def test_a_window_of_hounsfield_units_is_for_ct_in_all_channels(
    names: list[str] | None, second_is_ct: bool, modality: str, tmp_path: Path
) -> None:
    folder = make_set(tmp_path, count=2, channels=2, modality="CT")
    description = json.loads((folder / "dataset.json").read_text())
    del description["modality"]
    (folder / "dataset.json").write_text(json.dumps({**description, **({"channel_names": names} if names else {})}))
    if not second_is_ct:
        for number in range(2):
            change(folder / "imagesTr" / f"case_{number:02}_0001.nii.gz", abs)
    assert take(folder).modality == modality


def test_labels_that_nothing_names_may_be_of_any_format(tmp_path: Path) -> None:
    folder = make_set(tmp_path, count=1, classes=2)
    path = folder / "labelsTr" / "case_00.nii.gz"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(path.with_name("case_00.nrrd")))
    path.unlink()
    (folder / "dataset.json").unlink()
    assert take(folder).label_values == (1, 2)
