"""The network inside a coupling, unless the user brings another one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_dropout_layer, get_norm_layer
from torch import nn

__all__ = ["convolutional_branch"]


def convolutional_branch(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    convs: int,
    kernel_size: Sequence[int],
    act: str | tuple[str, dict[str, Any]] | None,
    norm: str | tuple[str, dict[str, Any]] | None,
    dropout: float | str | tuple[str, dict[str, Any]] | None,
) -> nn.Sequential:
    """Convolutions that keep the size, each followed by normalization, dropout and activation, as MONAI orders them.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the half that the branch reads.
        out_channels: channels of the half that it changes.
        convs: number of convolutions; those between have the larger of the two numbers of channels.
        kernel_size: odd, one per axis.
        act: see `monai.networks.layers.utils.get_act_layer`; None for none.
        norm: see `get_norm_layer`; None for none.
        dropout: see `get_dropout_layer`; None or 0 for none.
    """
    widths = [in_channels, *[max(in_channels, out_channels)] * (convs - 1), out_channels]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        # A bias in front of a normalization would be taken away again.
        layers.append(Conv[Conv.CONV, spatial_dims](before, after, kernel_size, padding="same", bias=norm is None))
        if norm is not None:
            layers.append(get_norm_layer(norm, spatial_dims, after))
        if dropout:
            layers.append(get_dropout_layer(dropout))
        if act is not None:
            layers.append(get_act_layer(act))
    # Flat, because a nested Sequential keeps the input of an inner one alive while that runs.
    return nn.Sequential(*layers)
