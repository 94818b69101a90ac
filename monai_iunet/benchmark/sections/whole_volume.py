"""A training step with AdamW, and inference, on a whole volume: planned, and allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from monai_iunet.benchmark.measure import DTYPES, allocated_on_gpu, peak_with_optimizer
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number
from monai_iunet.benchmark.sections.equal_cost import infer
from monai_iunet.planning.plan import plan_training

__all__ = ["SECTION"]


def _jobs(settings: Settings) -> Iterator[Job]:
    for name in ("SegIUNet", "SegIUNet, exact", "DynUNet"):
        for dtype in reversed(DTYPES):
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> list[Row]:
    size, device = settings.sizes.whole_volume, settings.device
    net, kind = EQUAL_COST[name]().to(device), DTYPES[dtype]
    plan = plan_training(net, size, dtype=kind)
    row = {
        "network": name,
        "dtype": dtype,
        "spatial_size": list(size),
        "planned_gibibytes": plan.training_peak / 2**30,
        "planned_inference_gibibytes": plan.inference_peak / 2**30,
    }
    images = torch.rand(1, 1, *size, device=device)
    try:
        allocated = peak_with_optimizer(net, images, images[:0], kind, _mean_square)
    except torch.OutOfMemoryError:
        return [{**row, "fits": False}]
    net.zero_grad(set_to_none=True)
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers(), images))
    inference = fixed + allocated_on_gpu(device, partial(infer, net.eval(), images, kind))
    return [
        {
            **row,
            "fits": True,
            "gibibytes": allocated / 2**30,
            "inference_gibibytes": inference / 2**30,
            "planned_over_allocated": plan.training_peak / allocated,
            "bytes_per_voxel": allocated / math.prod(size),
        }
    ]


def _mean_square(output: Tensor, _: Tensor) -> Tensor:
    return output.float().square().mean()


SECTION = Section(
    "whole_volume",
    "A training step with AdamW, and inference, on a whole volume, batch 1",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("spatial size", "spatial_size", str),
        ("fits", "fits", str),
        ("planned, GiB", "planned_gibibytes", number(1)),
        ("allocated, GiB", "gibibytes", number(1)),
        ("planned over allocated", "planned_over_allocated", number(3)),
        ("no_grad, planned, GiB", "planned_inference_gibibytes", number(1)),
        ("allocated, GiB", "inference_gibibytes", number(1)),
    ),
    _jobs,
    needs_gpu=True,
)
