"""What happens to the work when a process is killed, a disk is full or two processes meet: slow, run before a release.

What was reported done is there afterwards, whole; what was not can be done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from tests.bundles.helpers import command, run
from tests.bundles.made_data import HIPPOCAMPUS as BUNDLE
from tests.bundles.made_data import make_hippocampus_data
from tests.bundles.test_multi_process import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals and mounts of Linux")]

KILLS = 10
SEGMENT = [sys.executable, "-c", "from monai_iunet.cli import main; main()", "segment"]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "network_def__channels": [4, 8],
        "network_def__couplings": 1,
        "dataset_dir": make_hippocampus_data(tmp_path / "data", training=2),
        "amp": False,
        "max_epochs": 300,
        "val_interval": 10,
        "patience": 100,
        "output_dir": tmp_path / "log",
        "roi_size": [24, 32, 24],
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = make_hippocampus_data(tmp_path / "data", training=30) / "imagesTr"
    return folder


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode:
        pytest.skip("only an administrator may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trained(folder: Path) -> int:
    """Epochs in a folder of checkpoints, whose files must be whole."""
    for name in ("last.pt", "model.pt"):
        if (folder / name).exists():
            torch.load(folder / name, weights_only=True)
    return torch.load(folder / "last.pt", weights_only=True)["epoch"] if (folder / "last.pt").exists() else 0


def at_random(folder: Path, rng: random.Random) -> None:
    """Any moment, from the start of the process to some epochs later."""
    time.sleep(rng.uniform(0, 9))


def while_writing(folder: Path, rng: random.Random) -> None:
    """A moment while a checkpoint is written under its temporary name."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(folder.glob(".*.pt")):
        time.sleep(0.0005)


@pytest.mark.parametrize("moment", [at_random, while_writing])
def test_a_training_that_is_killed_again_and_again(
    moment: Callable[[Path, random.Random], None], recipe: dict[str, Any], tmp_path: Path
) -> None:
    run(BUNDLE, "train.json", **recipe, ckpt_dir=tmp_path / "whole")
    folder, rng, done, kills = tmp_path / "killed", random.Random(0), 0, 0
    while kills < KILLS:
        process = start([sys.executable, *command(BUNDLE, "train.json", **recipe, ckpt_dir=folder, resume=True)])
        moment(folder, rng)
        if process.poll() is not None:
            break  # it was through
        kill(process)
        kills += 1
        now = trained(folder)
        assert now >= done
        done = now
    assert kills >= KILLS // 2
    if done < recipe["max_epochs"]:
        run(BUNDLE, "train.json", **recipe, ckpt_dir=folder, resume=True)
    assert trained(folder) == recipe["max_epochs"]
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "model.pt", "model_final.pt", "training.json"]
    for name in ("last.pt", "model.pt"):
        whole, killed = (torch.load(tmp_path / part / name, weights_only=True) for part in ("whole", "killed"))
        whole, killed = (part.get("network", part) for part in (whole, killed))
        assert all(torch.equal(killed[key], tensor) for key, tensor in whole.items())


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    """The results in a folder, which must be whole."""
    return {
        path.name: np.asarray(nibabel.load(path).dataobj) for path in folder.glob("*.nii.gz") if path.name[0] != "."
    }


def test_an_inference_that_is_killed_again_and_again(images: Path, tmp_path: Path) -> None:
    run(BUNDLE, "inference.json", dataset_dir=images, output_dir=tmp_path / "whole")
    expected, rng = labels_in(tmp_path / "whole"), random.Random(0)
    assert len(expected) == 31
    folder, done = tmp_path / "killed", set()
    for _ in range(KILLS):
        process = start([sys.executable, *command(BUNDLE, "inference.json", dataset_dir=images, output_dir=folder)])
        time.sleep(rng.uniform(6, 11))
        kill(process)
        found = labels_in(folder) if folder.exists() else {}
        assert done <= found.keys()
        done = set(found)
    run(BUNDLE, "inference.json", dataset_dir=images, output_dir=folder)
    found = labels_in(folder)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], labels) for name, labels in expected.items())


def test_the_command_is_killed_again_and_again(images: Path, tmp_path: Path) -> None:
    paths, rng, folder = [str(path) for path in sorted(images.iterdir())], random.Random(0), tmp_path / "out"
    for _ in range(KILLS):
        process = start([*SEGMENT, *paths, "--output", str(folder), "--no-overlay", "--overwrite"])
        count, told = rng.randint(1, len(paths) - 1), []
        for line in process.stdout:  # type: ignore[union-attr]
            told += [Path(line.strip()).name] if line.strip().endswith("_seg.nii.gz") else []
            if len(told) == count:
                break
        time.sleep(rng.uniform(0, 0.5))  # any moment of the next image
        kill(process)
        assert len(told) == count
        assert set(told) <= labels_in(folder).keys()


def labels_are_written(folder: Path, process: subprocess.Popen[str]) -> bool:
    """Wait for a moment in which the labels of an image have their temporary name."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(folder.glob(".*_seg.nii.gz.*.nii.gz")):
            return True
    return False


@pytest.mark.parametrize("way", ["the command", "inference.json"])
def test_a_kill_while_labels_are_written(way: str, images: Path, tmp_path: Path) -> None:
    """Beside a process that wants the same core, so that a file is open for longer."""
    paths, folder = [str(path) for path in sorted(images.iterdir())], tmp_path / "out"
    folder.mkdir()
    load = start([sys.executable, "-c", "while True: pass"])
    if way == "the command":
        words = [*SEGMENT, *paths, "--output", str(folder), "--no-overlay", "--skip-done"]
    else:
        words = [sys.executable, *command(BUNDLE, "inference.json", dataset_dir=images, output_dir=folder)]
    try:
        for _ in range(KILLS // 2):
            process = start(words)
            written = labels_are_written(folder, process)
            kill(process)
            assert written
            labels_in(folder)
    finally:
        kill(load)
    subprocess.run(words, check=True, capture_output=True)
    assert len(labels_in(folder)) == len(paths)


def test_a_disk_that_fills_up_during_training_keeps_the_last_state(recipe: dict[str, Any], tmp_path: Path) -> None:
    run(BUNDLE, "train.json", **{**recipe, "max_epochs": 1}, ckpt_dir=tmp_path / "once")
    size = sum(path.stat().st_size for path in (tmp_path / "once").iterdir())
    with small_disk(tmp_path / "disk", f"{int(1.3 * size / 1024)}k") as disk:
        words = [sys.executable, *command(BUNDLE, "train.json", **recipe, ckpt_dir=disk)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert "No space left" in result.stdout + result.stderr
        assert 1 <= trained(disk) < recipe["max_epochs"]
        assert not list(disk.glob(".*"))


def test_a_full_disk_gets_no_part_of_a_result(images: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        image = min(images.iterdir())
        result = subprocess.run([*SEGMENT, image, "--output", disk], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "No space left" in result.stderr
        assert "Traceback" not in result.stderr
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_full_disk_gets_no_part_of_what_a_config_writes(images: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        words = [sys.executable, *command(BUNDLE, "inference.json", dataset_dir=images, output_dir=disk)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert "No space left" in result.stdout + result.stderr
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_full_disk_of_temporary_files_is_told_in_one_line(images: Path, tmp_path: Path) -> None:
    program = "import monai_iunet.io.scratch as scratch; scratch.scratch_array.__defaults__ = (10,); "
    words = [sys.executable, "-c", program + SEGMENT[2], "segment", str(min(images.iterdir()))]
    with small_disk(tmp_path / "disk", "16k") as disk:
        result = subprocess.run(
            [*words, "--output", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(disk)},
        )
    assert result.returncode == 1
    assert "GiB do not fit. Make room there, or set TMPDIR" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_read_only_folder_is_noticed_before_the_work(images: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        image = min(images.iterdir())
        for output in (disk, disk / "new"):
            result = subprocess.run([*SEGMENT, image, "--output", output], capture_output=True, text=True, check=False)
            assert result.returncode == 2
            assert "cannot be written" in result.stderr
            assert "Traceback" not in result.stderr
        for words in (
            command(BUNDLE, "train.json", **recipe, ckpt_dir=disk / "new"),
            command(BUNDLE, "inference.json", dataset_dir=images, output_dir=disk / "new"),
        ):
            result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
            assert result.returncode != 0
            assert "cannot be written" in result.stderr


def test_two_processes_segment_into_one_folder(images: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(images.iterdir())[:8]]
    processes = [start([*SEGMENT, *paths, "--output", str(tmp_path / "out")]) for _ in range(2)]
    for process in processes:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    alone = tmp_path / "alone"
    subprocess.run([*SEGMENT, *paths, "--output", alone], check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in alone.iterdir())
    found, expected = labels_in(tmp_path / "out"), labels_in(alone)
    assert len(expected) == 8
    assert all(np.array_equal(found[name], labels) for name, labels in expected.items())


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.05)
    kill(process)
    raise TimeoutError


def test_a_worker_that_dies_ends_the_training_with_a_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    words = command(BUNDLE, "train.json", **recipe, num_workers=1, ckpt_dir=folder)
    process = start([sys.executable, *words])
    wait_for((folder / "last.pt").exists, process)
    # Whatever other helpers a process has, workers are what it forked with its own command line.
    workers = wait_for(lambda: [pid for pid in children(process.pid) if "monai.bundle" in command_line(pid)], process)
    os.kill(workers[0], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "DataLoader worker" in printed
    assert "killed" in printed
    assert trained(folder) >= 1


def test_a_rank_that_dies_ends_the_others_with_a_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    recipe |= {"max_epochs": 1000, "dataset_dir": make_hippocampus_data(tmp_path / "more", training=2, validation=2)}
    words = [*torchrun(), *command(BUNDLE, "multi_gpu_train.json", **recipe, ckpt_dir=folder)]
    process = start([sys.executable, *words])
    wait_for((folder / "last.pt").exists, process)
    ranks = [pid for pid in children(process.pid) if "monai.bundle" in command_line(pid)]
    assert len(ranks) >= 2
    os.kill(ranks[-1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in printed
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert trained(folder) >= 1


def test_processes_of_torchrun_share_a_folder(images: Path, tmp_path: Path) -> None:
    paths, folder = sorted(images.iterdir())[:5], tmp_path / "out"
    start = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2"]
    words = [*start, *SEGMENT, *paths, "--output", folder, "--no-overlay", "--volumes", "json"]
    alone = subprocess.run(words, capture_output=True, text=True, check=False)
    assert alone.returncode != 0
    assert "Pass --share auto" in alone.stderr
    assert not folder.exists()
    result = subprocess.run([*words, "--share", "auto"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    done = [Path(line).name for line in result.stdout.splitlines() if line.endswith("_seg.nii.gz")]
    names = [path.name.removesuffix(".nii.gz") for path in paths]
    assert sorted(done) == sorted(f"{name}_seg.nii.gz" for name in names)
    assert list(json.loads((folder / "volumes.json").read_text())) == names
