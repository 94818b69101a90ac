"""3D U-Nets of growing depth: memory, and time, of ours and of other packages that rebuild or recompute activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from monai_iunet.benchmark.measure import (
    DTYPES,
    Spread,
    autocast,
    peak_of_inference,
    peak_of_training,
    ratio,
    time_alternately,
)
from monai_iunet.benchmark.peers import CONTESTANTS, PEERS
from monai_iunet.benchmark.section import Job, Row, Section, Settings, SkippedError, number, spread
from monai_iunet.networks.nets.iunet import IUNet

__all__ = ["AUTO_UNITS", "MEMORY", "TIME"]

AUTO_UNITS = 20  # budget of "auto", in units of the bytes of the input


def _names(settings: Settings) -> list[str]:
    return [name for name in CONTESTANTS if name not in PEERS or name in settings.peers]


def _input(settings: Settings) -> Tensor:
    shape = 1, settings.sizes.depth_channels[0], *[settings.sizes.depth_size] * 3
    return torch.randn(shape, device=settings.device, requires_grad=True)


def _make(name: str, couplings: int, settings: Settings, unit: int) -> nn.Module:
    net = CONTESTANTS[name](settings.sizes.depth_channels, couplings).to(settings.device)
    if isinstance(net, IUNet) and net.activations == "auto":
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
        net.memory_budget = AUTO_UNITS * unit + parameters  # which are there anyway; gradients are not yet
    return net


def _train(net: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Take a step; its loss alone, around a network that does nothing, takes 7 units in float32."""
    z = x * 1
    with autocast(x.device, dtype):
        y = net(z)
        loss = y.float().square().mean()
    loss.backward()


def _infer(net: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad(), autocast(x.device, dtype):
        z = x * 1
        y = net(z)  # noqa: F841 - the caller holds on to the result


def _what_runs(name: str, action: Callable[[], object]) -> None:
    """Run an action once; what another package raises is a reason to leave it out."""
    try:
        action()
    except Exception as error:
        if name not in PEERS:
            raise
        raise SkippedError(
            f"{name} raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _memory_jobs(settings: Settings) -> Iterator[Job]:
    depths = sorted(
        settings.sizes.depths, key=lambda depth: depth not in (min(settings.sizes.depths), max(settings.sizes.depths))
    )
    for couplings in depths:  # the ends first
        for name in _names(settings):
            for dtype in DTYPES:
                yield Job(f"{name}, {couplings} couplings, {dtype}", partial(_memory, settings, name, couplings, dtype))


def _memory(settings: Settings, name: str, couplings: int, dtype: str) -> list[Row]:
    x = _input(settings)
    unit = x.numel() * x.element_size()
    net = _make(name, couplings, settings, unit)
    training, inference = partial(_train, net, x, DTYPES[dtype]), partial(_infer, net, x, DTYPES[dtype])
    _what_runs(name, training)
    x.grad = None
    return [
        {
            "network": name,
            "couplings": couplings,
            "dtype": dtype,
            "training_memory": peak_of_training(net, training) / unit,
            "inference_memory": peak_of_inference(net, inference) / unit,
        }
    ]


def _time_jobs(settings: Settings) -> Iterator[Job]:
    for dtype in DTYPES:
        yield Job(f"{settings.sizes.timed_depth} couplings, {dtype}", partial(_time, settings, dtype))


def _time(settings: Settings, dtype: str) -> Iterator[Row]:
    x, couplings = _input(settings), settings.sizes.timed_depth
    nets = {}
    for name in _names(settings):
        try:
            net = _make(name, couplings, settings, x.numel() * x.element_size())
            _what_runs(name, partial(_train, net, x, DTYPES[dtype]))
            nets[name] = net
        except SkippedError as reason:
            yield {"network": name, "couplings": couplings, "dtype": dtype, "skipped": str(reason)}
    training, inference = (
        time_alternately(
            {name: partial(action, net, x, DTYPES[dtype]) for name, net in nets.items()},
            settings.sizes.rounds,
            settings.device,
            settings.deadline,
        )
        for action in (_train, _infer)
    )
    for name in nets:
        row = {
            "network": name,
            "couplings": couplings,
            "dtype": dtype,
            "training_seconds": Spread.of(training[name]),
            "training_over_store": ratio(training[name], training["ours, store"]),
            "inference_seconds": Spread.of(inference[name]),
            "inference_over_store": ratio(inference[name], inference["ours, store"]),
        }
        if "iunets" in nets:
            row["training_over_iunets"] = ratio(training[name], training["iunets"])
        yield row


_NAMES = (("network", "network", str), ("couplings", "couplings", str), ("dtype", "dtype", str))
MEMORY = Section(
    "depth_memory",
    "One training step of 3D U-Nets, memory in units of the input's bytes (the loss alone: 7)",
    (*_NAMES, ("training", "training_memory", number(2)), ("no_grad", "inference_memory", number(2))),
    _memory_jobs,
)
TIME = Section(
    "depth_time",
    "The same networks: time, all taking turns",
    (
        *_NAMES,
        ("training, s", "training_seconds", spread()),
        ("over store", "training_over_store", spread()),
        ("over iunets", "training_over_iunets", spread()),
        ("no_grad, s", "inference_seconds", spread()),
        ("over store", "inference_over_store", spread()),
    ),
    _time_jobs,
)
