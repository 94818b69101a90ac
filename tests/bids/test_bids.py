"""`monai-iunet bids` on a made data set: two sessions, a participant without T1w, one that cannot be read."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iunet import bundle_folder
from monai_iunet.bids.images import find_images, participants
from monai_iunet.errors import InputError
from tests.test_cli import call, save, without_warnings

pytest.importorskip("bids")
SUFFIX = "desc-hippocampus_dseg"


def image_of(folder: Path, subject: str, session: str | None, name: str = "T1w") -> Path:
    stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    place = folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{stem}_{name}.nii.gz"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "made", "BIDSVersion": "1.8.0"}))
    rng = np.random.default_rng(0)
    for session in ("pre", "post"):
        save(image_of(folder, "01", session), rng.random((35, 50, 36), dtype=np.float32))
    save(image_of(folder, "02", None, "T2w"))
    image_of(folder, "03", None).write_bytes(b"no image")
    return folder


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def verdict(folder: Path) -> list[dict[str, Any]]:
    program = shutil.which("bids-validator-deno")
    if program is None:
        pytest.skip("bids-validator-deno is not installed")
    words = [program, str(folder), "--format", "json", "--ignoreWarnings"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    return [issue for issue in json.loads(result.stdout)["issues"]["issues"] if issue["severity"] == "error"]


def test_each_participant_is_segmented_or_reported(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, error = call("bids", data, out, "participant", "--probabilities")
    assert code == 2
    lines = without_warnings(error).splitlines()
    assert lines[0] == "Error: sub-02: has no T1w image."
    assert "sub-03_T1w.nii.gz: not a readable NIfTI file" in lines[1]
    assert len(lines) == 2
    anat = out / "sub-01" / "ses-post" / "anat"
    assert str(anat / f"sub-01_ses-post_{SUFFIX}.nii.gz") in printed
    labels = nibabel.load(anat / f"sub-01_ses-post_{SUFFIX}.nii.gz")
    assert labels.shape == (35, 50, 36)
    sidecar = json.loads((anat / f"sub-01_ses-post_{SUFFIX}.json").read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-01/ses-post/anat/sub-01_ses-post_T1w.nii.gz"]
    structures = read_tsv(anat / f"sub-01_ses-post_{SUFFIX}.tsv")
    counts = np.bincount(np.asarray(labels.dataobj).ravel(), minlength=3)
    assert [(row["index"], row["name"], float(row["volume_mm3"])) for row in structures] == [
        ("1", "anterior hippocampus", counts[1]),
        ("2", "posterior hippocampus", counts[2]),
    ]
    assert all(0 <= float(row["quality"]) < 0.6 for row in structures)  # of noise
    assert (out / "figures" / f"sub-01_ses-post_{SUFFIX}.png").stat().st_size > 1000
    probabilities = nibabel.load(anat / f"sub-01_ses-post_{SUFFIX.replace('dseg', 'probseg')}.nii.gz")
    assert probabilities.shape == (35, 50, 36, 3)

    code, printed, error = call("bids", data, out, "group")
    assert code == 2
    assert error == "Error: sub-02: has no result.\nError: sub-03: has no result.\n"
    rows = read_tsv(out / "group_hippocampus.tsv")
    assert [(row["participant_id"], row["session_id"]) for row in rows] == [
        ("sub-01", "ses-post"),
        ("sub-01", "ses-pre"),
        ("sub-02", "n/a"),
        ("sub-03", "n/a"),
    ]
    assert float(rows[0]["anterior_hippocampus_mm3"]) == counts[1]
    assert rows[2]["anterior_hippocampus_mm3"] == "n/a"
    assert rows[0]["anterior_hippocampus_quality"] == structures[0]["quality"]
    assert verdict(out) == []


def test_what_is_done_is_left_out_and_nothing_is_replaced(data: Path, tmp_path: Path) -> None:
    arguments = ("bids", data, tmp_path / "out", "participant")
    code, printed, error = call(*arguments, "--participant_label", "sub-01", "--session-label", "pre")
    assert (code, without_warnings(error)) == (0, "")
    assert printed.count("_dseg.nii.gz") == 1
    code, printed, error = call(*arguments, "--participant-label", "01")
    assert (code, printed) == (2, "")
    assert "_dseg.nii.gz: exists. Pass --overwrite" in error
    code, printed, _ = call(*arguments, "--participant-label", "01", "--skip-done")
    assert code == 0
    assert "ses-post" in printed
    assert "ses-pre" not in printed
    described = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert [entry["Name"] for entry in described["GeneratedBy"]] == ["monai_iunet"]


def test_images_whose_names_pybids_does_not_understand_are_named(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    find_images(data, ["T1w"])
    assert "are left out" not in caplog.text
    for name in ("acq-0.8mm_T1w.nii.gz", "acq-b_T1w.NII.GZ", "t1w.nii", "mod-T1w_defacemask.nii.gz"):
        (data / "sub-01" / "ses-pre" / "anat" / f"sub-01_ses-pre_{name}").touch()
    (data / "sub-01" / "ses-pre" / "anat" / "._sub-01_ses-pre_T1w.nii.gz").touch()
    images, _ = find_images(data, ["T1w"], ["01"])
    assert len(images) == 2
    assert "3 files, such as" in caplog.text
    assert "sub-01_ses-pre_acq-0.8mm_T1w.nii.gz, are left out: in BIDS, labels have letters and digits" in caplog.text


def test_filters_for_other_contrasts_alone_are_refused(data: Path, tmp_path: Path) -> None:
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"T1": {"acquisition": "fast"}}))
    with pytest.raises(InputError, match="has no entry t1w or t2w, so it would not filter"):
        find_images(data, ["T1w", "T2w"], filters=filters)
    filters.write_text(json.dumps({"T1W": {}, "bold": {}}))
    assert len(find_images(data, ["T1w"], filters=filters)[0]) == 3


def test_filters_sessions_and_labels_in_a_row(data: Path, tmp_path: Path) -> None:
    save(image_of(data, "04", "pre", "acq-fast_T1w"))
    save(image_of(data, "04", "pre", "part-phase_T1w"))
    save(image_of(data, "05", "pre", "acq-slow_T1w"))
    images, missing = find_images(data, ["T1w"], ["04", "sub-05"], ["pre"])
    assert [image.stem for image in images] == ["sub-04_ses-pre_acq-fast", "sub-05_ses-pre_acq-slow"]
    assert missing == []
    filters = tmp_path / "of_labels.json"
    filters.write_text(json.dumps({"t1w": {"acquisition": "fast"}}))
    words = (f"--bids-filter-file={filters}", "--participant_label", "04", "05", "--session_label=pre")
    code, printed, error = call("bids", "--json", data, tmp_path / "out", "participant", *words)
    expected = "Error: sub-05 ses-pre: has no T1w image that fits --bids-filter-file.\n"
    assert (code, without_warnings(error)) == (2, expected)
    assert f"sub-04_ses-pre_acq-fast_{SUFFIX}.nii.gz" in printed


def test_a_part_of_a_name_that_is_no_entity_does_not_end_the_group(data: Path, tmp_path: Path) -> None:
    image = image_of(data, "03", None)
    image.rename(image.with_name("sub-03_mprage_T1w.nii.gz"))
    folder = tmp_path / "out" / "sub-03" / "anat"
    folder.mkdir(parents=True)
    stem = f"sub-03_mprage_{SUFFIX}"
    (folder / f"{stem}.nii.gz").touch()
    (folder / f"{stem}.tsv").write_text("index\tname\tcolor\tvolume_mm3\tquality\n1\tfront\t#ff0000\t12.000\t0.9\n")
    code, _, error = call("bids", data, tmp_path / "out", "group")
    assert code == 2, error  # since the others have no result
    row = read_tsv(tmp_path / "out" / "group_hippocampus.tsv")[-1]
    assert (row["participant_id"], row["image"], row["front_mm3"]) == ("sub-03", "sub-03_mprage", "12.000")
    for content in (b"index;name\n1;front\n", "index\tname\n1\tfront\n".encode("utf-16")):  # as a spreadsheet saves it
        (folder / f"{stem}.tsv").write_bytes(content)
        code, _, error = call("bids", data, tmp_path / "out", "group")
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith(f"Error: {folder / stem}.tsv: not a table of structures")


@pytest.mark.parametrize(
    "options",
    [("--participant-label", "01"), ("--session-label", "pre"), ("--report",), ("--probabilities", "--strict")],
)
def test_options_that_the_group_would_pass_over_are_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    code, _, error = call("bids", tmp_path, tmp_path / "out", "group", *options)
    assert (code, error.count("\n")) == (2, 1)
    given = ", ".join(word for word in options if word.startswith("--"))
    assert error.startswith(f"Error: {given}: of the level participant")


def test_a_missing_session_is_reported(data: Path) -> None:
    save(image_of(data, "01", "late", "T2w"))
    assert [str(absent) for absent in find_images(data, ["T1w"], ["01"])[1]] == ["sub-01 ses-late"]
    save(image_of(data, "04", "post"))
    images, missing = find_images(data, ["T1w"], sessions=["pre"])  # others than they have images of
    assert [image.stem for image in images] == ["sub-01_ses-pre"]
    assert [str(absent) for absent in missing] == ["sub-02 ses-pre", "sub-03 ses-pre", "sub-04 ses-pre"]


def test_folders_without_an_image_that_bids_knows_are_reported(data: Path, tmp_path: Path) -> None:
    for folder in ("sub-04/anat", "sub-05/ses-pre", "sub-01/ses-empty", "sub-06/ses-a b"):
        (data / folder).mkdir(parents=True)
    save(image_of(data, "é", None), np.ones((9, 9, 9), np.float32))
    missing = [str(absent) for absent in find_images(data, ["T1w"])[1]]
    assert missing == ["sub-01 ses-empty", "sub-02", "sub-04", "sub-05 ses-pre", "sub-06 ses-a b", "sub-é"]
    assert participants(data) == ["01", "02", "03", "04", "05", "06", "é"]
    code, _, error = call("bids", data, tmp_path / "out", "participant", "--fail-fast", "--participant-label", "é")
    assert code
    assert "sub-é: has no T1w image. Labels of BIDS are letters and digits" in error


def test_a_data_set_may_be_a_link(data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(data, target_is_directory=True)
    assert [image.source for image in find_images(link, ["T1w"])[0]] == [
        image.source for image in find_images(data, ["T1w"])[0]
    ]


def test_two_images_of_one_name_do_not_share_a_result(data: Path, tmp_path: Path) -> None:
    """One compressed and one not, or two contrasts of a bundle that takes both."""
    again = image_of(data, "01", "pre").with_suffix("")
    save(again, np.ones((9, 9, 9), np.float32))
    code, _, error = call("bids", data, tmp_path / "out", "participant")
    assert code == 2
    assert "both results would be" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sessions_of_one_name_do_not_share_a_picture(data: Path, tmp_path: Path) -> None:
    for session in ("pre", "post"):
        save(image_of(data, "04", session).with_name("sub-04_T1w.nii.gz"), np.ones((9, 9, 9), np.float32))
    code, _, error = call("bids", data, tmp_path / "out", "participant", "--participant-label", "04")
    assert code == 2
    assert "both results would be" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sub-02_T1w.nii.gz", "sub-04_ses-post_T1w.nii.gz"])
def test_a_file_in_the_folder_of_another_is_refused(name: str, data: Path, tmp_path: Path) -> None:
    save(image_of(data, "04", "pre").with_name(name), np.ones((9, 9, 9), np.float32))
    code, _, error = call("bids", data, tmp_path / "out", "participant")
    assert code == 2
    assert f"{name}: is named after " in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--participant-label", "77"], "has no participant 77. There is 01, 02, 03."),
        (["--session-label", "last"], "has no session last. There is post, pre."),
        (["--bids-filter-file", "no.json"], "no.json: not a JSON file"),
        (["--bundle", "headneck"], 'Add "bids_suffixes"'),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str, data: Path, tmp_path: Path) -> None:
    code, printed, error = call("bids", data, tmp_path / "out", "participant", *arguments)
    assert (code, printed) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_will_not_do(data: Path, tmp_path: Path) -> None:
    for bids_dir, output, message in (
        (tmp_path, tmp_path / "out", "has no dataset_description.json"),
        (tmp_path / "no", tmp_path / "out", "no such folder"),
        (data, data, "is the data set itself"),
    ):
        code, _, error = call("bids", bids_dir, output, "participant")
        assert code == 2
        assert message in error
    other = tmp_path / "other"
    other.mkdir()
    description = json.dumps({"GeneratedBy": [{"Name": "fMRIPrep"}]})
    (other / "dataset_description.json").write_text(description)
    code, _, error = call("bids", data, other, "participant", "--participant-label", "01")
    assert code == 2
    assert "describes the data set of another program" in error
    assert (other / "dataset_description.json").read_text() == description
    code, _, error = call("bids", data, tmp_path / "empty", "group")
    assert code == 2
    assert "Run the level participant first" in error


def test_contrasts_are_named_by_the_bundle() -> None:
    from monai_iunet import BundleSegmenter
    from monai_iunet.bids.derivatives import contrasts, description_label

    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    assert contrasts(segmenter) == ["T1w"]
    assert description_label(segmenter) == "hippocampus"
    segmenter.metadata["bids_suffixes"] = "T1w"
    with pytest.raises(InputError, match="does not say which contrasts"):
        contrasts(segmenter)
