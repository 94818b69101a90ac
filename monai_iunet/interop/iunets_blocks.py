"""The default networks in the couplings of the package `iunets`: of its release 0.1, and of the head of its repository.

Source: the package `iunets`, version 0.1, and the head of https://github.com/cetmann/iunets, `layers.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["HeadBlock", "StandardBlock"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALIZATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "instance": ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), {"affine": True}),
    "batch": ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), {"eps": 1e-3}),
}


class StandardBlock(nn.Sequential):
    """The network in a coupling of the release: convolutions, each followed by leaky ReLU and normalization.

    Args:
        dim: 1, 2 or 3.
        in_channels: channels of the half that it reads.
        out_channels: channels of the half that it changes.
        block_depth: number of convolutions.
        zero_init: whether it is zero at first, and the coupling the identity.

    Example:
        >>> import torch
        >>> StandardBlock(2, 3, 2)(torch.rand(1, 3, 4, 4)).abs().max().item()
        0.0
    """

    def __init__(
        self, dim: int, in_channels: int, out_channels: int, block_depth: int = 1, zero_init: bool = True
    ) -> None:
        layers: list[nn.Module] = []
        for convolution, after in _convolutions(dim, in_channels, out_channels, block_depth):
            layers += [convolution, nn.LeakyReLU(), nn.GroupNorm(1, after, eps=1e-3)]
        if zero_init:
            nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
        super().__init__(*layers)


class HeadBlock(nn.Sequential):
    """The network in a coupling of the head of the repository: convolutions, normalization and leaky ReLU after each.

    Args:
        dim: 1, 2 or 3.
        in_channels: channels of the half that it reads.
        out_channels: channels of the half that it changes.
        depth: number of convolutions.
        zero_init: whether it is zero at first, and the coupling the identity; there it ends in an error.
        normalization: "instance", "batch" or None.

    Raises:
        ValueError: for another normalization; with "group" the repository fails, too.

    Example:
        >>> [type(layer).__name__ for layer in HeadBlock(2, 3, 2, depth=1)]
        ['Conv2d', 'InstanceNorm2d', 'LeakyReLU']
    """

    def __init__(
        self,
        dim: int,
        in_channels: int,
        out_channels: int,
        depth: int = 2,
        zero_init: bool = False,
        normalization: str | None = "instance",
    ) -> None:
        if normalization is not None and normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be {', '.join(NORMALIZATIONS)} or None, got {normalization!r}.")
        layers: list[nn.Module] = []
        for convolution, after in _convolutions(dim, in_channels, out_channels, depth):
            layers.append(convolution)
            if normalization is not None:
                classes, options = NORMALIZATIONS[normalization]
                layers.append(classes[dim - 1](after, **options))
            layers.append(nn.LeakyReLU())
        if zero_init:
            nn.init.zeros_(layers[-2].weight)  # type: ignore[arg-type]
        super().__init__(*layers)


def _convolutions(dim: int, in_channels: int, out_channels: int, depth: int) -> Iterator[tuple[nn.Module, int]]:
    """Yield convolutions from `in_channels` to `out_channels`, by the larger of both, each with its channels."""
    widths = [in_channels, *[max(in_channels, out_channels)] * (depth - 1), out_channels]
    for before, after in itertools.pairwise(widths):
        convolution = CONVOLUTIONS[dim - 1](before, after, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(convolution.weight, a=0.01, mode="fan_out")
        yield convolution, after
