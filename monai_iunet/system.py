"""Machine, versions and devices, as a bug report needs them."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from monai_iunet.errors import InputError

__all__ = ["available_memory", "describe_system", "processor_name", "usable_device"]

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


def usable_device(name: str | torch.device, argument: str = "device") -> torch.device:
    """Return a device, after checking that tensors can be made on it.

    Args:
        name: of the device, or the device.
        argument: what named it, for the error.

    Raises:
        InputError: when it is not there.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{argument} {name}: not available here. Use cpu.") from error
    return device


def processor_name() -> str:
    """Return model and number of cores of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def available_memory() -> int | None:
    """Return the bytes of memory that processes can still take without swapping; None where the system does not say.

    Linux says it in `/proc/meminfo`; a container may have less, which its cgroup says.

    Example:
        >>> available_memory() != 0
        True
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return available
