"""Files are tried in a process of their own, which takes no code from the working directory, and once each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from monai_iunet.errors import InputError
from monai_iunet.io import untrusted
from monai_iunet.io.read import read_image
from tests.io.dicom_files import write_slices

NAMES = ("random", "nibabel", "numpy", "SimpleITK", "pydicom", "copy", "monai_iunet", "sitecustomize", "usercustomize")


def write_image(path: Path) -> Path:
    data = np.random.default_rng(0).random((30, 40, 30)).astype(np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data), str(path))
    return path


@pytest.mark.parametrize(
    "source", [pytest.param("image.mha", marks=pytest.mark.slow), pytest.param("series", marks=pytest.mark.long)]
)
def test_no_code_is_taken_from_the_working_directory(source: str, tmp_path: Path) -> None:
    if source == "series":
        write_slices(tmp_path / source, np.random.default_rng(0).integers(0, 200, (30, 30, 40)).astype(np.int16))
    else:
        write_image(tmp_path / source)
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open('RAN_{name}', 'w').close()\n")
    # The installed command does not import from the working directory either.
    code = "import sys; sys.path = [part for part in sys.path if part]; from monai_iunet.cli import main; main()"
    words = [sys.executable, "-c", code, "segment", source, "--output", "out", "--no-overlay", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    root = str(Path(untrusted.__file__).parents[2])
    result = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": root}
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("RAN_")] == []
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_the_folder_of_the_data_is_no_place_for_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "image.mha")
    (tmp_path / "random.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend("")
    assert read_image(path).shape == (30, 40, 30)
    assert not (tmp_path / "RAN").exists()


def test_a_file_is_tried_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    run = subprocess.run

    def note(*arguments: object, **options: object) -> object:
        started.append(arguments)
        return run(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", note)
    path = write_image(tmp_path / "image.mha")
    for _ in range(3):
        read_image(path)
    assert len(started) == 1
    content = path.read_bytes()
    path.write_bytes(content.replace(b"NDims = 3", b"NDims = -1"))
    for tries in (2, 3):  # what is damaged is tried again
        with pytest.raises(InputError, match="damaged"):
            read_image(path)
        assert len(started) == tries
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    read_image(path)
    assert len(started) == 4


def test_a_slice_that_is_added_is_noticed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (6, 9, 8)).astype(np.int16)
    folder = write_slices(tmp_path / "a", values)
    assert read_image(folder).shape == (8, 9, 6)
    write_slices(folder, values[:1], InstanceNumber=99, ImagePositionPatient=[-10, 20, 50])
    with pytest.raises(InputError, match=r"mm between|lie where"):
        read_image(folder)


def test_data_beside_a_header_count_for_the_memory_that_reading_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "image.mhd", np.zeros((500, 500, 500), np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data), str(path))
    little = f"import monai_iunet.io.untrusted as module; module.SPARE_MEMORY = {2**27}; main("
    monkeypatch.setattr(untrusted, "CODE", untrusted.CODE.replace("main(", little))
    untrusted.try_in_a_process(path)
