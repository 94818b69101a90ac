"""The largest cube on which a step of training with Adam fits on the GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from monai_iunet.benchmark.measure import DTYPES
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.section import Job, Row, Section, Settings
from monai_iunet.benchmark.sections.equal_cost import train

__all__ = ["SECTION", "largest"]

LIMIT = 1024  # voxels along an axis
STEP = 32


def _jobs(settings: Settings) -> Iterator[Job]:
    for dtype in reversed(DTYPES):
        for name in EQUAL_COST:
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, dtype))


def _measure(settings: Settings, name: str, dtype: str) -> list[Row]:
    net = EQUAL_COST[name]().to(settings.device)
    reasons: dict[int, str] = {}

    def fits(size: int) -> bool:
        reason = _failure(net, size, settings.device, DTYPES[dtype])
        if reason is not None:
            reasons[size] = reason
        return reason is None

    cube = largest(fits, LIMIT)
    # The smallest that failed, and why: memory, or an operator that does not take so many elements.
    return [{"network": name, "dtype": dtype, "largest_cube": cube, "beyond": reasons.get(cube + STEP, "")}]


def _failure(net: nn.Module, size: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a step on a cube does not work; None if it does, with gradients that are numbers and not all zero."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0)
    try:
        train(net, torch.rand(1, 1, size, size, size, device=device), dtype)
        optimizer.step()
        gradients = [parameter.grad.abs().sum() for parameter in net.parameters() if parameter.grad is not None]
        total = float(torch.stack(gradients).sum())
        return None if 0 < total < float("inf") else f"gradients sum to {total}"
    except torch.OutOfMemoryError:
        return "memory"
    except (RuntimeError, ValueError, OverflowError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        net.zero_grad(set_to_none=True)
        optimizer.state.clear()
        gc.collect()
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], limit: int, step: int = STEP) -> int:
    """Return the largest multiple of `step` up to `limit` that fits, by bisection; 0 if none does."""
    low, high = 0, limit // step + 1  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


SECTION = Section(
    "largest_cubes",
    "Largest cube, a multiple of 32, on which a step with Adam fits, batch 1",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("largest cube", "largest_cube", str),
        ("what fails beyond", "beyond", str),
    ),
    _jobs,
    needs_gpu=True,
)
