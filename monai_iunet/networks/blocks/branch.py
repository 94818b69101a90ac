"""The network inside a coupling, unless the user brings another one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_dropout_layer, get_norm_layer
from torch import Tensor, nn

from monai_iunet.networks.layers.normalized_activation import can_be_joined, normalized_activation
from monai_iunet.networks.layers.slab_convolution import convolve

__all__ = ["Branch", "named_branch"]

Layer = str | tuple[str, dict[str, Any]] | None


def named_branch(
    name: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    convs: int,
    kernel_size: Sequence[int],
    act: Layer,
    norm: Layer,
    dropout: float | Layer,
    **options: Any,
) -> Branch:
    """Return a branch of a kind that has a name.

    Args:
        name: "conv", convolutions that keep the size, each followed by normalization, dropout and activation, as MONAI
            orders them; "residual", MONAI's `UnetResBlock`, of two such convolutions and a skip connection, as in the
            encoder of nnU-Net's residual networks; "mednext", a depthwise convolution, a normalization, a 1x1
            convolution to `expansion` times the channels, GELU, and a 1x1 convolution back (Roy et al., MedNeXt, 2023,
            arXiv 2303.09975).
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the half that the branch reads.
        out_channels: channels of the half that it changes.
        convs: number of blocks of that kind; those between have the larger of the two numbers of channels.
        kernel_size: odd, one per axis.
        act: see `monai.networks.layers.utils.get_act_layer`; None for none. Of "mednext" it is GELU.
        norm: see `get_norm_layer`; None for none.
        dropout: see `get_dropout_layer`; None or 0 for none.
        options: of "mednext": `expansion`, 4 by default.

    Raises:
        ValueError: when there is no branch of the name, or not with such options.
    """
    if name not in BRANCHES:
        raise ValueError(f"branch {name!r}: must be one of {', '.join(BRANCHES)}.")
    if options.keys() - {"expansion"} or (options and name != "mednext"):
        raise ValueError(f'branch {name!r} with {options}: only "mednext" has an option, its expansion.')
    if not isinstance(options.get("expansion", 1), Integral) or options.get("expansion", 1) < 1:
        raise ValueError(f"branch {name!r}: expansion must be a positive int, got {options['expansion']!r}.")
    widths = [in_channels, *[max(in_channels, out_channels)] * (convs - 1), out_channels]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += BRANCHES[name](spatial_dims, before, after, kernel_size, act, norm, dropout, **options)
    # Flat, because a nested Sequential keeps the input of an inner one alive while that runs.
    return Branch(*layers)


def _convolution(
    dims: int, before: int, after: int, kernel: Sequence[int], act: Layer, norm: Layer, dropout: float | Layer
) -> list[nn.Module]:
    # A bias in front of a normalization would be taken away again.
    layers: list[nn.Module] = [Conv[Conv.CONV, dims](before, after, kernel, padding="same", bias=norm is None)]
    if norm is not None:
        layers.append(get_norm_layer(norm, dims, after))
    if dropout:
        layers.append(get_dropout_layer(dropout))
    if act is not None:
        layers.append(get_act_layer(act))
    return layers


def _residual(
    dims: int, before: int, after: int, kernel: Sequence[int], act: Layer, norm: Layer, dropout: float | Layer
) -> list[nn.Module]:
    return [UnetResBlock(dims, before, after, kernel, 1, norm or "", act or "", dropout or None)]


def _mednext(
    dims: int,
    before: int,
    after: int,
    kernel: Sequence[int],
    act: Layer,
    norm: Layer,
    dropout: float | Layer,
    expansion: int = 4,
) -> list[nn.Module]:
    convolution = Conv[Conv.CONV, dims]
    return [
        convolution(before, before, kernel, padding="same", groups=before, bias=norm is None),
        *([] if norm is None else [get_norm_layer(norm, dims, before)]),
        convolution(before, expansion * before, 1),
        nn.GELU(),
        convolution(expansion * before, after, 1),
        *([get_dropout_layer(dropout)] if dropout else []),
    ]


BRANCHES: dict[str, Callable[..., list[nn.Module]]] = {
    "conv": _convolution,
    "residual": _residual,
    "mednext": _mednext,
}


class Branch(nn.Sequential):
    """Runs layers one after another, and can be compiled: `branch.compile()`.

    What is compiled gets a copy of the input, contiguous and no view of something else, so that the backward pass,
    which evaluates a branch again on a rebuilt input, meets the same conditions and is not compiled once more.

    Args:
        args: the layers, see `torch.nn.Sequential`.

    Example:
        >>> import torch
        >>> branch = Branch(nn.Conv2d(3, 2, 3, padding=1), nn.LeakyReLU())
        >>> branch(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    _compiled: Callable[[Branch, list[Tensor]], Tensor] | None = None

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """Return the output of the last layer.

        Args:
            x: what goes into the first layer; or a list of this alone, which is emptied, so that its memory is free
                behind the first layer.
        """
        inputs = x if isinstance(x, list) else [x]
        del x
        if self._compiled is None:
            return self._one_after_another(inputs)
        return self._compiled(self, [inputs.pop().clone(memory_format=torch.contiguous_format)])

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled is not None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers, with the arguments of `torch.compile`; names in the state stay."""
        # Of the class, so that a replica of the branch runs its own layers.
        self._compiled = torch.compile(Branch._one_after_another, *args, **kwargs)

    def _one_after_another(self, inputs: list[Tensor]) -> Tensor:
        x = inputs.pop()
        layers: list[nn.Module] = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and can_be_joined(x, layer, layers[0]):
                x = normalized_activation(x, layer, layers.pop(0))
            else:
                x = convolve(x, layer)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # a copy is compiled by itself
