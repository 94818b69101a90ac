"""Our network between rebuilding all activations and storing all, by what its levels keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from monai_iunet.benchmark.measure import DTYPES, Spread, peak_of_training, ratio, time_alternately
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.benchmark.sections.equal_cost import train
from monai_iunet.planning.budget import WAYS, best_activations
from monai_iunet.planning.plan import plan_training

__all__ = ["SECTION"]

PARTS = (0.2, 0.4, 0.6, 0.8)


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in DTYPES:
        yield Job(dtype, partial(_measure, settings, dtype))


def _measure(settings: Settings, dtype: str) -> Iterator[Row]:
    """Measure at budgets that are parts of the way from the memory of the one end to that of the other.

    The first budget is twice the memory of the frugal end, parameters and gradients aside. Beside the budgets there is
    the network whose levels all keep the outputs of convolutions. The line is that between the two ends in memory and
    time; what lies below it does better than mixing the two. Budgets are those of the larger images, on which memory is
    counted, as in the table of networks of equal cost.
    """
    device, kind = settings.device, DTYPES[dtype]
    large, x = (
        torch.rand(1, 1, *[size] * 3, device=device) for size in (settings.sizes.memory_size, settings.sizes.time_size)
    )
    ends = {activations: _with_activations(activations).to(device) for activations in ("invert", "store")}
    plans = [plan_training(net, large.shape[2:], dtype=kind, optimizer=None) for net in ends.values()]
    peaks = [plan.training_peak for plan in plans]
    twice = 2 * peaks[0] - plans[0].parameters - plans[0].gradients
    nets = {"invert": ends["invert"], "convolutions": _with_activations("convolutions").to(device)}
    for budget in (twice, *(int(peaks[0] + part * (peaks[1] - peaks[0])) for part in PARTS)):
        chosen = best_activations(ends["invert"], budget, large.shape, kind)
        nets.setdefault(_short(chosen), _with_activations(chosen).to(device))
    nets["store"] = ends["store"]
    memory = {name: peak_of_training(net, partial(train, net, large, kind)) for name, net in nets.items()}
    actions = {name: partial(train, net, x, kind) for name, net in nets.items()}
    seconds = time_alternately(actions, settings.sizes.rounds, device, settings.deadline)
    for name in nets:
        part = (memory[name] - memory["invert"]) / (memory["store"] - memory["invert"])
        line = [(1 - part) * low + part * high for low, high in zip(seconds["invert"], seconds["store"])]
        yield {
            "activations": name,
            "dtype": dtype,
            "training_bytes_per_voxel": memory[name] / large.numel(),
            "training_microseconds_per_voxel": Spread.of(1e6 * time / x.numel() for time in seconds[name]),
            "training_over_store": ratio(seconds[name], seconds["store"]),
            "training_over_line": ratio(seconds[name], line),
        }


def _with_activations(activations: str | Sequence[str]) -> Any:
    net: Any = EQUAL_COST["SegIUNet"]()
    net.activations = activations
    return net


def _short(chosen: Sequence[str]) -> str:
    """Return text such as `convolutions 2; store 3, 4`, the finest level being 1; the others rebuild all."""
    levels = {way: [str(level) for level, other in enumerate(chosen, 1) if other == way] for way in WAYS[1:]}
    return "; ".join(f"{way} {', '.join(of_way)}" for way, of_way in levels.items() if of_way) or WAYS[0]


SECTION = Section(
    "budgets",
    "SegIUNet with activations rebuilt, stored, or kept in part by level, as a budget allows; the line joins the ends",
    (
        ("activations", "activations", str),
        ("dtype", "dtype", str),
        ("training, B/voxel", "training_bytes_per_voxel", number(0)),
        ("training step, µs/voxel", "training_microseconds_per_voxel", spread()),
        ("over store", "training_over_store", spread()),
        ("over the line", "training_over_line", spread()),
    ),
    _jobs,
)
