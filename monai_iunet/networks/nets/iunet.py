"""The invertible U-Net.

Source: Etmann, Ke, Schönlieb, iUNets: Learnable Invertible Up- and Downsampling for Large-Scale Inverse Problems, 2020
(arXiv 2005.05220).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.pytorch_private import compiled_part, has_hooks, is_exporting, is_in_forward_mode, is_view
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.reversible import InvertibleLayer, Tensors
from monai_iunet.engine.state import given_to_user
from monai_iunet.networks.blocks.branch import Branch, named_branch
from monai_iunet.networks.blocks.coupling import AdditiveCoupling, WholeCoupling
from monai_iunet.networks.blocks.grid import check_range, enter, is_integer, round_to_grid, values
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.orthogonal_layer import OrthogonalLayer
from monai_iunet.networks.blocks.partition import ChannelPartition, join_rounded
from monai_iunet.networks.blocks.resampling import OrthogonalDownsampling
from monai_iunet.networks.layers.autocast import autocast_type, without_cast_copies
from monai_iunet.networks.layers.metadata import with_metadata, without_metadata
from monai_iunet.networks.nets.activations import ChosenActivations
from monai_iunet.networks.nets.architecture import Architecture, is_positive_int
from monai_iunet.networks.nets.padding import crop, crop_like, pad
from monai_iunet.networks.nets.scripting import Traced

__all__ = ["IUNet"]

MakeBranch = Callable[[int, int, int, str, int, int], nn.Module]
MakePartition = Callable[[tuple[int, ...], tuple[int, ...]], InvertibleLayer]

ON_THE_GRID = (AdditiveCoupling, OrthogonalLayer, ChannelPartition)  # layers that know how to be exact
OVERWRITING = (AdditiveCoupling, ChannelMixing, OrthogonalDownsampling, ChannelPartition)  # and keep no state


class IUNet(ChosenActivations):
    """Maps 1D, 2D or 3D images to such images, invertibly, and is trained without storing its activations.

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
        convs_per_coupling: convolutions in each coupling branch; blocks, where `branch` names another kind.
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
        activations: "invert" to rebuild activations in the backward pass, "convolutions" to rebuild them from kept
            outputs of the branches' convolutions, "store" for plain autograd, or one of them per level, finest first;
            see `networks/nets/activations.py`. "auto" chooses for each size of images, so that a step is as fast as
            `memory_budget` allows. The parameters and outputs are the same; may be set on a built network too.
        memory_budget: for "auto", what a step may hold beside optimizer and loss: bytes, or such as "20 GiB".
        exact: round activations to a grid, so that they are rebuilt, and gradients taken, exactly to the last bit; see
            `networks/blocks/grid.py`. Values must stay below 256. May be set on a built network too. Under autocast to
            16 bits it takes less memory, because activations are then kept in 16 bits, but where hooks on couplings,
            channel mixing or resampling look at them, or these are compiled by themselves.
        branch: kind of the branches: "conv", convolutions; "residual", MONAI's `UnetResBlock`; "mednext", a depthwise
            convolution of `kernel_size` and two of size 1 with GELU between, over 4 times the channels; for another
            number `("mednext", {"expansion": 2})`.
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
        branch: str | tuple[str, dict[str, Any]] = "conv",
        make_branch: MakeBranch | None = None,
    ) -> None:
        super().__init__()
        if channel_mixing not in ("split", None) and not is_positive_int(channel_mixing):
            raise ValueError(f'channel_mixing must be "split", a positive int or None, got {channel_mixing!r}.')
        if not isinstance(learnable_resampling, bool):
            raise ValueError(f"learnable_resampling must be True or False, got {learnable_resampling!r}.")
        if make_branch is not None and not callable(make_branch):
            raise ValueError(f"make_branch must make a network for each coupling, got {make_branch!r}.")
        self.design = Architecture.of(spatial_dims, channels, strides, couplings, padding_mode)
        self.spatial_dims, self.channels, self.strides = spatial_dims, self.design.channels, self.design.strides
        self.couplings, self.factors, self.padding_mode = self.design.couplings, self.design.factors, padding_mode
        own_branch = _branches(branch, spatial_dims, convs_per_coupling, kernel_size, act, norm, dropout)
        mix = partial(ChannelMixing, orthogonal_map=orthogonal_map)
        # Any, because iterating over an nn.ModuleList gives plain modules; these hold InvertibleLayers.
        self.encoder: Any = nn.ModuleList()
        self.decoder: Any = nn.ModuleList()
        self.splits: Any = nn.ModuleList()  # halves of a level to (skip, down), in the encoder
        self.merges: Any = nn.ModuleList()  # the same in the decoder, used backwards
        self.downsamplings: Any = nn.ModuleList()
        self.upsamplings: Any = nn.ModuleList()  # downsamplings used backwards
        resampling = (resampling_init, orthogonal_map, learnable_resampling)
        for level in range(self.levels):
            every = None if channel_mixing == "split" else channel_mixing
            for stage, levels in (("encoder", self.encoder), ("decoder", self.decoder)):
                levels.append(self._make_couplings(stage, level, make_branch or own_branch, every, mix))
            if level < len(self.strides):
                self._make_resampling(level, mix if channel_mixing == "split" else ChannelPartition, resampling)
        self._make_partitions()
        self.memory_budget = memory_budget
        self.activations = activations
        self.exact = exact

    def _make_couplings(
        self, stage: str, level: int, make_branch: MakeBranch, mix_every: int | None, mix: MakePartition
    ) -> nn.ModuleList:
        """Return the couplings of a level of the encoder or decoder, and the channel mixing between them."""
        layers = nn.ModuleList()
        for index in range(self.couplings[level]):
            before, after = self.design.halves(level, index), self.design.halves(level, index + 1)
            branch = make_branch(self.spatial_dims, before[1], before[0], stage, level, index)
            whole = callable(getattr(branch, "inverse", None))
            layers.append(WholeCoupling(branch, before, after) if whole else AdditiveCoupling(branch))
            if mix_every is not None and (index + 1) % mix_every == 0:
                layers.append(mix(after, after))
        return layers

    def _make_resampling(self, level: int, change: MakePartition, options: tuple[Any, str, bool]) -> None:
        """Add what lies between a level and the next: splits and merges, downsampling and upsampling."""
        skip = self.design.skips[level]
        parts = (skip, self.channels[level] - skip)
        self.splits.append(change(self.design.last_halves(level), parts))
        self.merges.append(change(self.design.halves(level), parts))
        stride = self.strides[level]
        self.downsamplings.append(OrthogonalDownsampling(parts[1], stride, self.design.halves(level + 1), *options))
        self.upsamplings.append(OrthogonalDownsampling(parts[1], stride, self.design.last_halves(level + 1), *options))

    def _make_partitions(self) -> None:
        """Add the layers that divide whole states into halves, and join halves to whole states."""
        first, last = self.design.halves(self.levels - 1), self.design.last_halves(self.levels - 1)
        deepest = self.channels[-1]
        self._open = ChannelPartition(self.channels[:1], self.design.halves(0))
        self._bottom = ChannelPartition(last, (deepest,))
        self._bottom_up = ChannelPartition((deepest,), first)
        self._turn = ChannelPartition(last, first)
        # From the halves at the end of each level of the decoder to the whole.
        self._joins: Any = nn.ModuleList(
            ChannelPartition(self.design.last_halves(level), (total,)) for level, total in enumerate(self.channels)
        )

    @property
    def exact(self) -> bool:
        """Whether activations are rounded to a grid, and rebuilt to the last bit."""
        return self._exact

    @exact.setter
    def exact(self, value: bool) -> None:
        if not isinstance(value, bool):  # a config may well bring the text "false", which would count as true
            raise ValueError(f"exact must be True or False, got {value!r}.")
        others = {type(layer).__name__ for layer in self._layers() if not isinstance(layer, ON_THE_GRID)}
        if value and others:
            raise ValueError(
                "exact=True needs additive couplings: branches without a method `inverse`, and no invertible layers of "
                f"one's own. Here are {', '.join(sorted(others))}."
            )
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
        """Let each level "invert", keep "convolutions", or "store"."""
        for level, activations in enumerate(choice):
            for layer in self._layers_of(level):
                layer.rebuilds = activations != "store"
                if isinstance(layer, AdditiveCoupling):
                    layer.keeps_convolutions = activations == "convolutions"

    def couplings_of(self, level: int) -> list[nn.Module]:
        """Return the couplings of a level, and the channel mixing between them."""
        return [*self.encoder[level], *self.decoder[level]]

    def _layers_of(self, level: int) -> Iterator[InvertibleLayer]:
        """Yield the layers of a level, and those between it and the next."""
        between = (self.splits, self.merges, self.downsamplings, self.upsamplings)
        yield from (*self.encoder[level], *self.decoder[level], self._joins[level])
        yield from (layers[level] for layers in between if level < len(layers))
        if level == 0:
            yield self._open
        if level == len(self.channels) - 1:
            yield from (self._bottom, self._bottom_up, self._turn)

    def forward(self, x: Tensor | list[Tensor], crop: bool = True) -> Tensor:
        """Apply the network.

        Args:
            x: `(batch, channels[0], *spatial)`, floating point; or a list of this alone, which is emptied, so that the
                memory is free once the first couplings have replaced it.
            crop: whether the output has the size of `x`. If the size does not divide, the cropped output has no
                inverse; pass False for the padded one, which `inverse(y, spatial_size=x.shape[2:])` takes back to `x`.

        Returns:
            A tensor like `x`, or of the padded size.
        """
        return self._forward_in_one(x, crop)[0]

    def forward_levels(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        """Apply the network and show what the decoder has at each level, for deep supervision.

        Args:
            x: `(batch, channels[0], *spatial)`, floating point; or a list of this alone, see `forward`.

        Returns:
            `len(strides)` tensors (at least one), finest first: the output of `forward`, then for each coarser level of
            the decoder, without the coarsest of all, `(batch, channels[level], *spatial)` at its resolution. If the
            size of `x` does not divide, these belong to the padded image.
        """
        return self._forward_in_one(x, True, True)

    def inverse(self, y: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        """Apply the inverse of the network.

        A dropout that is active draws other masks than it did in `forward`: call `eval()` to have the inverse of that.

        Args:
            y: `(batch, channels[0], *spatial)`, of a size that divides by `factors`.
            spatial_size: size of the image before it was padded, if it was; the result is cropped to it.

        Returns:
            A tensor like `y`, or of the size `spatial_size`.

        Raises:
            ValueError: when the size of `y` does not divide, or is not that to which `spatial_size` is padded.
        """
        self.design.check_images(y, "y", self.channels[0])
        self.design.check_divides(y.shape[2:], "inverse", "Pass the output of forward(x, crop=False).")
        with self._walk(y.device) as checked:
            codes = self._decode_inverse(self._enter(y))
            codes.append(self._turn.inverse(*codes.pop()))
            x = self._encode_inverse(codes)
        x = checked(self._leave(x, y))
        return x if spatial_size is None else crop(x, list(spatial_size), list(self.factors))

    def encode(self, x: Tensor) -> Tensors:
        """Return the codes of images: the channels that skip at each level, finest first, and all of the coarsest.

        Args:
            x: `(batch, channels[0], *spatial)`; padded if the size does not divide.

        Returns:
            A tensor per level, `(batch, channels[i] - channels[i + 1] / prod(strides[i]), *spatial)` at its resolution;
            of the coarsest `(batch, channels[-1], *spatial)`.
        """
        self.design.check_images(x, "x", self.channels[0])
        with self._walk(x.device) as checked:
            *skips, state = self._encode([self._pad(x)])
            codes = *map(given_to_user, skips), *self._bottom(*state, keep=True)
        return tuple(checked(self._leave(code, x)) for code in codes)

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Return the images of codes as `encode` returns them, by the decoder: `(batch, channels[0], *spatial)`."""
        self.design.check_codes(codes)
        with self._walk(codes[0].device) as checked:
            *skips, deepest = map(self._enter, codes)
            y = self._decode([*skips, self._bottom_up(deepest)])
        return checked(self._leave(y, codes[0]))

    def encode_inverse(self, codes: Sequence[Tensor]) -> Tensor:
        """Return the image with these codes: the inverse of `encode`."""
        self.design.check_codes(codes)
        with self._walk(codes[0].device) as checked:
            *skips, deepest = map(self._enter, codes)
            x = self._encode_inverse([*skips, self._bottom.inverse(deepest)])
        return checked(self._leave(x, codes[0]))

    def decode_inverse(self, y: Tensor) -> Tensors:
        """Return the codes that the decoder takes to this image: the inverse of `decode`."""
        self.design.check_images(y, "y", self.channels[0])
        self.design.check_divides(y.shape[2:], "decode_inverse", "Pass what `decode` returned.")
        with self._walk(y.device) as checked:
            *skips, state = self._decode_inverse(self._enter(y))
            codes = *map(given_to_user, skips), *self._bottom_up.inverse(*state, keep=True)
        return tuple(checked(self._leave(code, y)) for code in codes)

    def _forward(self, images: list[Tensor], crop: bool, levels: bool) -> list[Tensor]:
        x = images.pop()
        # Has the shape, the type and the metadata of the images, which nobody else may hold from here on.
        like = x if torch.jit.is_tracing() else with_metadata(without_metadata(x).new_empty(1).expand(x.shape), x)
        private = not levels and self._is_private(x)
        with self._walk(x.device) as checked:
            images.append(self._pad(x))
            del x
            codes = self._encode(images, private)
            codes.append(self._turn(*codes.pop()))
            tapped: list[Tensor] | None = [] if levels else None
            y = self._decode(codes, tapped, private, like.dtype)
        y = checked(self._leave(y, like, rounded=True))
        return [
            crop_like(y, like, list(self.factors)) if crop else y,
            *(checked(self._leave(level, like, rounded=True)) for level in reversed(tapped or [])),
        ]

    _forward_uncompiled = torch.compiler.disable(_forward)

    def _forward_in_one(self, x: Tensor | list[Tensor], crop: bool, levels: bool = False) -> list[Tensor]:
        """Apply the forward pass, kept from `torch.compile` if there is a backward pass, which may rebuild activations.

        It would break its graph at every layer and compile each piece again; better one break around the whole.
        """
        images = x if isinstance(x, list) else [x]
        if len(images) != 1:
            raise ValueError(f"x must be a tensor, or a list of it alone, got a list of {len(images)}.")
        del x
        self.design.check_images(images[0], "x", self.channels[0])
        self.design.check_number(images[0].shape, max(self.design.halves(0)), "Half a state")
        self._fit(images[0])
        if torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling() and not is_exporting():
            return self._forward_uncompiled(images, crop, levels)
        return self._forward(images, crop, levels)

    # The four walks below hand states over in lists that are emptied on the way, so that no caller's variable keeps a
    # state alive that the next layer has replaced.

    def _encode(self, images: list[Tensor], private: bool = False) -> list[Any]:
        """Return the skipped channels per level, then the halves of the coarsest level.

        Args:
            images: a list of these alone, which is emptied.
            private: whether nobody else can hold states, see `_is_private`.
        """
        overwrite = private and not torch.is_grad_enabled()
        state = [*map(self._enter, self._open(images.pop()))]
        codes: list[Any] = []
        for level, layers in enumerate(self.encoder):
            for layer in layers:
                state = _after(layer, state, overwrite)
            if level < len(self.splits):
                skipped, *state = _after(self.splits[level], state, overwrite)
                codes.append(skipped)
                del skipped
                state = [*self.downsamplings[level](*state)]
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

    def _decode(
        self,
        codes: list[Any],
        tapped: list[Tensor] | None = None,
        private: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the output of the decoder.

        Args:
            codes: what `_encode` returns, emptied.
            tapped: gets what the decoder has at each level.
            private: whether nobody else can hold states, see `_is_private`.
            dtype: to which the output will be rounded, if known.
        """
        overwrite = private and not torch.is_grad_enabled()
        state = [*codes.pop()]
        # If rounded, no whole is made in the type of the states, and the backward pass starts from the halves. Not if
        # `exact`: 16 bits would be taken for the integers of a stream.
        if not private or self.exact or dtype not in (torch.float16, torch.bfloat16):
            dtype = None
        for level in reversed(range(len(self.decoder))):
            if level < len(self.merges):
                state = [codes.pop(), *self.upsamplings[level].inverse(*state)]
                state = _after(self.merges[level], state, overwrite, inverse=True)
            *layers, last = self.decoder[level]
            for layer in layers:
                state = _after(layer, state, overwrite)
            if dtype is not None and level == 0 and not overwrite:
                state = [*last(*state, keep=True, private=True)]
            else:
                state = _after(last, state, overwrite)
            if tapped is not None and 0 < level < len(self.merges):
                tapped.append(self._joins[level](*state)[0])
        return self._joins[0](*state, keep=True)[0] if dtype is None else join_rounded(state, dtype)

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
        """Convert a part of images to the type in which sums can be taken back, and to the grid if `exact`."""
        x = without_metadata(x)
        autocast = autocast_type(x.device)
        if self.exact and autocast in (torch.float16, torch.bfloat16) and self._may_use_integers(x):
            return enter(x, autocast)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.exact:
            return round_to_grid(x)
        if torch.is_grad_enabled() or needs_plain_operators(x) or not is_view(x):
            return x
        return x.clone()  # in inference a half must not keep the whole alive, of which it is a view

    def _leave(self, y: Tensor, x: Tensor, rounded: bool = False) -> Tensor:
        """Return an output with the type and metadata of the input; under autocast in float32, unless rounded."""
        if self.exact and is_integer(y):
            y = values(y, x.dtype if rounded else torch.float32)
        elif rounded or autocast_type(x.device) is None:
            y = y.to(x.dtype)
        return with_metadata(y, x)

    def _may_use_integers(self, x: Tensor) -> bool:
        """Return whether nobody looks at what is between the layers, nor needs more digits."""
        return x.dtype != torch.float64 and self._is_unwatched(x)

    def _is_unwatched(self, x: Tensor) -> bool:
        """Return whether nobody looks at what is between the layers.

        A layer of one's own, which may have come since `exact` was set, looks at it, too, and so does a compiled one.
        """
        modules = list(self.modules())  # the walk takes time
        layers = [module for module in modules if isinstance(module, InvertibleLayer)]
        return (
            all(isinstance(layer, ON_THE_GRID) for layer in layers)
            and not needs_plain_operators(x, *(self.parameters() if is_in_forward_mode() else ()))
            and not any(has_hooks(layer) or "forward" in vars(layer) for layer in layers)
            and not any(isinstance(compiled_part(module), InvertibleLayer) for module in modules)
        )

    def _is_private(self, x: Tensor) -> bool:
        """Return whether nobody else can hold states: in inference they may then be written over by the next ones.

        A branch of one's own, a layer of one's own in a branch, or a hook there may keep what goes into it.
        """
        modules = list(self.modules())[1:]
        layers = [module for module in modules if isinstance(module, InvertibleLayer)]
        return (
            self._is_unwatched(x)
            and all(type(layer) in OVERWRITING for layer in layers)
            and all(type(layer.branch) is Branch for layer in layers if isinstance(layer, AdditiveCoupling))
            and not (has_hooks(self) or "forward" in vars(self) or any(map(runs_foreign_code, modules)))
        )

    @contextmanager
    def _walk(self, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
        """Surround a walk through the layers, except in an export.

        What autocast casts is not kept, and values that leave the range of the grid raise an error. Outputs have to go
        through what this yields, see `check_range`.
        """
        if torch.compiler.is_compiling():
            yield _unchanged
        else:
            with without_cast_copies(device), check_range() if self.exact else nullcontext(_unchanged) as checked:
                yield checked

    def __prepare_scriptable__(self) -> nn.Module:
        return Traced(self, self.channels[0], self.factors)

    def layout(self) -> str:
        """Return a picture in text: a row per level, a number of channels per coupling, each split as (skip/down).

        Example:
            >>> IUNet(spatial_dims=1, channels=(4, 4), couplings=2).print_layout()
            4-4-(2/2)----(2/2)-4-4
            -------4-4--4-4-------
        """
        return self.design.layout()

    def print_layout(self) -> None:
        """Print `layout()`."""
        print(self.layout())  # noqa: T201 - the method exists to print

    def _pad(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "The ONNX exporter that traces cannot write conditions on the size of images. Pass dynamo=True to "
                "torch.onnx.export, its default from PyTorch 2.9 on; to MONAI's onnx_export in converter_kwargs."
            )
        return pad(without_metadata(x), list(self.factors), self.padding_mode)


def _after(layer: InvertibleLayer, state: list[Tensor], overwrite: bool, inverse: bool = False) -> list[Tensor]:
    """Return the state after a layer, or its inverse, whose memory is that of the state before if asked for."""
    if overwrite:
        return [*layer.replace(state, inverse)]
    return [*(layer.inverse(*state) if inverse else layer(*state))]


def _unchanged(output: Tensor) -> Tensor:
    return output


def _branches(
    branch: Any,
    spatial_dims: int,
    convs_per_coupling: int,
    kernel_size: int | Sequence[int],
    act: Any,
    norm: Any,
    dropout: Any,
) -> MakeBranch:
    """Return what makes the branches that the arguments describe."""
    name, options = (branch, {}) if isinstance(branch, str) else branch
    if not is_positive_int(convs_per_coupling):
        raise ValueError(f"convs_per_coupling must be a positive int, got {convs_per_coupling!r}.")
    if isinstance(dropout, bool) and dropout:  # which would count as a rate of 1, where nothing is left
        raise ValueError(f"dropout must be a rate such as 0.1, or a kind with options, got {dropout!r}.")
    kernel = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size,) * spatial_dims
    if len(kernel) != spatial_dims or not all(is_positive_int(extent) and extent % 2 for extent in kernel):
        raise ValueError(f"kernel_size must be odd, an int or {spatial_dims} of them, got {kernel_size!r}.")

    def make_branch(dims: int, in_channels: int, out_channels: int, stage: str, level: int, index: int) -> nn.Module:
        layers = (kernel, act, norm, dropout)
        return named_branch(name, dims, in_channels, out_channels, convs_per_coupling, *layers, **options)

    return make_branch
