"""Orthogonal downsampling by 2 per axis: ours, the strided grouped convolution that does the same, and a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from monai_iunet.benchmark.measure import Spread, ratio, time_alternately
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.networks.blocks.resampling import OrthogonalDownsampling

__all__ = ["SECTION"]

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in TYPES:
        yield Job(dtype, partial(_measure, settings, dtype))


def _measure(settings: Settings, dtype: str) -> Iterator[Row]:
    """Time both directions. The copy is that of the tensor: it moves as many bytes as one resampling has to."""
    channels, size, device = settings.sizes.resampling_channels, settings.sizes.resampling_size, settings.device
    kind: dict[str, Any] = {"device": device, "dtype": TYPES[dtype]}
    x = torch.randn(1, channels, *[size] * 3, **kind, requires_grad=True)
    downsampling = OrthogonalDownsampling(channels, (2, 2, 2), (8 * channels,)).to(**kind)
    kernel = downsampling.matrix().detach().to(x.dtype).reshape(8 * channels, 1, 2, 2, 2).requires_grad_()
    gradient = torch.randn(1, 8 * channels, *[size // 2] * 3, **kind)

    def down(rebuilds: bool) -> Tensor:
        downsampling.rebuilds = rebuilds
        return downsampling(x)[0]

    forward: dict[str, Callable[[], Any]] = {
        "ours, invert": lambda: down(True),
        "ours, store": lambda: down(False),
        "strided grouped convolution": lambda: functional.conv3d(x, kernel, stride=2, groups=channels),
        "copy": lambda: x.detach().clone(),
    }
    outputs = {name: action() for name, action in forward.items() if name != "copy"}
    weights = {name: kernel if name.startswith("strided") else downsampling.matrix.weight for name in outputs}
    backward = {name: partial(_differentiate, outputs[name], [x, weights[name]], gradient) for name in outputs}
    rounds = 4 * settings.sizes.rounds
    forward_seconds = time_alternately(forward, rounds, device, settings.deadline)
    backward_seconds = time_alternately(backward, rounds, device, settings.deadline)
    moved = 2 * x.numel() * x.element_size()
    for name in forward:
        yield {
            "layer": name,
            "dtype": dtype,
            "forward_milliseconds": Spread.of(1e3 * time for time in forward_seconds[name]),
            "backward_milliseconds": Spread.of(1e3 * time for time in backward_seconds.get(name, [math.nan])),
            "forward_over_copy": ratio(forward_seconds[name], forward_seconds["copy"]),
            "forward_gigabytes_per_second": moved / 1e9 / Spread.of(forward_seconds[name]).median,
        }


def _differentiate(output: Tensor, inputs: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(output, inputs, gradient, retain_graph=True)


SECTION = Section(
    "resampling",
    "Orthogonal downsampling by 2 per axis",
    (
        ("layer", "layer", str),
        ("dtype", "dtype", str),
        ("forward, ms", "forward_milliseconds", spread(digits=1)),
        ("backward, ms", "backward_milliseconds", spread(digits=1)),
        ("forward over a copy", "forward_over_copy", spread()),
        ("forward, GB/s", "forward_gigabytes_per_second", number(1)),
    ),
    _jobs,
)
