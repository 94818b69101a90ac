"""Whether gradients through rebuilt activations are, to the last bit, those of stored ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from monai_iunet.benchmark.measure import DTYPES
from monai_iunet.benchmark.section import Job, Row, Section, Settings
from monai_iunet.benchmark.sections.equal_cost import train
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["SECTION"]


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


GPU_SETTINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "deterministic": lambda: torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    "default": nullcontext,
    "kernels chosen by timing": lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False),
    "TF32": _tf32,
}


def _jobs(settings: Settings) -> Iterator[Job]:
    for name, context in (GPU_SETTINGS if settings.device.type == "cuda" else {"default": nullcontext}).items():
        for dtype in DTYPES:
            yield Job(f"{name}, {dtype}", partial(_measure, settings, name, context, dtype))


def _measure(
    settings: Settings, name: str, context: Callable[[], AbstractContextManager[None]], dtype: str
) -> Iterator[Row]:
    images = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1)).to(settings.device)
    with context():
        for exact in (True, False):
            stored, again, rebuilt = (
                _gradients(activations, exact, images, DTYPES[dtype]) for activations in ("store", "store", "invert")
            )
            yield {
                "settings": name,
                "dtype": dtype,
                "network": "exact" if exact else "not exact",
                "equal": torch.equal(rebuilt, stored),
                "stored_repeats": torch.equal(again, stored),
                "difference": float((rebuilt - stored).norm() / stored.norm()),
                "stored_difference": float((again - stored).norm() / stored.norm()),
            }


def _gradients(activations: str, exact: bool, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SegIUNet(3, 1, 3, (16, 32, 64), couplings=6, activations=activations, exact=exact)
    net.to(images.device)
    train(net, images, dtype)
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


SECTION = Section(
    "exactness",
    "Gradients through rebuilt activations beside those through stored ones, 6 couplings per level",
    (
        ("settings", "settings", str),
        ("dtype", "dtype", str),
        ("network", "network", str),
        ("bit for bit", "equal", str),
        ("stored ones repeat", "stored_repeats", str),
        ("relative difference", "difference", lambda value: f"{value:.1e}"),
        ("of stored ones", "stored_difference", lambda value: f"{value:.1e}"),
    ),
    _jobs,
)
