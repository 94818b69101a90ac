"""A training step whose operations are started one by one, and recorded in a CUDA graph, which starts them at once.

A network that rebuilds its activations has more operations than one that stores them, most of them small, and each
takes the host some time to start. Where a GPU waits for that, a graph shows how long the step itself takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from monai_iunet.benchmark.measure import DTYPES, Spread, ratio, time_alternately
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, spread
from monai_iunet.benchmark.sections.equal_cost import train

__all__ = ["SECTION"]

NETWORKS = ("SegIUNet", "SegIUNet, exact", "DynUNet")


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in reversed(DTYPES):
        for name in NETWORKS:
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> Iterator[Row]:
    size, device = settings.sizes.time_size, settings.device
    images, net = torch.rand(1, 1, *[size] * 3, device=device), EQUAL_COST[name]().to(device)
    step = partial(train, net, images, DTYPES[dtype])
    actions: dict[str, Callable[[], object]] = {
        "one by one": partial(_afresh, net, step),
        "graph": _recorded(net, step, device),
    }
    seconds = time_alternately(actions, settings.sizes.rounds, device, settings.deadline)
    for way in actions:
        yield {
            "network": name,
            "dtype": dtype,
            "way": way,
            "nanoseconds_per_voxel": Spread.of(1e9 * time / size**3 for time in seconds[way]),
            "over_one_by_one": ratio(seconds[way], seconds["one by one"]),
        }


def _afresh(net: nn.Module, step: Callable[[], None]) -> None:
    net.zero_grad(set_to_none=True)
    step()


def _recorded(net: nn.Module, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what replays a step, after two on a stream of its own, as recording asks for."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            _afresh(net, step)
    torch.cuda.current_stream(device).wait_stream(stream)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


SECTION = Section(
    "cuda_graphs",
    "A training step, its operations started one by one, and at once as a CUDA graph",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("way", "way", str),
        ("ns/voxel", "nanoseconds_per_voxel", spread(digits=1)),
        ("over one by one", "over_one_by_one", spread()),
    ),
    _jobs,
    needs_gpu=True,
)
