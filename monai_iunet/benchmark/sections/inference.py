"""Segmentation by sliding windows: resident memory and time of MONAI's inferer, with buffers and without, and of ours.

From an image as it was read, int16, to labels on its grid. Each measurement is a process of its own, because a process
does not tell when it held how much; what it held after its imports is subtracted. MONAI's way is that of its bundles:
all logits on the grid of the network, softmax, `Invertd`, argmax.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
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
from monai_iunet.inference.prepare import prepare

__all__ = ["SECTION", "measure_here"]

SPACING = 1.5  # mm, of the network; images have 1 mm
MONAI, BUFFERED, OURS = "MONAI", "MONAI, buffer_steps=2", "ours"


def _jobs(settings: Settings) -> Iterator[Job]:
    """Side by side where all fit; then ours on a large image and on one that is twice as long."""
    side = settings.sizes.memory_size
    for classes in (8, 118):
        beside = partial(_measure, settings, classes, (side, side, 2 * side), (MONAI, BUFFERED, OURS))
        yield Job(f"{classes} classes", beside)
    for length in (1, 2):
        width, depth, height = settings.sizes.whole_volume
        size = (width, depth, length * height)
        yield Job(f"118 classes, {_times(size)}", partial(_measure, settings, 118, size, (OURS,)))


def _measure(settings: Settings, classes: int, size: Sequence[int], names: Sequence[str]) -> Iterator[Row]:
    small = len(names) > 1
    window = 48 if size[0] >= 96 else 16
    found = {}
    for name in names:
        found[name] = _in_a_process(
            name=name,
            classes=classes,
            size=list(size),
            window=window,
            rounds=settings.sizes.rounds if small else 1,
            device=str(settings.device),
        )
    for name, values in found.items():
        row = {
            "inferer": name,
            "classes": classes,
            "image": _times(size),
            "mebibytes": values["bytes"] / 2**20,
            "image_and_labels_mebibytes": 3 * np.prod(size).item() / 2**20,
            "cpu_seconds": Spread.of(values["cpu_seconds"]),
            "seconds": Spread.of(values["seconds"]),
        }
        if settings.device.type == "cuda":
            row["gpu_mebibytes"] = values["gpu_bytes"] / 2**20
        if MONAI in found:
            row["over_monai"] = ratio(values["cpu_seconds"], found[MONAI]["cpu_seconds"])
        yield row


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
    overlap: float = 0.5,
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
    try:
        import resource
    except ImportError as error:
        raise SkippedError("the system does not tell the memory of a process") from error
    unit = 1 if sys.platform == "darwin" else 1024
    network = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, classes, 1)).to(device).eval()
    transforms = [
        Orientationd("image", "RAS", labels=None),
        Spacingd("image", [spacing] * 3, mode="bilinear"),
        ScaleIntensityRanged("image", -1000, 1000, -1, 1, clip=True),
    ]
    preprocessing = Compose(transforms)
    windows: dict[str, Any] = {"roi_size": [window] * 3, "sw_batch_size": 1, "overlap": overlap, "mode": "gaussian"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    data = np.empty((1, *size), np.int16)
    for plane in data[0]:
        plane[:] = rng.integers(-1000, 1000, plane.shape)
    image = MetaTensor(torch.from_numpy(data), affine=torch.eye(4), meta={"original_affine": np.eye(4)})
    cpu_seconds, seconds = [], []
    with torch.no_grad():
        for _ in range(rounds):
            cpu_start, start = time.process_time(), time.perf_counter()
            if name == OURS:
                prepared, meta = prepare(preprocessing, image, device)
                labels, _ = LabelInferer(preprocessing, **windows).segment(prepared, meta, network)
            else:
                buffers: dict[str, Any] = (
                    {"buffer_steps": 2, "buffer_dim": int(np.argmax(size))} if name == BUFFERED else {}
                )
                inferer = SlidingWindowInferer(**windows, **buffers, device="cpu", sw_device=device)
                item: Any = preprocessing({"image": image.float()})
                item["pred"] = torch.softmax(inferer(item["image"][None], network)[0], 0)
                invert = Invertd("pred", preprocessing, "image", nearest_interp=False, to_tensor=True)
                labels = invert(item)["pred"].argmax(0).to(torch.uint8)
                del item
            del labels
            cpu_seconds.append(time.process_time() - cpu_start)
            seconds.append(time.perf_counter() - start)
    return {
        "bytes": unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "interpreter_bytes": unit * before,
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
    }


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


SECTION = Section(
    "inference",
    "Segmentation by sliding windows on a grid of 1.5 mm: resident memory beside the interpreter's",
    (
        ("inferer", "inferer", str),
        ("classes", "classes", str),
        ("image of 1 mm", "image", str),
        ("MiB", "mebibytes", number(0)),
        ("of these image and labels", "image_and_labels_mebibytes", number(0)),
        ("on the GPU, MiB", "gpu_mebibytes", number(0)),
        ("CPU seconds", "cpu_seconds", spread(digits=1)),
        ("over MONAI", "over_monai", spread()),
        ("seconds", "seconds", spread(digits=1)),
    ),
    _jobs,
)
