"""Folders in which one process works at a time, and the files of an image."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monai_iunet import InputError
from monai_iunet.cli import app
from monai_iunet.io import files
from monai_iunet.io.files import files_in, hold_folder, write_atomically

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="another process works in this folder")
    with hold_folder(tmp_path), refused, hold_folder(tmp_path, patience=0):
        pass
    with hold_folder(tmp_path, patience=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from monai_iunet.io.files import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode < 0
    with hold_folder(tmp_path, patience=0):
        pass


def test_a_training_that_outlives_its_comparison_holds_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from monai_iunet.benchmark import comparison\n"
        "from monai_iunet.io.files import hold_folder\n"
        "run, me = comparison.subprocess.run, os.getpid()\n"
        "child = [sys.executable, '-c', f'import os, sys; os.kill({me}, 9); sys.stdin.read()']\n"
        "comparison.subprocess.run = lambda words, **options: run(child, **options)\n"
        "with hold_folder(Path(sys.argv[1])): comparison.run_config(Path('.'), 'train.json', {})"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE) as process:
        assert process.wait() < 0
        with pytest.raises(InputError, match="another process works"), hold_folder(tmp_path, patience=0):
            pass
        process.communicate()  # ends what it reads
    with hold_folder(tmp_path):
        pass


def test_two_benchmarks_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "hold_folder", partial(hold_folder, patience=0))
    with hold_folder(tmp_path):
        result = CliRunner().invoke(app, ["benchmark", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "another process works in this folder" in result.output


@pytest.mark.parametrize(
    ("header", "beside"),
    [
        ("ElementDataFile = a b.raw\n", ["a b.raw"]),
        ("NDims = 3\nelementdatafile=LIST\na b.raw\nc.raw\n", ["a b.raw", "c.raw"]),
        ("ElementDataFile = s_%03d.raw 1 2 1\n", ["s_001.raw", "s_002.raw"]),
        ("ElementDataFile = LOCAL\n", []),
        ("NRRD0004\ndata file: ./a b.raw\n", ["a b.raw"]),
        ("NRRD0004\ndatafile: LIST 2\nc.raw\na b.raw\n", ["c.raw", "a b.raw"]),
        ("NRRD0004\ndata file: absent.raw\n", []),
    ],
)
def test_an_image_is_its_header_and_the_data_beside_it(header: str, beside: list[str], tmp_path: Path) -> None:
    for name in ("a b.raw", "c.raw", "s_001.raw", "s_002.raw", "other.raw"):
        (tmp_path / name).touch()
    path = tmp_path / f"image.{'nhdr' if header.startswith('NRRD') else 'mhd'}"
    path.write_text(header)
    assert files_in(path) == [path, *(tmp_path / name for name in beside)]


def test_hidden_files_are_none_of_an_image(tmp_path: Path) -> None:
    for name in ("1.dcm", ".DS_Store"):
        (tmp_path / name).touch()
    assert files_in(tmp_path) == [tmp_path / "1.dcm"]


@pytest.mark.parametrize("name", ["1.2.840.7_seg.json", "1.2.840.7_seg.nii.gz", "model.pt"])
def test_what_is_being_written_ends_as_the_file_but_is_not_found_as_one(name: str, tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        assert temporary.name.endswith(".nii.gz" if name.endswith(".nii.gz") else temporary.suffix)
        assert not temporary.name.endswith("_seg.json")
        temporary.write_text("a")

    write_atomically(tmp_path / name, write)
    assert [path.name for path in tmp_path.iterdir()] == [name]
