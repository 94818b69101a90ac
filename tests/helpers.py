"""Measures that several tests use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# PyTorch 2.8 on a CPU gives twice the gradient to fully sharded networks in two processes, 2.11 does not.
GLOO_AVERAGES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def randomize(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Parameters far from their initial values, where nothing vanishes by symmetry."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Norms of the differences, relative to each expected norm, or to the largest norm where that one vanishes."""
    largest = max(float(tensor.norm()) for tensor in expected)
    return [
        float((a - b).norm()) / (float(b.norm()) if float(b.norm()) > 1e-8 * largest else largest)
        for a, b in zip(got, expected, strict=True)
    ]
