"""The invertible U-Net.

Source: Etmann, Ke, Schönlieb, iUNets: Learnable Invertible Up- and Downsampling for Large-Scale Inverse Problems, 2020
(arXiv 2005.05220).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import is_exporting
from monai_iunet.engine.reversible import InvertibleLayer, Tensors
from monai_iunet.networks.blocks.branch import convolutional_branch
from monai_iunet.networks.blocks.coupling import AdditiveCoupling, WholeCoupling
from monai_iunet.networks.blocks.grid import check_range, round_to_grid
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.partition import ChannelPartition
from monai_iunet.networks.blocks.resampling import OrthogonalDownsampling
from monai_iunet.networks.nets.activations import ChosenActivations
from monai_iunet.networks.nets.channels import reachable_channels
from monai_iunet.networks.nets.padding import PADDING_MODES, crop, crop_like, pad
from monai_iunet.networks.nets.scripting import Traced

__all__ = ["IUNet"]

MakeBranch = Callable[[int, int, int, str, int, int], nn.Module]


class IUNet(ChosenActivations):
    """Invertible U-Net: a bijection of 1D, 2D or 3D images, trained without storing its activations.

    Additive couplings keep the resolution. Between levels a part of the channels is downsampled by a learnable
    orthogonal matrix per channel, and the rest, the code of the level, skips to the decoder:

        channels[0] --couplings-- (skip | down) ................................ (skip | up) --couplings-- channels[0]
                                        `-- channels[1] --couplings--    ...   --'

    In training the backward pass rebuilds the activations from the output, so the memory does not grow with the number
    of couplings.

    Args:
        spatial_dims: 1, 2 or 3.
        channels: channels per level; `channels[0]` go in and come out. Reachable are
            `channels[i + 1] = prod(stride) * k` with `1 <= k < channels[i]`; for others the nearest reachable number is
            built, with a warning. `self.channels` tells what was built.
        strides: downsampling factor: an int, or one entry per downsampling (`len(channels) - 1`), each an int or one
            int per axis.
        couplings: couplings per level, in the encoder and again in the decoder; an int or one per level.
        convs_per_coupling: convolutions in each coupling branch.
        kernel_size: of the branches' convolutions; odd, an int or one per axis.
        act: activation of the branches, as in MONAI's `get_act_layer`; None for none.
        norm: normalization of the branches, as in MONAI's `get_norm_layer`; None for none.
        dropout: dropout of the branches, as in MONAI's `get_dropout_layer`; 0 for none.
        channel_mixing: orthogonal 1x1 convolutions: "split" for one before each split and after each merge, n for one
            after every n-th coupling, None for none.
        orthogonal_map: "cayley", "matrix_exp" or "householder", see `OrthogonalMatrix`.
        resampling_init: where the resampling starts: "haar", "pixel_shuffle", "random" or an orthogonal matrix.
        learnable_resampling: whether the resampling is trained.
        padding_mode: how images are padded whose size does not divide, as in `torch.nn.functional.pad`; None to refuse.
        activations: "invert" to rebuild activations in the backward pass, "store" for plain autograd, or one of the two
            per level, finest first; "auto" chooses for each size of images, so that a step is as fast as
            `memory_budget` allows. The parameters and outputs are the same; may be set on a built network too.
        memory_budget: for "auto", what a step may hold beside optimizer and loss: bytes, or such as "20 GiB".
        exact: round activations to a grid, so that they are rebuilt, and gradients taken, exactly to the last bit; see
            `networks/blocks/grid.py`. Values must stay below 256. May be set on a built network too.
        make_branch: `make_branch(spatial_dims, in_channels, out_channels, stage, level, index)`, with stage "encoder"
            or "decoder", returns the branch of a coupling, a network from `in_channels` to `out_channels`. If what it
            returns has a method `inverse`, it stands in for the whole coupling, a bijection of
            `in_channels + out_channels` channels.

    Raises:
        ValueError: for arguments that describe no network, and for inputs of the wrong shape or type.

    Example:
        >>> net = IUNet(spatial_dims=3, channels=(4, 16, 64), couplings=1)
        >>> x = torch.rand(1, 4, 8, 8, 8)
        >>> y = net(x)
        >>> y.shape
        torch.Size([1, 4, 8, 8, 8])
        >>> torch.allclose(net.inverse(y), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        strides: int | Sequence[int | Sequence[int]] = 2,
        couplings: int | Sequence[int] = 2,
        convs_per_coupling: int = 1,
        kernel_size: int | Sequence[int] = 3,
        act: str | tuple[str, dict[str, Any]] | None = "LEAKYRELU",
        norm: str | tuple[str, dict[str, Any]] | None = ("INSTANCE", {"affine": True}),
        dropout: float | str | tuple[str, dict[str, Any]] | None = 0.0,
        channel_mixing: Literal["split"] | int | None = "split",
        orthogonal_map: str = "cayley",
        resampling_init: Any = "haar",
        learnable_resampling: bool = True,
        padding_mode: str | None = "constant",
        activations: str | Sequence[str] = "invert",
        memory_budget: int | str | None = None,
        exact: bool = False,
        make_branch: MakeBranch | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}.")
        if padding_mode is not None and padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be None or one of {PADDING_MODES}, got {padding_mode!r}.")
        if channel_mixing not in ("split", None) and not _is_positive_int(channel_mixing):
            raise ValueError(f'channel_mixing must be "split", a positive int or None, got {channel_mixing!r}.')
        if not _is_positive_int(convs_per_coupling):
            raise ValueError(f"convs_per_coupling must be a positive int, got {convs_per_coupling!r}.")
        if len(channels) == 0 or not all(map(_is_positive_int, channels)) or channels[0] < 2:
            raise ValueError(
                "channels must be positive ints, one per level, and the first at least 2 to be halved, "
                f"got {channels!r}."
            )
        self.spatial_dims = spatial_dims
        self.strides = _strides(strides, spatial_dims, channels)
        self.channels = _reachable_channels(channels, self.strides)
        self.couplings = _couplings(couplings, len(self.channels))
        self.factors = tuple(math.prod(stride[axis] for stride in self.strides) for axis in range(spatial_dims))
        self.padding_mode = padding_mode

        kernel = (kernel_size,) * spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != spatial_dims or not all(_is_positive_int(extent) and extent % 2 for extent in kernel):
            raise ValueError(f"kernel_size must be odd, an int or {spatial_dims} of them, got {kernel_size!r}.")

        def default_branch(dims: int, in_channels: int, out_channels: int, *_: Any) -> nn.Module:
            return convolutional_branch(dims, in_channels, out_channels, convs_per_coupling, kernel, act, norm, dropout)

        self._skips = [
            total - following // math.prod(stride)
            for total, following, stride in zip(self.channels, self.channels[1:], self.strides)
        ]
        # Any, because iterating over an nn.ModuleList gives plain modules; these hold InvertibleLayers.
        self.encoder: Any = nn.ModuleList()
        self.decoder: Any = nn.ModuleList()
        self.splits: Any = nn.ModuleList()  # halves of a level to (skip, down), in the encoder
        self.merges: Any = nn.ModuleList()  # the same in the decoder, used backwards
        self.downsamplings: Any = nn.ModuleList()
        self.upsamplings: Any = nn.ModuleList()  # downsamplings used backwards
        for level, total in enumerate(self.channels):
            first = _halves(total, 0)
            last = _halves(total, self.couplings[level])
            for stage, levels in (("encoder", self.encoder), ("decoder", self.decoder)):
                layers = nn.ModuleList()
                for index in range(self.couplings[level]):
                    before, after = _halves(total, index), _halves(total, index + 1)
                    branch = (make_branch or default_branch)(spatial_dims, before[1], before[0], stage, level, index)
                    whole = callable(getattr(branch, "inverse", None))
                    layers.append(WholeCoupling(branch, before, after) if whole else AdditiveCoupling(branch))
                    if isinstance(channel_mixing, int) and (index + 1) % channel_mixing == 0:
                        layers.append(ChannelMixing(after, after, orthogonal_map))
                levels.append(layers)
            if level < len(self.strides):
                stride = self.strides[level]
                skip = self._skips[level]
                parts = (skip, total - skip)
                following = _halves(self.channels[level + 1], 0)
                following_end = _halves(self.channels[level + 1], self.couplings[level + 1])
                for halves, changes in ((last, self.splits), (first, self.merges)):
                    changes.append(
                        ChannelMixing(halves, parts, orthogonal_map)
                        if channel_mixing == "split"
                        else ChannelPartition(halves, parts)
                    )
                for halves, changes in ((following, self.downsamplings), (following_end, self.upsamplings)):
                    changes.append(
                        OrthogonalDownsampling(
                            parts[1], stride, halves, resampling_init, orthogonal_map, learnable_resampling
                        )
                    )
        deepest = self.channels[-1]
        self._open = ChannelPartition(self.channels[:1], _halves(self.channels[0], 0))
        self._bottom = ChannelPartition(_halves(deepest, self.couplings[-1]), (deepest,))
        self._bottom_up = ChannelPartition((deepest,), _halves(deepest, 0))
        self._turn = ChannelPartition(_halves(deepest, self.couplings[-1]), _halves(deepest, 0))
        # From the halves at the end of each level of the decoder to the whole.
        self._joins: Any = nn.ModuleList(
            ChannelPartition(_halves(total, count), (total,)) for total, count in zip(self.channels, self.couplings)
        )
        self.memory_budget = memory_budget
        self.activations = activations
        self.exact = exact

    @property
    def exact(self) -> bool:
        """Whether activations are rounded to a grid, and rebuilt to the last bit."""
        return self._exact

    @exact.setter
    def exact(self, value: bool) -> None:
        if not isinstance(value, bool):  # a config may well bring the text "false", which would count as true
            raise ValueError(f"exact must be True or False, got {value!r}.")
        if value and any(isinstance(module, WholeCoupling) for module in self.modules()):
            raise ValueError("exact=True needs additive couplings: branches without a method `inverse`.")
        self._exact = value
        for layer in self._layers():
            layer.exact = value

    def _layers(self) -> list[InvertibleLayer]:
        return [module for module in self.modules() if isinstance(module, InvertibleLayer)]

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.channels)

    def set_levels(self, choice: Sequence[str]) -> None:
        """Let each level "invert" or "store"."""
        for level, activations in enumerate(choice):
            for layer in self._layers_of(level):
                layer.rebuilds = activations == "invert"

    def _layers_of(self, level: int) -> Iterator[InvertibleLayer]:
        """The layers of a level, and those between it and the next."""
        between = (self.splits, self.merges, self.downsamplings, self.upsamplings)
        yield from (*self.encoder[level], *self.decoder[level], self._joins[level])
        yield from (layers[level] for layers in between if level < len(layers))
        if level == 0:
            yield self._open
        if level == len(self.channels) - 1:
            yield from (self._bottom, self._bottom_up, self._turn)

    def forward(self, x: Tensor, crop: bool = True) -> Tensor:
        """Apply the network.

        Args:
            x: `(batch, channels[0], *spatial)`, floating point.
            crop: whether the output has the size of `x`. If the size does not divide, the cropped output has no
                inverse; pass False for the padded one, which `inverse(y, spatial_size=x.shape[2:])` takes back to `x`.

        Returns:
            A tensor like `x`, or of the padded size.
        """
        self._check(x, "x", self.channels[0])
        self._fit(x)
        return self._forward_in_one(x, crop)[0]

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Apply the network and show what the decoder has at each level, for deep supervision.

        Args:
            x: `(batch, channels[0], *spatial)`, floating point.

        Returns:
            `len(strides)` tensors (at least one), finest first: the output of `forward`, then for each coarser level of
            the decoder, without the coarsest of all, `(batch, channels[level], *spatial)` at its resolution. If the
            size of `x` does not divide, these belong to the padded image.
        """
        self._check(x, "x", self.channels[0])
        self._fit(x)
        return self._forward_in_one(x, True, True)

    def inverse(self, y: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        """Apply the inverse of the network.

        Args:
            y: `(batch, channels[0], *spatial)`, of a size that divides by `factors`.
            spatial_size: size of the image before it was padded, if it was; the result is cropped to it.
        """
        self._check(y, "y", self.channels[0])
        self._check_divides(y.shape[2:], "inverse: ", "Pass the output of forward(x, crop=False).")
        with self._grid():
            codes = self._decode_inverse(self._enter(y))
            codes.append(self._turn.inverse(*codes.pop()))
            x = _leave(self._encode_inverse(codes), y)
        return x if spatial_size is None else crop(x, list(spatial_size), list(self.factors))

    def encode(self, x: Tensor) -> Tensors:
        """The codes of an image: the skipped channels of each level, finest first, and the whole of the coarsest.

        Sizes that do not divide are padded.
        """
        self._check(x, "x", self.channels[0])
        with self._grid():
            *skips, state = self._encode(self._enter(self._pad(x)))
            codes = *skips, *self._bottom(*state, keep=True)
        return tuple(_leave(code, x) for code in codes)

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """The image of codes as `encode` returns them, through the decoder."""
        self._check_codes(codes)
        with self._grid():
            *skips, deepest = map(self._enter, codes)
            return _leave(self._decode([*skips, self._bottom_up(deepest)]), codes[0])

    def encode_inverse(self, codes: Sequence[Tensor]) -> Tensor:
        """The image whose codes these are: inverse of `encode`."""
        self._check_codes(codes)
        with self._grid():
            *skips, deepest = map(self._enter, codes)
            return _leave(self._encode_inverse([*skips, self._bottom.inverse(deepest)]), codes[0])

    def decode_inverse(self, y: Tensor) -> Tensors:
        """The codes that the decoder takes to this image: inverse of `decode`."""
        self._check(y, "y", self.channels[0])
        self._check_divides(y.shape[2:], "decode_inverse: ", "Pass what `decode` returned.")
        with self._grid():
            *skips, state = self._decode_inverse(self._enter(y))
            codes = *skips, *self._bottom_up.inverse(*state, keep=True)
        return tuple(_leave(code, y) for code in codes)

    def _forward(self, x: Tensor, crop: bool, levels: bool = False) -> list[Tensor]:
        with self._grid():
            codes = self._encode(self._enter(self._pad(x)))
            codes.append(self._turn(*codes.pop()))
            tapped: list[Tensor] | None = [] if levels else None
            y = self._decode(codes, tapped)
        return [
            crop_like(_leave(y, x), x, list(self.factors)) if crop else _leave(y, x),
            *(_leave(level, x) for level in reversed(tapped or [])),
        ]

    _forward_uncompiled = torch.compiler.disable(_forward)

    def _forward_in_one(self, x: Tensor, crop: bool, levels: bool = False) -> list[Tensor]:
        """The forward pass, kept from `torch.compile` where there is a backward pass, which may rebuild activations.

        It would break its graph at every layer and compile each piece again; better one break around the whole.
        """
        if torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling() and not is_exporting():
            return self._forward_uncompiled(x, crop, levels)
        return self._forward(x, crop, levels)

    # The four walks below hand states over in lists that are emptied on the way, so that no caller's variable keeps a
    # state alive that the next layer has replaced.

    def _encode(self, x: Tensor) -> list[Any]:
        """The skipped channels per level, then the halves of the coarsest level."""
        state = self._open(x)
        del x
        codes: list[Any] = []
        for level, layers in enumerate(self.encoder):
            for layer in layers:
                state = layer(*state)
            if level < len(self.splits):
                state = self.splits[level](*state)
                codes.append(state[0])
                state = self.downsamplings[level](*state[1:])
        return [*codes, state]

    def _encode_inverse(self, codes: list[Any]) -> Tensor:
        state = codes.pop()
        for level in reversed(range(len(self.encoder))):
            if level < len(self.splits):
                state = self.downsamplings[level].inverse(*state)
                state = self.splits[level].inverse(codes.pop(), *state)
            for layer in reversed(self.encoder[level]):
                state = layer.inverse(*state)
        return self._open.inverse(*state, keep=True)[0]

    def _decode(self, codes: list[Any], tapped: list[Tensor] | None = None) -> Tensor:
        state = codes.pop()
        for level in reversed(range(len(self.decoder))):
            if level < len(self.merges):
                state = self.upsamplings[level].inverse(*state)
                state = self.merges[level].inverse(codes.pop(), *state)
            for layer in self.decoder[level]:
                state = layer(*state)
            if tapped is not None and 0 < level < len(self.merges):
                tapped.append(self._joins[level](*state)[0])
        return self._joins[0](*state, keep=True)[0]

    def _decode_inverse(self, y: Tensor) -> list[Any]:
        state = self._joins[0].inverse(y)
        del y
        codes: list[Any] = []
        for level, layers in enumerate(self.decoder):
            for layer in reversed(layers):
                state = layer.inverse(*state)
            if level < len(self.merges):
                state = self.merges[level](*state)
                codes.append(state[0])
                state = self.upsamplings[level](*state[1:])
        return [*codes, state]

    def _enter(self, x: Tensor) -> Tensor:
        """What runs through the couplings: float32 or float64, so that sums can be taken back; on a grid if `exact`."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return round_to_grid(x) if self.exact else x

    def _grid(self) -> AbstractContextManager[None]:
        """Context that raises an error if values leave the range of the grid; not in an export."""
        return check_range() if self.exact and not torch.compiler.is_compiling() else nullcontext()

    def __prepare_scriptable__(self) -> nn.Module:
        return Traced(self, self.channels[0], self.factors)

    def layout(self) -> str:
        """Picture of the network: a row per level, a number of channels per coupling, and each split as (skip/down).

        Example:
            >>> IUNet(spatial_dims=1, channels=(4, 4), couplings=2).print_layout()
            4-4-(2/2)----(2/2)-4-4
            -------4-4--4-4-------
        """
        rows: list[str] = []
        for level in reversed(range(len(self.channels))):
            total = self.channels[level]
            couplings = "-".join([str(total)] * self.couplings[level])
            if not rows:
                rows.append(f"{couplings}--{couplings}")
                continue
            split = f"({self._skips[level]}/{total - self._skips[level]})"
            rows.append(f"{couplings}-{split}{'-' * max(len(rows[-1]) - len(split), 4)}{split}-{couplings}")
        width = len(rows[-1])
        # An odd rest goes to the right.
        return "\n".join(f"{'-' * ((width - len(row)) // 2)}{row}".ljust(width, "-") for row in reversed(rows))

    def print_layout(self) -> None:
        """Print `layout()`."""
        print(self.layout())  # noqa: T201 - the method exists to print

    def _pad(self, x: Tensor) -> Tensor:
        return pad(x, list(self.factors), self.padding_mode)

    def _check(self, x: Tensor, name: str, channels: int) -> None:
        if torch.jit.is_tracing():  # would be of the example alone
            return
        expected = f"(batch, {channels}, {', '.join(['size'] * self.spatial_dims)})"
        if not isinstance(x, Tensor) or x.ndim != self.spatial_dims + 2 or x.shape[1] != channels:
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape {expected}, got {came}.")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with `.float()`.")
        if x.shape[0] == 0 or any(extent < factor for extent, factor in zip(x.shape[2:], self.factors)):
            raise ValueError(
                f"{name} must hold at least one image of at least {self.factors} voxels, the factors that the network "
                f"downsamples by, got {tuple(x.shape)}. Use larger images or fewer levels."
            )

    def _check_divides(self, spatial_size: Sequence[int], where: str, remedy: str) -> None:
        if any(extent % factor for extent, factor in zip(spatial_size, self.factors)):
            raise ValueError(
                f"{where}the spatial size must be divisible by {self.factors}, got {tuple(spatial_size)}. {remedy}"
            )

    def _check_codes(self, codes: Sequence[Tensor]) -> None:
        widths = [*self._skips, self.channels[-1]]
        came = [tuple(code.shape) for code in codes]
        if len(codes) != len(widths) or any(
            len(shape) != self.spatial_dims + 2 or shape[1] != width for shape, width in zip(came, widths)
        ):
            raise ValueError(f"codes must be {len(widths)} tensors with {widths} channels, got shapes {came}.")
        size = tuple(codes[-1].shape[2:])
        for level in reversed(range(len(self.strides))):
            size = tuple(extent * factor for extent, factor in zip(size, self.strides[level]))
            if tuple(codes[level].shape[2:]) != size:
                raise ValueError(f"The code of level {level} must have the spatial size {size}, got shapes {came}.")


def _leave(y: Tensor, x: Tensor) -> Tensor:
    """What comes out for what went in: of the same type, but float32 under autocast to 16 bits."""
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _halves(channels: int, index: int) -> tuple[int, int]:
    """Channels of the halves in front of a coupling; the halves change places with each."""
    small, large = channels // 2, channels - channels // 2
    return (large, small) if index % 2 else (small, large)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _strides(
    strides: int | Sequence[int | Sequence[int]], spatial_dims: int, channels: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """One tuple per downsampling, one factor per axis."""
    count = len(channels) - 1
    entries = [strides] * count if isinstance(strides, int) else list(strides)
    result = tuple((entry,) * spatial_dims if isinstance(entry, int) else tuple(entry) for entry in entries)
    if len(result) != count or any(
        len(stride) != spatial_dims or not all(map(_is_positive_int, stride)) for stride in result
    ):
        raise ValueError(
            f"strides must be an int or {count} entries (one less than channels), each an int or {spatial_dims} "
            f"positive ints, got {strides!r}."
        )
    return result


def _couplings(couplings: int | Sequence[int], levels: int) -> tuple[int, ...]:
    result = (couplings,) * levels if isinstance(couplings, int) else tuple(couplings)
    if len(result) != levels or not all(map(_is_positive_int, result)):
        raise ValueError(f"couplings must be a positive int or {levels} of them (one per level), got {couplings!r}.")
    return result


def _reachable_channels(channels: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    built = reachable_channels(channels, strides)
    if built != tuple(channels):
        warnings.warn(
            f"channels={tuple(channels)} cannot be reached: with strides {tuple(map(tuple, strides))} each level has "
            "prod(stride) * k channels, where k, the channels that are downsampled, is at least 1 and less than the "
            f"channels of the level above. Built instead, the nearest: {built}.",
            stacklevel=3,
        )
    return built
