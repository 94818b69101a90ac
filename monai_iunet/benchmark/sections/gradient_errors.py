"""How far gradients are from those in float64, by number of couplings, precision and way of having activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from monai_iunet.benchmark.measure import DTYPES
from monai_iunet.benchmark.section import Job, Row, Section, Settings
from monai_iunet.networks.nets.iunet import IUNet

__all__ = ["SECTION"]

COUPLINGS = (12, 48, 96)
WAYS: dict[str, dict[str, Any]] = {
    "stored": {"activations": "store", "exact": False},
    "rebuilt": {"activations": "invert", "exact": False},
    "convolutions kept": {"activations": "convolutions", "exact": False},
    "rebuilt, exact": {"activations": "invert", "exact": True},
}


def _jobs(settings: Settings) -> Iterator[Job]:
    for couplings in COUPLINGS:
        yield Job(str(couplings), partial(_measure, settings, couplings))


def _measure(settings: Settings, couplings: int) -> Iterator[Row]:
    images = torch.randn(1, 24, 16, 16, 16, generator=torch.Generator().manual_seed(1)).to(settings.device)
    reference = _gradients(images.double(), couplings, torch.float32, **WAYS["stored"])
    for dtype, kind in DTYPES.items():
        for way, options in WAYS.items():
            found = _gradients(images, couplings, kind, **options).double()
            yield {
                "couplings": couplings,
                "dtype": dtype,
                "activations": way,
                "relative_error": float((found - reference).norm() / reference.norm()),
            }


def _gradients(images: Tensor, couplings: int, dtype: torch.dtype, activations: str, exact: bool) -> Tensor:
    """Return the gradients of all parameters, of a network with one level and a sum of all outputs, weighted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = IUNet(3, (24,), couplings=couplings // 2, activations=activations, exact=exact)
    net.to(images)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).to(images)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = net(images)
    (features * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


SECTION = Section(
    "gradient_errors",
    "Relative error of the gradients of a network with one level, beside those in float64",
    (
        ("couplings", "couplings", str),
        ("dtype", "dtype", str),
        ("activations", "activations", str),
        ("relative error", "relative_error", lambda value: f"{value:.1e}"),
    ),
    _jobs,
)
