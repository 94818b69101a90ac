"""Measuring: memory in live bytes, which repeat exactly, and time in alternating rounds, with its range."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from monai_iunet.planning.live_bytes import LiveBytes
from monai_iunet.planning.plan import Loss

__all__ = [
    "DTYPES",
    "Spread",
    "allocated_on_cpu",
    "allocated_on_gpu",
    "autocast",
    "forward_macs",
    "peak_of_inference",
    "peak_of_training",
    "peak_with_optimizer",
    "ratio",
    "time_alternately",
]


# What networks compute in, by the name in tables; in 16 bits it is under autocast, with parameters in float32.
DTYPES = {"float32": torch.float32, "bf16 autocast": torch.bfloat16}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return autocast to a type; none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return median and range of values."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Return text such as `1.31 (1.28-1.40)`."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}-{self.high * scale:.{digits}f})"

    def as_dict(self) -> dict[str, float]:
        """Return a dictionary for JSON."""
        return asdict(self)


def time_alternately(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Measure the seconds of each action in each round.

    In every round each action runs once, in turn, forwards and backwards alternating, so that whatever else the machine
    does meets all of them alike. One round to warm up is not counted. After `deadline`, a moment of
    `time.monotonic()`, no further round begins, but for the first that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    gc.freeze()  # so that collecting the garbage of an action is quick
    try:
        for number in range(rounds + 1):
            if number > 1 and time.monotonic() > deadline:
                break
            for name in list(actions)[:: 1 if number % 2 else -1]:
                gc.collect()
                _synchronize(device)
                start = time.perf_counter()
                actions[name]()
                _synchronize(device)
                if number:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return seconds


def ratio(above: list[float], below: list[float]) -> Spread:
    """Return the spread of the quotients, round by round."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))


def peak_of_training(net: nn.Module, step: Callable[[], object]) -> int:
    """Return the peak live bytes of a training step beside parameters and their gradients, which are there before."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    with LiveBytes(ignore=[*net.parameters(), *net.buffers(), *gradients]) as live:
        step()
    return live.peak


def peak_of_inference(net: nn.Module, run: Callable[[], object]) -> int:
    """Return the peak live bytes of a forward pass without gradients, beside the parameters."""
    with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live, torch.no_grad():
        run()
    return live.peak


def allocated_on_gpu(device: torch.device, action: Callable[[], object]) -> int:
    """Return the bytes that an action allocates on a GPU at most, beside what was allocated before."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def allocated_on_cpu(action: Callable[[], object]) -> int:
    """Return the bytes that an action allocates on the CPU at most, as PyTorch's profiler reports it.

    This sees into compiled code, which `LiveBytes` does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    changes: list[tuple[int, int]] = []  # moments, and bytes that were allocated or freed then
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


def peak_with_optimizer(net: nn.Module, images: Tensor, target: Tensor, dtype: torch.dtype, loss: Loss) -> int:
    """Return the peak bytes of a whole step of training with AdamW, the second one: parameters, optimizer and all.

    On a GPU it is what PyTorch has allocated at most, elsewhere live bytes, without the target.
    """
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        with autocast(images.device, dtype):
            value = loss(net(images), target)
        value.backward()
        del value
        optimizer.step()
        optimizer.zero_grad()

    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated(images.device)
        held = sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers(), images))
        step()
        torch.cuda.reset_peak_memory_stats(images.device)
        step()
        return torch.cuda.max_memory_allocated(images.device) - (before - held)
    with LiveBytes(ignore=[target]) as live:
        step()
        live.peak = 0
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.detach()  # seen by the ruler, used or not
        step()
    return live.peak


def forward_macs(net: nn.Module, x: Tensor) -> float:
    """Count the multiply-accumulate operations of a forward pass in evaluation, where matrices are constants."""
    mode = net.training
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    net.train(mode)
    return counter.get_total_flops() / 2


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
