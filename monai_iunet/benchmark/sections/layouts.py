"""Contiguous tensors and those with the channels last in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from monai_iunet.benchmark.measure import DTYPES, Spread, allocated_on_gpu, ratio, time_alternately
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.benchmark.sections.equal_cost import train

__all__ = ["SECTION"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def _jobs(settings: Settings) -> Iterator[Job]:
    for name in ("SegIUNet", "DynUNet"):
        for dtype in reversed(DTYPES):
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> Iterator[Row]:
    size, device = settings.sizes.time_size, settings.device
    actions = {}
    for layout, memory_format in LAYOUTS.items():
        net = EQUAL_COST[name]().to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
        images = torch.rand(1, 1, *[size] * 3, device=device).contiguous(memory_format=memory_format)
        actions[layout] = partial(train, net, images, DTYPES[dtype])
    seconds = time_alternately(actions, settings.sizes.rounds, device, settings.deadline)
    for layout, action in actions.items():
        yield {
            "network": name,
            "dtype": dtype,
            "layout": layout,
            "training_microseconds_per_voxel": Spread.of(1e6 * time / size**3 for time in seconds[layout]),
            "over_contiguous": ratio(seconds[layout], seconds["contiguous"]),
            "training_allocated_per_voxel": allocated_on_gpu(device, action) / size**3,
        }


SECTION = Section(
    "layouts",
    "A training step with the channels last in memory",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("layout", "layout", str),
        ("training step, µs/voxel", "training_microseconds_per_voxel", spread()),
        ("over contiguous", "over_contiguous", spread()),
        ("allocated, B/voxel", "training_allocated_per_voxel", number(0)),
    ),
    _jobs,
    needs_gpu=True,
)
