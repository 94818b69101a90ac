"""What a training may take: memory and time, and how fast the machine is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from monai.losses import DiceCELoss

from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["Limits", "measure_limits", "measure_speed"]

CHANNELS = (32, 64, 128, 256)  # of the network whose training is timed
MEASURED, TINY = 48, 16  # voxels along an axis of its patches
WORTH_ROUNDING = 1.2  # times as fast as float32 must bfloat16 be on a CPU
WITHOUT_INSTRUCTIONS = 0.5  # times as fast as float32 is bfloat16 at most on a CPU that has none for it


@dataclass(frozen=True)
class Limits:
    """What a training may take.

    Attributes:
        memory: bytes of a training step.
        seconds: of everything, all folds and evaluations; None for as long as it takes.
        speed: voxels per second in training; None if it was not measured.
        dtype: of autocast; float32 for none.
        gain: of a CPU, how many times the voxels per second of float32 it trains in `dtype`; None for a GPU.
        at_once: folds that are trained side by side, each by a process of its own.

    Example:
        >>> Limits(memory=8 * 2**30).seconds is None
        True
    """

    memory: int
    seconds: float | None = None
    speed: float | None = None
    dtype: torch.dtype = torch.float32
    gain: float | None = None
    at_once: int = 1


def measure_speed(device: torch.device, dtype: torch.dtype = torch.float32, size: int = MEASURED) -> float:
    """Return how many voxels per second a device trains, from a step of a patch of `size` voxels along each axis.

    Of a CPU the time that the process gets is counted, so that other programs do not change the plan.
    """
    network = SegIUNet(3, 1, 2, CHANNELS).to(device).train()
    images, labels = (make(1, 1, size, size, size, device=device) for make in (torch.rand, torch.zeros))
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    seconds = []

    def now() -> float:
        return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()

    for _ in range(4):
        start = now()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(network(images), labels)
        value.backward()
        float(value.detach())  # waits for a GPU
        seconds.append(now() - start)
    return images.numel() / float(min(seconds[1:]))


def measure_limits(device: torch.device, memory: int, seconds: float | None) -> Limits:
    """Return the limits of a training on a device: how fast it is, and on a CPU whether bfloat16 is faster.

    Args:
        device: where the network is trained.
        memory: bytes of a training step.
        seconds: of everything; None for as long as it takes.
    """
    if device.type == "cpu":
        dtype, gain = _faster_dtype(device)
    else:
        dtype, gain = torch.bfloat16 if device.type == "cuda" else torch.float32, None
    speed = None if seconds is None else measure_speed(device, dtype)
    return Limits(memory, seconds, speed, dtype, gain)


def _faster_dtype(device: torch.device) -> tuple[torch.dtype, float]:
    """Return in what a CPU trains faster, and how many times as fast as float32 bfloat16 is.

    One thread is measured: several that wait for each other take the processor's time, more so among other programs.
    A CPU without instructions for bfloat16 computes it tens of times more slowly: a tiny patch tells it in seconds,
    where a larger one would take minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def measure_gain(size: int) -> float:
        return measure_speed(device, torch.bfloat16, size) / measure_speed(device, torch.float32, size)

    try:
        gain = measure_gain(TINY)
        if gain > WITHOUT_INSTRUCTIONS:
            gain = measure_gain(MEASURED)
    finally:
        torch.set_num_threads(threads)
    return (torch.bfloat16 if gain >= WORTH_ROUNDING else torch.float32), gain
