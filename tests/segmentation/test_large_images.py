"""What a segmentation holds, and what is done where it would not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

import monai_iunet
from monai_iunet import BundleSegmenter, LiveBytes, bundle_folder
from monai_iunet.errors import InputError
from monai_iunet.io.read import read_image
from monai_iunet.segmentation import segmenter as module
from tests.test_cli import call

MAIN = "from monai_iunet.cli import main; main()"


def save_ct(path: Path, shape: tuple[int, ...]) -> Path:
    """A CT of noise around a body."""
    data = np.full(shape, -1024, np.int16)
    inside = tuple(slice(extent // 8, -(extent // 8) or None) for extent in shape)
    data[inside] = np.random.default_rng(0).integers(-200, 300, data[inside].shape)
    image = nibabel.Nifti1Image(data, np.diag([1.5, 1.5, 2.0, 1.0]))
    image.set_sform(image.affine, code=1)
    nibabel.save(image, path)
    return path


def test_what_will_not_fit_is_refused_before_the_start(
    segmenter: BundleSegmenter,
    left_hippocampus: nibabel.Nifti1Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    monkeypatch.setattr(segmenter.network, "forward", lambda *_: pytest.fail("the network was run"))
    with pytest.raises(InputError, match=r"GiB beside the image, .* GiB are available") as caught:
        monai_iunet.segment(left_hippocampus, segmenter)
    assert "\n" not in str(caught.value)
    path = save_ct(tmp_path / "ct.nii.gz", (20, 24, 32))
    code, _, error = call("segment", path, "--bundle", "headneck", "--output", tmp_path / "out")
    assert code == 2
    assert error.startswith(f"Error: {path}: iunet_headneck_ct_segmentation: a segmentation of this size takes")
    monkeypatch.setattr(module, "available_memory", lambda: None)  # systems that do not say


def test_a_ct_keeps_its_type_until_a_window_is_cut(tmp_path: Path) -> None:
    image = read_image(save_ct(tmp_path / "ct.nii.gz", (40, 48, 64)))
    assert image.dataobj.dtype == np.int16
    segmenter = BundleSegmenter(bundle_folder("headneck"), "cpu")
    with LiveBytes(ignore=list(segmenter.network.parameters())) as live:
        labels = segmenter.segment(image).labels
    assert labels.shape == image.shape
    planned = segmenter.plan(image.shape, (1.5, 1.5, 2.0), with_network=True)
    parameters = sum(parameter.nbytes for parameter in segmenter.network.parameters())
    assert live.peak < planned.peak - parameters


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_a_kill_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    image, out, scratch = save_ct(tmp_path / "ct.nii.gz", (256, 256, 200)), tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    program = f"import monai_iunet.io.scratch as scratch; scratch.scratch_array.__defaults__ = (10,); {MAIN}"
    for seconds in (1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "segment", image, "--bundle", "headneck", "--output", out, "--no-overlay"],
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and "(deleted)" not in _maps(process.pid):
            time.sleep(0.05)
        assert "(deleted)" in _maps(process.pid)  # the labels, which are being written
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(out.iterdir())
        assert not [path for path in scratch.iterdir() if path.is_file()]  # PyTorch makes a folder there


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
