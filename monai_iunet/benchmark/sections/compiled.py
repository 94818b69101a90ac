"""`torch.compile`: of our branches, and of a whole network that evaluates a part of its activations again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import DTYPES, Spread, allocated_on_cpu, allocated_on_gpu, ratio, time_alternately
from monai_iunet.benchmark.networks import BUDGET, EQUAL_COST, CompiledWithBudget
from monai_iunet.benchmark.section import Job, Row, Section, Settings, SkippedError, number, spread
from monai_iunet.benchmark.sections.equal_cost import train
from monai_iunet.networks.blocks.branch import Branch

__all__ = ["SECTION"]


def _jobs(settings: Settings) -> Iterator[Job]:
    for name in ("DynUNet", "SegIUNet"):
        for dtype in reversed(DTYPES):
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> Iterator[Row]:
    size, device = settings.sizes.time_size, settings.device
    images = torch.rand(1, 1, *[size] * 3, device=device)
    plain = EQUAL_COST[name]().to(device)
    compiled, how = _compiled(EQUAL_COST[name]().to(device))
    actions = {
        "not": partial(_step, plain, images, DTYPES[dtype]),
        how: partial(_step, compiled, images, DTYPES[dtype]),
    }
    try:
        actions[how]()
    except Exception as error:  # no compiler on this machine, or a network that it does not take
        first = (str(error).strip().splitlines() or [""])[0]
        raise SkippedError(f"torch.compile raises {type(error).__name__}: {first}") from error
    seconds = time_alternately(actions, settings.sizes.rounds, device, settings.deadline)
    for key, action in actions.items():
        allocated = allocated_on_gpu(device, action) if device.type == "cuda" else allocated_on_cpu(action)
        yield {
            "network": name,
            "dtype": dtype,
            "compiled": key,
            "training_allocated_per_voxel": allocated / size**3,
            "training_microseconds_per_voxel": Spread.of(1e6 * time / size**3 for time in seconds[key]),
            "over_not_compiled": ratio(seconds[key], seconds["not"]),
        }


def _compiled(net: nn.Module) -> tuple[nn.Module, str]:
    branches = [module for module in net.modules() if isinstance(module, Branch)]
    if not branches:
        return CompiledWithBudget(net), f"whole, budget {BUDGET}"
    for branch in branches:
        branch.compile()
    return net, "branches"


def _step(net: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Take a step and free its gradients: a compiled network makes all before it adds to those that are there."""
    train(net, images, dtype)
    net.zero_grad(set_to_none=True)


SECTION = Section(
    "compiled",
    "A training step, compiled and not: memory as the allocator reports it, gradients included",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("compiled", "compiled", str),
        ("allocated, B/voxel", "training_allocated_per_voxel", number(0)),
        ("training step, µs/voxel", "training_microseconds_per_voxel", spread()),
        ("over not compiled", "over_not_compiled", spread()),
    ),
    _jobs,
)
