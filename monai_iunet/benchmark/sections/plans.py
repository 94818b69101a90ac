"""What a step of training was planned to hold at most, and what it held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from monai.losses import DiceCELoss

from monai_iunet.benchmark.measure import DTYPES, peak_with_optimizer
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number
from monai_iunet.planning.plan import plan_training

__all__ = ["SECTION"]


def _jobs(settings: Settings) -> Iterator[Job]:
    for name in EQUAL_COST:
        for dtype in DTYPES:
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> list[Row]:
    net = EQUAL_COST[name]().to(settings.device)
    images = torch.rand(1, 1, *[settings.sizes.time_size] * 3, device=settings.device)
    target = torch.randint(0, 2, images.shape, device=settings.device)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    planned = plan_training(net, images.shape[2:], dtype=DTYPES[dtype], loss=loss).training_peak
    measured = peak_with_optimizer(net, images, target, DTYPES[dtype], loss)
    return [
        {
            "network": name,
            "dtype": dtype,
            "planned_mebibytes": planned / 2**20,
            "measured_mebibytes": measured / 2**20,
            "planned_over_measured": planned / measured,
        }
    ]


SECTION = Section(
    "plans",
    "Peak of a training step with AdamW, Dice and cross-entropy, batch 1: planned and measured",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("planned, MiB", "planned_mebibytes", number(1)),
        ("measured, MiB", "measured_mebibytes", number(1)),
        ("planned over measured", "planned_over_measured", number(3)),
    ),
    _jobs,
)
