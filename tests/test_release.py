"""What a release needs: one version everywhere, and a container that is built of files that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def first(pattern: str, name: str) -> str:
    found = re.search(pattern, read(name), flags=re.MULTILINE)
    assert found is not None, name
    return found.group(1)


def test_the_version_is_the_same_everywhere() -> None:
    version = first(r'^version = "(.*)"$', "pyproject.toml")
    assert first(r"^version: (.*)$", "CITATION.cff") == version
    assert first(r"^## (\d[\d.]*)", "CHANGELOG.md") == version


def test_the_container_is_built_of_files_that_there_are() -> None:
    copied = [
        name
        for line in re.findall(r"^COPY (.*)$", read("Dockerfile"), flags=re.MULTILINE)
        for name in line.split()[:-1]
    ]
    assert {"monai_iunet", "bundles", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in read(".dockerignore").splitlines()
    for extra in first(r"\[([a-z,]+)\]", "Dockerfile").split(","):
        assert re.search(rf"^{extra} = ", read("pyproject.toml"), flags=re.MULTILINE)


def test_nobody_is_root_in_the_container() -> None:
    user = first(r"^USER (\d+)$", "Dockerfile")
    assert int(user) > 0
    assert f"--uid {user} " in read("Dockerfile")


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
