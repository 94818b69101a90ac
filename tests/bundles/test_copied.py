"""A bundle away from the repository, with the package from its wheel: nothing depends on where either lies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.bundles.helpers import options
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "hatchling")), reason="needs build and hatchling"
)
def test_copied_renamed_and_read_only_it_segments_with_the_wheel(tmp_path: Path) -> None:
    python = [sys.executable, "-P"]
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([*python, *build], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run([*python, *install], check=True, capture_output=True)

    bundle = shutil.copytree(HIPPOCAMPUS, tmp_path / "renamed", ignore=shutil.ignore_patterns("eval", "train"))
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    bundle.chmod(0o555)
    image = make_hippocampus_data(tmp_path / "data", training=1) / "imagesTr" / "made_0.nii.gz"
    given = options(bundle, "inference.json", dataset_dir=image, output_dir=tmp_path / "out")
    code = (
        "import monai_iunet, monai.bundle\n"
        f"assert monai_iunet.__file__.startswith({str(installed)!r}), monai_iunet.__file__\n"
        f"monai.bundle.run(**{given!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run([*python, "-c", code], check=True, capture_output=True, cwd=tmp_path, env=environment)
    labels = nibabel.load(tmp_path / "out" / "made_0_seg.nii.gz")
    assert labels.shape == nibabel.load(image).shape
    assert np.asarray(labels.dataobj).any()
    # Also for an administrator, whom permissions do not stop.
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    for path in (bundle, *before):
        path.chmod(0o755 if path.is_dir() else 0o644)
