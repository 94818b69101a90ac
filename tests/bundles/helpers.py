"""Bundles through MONAI's own entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import monai.bundle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_iunet.bundling.task import TASKS

BUNDLES = Path(__file__).parents[2] / "bundles"
# Bundles whose weights are there; the others are recipes so far.
TRAINED = [task for task in TASKS if (BUNDLES / task.name / "models" / "model.pt").is_file()]
SCHEMA = Path(__file__).with_name("metadata_schema.json")
# Now and then PyTorch's gloo threads abort a process on a CPU that has done its work and is about to exit.
GLOO_ABORT = "terminate called without an active exception"


def copy_bundle(folder: Path, bundle: Path = BUNDLES / "iunet_hippocampus_mri_segmentation") -> Path:
    """Copy a bundle, without what its training and evaluation left."""
    return Path(shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "train")))


def options(bundle: Path, config: str, **overrides: object) -> dict[str, object]:
    """What `monai.bundle.run` is given, as the README of a bundle says; `__` in a name stands for `#`."""
    configs = bundle / "configs"
    files = {"config_file": configs / config, "meta_file": configs / "metadata.json"}
    if config.endswith("evaluate.json"):
        overrides = {"fit_quality": False, **overrides}  # lest a bundle of the repository is fitted to made data
    given = {**files, "logging_file": configs / "logging.conf", "bundle_root": bundle, **overrides}
    return {name.replace("__", "#"): str(value) if isinstance(value, Path) else value for name, value in given.items()}


def command(bundle: Path, config: str, **overrides: object) -> list[str]:
    """Words of `python -m monai.bundle run`."""
    words = ["-m", "monai.bundle", "run"]
    for name, value in options(bundle, config, **overrides).items():
        words += [f"--{name}", str(value)]
    return words


def run(bundle: Path, config: str, **overrides: object) -> None:
    """Run a config in this process, as the command does; a process of its own takes seconds to import all."""
    monai.bundle.run(**{**options(bundle, config, **overrides), "logging_file": False})


def launch(launcher: Sequence[str], bundle: Path, config: str, **overrides: object) -> str:
    """Run the command in a process of its own, or several; it must succeed. Return what it prints."""
    words = [sys.executable, *launcher, *command(bundle, config, **overrides)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if launcher and result.returncode and GLOO_ABORT in result.stderr:
        warnings.warn(f"{config}: PyTorch aborted a process at its exit; it is run again.", stacklevel=2)
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def losses(log_dir: Path) -> list[float]:
    """Loss of each step of a training, from what it wrote for TensorBoard."""
    log = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    log.Reload()
    return [event.value for event in log.Scalars("train_loss")]
