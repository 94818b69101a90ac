"""Data sets as people have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from monai_iunet import InputError, list_cases
from monai_iunet.training.cases import image_of
from monai_iunet.training.dataset import patients_of, read_labeled_data


def make(folder: Path, files: Sequence[str], description: Any = None) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if description is not None:
        (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def names(cases: Sequence[dict[str, Any]]) -> list[str]:
    return [Path(case["label"]).name.split(".")[0] for case in cases]


def decathlon(count: int, **more: Any) -> dict[str, Any]:
    entries = [{"image": f"./imagesTr/c{n:02}.nii.gz", "label": f"./labelsTr/c{n:02}.nii.gz"} for n in range(count)]
    return {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": entries, **more}


def test_a_decathlon_folder_without_validation_cases_is_split(tmp_path: Path) -> None:
    folder = make(tmp_path, [], decathlon(10))
    parts = [list_cases(folder, "validation", fold) for fold in range(5)]
    assert sorted(name for part in parts for name in names(part)) == names(list_cases(folder))
    assert list_cases(folder, "validation") == parts[0]
    for fold, part in enumerate(parts):
        training = list_cases(folder, "training", fold)
        assert len(training) == 8
        assert not set(names(training)) & set(names(part))


def test_validation_cases_of_its_own_are_used(tmp_path: Path) -> None:
    description = decathlon(6)
    description["validation"] = description["training"][4:]
    description["training"] = description["training"][:4]
    folder = make(tmp_path, [], description)
    assert names(list_cases(folder, "validation")) == ["c04", "c05"]
    assert names(list_cases(folder, "training")) == ["c00", "c01", "c02", "c03"]
    assert names(list_cases(folder, "training", without=["c01.nii.gz", "c05.nii.gz"])) == ["c00", "c02", "c03"]
    # Folds are made of the training cases alone.
    assert names(list_cases(folder, "validation", 1, 2)) == ["c01", "c03"]
    judges = {"judges": ["c02.nii.gz"]}
    assert names(list_cases(folder, "judges", 1, 2, **judges)) == ["c02"]
    assert names(list_cases(folder, "validation", 1, 2, **judges)) == ["c01"]
    assert names(list_cases(folder, "training", 1, 2, **judges)) == ["c00", "c03"]
    assert names(list_cases(make(tmp_path, [], decathlon(6, validation=[])), "validation")) == ["c00", "c05"]


def test_a_raw_data_set_of_nnunet_is_read(tmp_path: Path) -> None:
    files = [f"imagesTr/p{n}_000{channel}.nii.gz" for n in range(3) for channel in range(2)]
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    description = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": labels, "file_ending": ".nii.gz"}
    data = read_labeled_data(make(tmp_path, [*files, *(f"labelsTr/p{n}.nii.gz" for n in range(3))], description))
    assert data.channels == ("T1", "FLAIR")
    assert data.labels == {"whole": 1, "core": 2, "enhancing": 3}
    assert data.parts == "whole: labels 1, 2, 3; core: labels 2, 3; enhancing: labels 3"
    assert [[Path(path).name for path in case["image"]] for case in data.training][1] == [
        "p1_0000.nii.gz",
        "p1_0001.nii.gz",
    ]
    assert data.problems == ()


@pytest.mark.parametrize("channels", [1, 2])
def test_images_that_nnunet_lists_without_their_channels_are_found(channels: int, tmp_path: Path) -> None:
    files = [f"imagesTr/p{n}_000{channel}.nii.gz" for n in range(3) for channel in range(channels)]
    listed = [{"image": f"./imagesTr/p{n}.nii.gz", "label": f"./labelsTr/p{n}.nii.gz"} for n in range(3)]
    description = {"modality": {str(channel): f"T{channel}" for channel in range(channels)}, "training": listed}
    data = read_labeled_data(make(tmp_path, [*files, *(f"labelsTr/p{n}.nii.gz" for n in range(3))], description))
    found = [case["image"] if isinstance(case["image"], list) else [case["image"]] for case in data.training]
    assert [[Path(path).name for path in paths] for paths in found] == [
        [f"p{n}_000{channel}.nii.gz" for channel in range(channels)] for n in range(3)
    ]
    assert len(data.channels) == channels
    # With a channel missing, the image is not there.
    (tmp_path / "imagesTr" / "p1_0000.nii.gz").unlink()
    assert Path(image_of(read_labeled_data(tmp_path).training[1])).name == "p1.nii.gz"


def test_cases_that_nnunet_names_one_by_one_are_read(tmp_path: Path) -> None:
    named = {f"p{n}": {"images": [f"raw/p{n}.nii.gz"], "label": f"raw/p{n}_seg.nii.gz"} for n in range(2)}
    description = {"channel_names": {"0": "CT"}, "labels": {"liver": 1}, "dataset": {**named, "p9": {"label": "a"}}}
    # Others in the two folders are none of them.
    data = read_labeled_data(make(tmp_path, ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"], description))
    assert [Path(image_of(case)).name for case in data.training] == ["p0.nii.gz", "p1.nii.gz"]
    assert names(data.training) == ["p0_seg", "p1_seg"]
    assert [problem.split("dataset.json: ")[1] for problem in data.problems] == [
        "entry 2 names no image: {'image': None, 'label': 'a'}."
    ]


def test_channels_are_named_by_their_numbers(tmp_path: Path) -> None:
    names = {"10": "k", **{str(number): "abcdefghij"[number] for number in range(9, -1, -1)}}
    files = [f"imagesTr/p_{number:04}.nii.gz" for number in range(11)]
    description = {"channel_names": names, "labels": {"liver": 1}}
    data = read_labeled_data(make(tmp_path, [*files, "labelsTr/p.nii.gz"], description))
    assert data.channels == tuple("abcdefghijk")


@pytest.mark.parametrize("names", [{"0": "T1"}, {"0": "T1", "1": "T2", "2": "FLAIR"}])
def test_names_of_more_or_fewer_channels_are_refused(names: dict[str, str], tmp_path: Path) -> None:
    files = ["imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz", "labelsTr/p.nii.gz"]
    with pytest.raises(InputError, match=rf"names {len(names)} channels, T1.*, but images have 2\. "):
        read_labeled_data(make(tmp_path, files, {"channel_names": names, "labels": {"liver": 1}}))


@pytest.mark.parametrize(("description", "expected"), [({"modality": "MRI"}, "MRI"), ({}, "channel")])
def test_one_name_is_that_of_all_channels(description: dict[str, str], expected: str, tmp_path: Path) -> None:
    files = ["imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz", "labelsTr/p.nii.gz"]
    assert read_labeled_data(make(tmp_path, files, description)).channels == (f"{expected} 0", f"{expected} 1")


@pytest.mark.parametrize(
    ("image", "label", "named"),
    [
        ("imagesTr/c01.nii.gz", "labelsTr/c01.nii.gz", "image has the name c01"),  # the same case
        ("second/c01.nii", "labelsTr/other.nii.gz", "image has the name c01"),
        ("imagesTr/other.nii.gz", "second/c01.nii.gz", "label has the name c01"),
    ],
)
@pytest.mark.parametrize("section", ["training", "validation"])
def test_cases_that_are_not_told_apart_are_problems(
    section: str, image: str, label: str, named: str, tmp_path: Path
) -> None:
    description = decathlon(5)
    description.setdefault(section, []).append({"image": image, "label": label})
    data = read_labeled_data(make(tmp_path, [], description))
    assert names([*data.training, *(data.validation or [])]) == [f"c{n:02}" for n in range(5)]
    assert [problem.startswith(str(tmp_path / image)) and named in problem for problem in data.problems] == [True]


@pytest.mark.parametrize(
    "name", ["patient{:03}_frame{:02}", "sub-{:02}_ses-{}_T1w", "BraTS-GLI-{:05}-{:03}", "P{}-{}_seg"]
)
def test_all_scans_of_a_patient_are_in_one_fold(name: str, tmp_path: Path) -> None:
    patient_of = {name.format(patient, scan): patient for patient in range(1, 13) for scan in (1, 12)}
    cases = [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in patient_of]
    folder = make(tmp_path, [], {**decathlon(0), "training": cases})
    validated = []
    for fold in range(4):
        training, validation = (names(list_cases(folder, part, fold, folds=4)) for part in ("training", "validation"))
        assert {patient_of[case] for case in training}.isdisjoint(patient_of[case] for case in validation)
        assert len(validation) == 6
        validated += validation
    assert sorted(validated) == sorted(patient_of)


@pytest.mark.parametrize(
    ("files", "doubtful"),
    [
        (["a1_1", "a1_2", "a2_1", "a2_2"], True),  # two patients make no three folds
        (["b1_1", "b1_2", "b1_3", "b1_4", "b2_1", "b3_1"], True),  # as of sites
        (["LUNG1-001", "LUNG1-002", "LUNG1-010"], False),
        (["BraTS20_Training_001", "BraTS20_Training_101", "BraTS20_Training_102"], False),
        (["case_1_seg", "case_2_seg", "case_10_seg"], False),
    ],
    ids=str,
)
def test_where_names_show_no_patients_each_case_stands_alone(
    files: list[str], doubtful: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(set(patients_of(files, 3))) == len(files)
    assert ("1 may be a patient with several cases" in caplog.text) is doubtful


def test_an_image_in_two_formats_is_a_problem(tmp_path: Path) -> None:
    files = [f"{part}/{name}.nii.gz" for part in ("images", "labels") for name in "ab"]
    data = read_labeled_data(make(tmp_path, [*files, "images/a.nrrd", "labels/b.nii"]))
    assert names(data.training) == ["a", "b"]
    assert [Path(problem.split(":")[0]).name for problem in data.problems] == ["a.nrrd", "b.nii.gz"]


def test_an_image_beside_its_copy_of_a_channels_name_is_a_problem(tmp_path: Path) -> None:
    files = ["images/a.nii.gz", "images/a_0000.nii.gz", "labels/a.nii.gz"]
    data = read_labeled_data(make(tmp_path, files))
    assert names(data.training) == ["a"]
    assert [problem.replace(str(tmp_path), "") for problem in data.problems] == [
        "/images/a_0000.nii.gz: is there as a.nii.gz too. Leave one of them in the folder."
    ]


def test_two_folders_of_files_are_read(tmp_path: Path) -> None:
    files = [f"{part}/scan_{n:04}.nii.gz" for part in ("images", "labels") for n in range(3)]
    data = read_labeled_data(make(tmp_path, [*files, "images/._scan_0000.nii.gz", "labels/notes.txt"]))
    # Four digits are part of the name where labels have them too.
    assert names(data.training) == ["scan_0000", "scan_0001", "scan_0002"]
    assert data.channels == ("image",)
    assert data.labels is None


def test_files_of_other_names_and_formats_are_told(tmp_path: Path) -> None:
    problems = read_labeled_data(make(tmp_path, ["images/scan_1.nii.gz", "labels/mask_1.nii.gz"])).problems
    assert problems == (
        f"{tmp_path}/images/scan_1.nii.gz: has no label, {tmp_path}/labels has no file of the name scan_1.",
        f"{tmp_path}/labels/mask_1.nii.gz: has no image, {tmp_path}/images has no file of the name mask_1.",
    )
    (tmp_path / "images" / "scan_1.nii.gz").rename(tmp_path / "images" / "scan_1.mgz")
    with pytest.raises(InputError, match=r"images: no images in this folder\. Files of \.nii\.gz, "):
        read_labeled_data(tmp_path)


def test_labels_with_gaps_keep_their_values(tmp_path: Path) -> None:
    labels = {"0": "background", "5": "tumor", "2": "liver"}
    assert read_labeled_data(make(tmp_path, [], decathlon(1, labels=labels))).labels == {"liver": 2, "tumor": 5}


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    files = ["images/a_0000.nii.gz", "images/a_0001.nii.gz", "images/b_0000.nii.gz", "images/b_0001.nii.gz"]
    files += ["images/c_0001.nii.gz", "images/d_0000.nii.gz", "images/d_0001.nii.gz"]
    folder = make(tmp_path, [*files, *(f"labels/{name}.nii.gz" for name in "ace")])
    with pytest.raises(InputError) as error:
        list_cases(folder, "training")
    text = str(error.value)
    assert "4 files" in text
    for part in ("b_0000.nii.gz: has no label", "c_0001.nii.gz: has the channels [1]", "e.nii.gz: has no image"):
        assert part in text
    assert names(list_cases(folder, skip_bad=True)) == ["a"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold a dictionary"),
        ('{"training": [], "labels": {"liver": "one"}}', "must give each structure a number"),
        ('{"training": [], "labels": {"liver": 1.5}}', "must give each structure a number"),
        ('{"training": [], "labels": {"liver": true}}', "must give each structure a number"),
        ('{"training": [], "labels": {"liver": 1, "tumor": -2}}', "must give each structure a number"),
        ('{"training": [], "labels": {"whole": [1, 2.5]}}', "must give each structure a number"),
        ('{"training": {"image": "a.nii.gz"}}', '"training" must be a list of cases'),
        ('{"training": [], "validation": "val.json"}', '"validation" must be a list of cases'),
        ('{"training": [], "labels": {"liver": 1, "tumor": 1}}', "the same number"),
        ('{"training": [], "labels": {"1": "liver", "2": "liver"}}', "the same name"),
        ("{}", "not a data set"),
    ],
)
def test_what_is_no_data_set_is_an_error_in_a_line(description: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(description)
    with pytest.raises(InputError, match=message) as error:
        read_labeled_data(tmp_path)
    assert "\n" not in str(error.value)


def test_too_few_cases_are_not_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 cases cannot be split into 5 folds"):
        list_cases(make(tmp_path, [], decathlon(3)), "training")
    with pytest.raises(InputError, match="fold 5"):
        list_cases(tmp_path, "training", fold=5)
