"""What a second stream could gain: two evaluations of a branch one after the other, and beside each other.

The backward pass could rebuild the state before the next coupling while it differentiates this one. Where a branch
fills the GPU by itself, two streams take as long as one, and nothing is to be had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import DTYPES, Spread, autocast, ratio, time_alternately
from monai_iunet.benchmark.section import Job, Row, Section, Settings, spread
from monai_iunet.networks.blocks.branch import named_branch

__all__ = ["SECTION"]

CHANNELS = (24, 112, 416, 512)
REPEATED = 10


def _jobs(settings: Settings) -> Iterator[Job]:
    for level in reversed(range(len(CHANNELS))):
        for dtype in reversed(DTYPES):
            yield Job(f"level {level + 1}, {dtype}", partial(_measure, settings, level, dtype))


def _measure(settings: Settings, level: int, dtype: str) -> Iterator[Row]:
    half, size, device = CHANNELS[level] // 2, settings.sizes.time_size >> level, settings.device
    branches = [
        named_branch("conv", 3, half, half, 1, (3, 3, 3), "LEAKYRELU", ("INSTANCE", {"affine": True}), None).to(device)
        for _ in range(2)
    ]
    x = torch.randn(1, half, *[size] * 3, device=device)
    streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
    actions = {
        "one stream": partial(_run, branches, x, DTYPES[dtype], (streams[0], streams[0])),
        "two streams": partial(_run, branches, x, DTYPES[dtype], streams),
    }
    seconds = time_alternately(actions, 4 * settings.sizes.rounds, device, settings.deadline)
    for name in actions:
        yield {
            "level": level + 1,
            "dtype": dtype,
            "streams": name,
            "milliseconds": Spread.of(1e3 * time / REPEATED for time in seconds[name]),
            "over_one": ratio(seconds[name], seconds["one stream"]),
        }


def _run(
    branches: Sequence[nn.Module], x: Tensor, dtype: torch.dtype, streams: tuple[torch.cuda.Stream, torch.cuda.Stream]
) -> None:
    """Evaluate one branch, and another with its gradient, each on its stream."""
    for _ in range(REPEATED):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(streams[0]), torch.no_grad(), autocast(x.device, dtype):
            branches[0](x)
        with torch.cuda.stream(streams[1]):
            with autocast(x.device, dtype):
                loss = branches[1](x).float().sum()
            loss.backward()
        for stream in streams:
            torch.cuda.current_stream(x.device).wait_stream(stream)


SECTION = Section(
    "second_stream",
    "A branch evaluated while another is differentiated, on one stream and on two",
    (
        ("level", "level", str),
        ("dtype", "dtype", str),
        ("streams", "streams", str),
        ("ms", "milliseconds", spread(digits=2)),
        ("over one stream", "over_one", spread()),
    ),
    _jobs,
    needs_gpu=True,
)
