"""A whole volume in the memory of smaller GPUs: on which one a training step, and inference, fits, and its time there.

PyTorch's allocator is kept to the memory of a smaller GPU, less what the driver takes. Libraries then have to get by
with less, as they do on such a GPU: where cuDNN finds no room for the workspace of one kernel, it takes another.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import DTYPES, Spread, autocast
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.benchmark.sections.equal_cost import infer
from monai_iunet.planning.plan import plan_training

__all__ = ["GIBIBYTES", "SECTION", "limited_memory"]

GIBIBYTES = (6, 8, 12, 16, 24, 32, 48, 80)  # of the memory of GPUs
OF_THE_DRIVER = 0.75  # GiB that the driver and the libraries take beside PyTorch's allocator
ROUNDS = 2


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in reversed(DTYPES):
        for action in ("training", "no_grad"):
            for name in ("SegIUNet, exact", "SegIUNet", "DynUNet"):
                yield Job(f"{name}, {dtype}, {action}", partial(_measure, settings, name, dtype, action))


def _measure(settings: Settings, name: str, dtype: str, action: str) -> list[Row]:
    """Measure in the smallest memory in which it works, beginning with what is planned, which no kernel adds to."""
    device = settings.device
    images = torch.rand(1, 1, *settings.sizes.whole_volume, device=device)
    net, kind = EQUAL_COST[name]().to(device), DTYPES[dtype]
    run = _step(net, images, kind) if action == "training" else partial(infer, net.eval(), images, kind)
    plan = plan_training(net, images.shape[2:], dtype=kind)
    planned = (plan.training_peak if action == "training" else plan.inference_peak) / 2**30
    row: Row = {
        "network": name,
        "dtype": dtype,
        "action": action,
        "spatial_size": list(images.shape[2:]),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "planned": planned,
        "fits": False,
    }
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30
    for gibibytes in (size for size in GIBIBYTES if planned + OF_THE_DRIVER < size < whole):
        with limited_memory(device, gibibytes):
            seconds = _seconds(run, net, device)
            allocated = torch.cuda.max_memory_allocated(device) / 2**30
        if seconds:
            return [{**row, "fits": True, "gpu": gibibytes, "allocated": allocated, "seconds": Spread.of(seconds)}]
    return [row]


def _step(net: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a training step with AdamW."""
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        with autocast(images.device, dtype):
            loss = net(images).float().square().mean()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(run: Callable[[], None], net: nn.Module, device: torch.device) -> list[float]:
    """Return the seconds of each round after a first one that does not count; none if there is too little memory."""
    seconds = []
    try:
        for turn in range(1 + ROUNDS):
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            if turn:
                seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return []
    finally:
        net.zero_grad()
    return seconds


@contextmanager
def limited_memory(device: torch.device, gibibytes: float) -> Iterator[None]:
    """Let PyTorch allocate no more than a GPU of this memory offers, and count the peak from here on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(index)
    whole = torch.cuda.get_device_properties(index).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gibibytes - OF_THE_DRIVER) / whole), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


SECTION = Section(
    "small_gpus",
    "A training step with AdamW, and inference, on a whole volume, batch 1, in the memory of smaller GPUs",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("action", "action", str),
        ("allocator", "allocator", str),
        ("fits", "fits", str),
        ("GPU of, GiB", "gpu", number(0)),
        ("planned, GiB", "planned", number(1)),
        ("allocated, GiB", "allocated", number(1)),
        ("s", "seconds", spread()),
    ),
    _jobs,
    needs_gpu=True,
)
