"""Bundles through MONAI's own entry points."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from monai_iunet.bundling.task import TASKS

BUNDLES = Path(__file__).parents[2] / "bundles"
# Bundles whose weights are there; the others are recipes so far.
TRAINED = [task for task in TASKS if (BUNDLES / task.name / "models" / "model.pt").is_file()]
SCHEMA = Path(__file__).with_name("metadata_schema.json")
# Now and then PyTorch's gloo threads abort a process on a CPU that has done its work and is about to exit.
GLOO_ABORT = "terminate called without an active exception"


def command(bundle: Path, config: str, **overrides: object) -> list[str]:
    """`python -m monai.bundle run`, as the README of a bundle says; `__` in a name stands for `#`."""
    configs = bundle / "configs"
    words = ["-m", "monai.bundle", "run", "--config_file", str(configs / config)]
    words += ["--meta_file", str(configs / "metadata.json"), "--logging_file", str(configs / "logging.conf")]
    if config.endswith("evaluate.json"):
        overrides = {"fit_quality": False, **overrides}  # lest a bundle of the repository is fitted to made data
    for name, value in {"bundle_root": bundle, **overrides}.items():
        words += [f"--{name.replace('__', '#')}", str(value)]
    return words


def run(bundle: Path, config: str, launcher: Sequence[str] = (), **overrides: object) -> str:
    """What the command prints; it must succeed."""
    words = [sys.executable, *launcher, *command(bundle, config, **overrides)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if launcher and result.returncode and GLOO_ABORT in result.stderr:
        warnings.warn(f"{config}: PyTorch aborted a process at its exit; it is run again.", stacklevel=2)
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def losses(log: str) -> list[float]:
    """Loss of each step in a log."""
    return [float(line.split("train_loss:")[1]) for line in log.splitlines() if "train_loss:" in line]
