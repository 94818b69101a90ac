"""Machine, versions and devices, as a bug report needs them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["describe_system", "processor_name"]

PACKAGES = ("monai-iunet", "torch", "monai", "numpy", "nibabel", "SimpleITK", "pytorch-ignite", "nilearn", "highdicom")


def describe_system() -> dict[str, str]:
    """Return name and value of what to state in a bug report.

    Example:
        >>> describe_system()["highdicom"] != ""
        True
    """
    facts = {"Python": platform.python_version(), "system": platform.platform(), "processor": processor_name()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["torch"] = torch.__version__  # with the build
    facts["CUDA of PyTorch"] = torch.version.cuda or "none"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        facts[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts


def processor_name() -> str:
    """Return model and number of cores of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
