"""Segmentation networks of about equal cost: memory, and time, of a training step and of inference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import (
    DTYPES,
    Spread,
    allocated_on_gpu,
    autocast,
    forward_macs,
    peak_of_inference,
    peak_of_training,
    ratio,
    time_alternately,
)
from monai_iunet.benchmark.networks import EQUAL_COST, MakeNetwork, saved_on_cpu
from monai_iunet.benchmark.section import Job, Row, Section, Settings, SkippedError, number, spread

__all__ = ["MEMORY", "TIME", "infer", "networks", "train"]


def networks(device: torch.device) -> dict[str, MakeNetwork]:
    """Return what makes each network; it may raise `SkippedError`."""
    return {**EQUAL_COST, "DynUNet, save_on_cpu": partial(saved_on_cpu, "DynUNet", device)}


def train(net: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Run forward and backward pass with the mean square of the output as loss."""
    with autocast(images.device, dtype):
        loss = net(images).float().square().mean()
    loss.backward()


def infer(net: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Run a forward pass without gradients."""
    with torch.no_grad(), autocast(images.device, dtype):
        net(images)


def _memory_jobs(settings: Settings) -> Iterator[Job]:
    for name, make in networks(settings.device).items():
        for dtype in DTYPES:
            yield Job(f"{name}, {dtype}", partial(_memory, settings, name, make, dtype))


def _memory(settings: Settings, name: str, make: MakeNetwork, dtype: str) -> list[Row]:
    size, device = settings.sizes.memory_size, settings.device
    images, net = torch.rand(1, 1, *[size] * 3, device=device), make().to(device)
    small = torch.rand(1, 1, 32, 32, 32, device=device)
    training, inference = partial(train, net, images, DTYPES[dtype]), partial(infer, net, images, DTYPES[dtype])
    row = {
        "network": name,
        "dtype": dtype,
        "kmac_per_voxel": forward_macs(net, small) / small.numel() / 1e3,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "training_bytes_per_voxel": peak_of_training(net, training) / size**3,
        "inference_bytes_per_voxel": peak_of_inference(net, inference) / size**3,
    }
    if device.type == "cuda":  # the images, which were there before, count as above
        for key, action in (("training", training), ("inference", inference)):
            action()
            row[f"{key}_allocated_per_voxel"] = 4 + allocated_on_gpu(device, action) / size**3
    return [row]


def _time_jobs(settings: Settings) -> Iterator[Job]:
    for dtype in DTYPES:
        yield Job(dtype, partial(_time, settings, dtype))


def _time(settings: Settings, dtype: str) -> Iterator[Row]:
    size, device = settings.sizes.time_size, settings.device
    images = torch.rand(1, 1, *[size] * 3, device=device)
    nets: dict[str, nn.Module] = {}
    for name, make in networks(device).items():
        try:
            nets[name] = make().to(device)
        except SkippedError as reason:
            yield {"network": name, "dtype": dtype, "skipped": str(reason)}
    seconds = {
        action: time_alternately(
            {name: partial(action, net, images, DTYPES[dtype]) for name, net in nets.items()},
            settings.sizes.rounds,
            device,
            settings.deadline,
        )
        for action in (train, infer)
    }
    for name in nets:
        yield {
            "network": name,
            "dtype": dtype,
            "training_microseconds_per_voxel": Spread.of(1e6 * time / size**3 for time in seconds[train][name]),
            "inference_microseconds_per_voxel": Spread.of(1e6 * time / size**3 for time in seconds[infer][name]),
            "training_over_dynunet": ratio(seconds[train][name], seconds[train]["DynUNet"]),
        }


MEMORY = Section(
    "memory",
    "Segmentation networks of about equal cost: peak memory of a training step and of inference, batch 1",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("kMAC/voxel", "kmac_per_voxel", number(0)),
        ("parameters, M", "parameters", lambda value: f"{value / 1e6:.1f}"),
        ("training, B/voxel", "training_bytes_per_voxel", number(0)),
        ("no_grad, B/voxel", "inference_bytes_per_voxel", number(0)),
        ("training, allocated", "training_allocated_per_voxel", number(0)),
        ("no_grad, allocated", "inference_allocated_per_voxel", number(0)),
    ),
    _memory_jobs,
)
TIME = Section(
    "time",
    "The same networks: time of a training step and of inference, all taking turns",
    (
        ("network", "network", str),
        ("dtype", "dtype", str),
        ("training step, µs/voxel", "training_microseconds_per_voxel", spread()),
        ("no_grad, µs/voxel", "inference_microseconds_per_voxel", spread()),
        ("training over DynUNet", "training_over_dynunet", spread()),
    ),
    _time_jobs,
)
