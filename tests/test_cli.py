"""`monai-iunet segment`, as a person calls it."""

from __future__ import annotations

import gzip
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage
from typer.testing import CliRunner

from monai_iunet import cli
from monai_iunet.cli import app


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def without_warnings(text: str) -> str:
    """What is printed of errors, without doubts about noise."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("Warning: "))


def save(path: Path, data: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
    data = np.random.default_rng(0).random((35, 50, 36), dtype=np.float32) if data is None else data
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def test_the_example_segments_both_hippocampi(tmp_path: Path) -> None:
    code, printed, error = call("segment", "--example", "--strict", "--output", tmp_path / "new" / "folder")
    assert (code, error) == (0, "")
    written = tmp_path / "new" / "folder"
    assert sorted(path.name for path in written.iterdir()) == ["mni152_seg.nii.gz", "mni152_seg.png"]

    from monai_iunet.segmentation.whole_head import load_template

    template, result = load_template(), nibabel.load(written / "mni152_seg.nii.gz")
    assert result.shape == template.shape
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(result.affine, template.affine)
    labels = np.asarray(result.dataobj)
    volumes = np.bincount(labels.ravel(), minlength=5)[1:]  # in mm³, voxels are 1 mm
    assert (volumes > 500).all()
    for side in (volumes[:2].sum(), volumes[2:].sum()):
        assert 2000 < side < 7000
    assert abs(volumes[:2].sum() - volumes[2:].sum()) < 0.3 * volumes.sum() / 2
    for label, sign in ((1, -1), (2, -1), (3, 1), (4, 1)):
        center = nibabel.affines.apply_affine(template.affine, np.argwhere(labels == label).mean(0))
        assert 15 < sign * center[0] < 40
        assert str(volumes[label - 1]) in printed
    for anterior, posterior in ((1, 2), (3, 4)):
        assert np.argwhere(labels == anterior)[:, 1].mean() > np.argwhere(labels == posterior)[:, 1].mean()
    code, printed, _ = call("segment", "--example", "--skip-done", "--output", written)
    assert (code, printed) == (0, "Left out: 1 of 1 images, whose results are there.\n")


def test_images_of_ones_own_in_any_orientation(tmp_path: Path) -> None:
    from monai_iunet.segmentation.whole_head import LEFT_BOX, load_template

    template = load_template()
    low, high = (np.linalg.inv(template.affine) @ [*corner, 1] for corner in LEFT_BOX)
    crop = template.slicer[tuple(slice(int(a), int(b) + 1) for a, b in zip(low[:3], high[:3]))]
    nibabel.save(crop, tmp_path / "one.nii.gz")
    turned = crop.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nibabel.save(turned, tmp_path / "two.nii")
    code, printed, _ = call("segment", tmp_path / "one.nii.gz", tmp_path / "two.nii", "--output", tmp_path / "out")
    assert code == 0
    assert printed.count("anterior hippocampus") == 2
    one, two = (nibabel.load(tmp_path / "out" / f"{name}_seg.nii.gz") for name in ("one", "two"))
    np.testing.assert_allclose(one.affine, crop.affine)
    np.testing.assert_allclose(two.affine, turned.affine)
    assert two.shape == turned.shape
    back = nibabel.as_closest_canonical(two)
    np.testing.assert_allclose(back.affine, one.affine)
    expected, found = np.asarray(one.dataobj), np.asarray(back.dataobj)
    assert (expected > 0).sum() > 2000
    assert (expected != found).mean() < 0.001


def test_mirroring_twice_is_not_mirroring(tmp_path: Path) -> None:
    data = np.random.default_rng(1).random((35, 50, 36), dtype=np.float32)
    save(tmp_path / "as_is.nii.gz", data)
    save(tmp_path / "mirror.nii.gz", data[::-1].copy())
    call("segment", tmp_path / "as_is.nii.gz", "--output", tmp_path)
    call("segment", "--mirror", tmp_path / "mirror.nii.gz", "--output", tmp_path)
    one, two = (np.asarray(nibabel.load(tmp_path / f"{n}_seg.nii.gz").dataobj) for n in ("as_is", "mirror"))
    np.testing.assert_array_equal(one, two[::-1])


def truncated(path: Path) -> Path:
    save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text(path: Path) -> Path:
    path.write_text("not an image")
    return path


def zipped_text(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"not an image either"))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def with_nan(path: Path) -> Path:
    data = np.ones((35, 50, 36), dtype=np.float32)
    data[3, 4, 5] = np.nan
    return save(path, data)


def without_orientation(path: Path) -> Path:
    image = nibabel.Nifti1Image(np.ones((35, 50, 36), dtype=np.float32), np.eye(4))
    image.set_qform(None, code=0)
    image.set_sform(None, code=0)
    nibabel.save(image, path)
    return path


def with_singular_affine(path: Path) -> Path:
    image = nibabel.Nifti1Image(np.ones((35, 50, 36), dtype=np.float32), np.eye(4))
    image.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
    nibabel.save(image, path)
    return path


BAD_IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "no such file"),
    "folder": (folder, "no DICOM series in this folder"),
    "text": (text, "not a readable NIfTI"),
    "zipped text": (zipped_text, "not a readable NIfTI"),
    "truncated": (truncated, "truncated or damaged"),
    "4D": (lambda path: save(path, np.ones((8, 8, 8, 2), np.float32)), r"shape (8, 8, 8, 2), a 3D volume"),
    "complex": (lambda path: save(path, np.ones((8, 8, 8), np.complex64)), "type complex64"),
    "NaN": (with_nan, "1 voxels are NaN"),
    "no orientation": (without_orientation, "no orientation"),
    "whole head": (
        lambda path: save(path, np.eye(90, 1600, dtype=np.float32).reshape(90, 40, 40)),
        "no head found",
    ),
    "constant": (lambda path: save(path, np.ones((35, 50, 36), np.float32)), "all voxels have the same value"),
    "singular affine": (with_singular_affine, "affine that cannot be inverted"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    make, message = BAD_IMAGES[name]
    bad = make(tmp_path / "bad.nii.gz")
    code, printed, error = call("segment", bad, "--output", tmp_path / "out")
    assert code == 2
    assert printed == ""
    assert error.startswith(f"Error: {bad}: ")
    assert message in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_the_images_after_a_bad_one_are_segmented(tmp_path: Path) -> None:
    bad, missing = text(tmp_path / "bad.nii.gz"), tmp_path / "missing.nii.gz"
    good = save(tmp_path / "good.nii.gz")
    arguments = ("segment", bad, good, missing, "--no-overlay", "--volumes", "json")
    code, printed, error = call(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good_seg.json", "good_seg.nii.gz", "volumes.json"}
    assert str(tmp_path / "out" / "good_seg.nii.gz") in printed
    assert [line.split(": ")[1] for line in without_warnings(error).splitlines()] == [str(bad), str(missing)]
    code, printed, error = call(*arguments, "--fail-fast", "--output", tmp_path / "fast")
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert list((tmp_path / "fast").iterdir()) == []


def test_a_name_that_is_not_nifti(tmp_path: Path) -> None:
    code, _, error = call("segment", text(tmp_path / "image.png"))
    assert code == 2
    assert "not the name of an image that can be read" in error


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz")
    code, _, error = call("segment", image, "--output", text(tmp_path / "taken"))
    assert code == 2
    assert error.startswith(f"Error: {tmp_path / 'taken'}: cannot be written")


def test_results_that_would_overwrite_each_other(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        save(tmp_path / side / "image.nii.gz")
    code, _, error = call("segment", tmp_path / "a" / "image.nii.gz", tmp_path / "b" / "image.nii.gz")
    assert code == 2
    assert "Several images have the name image" in error


def test_bad_bundles_and_devices(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz")
    code, _, error = call("segment", image, "--bundle", tmp_path)
    assert code == 2
    assert "configs/inference.json, configs/metadata.json, models/model.pt is missing" in error
    code, _, error = call("segment", image, "--device", "gpu9")
    assert code == 2
    assert "--device gpu9: not available" in error


def test_decoders_that_nothing_uses_are_not_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MONAI looks for all of its readers whenever an image is to be loaded."""
    monkeypatch.setattr(cli, "app", LoadImage)
    with (
        caplog.at_level(logging.WARNING, "monai.data.nvimgcodec_pydicom_plugin"),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        cli.main()
    assert "nvImageCodec" not in caplog.text + "".join(str(warning.message) for warning in said)


@pytest.mark.parametrize("command", ["quality", "compare", "fit"])
def test_a_data_set_that_is_not_there_is_one_line(command: str, tmp_path: Path) -> None:
    gone, output = tmp_path / "gone", tmp_path / "out"
    arguments = {
        "quality": ("--bundle", "hippocampus", "--refit", "--dataset-dir", gone),
        "compare": ("--bundle", "hippocampus", "--max-epochs", 1, "--dataset-dir", gone, "--output", output),
        "fit": (gone, "--output", output),
    }
    code, _, error = call(command, *arguments[command])
    assert code == 2
    assert [line.startswith(f"Error: {gone}") for line in error.splitlines()] == [True]
    assert not output.exists()


def test_links_that_lead_in_a_circle_are_one_line(tmp_path: Path) -> None:
    circle, data = tmp_path / "circle", tmp_path / "data"
    circle.symlink_to(circle)
    data.mkdir()
    (data / "dataset_description.json").write_text('{"Name": "none", "BIDSVersion": "1.8.0"}')
    save(data / "sub-1_T1w.nii.gz")
    for arguments in (("fit", circle, "--output", tmp_path / "out"), ("bids", data, circle, "participant")):
        code, _, error = call(*arguments)
        assert code == 2
        assert [line.startswith(f"Error: {circle}: ") for line in error.splitlines()] == [True]


def test_neither_images_nor_the_example() -> None:
    assert call("segment")[0] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--probabilities-dtype", "float16"], "--probabilities-dtype: of probabilities, which are not written"),
        (["--series", "1.2.3"], "--series: of a folder with DICOM files, and none is named"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    code, _, error = call("segment", save(tmp_path / "a.nii.gz"), *options, "--output", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--mirror"], ["--share", "1/2"]])
def test_what_the_example_would_pass_over_is_refused(options: list[str], tmp_path: Path) -> None:
    code, _, error = call("segment", "--example", *options, "--output", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{options[0]}: of images of your own" in error
    assert not (tmp_path / "out").exists()


def test_the_installed_command_exits_with_2_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from monai_iunet.cli import main; main()", "segment", str(tmp_path / "no.nii.gz")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"Error: {tmp_path / 'no.nii.gz'}: no such file. Check the path.\n"


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="needs Linux with transparent huge pages"
)
@pytest.mark.parametrize("chosen", [None, "0"])
def test_large_tensors_are_in_huge_pages_unless_chosen_otherwise(chosen: str | None) -> None:
    code = (
        "import contextlib, sys; from pathlib import Path; from monai_iunet.cli import main\n"
        "sys.argv = ['', 'bundles']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "import torch; kept = torch.ones(2**24)\n"
        "flags = [line for line in Path('/proc/self/smaps').read_text().splitlines() if line.startswith('VmFlags')]\n"
        "print(any(' hg' in line for line in flags))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if chosen is None else {"THP_MEM_ALLOC_ENABLE": chosen}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines()[-1:] == [str(chosen is None)], result.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    script = "from monai_iunet.cli import main; main()"
    command = [sys.executable, "-c", script, "guide", "benchmark"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without a signal")
def test_a_signal_to_end_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; from monai_iunet import cli\n"
        "from monai_iunet.io.files import write_atomically\n"
        "def write(path): path.write_text('half'); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "cli.app = lambda: write_atomically(Path(sys.argv[1], 'a.txt'), write)\n"
        "cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (143, "")
    assert list(tmp_path.iterdir()) == []


def test_help_and_version_do_not_load_torch() -> None:
    for option in ("--help", "--version"):
        code = (
            "import sys; from monai_iunet.cli import app\n"
            f"try: app(['{option}'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'monai', 'numpy', 'nibabel') if m in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "[]"
