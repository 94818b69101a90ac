"""Dice and cross-entropy by number of classes: ours and MONAI's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from monai_iunet.benchmark.measure import Spread, ratio, time_alternately
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.planning.live_bytes import LiveBytes

__all__ = ["CLASSES", "SECTION"]

CLASSES = (3, 8, 118)
LOGITS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _jobs(settings: Settings) -> Iterator[Job]:
    for classes in CLASSES:
        for dtype in LOGITS:
            yield Job(f"{classes} classes, {dtype}", partial(_measure, settings, classes, dtype))


def _measure(settings: Settings, classes: int, dtype: str) -> Iterator[Row]:
    """Measure forward and backward; logits and their gradient are counted, the target is not."""
    size = settings.sizes.loss_size
    logits = torch.randn(1, classes, *[size] * 3, device=settings.device).to(LOGITS[dtype]).requires_grad_()
    target = torch.randint(0, classes, (1, 1, *[size] * 3), device=settings.device)
    losses: dict[str, nn.Module] = {
        "ours, chunked": ChunkedDiceCELoss(to_onehot_y=True, softmax=True),
        "MONAI": DiceCELoss(to_onehot_y=True, softmax=True),
    }
    actions = {name: partial(_step, loss, logits, target) for name, loss in losses.items()}
    seconds = time_alternately(actions, settings.sizes.rounds, settings.device, settings.deadline)
    for name, action in actions.items():
        logits.grad = None
        with LiveBytes(ignore=[target]) as live:
            action()
        yield {
            "loss": name,
            "classes": classes,
            "dtype": dtype,
            "memory": live.peak / (logits.numel() * logits.element_size()),
            "bytes_per_voxel": live.peak / size**3,
            "milliseconds": Spread.of(1e3 * time for time in seconds[name]),
            "over_monai": ratio(seconds[name], seconds["MONAI"]),
        }


def _step(loss: nn.Module, logits: Tensor, target: Tensor) -> None:
    logits.grad = None
    with torch.autocast(logits.device.type, torch.bfloat16, enabled=logits.dtype == torch.bfloat16):
        value = loss(logits, target)
    value.backward()


SECTION = Section(
    "losses",
    "Dice and cross-entropy: memory with logits and their gradient, in units of the logits",
    (
        ("loss", "loss", str),
        ("classes", "classes", str),
        ("logits", "dtype", str),
        ("over the logits", "memory", number(2)),
        ("B/voxel", "bytes_per_voxel", number(0)),
        ("forward and backward, ms", "milliseconds", spread(digits=1)),
        ("over MONAI", "over_monai", spread()),
    ),
    _jobs,
)
