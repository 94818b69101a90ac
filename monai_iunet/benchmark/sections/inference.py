"""Segmentation by sliding windows: resident memory and time of MONAI's inferer, with buffers and without, and of ours.

From an image as it was read, int16, to labels on its grid. Each measurement is a process of its own, because a process
does not tell when it held how much; what it held after a tiny image is subtracted. MONAI's way is that of its bundles:
all logits on the grid of the network, softmax, `Invertd`, argmax.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Invertd, Orientationd, ScaleIntensityRanged, Spacingd
from torch import nn

from monai_iunet.benchmark.measure import Spread, ratio
from monai_iunet.benchmark.section import Job, Row, Section, Settings, SkippedError, number, spread
from monai_iunet.inference.labels import LabelInferer
from monai_iunet.inference.plan import plan_inference
from monai_iunet.inference.prepare import prepare
from monai_iunet.inference.streaming import StreamingInferer
from monai_iunet.io.text import times

__all__ = ["SECTION", "measure_here"]

SPACING = 1.5  # mm, of the network; images have 1 mm
OVERLAP = 0.5  # of windows
LONG = 32  # classes of the images that become longer
MONAI, BUFFERED, OURS = "MONAI", "MONAI, buffer_steps=2", "ours"


def _jobs(settings: Settings) -> Iterator[Job]:
    """Yield all inferers side by side, by the number of classes, then by the length of the image."""
    side = settings.sizes.memory_size
    for classes, length in ((8, 2), (118, 2), (LONG, 2), (LONG, 4), (LONG, 8)):
        size = (side, side, length * side)
        yield Job(f"{classes} classes, {times(size)}", partial(_measure, settings, classes, size))


def _measure(settings: Settings, classes: int, size: tuple[int, ...]) -> Iterator[Row]:
    window = 48 if size[0] >= 96 else 16
    found = {}
    for name in (MONAI, BUFFERED, OURS):
        found[name] = _in_a_process(
            name=name,
            classes=classes,
            size=list(size),
            window=window,
            rounds=settings.sizes.rounds if size[-1] == 2 * size[0] else 1,  # the long ones are for memory
            device=str(settings.device),
        )
    for name, values in found.items():
        row = {
            "inferer": name,
            "classes": classes,
            "image": times(size),
            "length": max(size),
            "mebibytes": values["bytes"] / 2**20,
            "image_and_labels_mebibytes": 3 * math.prod(size) / 2**20,
            "cpu_seconds": Spread.of(values["cpu_seconds"]),
            "seconds": Spread.of(values["seconds"]),
        }
        if settings.device.type == "cuda":
            row["gpu_mebibytes"] = values["gpu_bytes"] / 2**20
        elif name == OURS:
            row["planned_mebibytes"] = _planned(classes, size, window) / 2**20
        row["over_monai"] = ratio(values["cpu_seconds"], found[MONAI]["cpu_seconds"])
        yield row


def _planned(classes: int, size: tuple[int, ...], window: int) -> int:
    """Return the bytes that are planned for what `measure_here` measures with its defaults."""
    inferer = StreamingInferer(**_windows(window, OVERLAP))
    plan = plan_inference(_preprocessing(SPACING), inferer, classes, size, (1.0, 1.0, 1.0), network=_network(classes))
    return plan.peak


def _in_a_process(**options: Any) -> dict[str, Any]:
    """Run `measure_here` in a process of its own."""
    program = "import json, sys; from monai_iunet.benchmark.sections.inference import measure_here; "
    program += "print(json.dumps(measure_here(**json.loads(sys.argv[1]))))"
    words = [sys.executable, "-c", program, json.dumps(options)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"ended by signal {-result.returncode}"]
        raise SkippedError(f"{options['name']}: {lines[-1]}")
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def measure_here(
    name: str,
    classes: int,
    size: Sequence[int],
    window: int,
    rounds: int = 1,
    device: str = "cpu",
    spacing: float = SPACING,
    overlap: float = OVERLAP,
) -> dict[str, Any]:
    """Segment noise in this process, and return bytes and seconds; the process should do nothing else.

    Args:
        name: "MONAI", "MONAI, buffer_steps=2" or "ours".
        classes: with the background.
        size: of the image, in voxels of 1 mm.
        window: voxels along an axis of a window.
        rounds: how often.
        device: where the network runs.
        spacing: of the network's grid, in mm.
        overlap: of windows.
    """
    network = _network(classes).to(device).eval()
    preprocessing, windows = _preprocessing(spacing), _windows(window, overlap)
    segment = partial(_segment, name, preprocessing=preprocessing, network=network, device=device)
    segment(_noise([8] * 3), windows=_windows(8, overlap))  # what is loaded on first use
    before = _peak_resident_bytes()
    image = _noise(size)
    cpu_seconds, seconds = [], []
    for _ in range(rounds):
        cpu_start, start = time.process_time(), time.perf_counter()
        segment(image, windows=windows)
        cpu_seconds.append(time.process_time() - cpu_start)
        seconds.append(time.perf_counter() - start)
    return {
        "bytes": _peak_resident_bytes() - before,
        "interpreter_bytes": before,
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
    }


def _peak_resident_bytes() -> int:
    """Return the most memory that this process has had.

    On Linux not by `getrusage`, whose figure begins with the memory of the program that has started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)[0])
    try:
        import resource
    except ImportError as error:
        raise SkippedError("the system does not tell the memory of a process") from error
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _noise(size: Sequence[int]) -> MetaTensor:
    rng = np.random.default_rng(0)
    data = np.empty((1, *size), np.int16)
    for plane in data[0]:
        plane[:] = rng.integers(-1000, 1000, plane.shape)
    return MetaTensor(torch.from_numpy(data), affine=torch.eye(4), meta={"original_affine": np.eye(4)})


@torch.no_grad()
def _segment(
    name: str, image: MetaTensor, preprocessing: Compose, network: nn.Module, device: str, windows: dict[str, Any]
) -> Any:
    """Return the labels of an image on its grid, by the inferer of a name."""
    if name == OURS:
        prepared, meta = prepare(preprocessing, image, device)
        return LabelInferer(preprocessing, **windows).segment(prepared, meta, network)[0]
    buffers: dict[str, Any] = {}
    if name == BUFFERED:
        buffers = {"buffer_steps": 2, "buffer_dim": int(np.argmax(image.shape[1:]))}
    inferer = SlidingWindowInferer(**windows, **buffers, device="cpu", sw_device=device)
    item: Any = preprocessing({"image": image.float()})
    item["pred"] = torch.softmax(inferer(item["image"][None], network)[0], 0)
    invert = Invertd("pred", preprocessing, "image", nearest_interp=False, to_tensor=True)
    return invert(item)["pred"].argmax(0).to(torch.uint8)


def _network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, classes, 1))


def _preprocessing(spacing: float) -> Compose:
    return Compose(
        [
            Orientationd("image", "RAS", labels=None),
            Spacingd("image", [spacing] * 3, mode="bilinear"),
            ScaleIntensityRanged("image", -1000, 1000, -1, 1, clip=True),
        ]
    )


def _windows(window: int, overlap: float) -> dict[str, Any]:
    return {"roi_size": [window] * 3, "sw_batch_size": 1, "overlap": overlap, "mode": "gaussian"}


SECTION = Section(
    "inference",
    "Segmentation by sliding windows on a grid of 1.5 mm: resident memory beside the interpreter's",
    (
        ("inferer", "inferer", str),
        ("classes", "classes", str),
        ("image of 1 mm", "image", str),
        ("MiB", "mebibytes", number(0)),
        ("of these image and labels", "image_and_labels_mebibytes", number(0)),
        ("planned", "planned_mebibytes", number(0)),
        ("on the GPU, MiB", "gpu_mebibytes", number(0)),
        ("CPU seconds", "cpu_seconds", spread(digits=1)),
        ("over MONAI", "over_monai", spread()),
        ("seconds", "seconds", spread(digits=1)),
    ),
    _jobs,
)
