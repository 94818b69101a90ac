"""Folders in which one process works at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from monai_iunet import InputError
from monai_iunet.io.files import hold_folder

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
