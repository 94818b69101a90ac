"""Damaged image files, through the command and the bundle: a clear refusal or a right result, never anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.io.damaged_images import DAMAGES, SECONDS


def segment_damaged(folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    """What came of each image; a crash or a hang of the process is told with the image that it was about."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.io.damaged_images", str(folder), str(first), str(last)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * SECONDS * (last - first),
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0, f"exit {result.returncode} after {lines[-1:]}: {result.stderr[-2000:]}"
    return [line for line in lines if "index" in line]


def check(found: list[dict[str, Any]], count: int) -> None:
    assert len(found) == count
    assert [image for image in found if image["wrong"]] == []
    outcomes = {image["segment"]["outcome"] for image in found}
    assert outcomes == {"refused", "result"}


@pytest.mark.long
def test_one_image_of_each_kind_of_damage(tmp_path: Path) -> None:
    check(segment_damaged(tmp_path, 0, len(DAMAGES)), len(DAMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_damaged_images(part: int, tmp_path: Path) -> None:
    check(segment_damaged(tmp_path, 100 * part, 100 * (part + 1)), 100)
