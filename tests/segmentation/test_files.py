"""Batches of `monai-iunet segment`: nothing is lost, nothing stops the others, and failures are said at the end."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder, installed_bundles
from monai_iunet.io.geometry import to_simpleitk
from monai_iunet.segmentation import files
from monai_iunet.segmentation.origin import origin_of
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.segmenter import BRAIN, BundleSegmenter
from tests.bundles.helpers import command, copy_bundle
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data
from tests.io.dicom_files import write_slices
from tests.test_cli import call, without_warnings
from tests.test_cli import save as save_image

MAIN = "from monai_iunet.cli import main; main()"

pytestmark = pytest.mark.usefixtures("small_windows")


def save(path: Path, data: np.ndarray | None = None) -> Path:
    return save_image(path, np.random.default_rng(0).random((15, 14, 16), dtype=np.float32) if data is None else data)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / "images" / f"{name}.nii.gz") for name in ("a", "b", "c")]


@pytest.fixture(autouse=True)
def folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_no_result_replaces_an_image(order: tuple[int, int], tmp_path: Path) -> None:
    paths = [save(tmp_path / "case.nii.gz"), save(tmp_path / "case_seg.nii.gz")]
    before = [path.read_bytes() for path in paths]
    share = ["--share", f"{1 + order.index(0)}/2"]  # in which the other image is that of another process
    for extra in ([], ["--overwrite"], ["--skip-done"], ["--overwrite", *share]):
        code, _, error = call("segment", *(paths[index] for index in order), "--output", tmp_path, *extra)
        assert code == 2
        assert "case_seg.nii.gz: the result of" in error
        assert "would replace this image" in error
        assert [path.read_bytes() for path in paths] == before


def test_a_result_that_is_an_image_by_another_name_is_not_replaced(tmp_path: Path) -> None:
    image, link = save(tmp_path / "case_seg.nii.gz"), tmp_path / "case.nii.gz"
    link.symlink_to(image)
    before = image.read_bytes()
    code, _, error = call("segment", link, "--output", tmp_path, "--overwrite", "--no-overlay")
    assert code == 2
    assert "would replace this image" in error
    assert image.read_bytes() == before


def test_no_result_is_compared_with_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which took minutes for a thousand images, and hours for series of slices."""
    cases, stat, count = [], Path.stat, 0
    for number in range(100):
        image, labels = tmp_path / f"{number}.nii.gz", tmp_path / f"{number}_seg.nii.gz"
        image.touch()
        labels.touch()
        cases.append(files.Case(image, str(number), labels, tmp_path / "none", dict, files.write_nifti))

    def counting(*arguments: Any, **options: Any) -> os.stat_result:
        nonlocal count
        count += 1
        return stat(*arguments, **options)

    monkeypatch.setattr(Path, "stat", counting)
    files.check_outputs(cases, files.Settings(skip_done=True), [case.image for case in cases])
    assert count < 20 * len(cases)


def test_a_file_that_is_there_is_kept_unless_asked_otherwise(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b_seg.nii.gz").write_text("manual segmentation")
    arguments = ("segment", *images, "--output", out, "--no-overlay")
    code, printed, error = call(*arguments)
    assert (code, printed) == (2, "")
    assert error.startswith(f"Error: {out / 'b_seg.nii.gz'}: exists. Pass --overwrite to replace it, or --skip-done")
    assert error.count("\n") == 1
    assert names(out) == ["b_seg.nii.gz"]
    assert call(*arguments, "--skip-done")[0] == 0
    assert [name for name in names(out) if name.endswith(".gz")] == ["a_seg.nii.gz", "b_seg.nii.gz", "c_seg.nii.gz"]
    assert (out / "b_seg.nii.gz").read_text() == "manual segmentation"
    assert call(*arguments, "--overwrite")[0] == 0
    assert nibabel.load(out / "b_seg.nii.gz").shape == (15, 14, 16)


@pytest.mark.parametrize("existing", ["a_seg.png", "a_prob.nii.gz", "volumes.csv"])
def test_pictures_probabilities_and_tables_are_kept_too(existing: str, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / existing).write_text("mine")
    code, _, error = call("segment", images[0], "--output", out, "--probabilities", "--volumes", "csv")
    assert code == 2
    assert f"{out / existing}: exists" in error
    assert names(out) == [existing]
    assert (out / existing).read_text() == "mine"


@pytest.mark.parametrize("extra", [("--skip-done",), ("--share", "1/2")])
@pytest.mark.parametrize(
    ("name", "text", "option"),
    [
        ("volumes.csv", "image,ml\na,5\n", ("--volumes", "csv")),
        ("volumes.json", '{"a": {"liver": 5}}', ("--volumes", "json")),
        ("volumes.json", "[1]", ("--volumes", "json")),
        ("report.html", "<title>Mine</title>", ("--report",)),
    ],
)
def test_a_table_or_a_page_of_somebody_else_is_kept(
    name: str, text: str, option: tuple[str, ...], extra: tuple[str, ...], images: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("ipyniivue")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    words = ("segment", *images, "--output", out, "--no-overlay", *option, *extra)
    code, _, error = call(*words)
    assert code == 2
    assert f"{out / name}: exists" in error
    assert (names(out), (out / name).read_text()) == ([name], text)
    (out / name).unlink()
    assert call(*words)[0] == 0
    before = (out / name).stat().st_mtime_ns
    if extra == ("--skip-done",):  # which goes on with what it wrote itself
        assert call(*words)[0] == 0
        assert (out / name).stat().st_mtime_ns > before


def test_what_goes_wrong_with_one_image_does_not_stop_the_others(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = BundleSegmenter.segment

    def fail_on_b(self: BundleSegmenter, image: Any, name: str = "image", *arguments: Any, **options: Any) -> Any:
        if name.endswith("b.nii.gz"):
            raise KeyError("of a component")
        return segment(self, image, name, *arguments, **options)

    monkeypatch.setattr(BundleSegmenter, "segment", fail_on_b)
    code, printed, error = call("segment", *images, "--output", tmp_path / "out", "--volumes", "json")
    assert code == 2
    assert without_warnings(error) == f"Error: {images[1]}: KeyError: 'of a component'\n"
    assert [line for line in printed.splitlines() if line.endswith("_seg.nii.gz")] == [
        str(tmp_path / "out" / f"{name}_seg.nii.gz") for name in ("a", "c")
    ]
    assert set(json.loads((tmp_path / "out" / "volumes.json").read_text())) == {"a", "c"}


def test_results_are_written_while_the_next_images_are_segmented(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write, seen = files.read_image, files._write, []
    first_is_segmented, third_is_read = threading.Event(), threading.Event()

    def note(paths: tuple[Path, ...], *arguments: Any) -> Any:
        seen.append(paths[0].name)
        if paths[0].name == "b.nii.gz":  # else it might be written before the first, and the third not be begun
            assert first_is_segmented.wait(timeout=60)
        if paths[0].name == "c.nii.gz":
            third_is_read.set()
        return read(paths, *arguments)

    def wait(segmentation: Any, case: files.Case, strict: bool) -> Any:
        first_is_segmented.set()
        # One after another, the third would be read after the second is written, and this would wait in vain.
        assert case.name != "b" or third_is_read.wait(timeout=60)
        return write(segmentation, case, strict)

    monkeypatch.setattr(files, "read_image", note)
    monkeypatch.setattr(files, "_write", wait)
    assert call("segment", *images, "--output", tmp_path / "out", "--no-overlay")[0] == 0
    assert sorted(seen) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_of_large_images_one_is_in_memory_at_a_time(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = files.read_image, []

    def note(paths: tuple[Path, ...], *arguments: Any) -> Any:
        seen.append((paths[0].name, names(tmp_path / "out")))
        return read(paths, *arguments)

    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "read_image", note)
    assert call("segment", *images, "--output", tmp_path / "out", "--no-overlay")[0] == 0
    assert seen == [
        ("a.nii.gz", []),
        ("b.nii.gz", ["a_seg.nii.gz"]),
        ("c.nii.gz", ["a_seg.nii.gz", "b_seg.nii.gz"]),
    ]


@pytest.mark.parametrize("words", [(), ("--skip-done",), ("--overwrite",)])
def test_what_another_run_has_written_meanwhile_is_kept(
    words: tuple[str, ...], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, labels = files.read_image, tmp_path / "out" / "a_seg.nii.gz"

    def write_too(paths: tuple[Path, ...], *arguments: Any) -> Any:
        if paths[0].name == "a.nii.gz":
            labels.write_text("of another run")
        return read(paths, *arguments)

    monkeypatch.setattr(files, "read_image", write_too)
    code, _, error = call("segment", *images[:2], "--output", tmp_path / "out", "--no-overlay", *words)
    assert (labels.read_bytes() == b"of another run") == ("--overwrite" not in words)
    assert code == (0 if "--overwrite" in words else 2)
    assert ("another run has written it while" in error) == ("--overwrite" not in words)
    assert (tmp_path / "out" / "b_seg.nii.gz").exists()


def test_labels_and_probabilities_have_both_forms_of_the_image(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4))
    turned = nibabel.affines.from_matvec([[0.98, -0.199, 0], [0.199, 0.98, 0], [0, 0, 1]], [3, 4, 5])
    image.set_sform(np.eye(4), code=4)
    image.set_qform(turned, code=1)
    labels, probabilities = np.zeros((4, 5, 6), np.uint8), np.full((2, 4, 5, 6), 0.5, np.float32)
    segmentation = Segmentation(image, labels, {1: "liver"}, probabilities)
    for write in (files.write_nifti, files.write_probabilities):
        write(segmentation, tmp_path / "result.nii.gz")
        result = nibabel.load(tmp_path / "result.nii.gz")
        for name in ("get_sform", "get_qform"):
            (matrix, code), (wanted, wanted_code) = (getattr(each, name)(coded=True) for each in (result, image))
            assert code == wanted_code
            np.testing.assert_allclose(matrix, wanted, atol=1e-6)
        assert result.header.get_xyzt_units() == image.header.get_xyzt_units()


def test_nothing_is_written_of_labels_that_have_no_name(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4))
    segmentation = Segmentation(image, np.full((2, 2, 2), 3, np.uint8), {1: "liver"})
    labels = tmp_path / "out" / "a_seg.nii.gz"
    case = files.Case(tmp_path / "a.nii.gz", "a", labels, tmp_path / "a_seg.json", dict, files.write_nifti)
    with pytest.raises(InputError, match="labels 3 have no name"):
        files._write(segmentation, case, strict=False)
    assert not labels.exists()


def test_what_a_kill_leaves_is_completed(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("segment", *images[:2], "--output", out, "--volumes", "csv")
    assert call("segment", images[0], "--output", out, "--volumes", "csv")[0] == 0
    first = (out / "a_seg.nii.gz").read_bytes()
    # Killed between the picture and the labels of the second image.
    (out / "b_seg.png").write_bytes(b"half")
    (out / ".b_seg.nii.gz.started").touch()
    code, printed, error = call(*arguments, "--skip-done")
    assert (code, without_warnings(error)) == (0, "")
    assert "Left out: 1 of 2" in printed
    assert (out / "a_seg.nii.gz").read_bytes() == first
    assert (out / "b_seg.png").stat().st_size > 1000
    assert names(out) == sorted([*(f"{n}_seg.{s}" for n in "ab" for s in ("json", "nii.gz", "png")), "volumes.csv"])
    rows = (out / "volumes.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["image", "a", "a", "b", "b"]


def test_what_a_kill_leaves_of_a_replacement_is_completed(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("segment", images[0], "--output", out, "--no-overlay", "--volumes", "csv")
    assert call(*words)[0] == 0
    labels = (out / "a_seg.nii.gz").read_bytes()
    # Killed after the record, which says what the new labels would have been made of.
    (out / "a_seg.nii.gz").write_bytes(b"labels of other weights")
    (out / ".a_seg.nii.gz.started").touch()
    code, printed, _ = call(*words, "--skip-done")
    assert (code, "Left out" in printed) == (0, False)
    assert (out / "a_seg.nii.gz").read_bytes() == labels
    assert names(out) == ["a_seg.json", "a_seg.nii.gz", "volumes.csv"]


def test_what_is_beside_labels_that_are_replaced_is_of_the_new_ones(
    images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    words = ("segment", images[0], "--output", out, "--no-overlay")
    assert call(*words, "--volumes", "csv")[0] == 0
    origin = json.loads((out / "a_seg.json").read_text())["origin"]
    view, picture = out / "report_files" / "a.json", out / "a_seg.png"
    view.parent.mkdir()
    for path in (view, picture):
        path.write_text("of the old labels")
    assert call(*words, "--mirror", "--overwrite")[0] == 0
    assert json.loads((out / "a_seg.json").read_text())["origin"] == {
        **origin,
        "options": {"mirror": True, "series": None},
    }
    assert json.loads(view.read_text())
    assert f"1 files, such as {picture}, are of labels that are replaced, and are not written again" in caplog.text


def test_a_foreign_record_is_said_before_an_image_is_segmented(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "other_seg.json").write_text("[]")
    code, _, error = call("segment", images[0], "--output", out, "--no-overlay", "--volumes", "csv")
    assert (code, "other_seg.json: not the record of a segmented image" in error) == (2, True)
    assert names(out) == ["other_seg.json"]


def test_several_processes_share_a_folder(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = call("segment", *images, "--output", out, "--no-overlay", "--volumes", "json", "--share", "1/2")
    assert code == 0
    assert [line for line in printed.splitlines() if "_seg" in line] == [
        str(out / f"{name}_seg.nii.gz") for name in ("a", "c")
    ]
    assert list(json.loads((out / "volumes.json").read_text())) == ["a", "c"]
    words = ("segment", *images, "--output", out, "--no-overlay", "--volumes", "json", "--share", "2/2", "--json")
    code, printed, _ = call(*words)
    assert code == 0
    assert [json.loads(line)["image"] for line in printed.splitlines()] == ["b"]
    assert list(json.loads((out / "volumes.json").read_text())) == ["a", "b", "c"]


def test_results_without_a_record_are_said(images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("segment", images[0], "--output", out, "--no-overlay")[0] == 0
    words = ("segment", *images[:2], "--output", out, "--no-overlay", "--skip-done", "--volumes", "json")
    code, printed, _ = call(*words)
    assert code == 0
    assert "Not in the table: 1 of 2 images without a record, such as a: " in printed
    assert list(json.loads((out / "volumes.json").read_text())) == ["b"]


def other_weights(folder: Path) -> Path:
    path = copy_bundle(folder) / "models" / "model.pt"
    torch.save({name: 0.99 * value for name, value in torch.load(path, weights_only=True).items()}, path)
    return folder


def no_second_weights(folder: Path) -> Path:
    (copy_bundle(folder) / "models" / "any_contrast_quality.json").unlink()
    return folder


def test_only_a_result_of_the_same_image_and_bundle_is_left_out(images: list[Path], tmp_path: Path) -> None:
    out, name = tmp_path / "out", HIPPOCAMPUS.name
    assert call("segment", images[0], "--output", out, "--no-overlay", "--skip-done")[0] == 0
    before = (out / "a_seg.nii.gz").read_bytes()
    (tmp_path / "other").mkdir()
    other = save(tmp_path / "other" / "a.nii.gz", 1 + nibabel.load(images[0]).get_fdata())
    moved = tmp_path / "moved" / "a.nii.gz"
    moved.parent.mkdir()
    images[0].rename(moved)

    def go_on(*words: Any) -> tuple[int, str, str]:
        return call("segment", *words, "--output", out, "--no-overlay", "--skip-done")

    for words, difference in (
        ((other, images[1]), "another image"),
        ((moved, "--mirror"), "other options"),
        ((moved, "--bundle", other_weights(tmp_path / "weights" / name)), "other weights"),
        ((moved, "--bundle", no_second_weights(tmp_path / "second" / name)), "other weights"),
        ((moved, "--bundle", copy_bundle(tmp_path / "spleen")), "another bundle"),
    ):
        code, printed, error = go_on(*words)
        assert (code, printed) == (2, "")
        assert f"Error: {out / 'a_seg.nii.gz'}: was made of {difference} (a_seg.json). Pass --overwrite alone" in error
        assert names(out) == ["a_seg.json", "a_seg.nii.gz"]
        assert (out / "a_seg.nii.gz").read_bytes() == before
    assert go_on(moved)[:2] == (0, "Left out: 1 of 1 images, whose results are there.\n")
    assert call("segment", other, "--output", out, "--no-overlay", "--overwrite", "--volumes", "csv")[0] == 0
    assert go_on(other)[0] == 0


@pytest.mark.parametrize("option", ["--skip-done", "--overwrite"])
def test_an_image_that_is_gone_is_no_other_image(option: str, images: list[Path], tmp_path: Path) -> None:
    arguments = ("--output", tmp_path / "out", "--no-overlay", "--volumes", "csv")
    assert call("segment", *images[:2], *arguments)[0] == 0
    images[0].unlink()
    code, printed, error = call("segment", *images, *arguments, option)
    assert code == 2
    assert without_warnings(error) == f"Error: {images[0]}: no such file. Check the path.\n"
    assert str(tmp_path / "out" / "c_seg.nii.gz") in printed


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_data_beside_a_header_are_part_of_the_origin(suffix: str, tmp_path: Path) -> None:
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        image = nibabel.Nifti1Image(rng.random((15, 14, 16), dtype=np.float32), np.eye(4))
        SimpleITK.WriteImage(to_simpleitk(image), tmp_path / folder / f"scan.{suffix}")
    one, other = (tmp_path / folder / f"scan.{suffix}" for folder in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    arguments = ("--output", out, "--no-overlay", "--skip-done")
    assert call("segment", one, *arguments)[0] == 0
    code, printed, error = call("segment", other, *arguments)
    assert (code, printed) == (2, "")
    assert "scan_seg.nii.gz: was made of another image" in error
    assert call("segment", one, *arguments)[:2] == (0, "Left out: 1 of 1 images, whose results are there.\n")


def test_the_weights_that_find_regions_are_part_of_the_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6)))
    for bundle, depends in (("hippocampus", True), ("headneck", False)):
        monkeypatch.undo()
        before = origin_of([image], BundleSegmenter(bundle_folder(bundle), "cpu"))
        brain = other_weights(tmp_path / bundle)
        installed = {**installed_bundles(), BRAIN: brain}
        monkeypatch.setattr("monai_iunet.segmentation.segmenter.installed_bundles", lambda found=installed: found)
        after = origin_of([image], BundleSegmenter(bundle_folder(bundle), "cpu"))
        assert (before["weights"] != after["weights"]) is depends


@pytest.mark.parametrize("record", [None, "{", '{"origin": [1]}'])
def test_a_result_of_unknown_origin_is_left_out_with_a_warning(
    record: str | None, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_seg.nii.gz").write_text("manual segmentation")
    if record is not None:
        (out / "a_seg.json").write_text(record)
    assert call("segment", images[0], "--output", out, "--no-overlay", "--skip-done")[0] == 0
    assert f"1 results, such as {out / 'a_seg.nii.gz'}, are left out, but no record tells which image" in caplog.text


def test_what_is_missing_beside_a_result_that_is_left_out_is_said(
    images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert call("segment", images[0], "--output", out, "--no-overlay")[0] == 0
    assert call("segment", images[0], "--output", out, "--no-overlay", "--skip-done", "--probabilities")[0] == 0
    assert f"1 files, such as {out / 'a_prob.nii.gz'}, are not there, though their labels are" in caplog.text


def test_programs_read_lines_of_json(images: list[Path], tmp_path: Path) -> None:
    images[1].write_bytes(b"no image")
    code, printed, _ = call("segment", *images[:2], "--output", tmp_path / "out", "--no-overlay", "--json")
    assert code == 2
    first, second = map(json.loads, printed.splitlines())
    assert first["labels"] == str(tmp_path / "out" / "a_seg.nii.gz")
    assert set(first["volumes_mm3"]) == {"anterior hippocampus", "posterior hippocampus"}
    assert "not a readable NIfTI file" in second["error"]
    code, printed, _ = call("segment", images[2], "--output", tmp_path / "out", "--no-overlay", "--quiet")
    assert (code, printed) == (0, "")


@pytest.mark.parametrize(
    "encoding", [pytest.param("gbk", marks=pytest.mark.slow), pytest.param("ascii", marks=pytest.mark.long)]
)
def test_every_encoding_of_the_output_will_do(encoding: str, images: list[Path], tmp_path: Path) -> None:
    words = [sys.executable, "-c", MAIN, "segment", *images[:2], "--output", tmp_path / "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([*words, "--no-overlay"], capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"_seg.nii.gz") == 2


@pytest.mark.parametrize("name", ["scan$_$1", "per cent %s %d", "{braces}", "mit Umlaut ü", "名前", "a'b\"c", "-dash"])
def test_every_file_name_will_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save(tmp_path / f"{name}.nii.gz")
    code, _, error = call("segment", image, "--output", tmp_path / "out", "--volumes", "csv")
    assert (code, without_warnings(error)) == (0, "")
    assert names(tmp_path / "out") == sorted(
        [*(f"{name}_seg.{suffix}" for suffix in ("json", "nii.gz", "png")), "volumes.csv"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_told(tmp_path: Path) -> None:
    folder, image = tmp_path / os.fsdecode(b"M\xfcller"), save(tmp_path / "scan.nii.gz")
    folder.mkdir()
    (folder / "text.txt").touch()
    out = ("--output", tmp_path / "out", "--volumes", "csv")
    code, printed, error = call("segment", image, folder, *out)
    assert (code, printed) == (2, "")
    assert "its name is not UTF-8" in error
    for path in (folder / "scan.nii.gz", folder / "series" / "a.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image.read_bytes())
    out = (*out, "--report") if "ipyniivue" in packages_distributions() else out
    code, printed, error = call("segment", folder / "scan.nii.gz", folder / "series", *out)
    assert code == 2  # what is wrong with the second ends nothing
    assert "scan_seg.nii.gz" in printed
    assert "no DICOM series in this folder" in error


def test_a_home_folder_that_no_shell_has_put_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "out").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for output in ("~/out", "~root/out"):
        code, _, error = call("segment", save(tmp_path / "scan.nii.gz"), "--output", output)
        assert code == 2
        assert "Write the path of your home folder out" in error
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "scan.nii.gz"]
    assert not [*tmp_path.glob("~*")]
    words = ("segment", tmp_path / "scan.nii.gz", "--output", "~nobody of this name", "--no-overlay")
    assert call(*words)[0] == 0
    assert nibabel.load(tmp_path / "~nobody of this name" / "scan_seg.nii.gz").shape == (15, 14, 16)


def test_a_volume_of_one_slice_has_a_picture(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((35, 51, 1)).astype(np.float32)
    code, _, error = call("segment", save(tmp_path / "thin.nii.gz", data), "--output", tmp_path / "out")
    assert (code, without_warnings(error)) == (0, "")
    assert names(tmp_path / "out") == ["thin_seg.nii.gz", "thin_seg.png"]


def test_results_of_a_linked_folder_are_named_after_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in "12":
        folder = write_slices(tmp_path / f"store {number}" / "DICOM", np.full((30, 30, 4), 9, np.int16))
        (tmp_path / f"patient{number}").symlink_to(folder)
    assert files.image_names([tmp_path / "patient1", tmp_path / "patient2"]) == ["patient1", "patient2"]
    monkeypatch.chdir(tmp_path / "store 1" / "DICOM")
    assert files.image_names([Path()]) == ["DICOM"]
    assert files.image_names([Path("..")]) == ["store 1"]


def test_a_slice_of_the_series_is_not_replaced(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", np.random.default_rng(0).integers(0, 200, (30, 30, 40)).astype(np.int16))
    (folder / "003.dcm").rename(folder / "a_seg.dcm")
    before = (folder / "a_seg.dcm").read_bytes()
    code, _, error = call("segment", folder, "--output", folder, "--format", "input", "--overwrite")
    assert code == 2
    assert "would replace this image" in error
    assert (folder / "a_seg.dcm").read_bytes() == before


def test_a_full_disk_ends_the_batch_and_what_went_wrong_before_is_said(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_image

    def fail(paths: tuple[Path, ...], *arguments: Any) -> Any:
        if paths[0].name == "b.nii.gz":
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        if paths[0].name == "c.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(paths, *arguments)

    monkeypatch.setattr(files, "read_image", fail)
    code, printed, error = call("segment", *images, "--output", tmp_path / "out", "--no-overlay")
    assert code == 1
    assert names(tmp_path / "out") == ["a_seg.nii.gz"]
    assert "a_seg.nii.gz" in printed
    lines = without_warnings(error).splitlines()
    assert lines[0].startswith(f"Error: {images[1]}: OSError: ")
    assert "No space left" in lines[1]


def test_a_full_disk_names_the_file_and_what_to_do(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(segmentation: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_nifti", fail)
    code, _, error = call("segment", images[0], "--output", tmp_path / "out", "--no-overlay")
    expected = f"Error: {tmp_path / 'out' / 'a_seg.nii.gz'}: No space left on device. Make room there, and call it"
    assert (code, without_warnings(error).strip()) == (1, f"{expected} again. Guide: monai-iunet guide segment.")


def test_a_full_disk_is_said_where_simpleitk_does_not_say_it(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Exception thrown in SimpleITK ImageFileWriter_Execute: ...")

    image = tmp_path / "a.nrrd"
    SimpleITK.WriteImage(to_simpleitk(nibabel.load(images[0])), image)
    monkeypatch.setattr(SimpleITK, "WriteImage", fail)
    code, _, error = call("segment", image, "--output", tmp_path / "out", "--no-overlay", "--format", "input")
    expected = f"Error: {tmp_path / 'out' / 'a_seg.nrrd'}: cannot be written by SimpleITK, as on a full disk."
    assert (code, without_warnings(error).strip()) == (1, f"{expected} Guide: monai-iunet guide segment.")


def test_fail_fast_says_unknown_errors_in_one_line(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_image", lambda *_: {}["of a component"])
    code, _, error = call("segment", *images, "--output", tmp_path / "out", "--fail-fast")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"Error: {images[0]}: KeyError: 'of a component'")


def test_images_that_are_left_out_are_said(images: list[Path], tmp_path: Path) -> None:
    assert "Left out" not in call("segment", images[0], "--output", tmp_path / "out", "--no-overlay")[1]
    code, output, _ = call("segment", *images, "--output", tmp_path / "out", "--no-overlay", "--skip-done")
    assert code == 0
    assert "Left out: 1 of 3 images, whose results are there." in output


@pytest.mark.long
@pytest.mark.parametrize("config", ["inference", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_folder_whose_name_is_a_number(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of MONAI makes numbers of such names."""
    make_hippocampus_data(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    data = "2024" if config == "evaluate" else "2025"
    (tmp_path / "2024" / "imagesTr").rename(tmp_path / "2025") if config == "inference" else None
    words = [sys.executable, *command(HIPPOCAMPUS, f"{config}.json", dataset_dir=data, output_dir="2026", amp=False)]
    result = subprocess.run([*words, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(names(tmp_path / "2026")) == {"inference": 5, "evaluate": 2}[config]
