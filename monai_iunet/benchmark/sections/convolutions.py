"""A convolution of a whole volume, at once and in slabs: its time, and what cuDNN takes beside its tensors.

In 16 bits cuDNN fills channels up to a multiple of eight, so that 12 channels cost as much as 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import DTYPES, Spread, allocated_on_gpu, autocast, ratio, time_alternately
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.networks.layers.slab_convolution import convolve

__all__ = ["SECTION"]

CHANNELS = (12, 16)


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in reversed(DTYPES):
        for channels in CHANNELS:
            yield Job(f"{channels} channels, {dtype}", partial(_measure, settings, channels, dtype))


def _measure(settings: Settings, channels: int, dtype: str) -> Iterator[Row]:
    device, kind, size = settings.device, DTYPES[dtype], settings.sizes.whole_volume
    layer = nn.Conv3d(channels, channels, 3, padding=1, bias=False, device=device)
    x = torch.randn(1, channels, *size, device=device, dtype=kind, requires_grad=True)
    gradient = torch.ones_like(x)
    actions = {
        "at once": partial(_step, partial(nn.Module.__call__, layer), layer, x, gradient, kind),
        "in slabs": partial(_step, partial(convolve, layer=layer), layer, x, gradient, kind),
    }
    bytes_of_x = x.numel() * x.element_size()
    allocated = {name: allocated_on_gpu(device, action) / bytes_of_x for name, action in actions.items()}
    seconds = time_alternately(actions, settings.sizes.rounds, device, settings.deadline)
    for name in actions:
        yield {
            "channels": channels,
            "dtype": dtype,
            "way": name,
            "tensors": allocated[name],
            "milliseconds": Spread.of(1e3 * time for time in seconds[name]),
            "over_at_once": ratio(seconds[name], seconds["at once"]),
            "nanoseconds_per_value": Spread.of(1e9 * time / (channels * math.prod(size)) for time in seconds[name]),
        }


def _step(compute: partial[Tensor], layer: nn.Module, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> None:
    """Run forward and backward pass; what is left of it are no tensors of the size of images."""
    with autocast(x.device, dtype):
        y = compute(x)
    y.backward(gradient)
    x.grad = layer.weight.grad = None


SECTION = Section(
    "convolutions",
    "A convolution of a whole volume, forward and backward: tensors allocated beside input and gradient, of their size",
    (
        ("channels", "channels", str),
        ("dtype", "dtype", str),
        ("way", "way", str),
        ("tensors", "tensors", number(2)),
        ("ms", "milliseconds", spread(digits=0)),
        ("over at once", "over_at_once", spread()),
        ("ns per value", "nanoseconds_per_value", spread(digits=3)),
    ),
    _jobs,
    needs_gpu=True,
)
