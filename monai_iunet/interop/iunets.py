"""The class of the package `iunets` on our engine: its arguments, its layout, its checkpoints.

There are two versions of it. The released one, 0.1, is given the channels that go in, `in_channels`; the head of the
repository, never released, the channels of each level, `channels`, and has another default block.

What is the same, so that outputs agree to rounding: couplings, splits, resampling, channel mixing and where it stands,
padding, and the blocks. What is right here and not there: gradients of the orthogonal matrices, `"householder"`, images
whose size does not divide (`forward(x, crop=False)` has an inverse), 16-bit types, and memory that does not grow with
depth.

Source: the package `iunets`, version 0.1, and the head of https://github.com/cetmann/iunets; Etmann, Ke, Schönlieb 2020
(arXiv 2005.05220).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_iunet.interop.iunets_blocks import HeadBlock, StandardBlock
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix
from monai_iunet.networks.nets.iunet import IUNet, MakeBranch

__all__ = ["iUNet", "load_iunets_state_dict"]

ORTHOGONAL_MAPS = {"exp": "matrix_exp", "cayley": "cayley", "householder": "householder"}
SAME_AS_IDENTITY = ("pixel_shuffle", "squeeze", "zeros")


class iUNet(IUNet):  # noqa: N801 - the name that is replaced
    """Builds an `IUNet` by arguments of the package `iunets`, of its release 0.1 and of the head of its repository.

    Args:
        channels: an int, as in the release: channels of the images, from which `slice_mode` makes those of the levels;
            or a sequence, as in the head: channels wanted at each level.
        architecture: couplings per level.
        dim: 1, 2 or 3.
        create_module_fn: `create_module_fn(in_channels, dim=, LR=, level=, module_index=, architecture=,
            **module_kwargs)` returns an invertible layer with `forward` and `inverse`; None for additive couplings.
            With `channels` per level it is given `branch="encoder"` or `"decoder"`, not `LR="L"` or `"R"`.
        module_kwargs: further arguments of it; for the default those of `StandardBlock`, whose `block_depth` may be
            called `depth`, or, with `channels` per level, of `HeadBlock`.
        slice_mode: "double", the default, or "constant": what downsampling makes of the number of channels; not with
            `channels` per level.
        learnable_resampling: whether resampling is trained.
        resampling_stride: an int, a tuple with one per axis, or a list of either with one per downsampling.
        resampling_method: "cayley", "exp" or "householder".
        resampling_init: "haar", "pixel_shuffle", "random" or an orthogonal matrix.
        resampling_kwargs: only None or an empty dictionary.
        learnable_channel_mixing: whether channel mixing is trained.
        channel_mixing_freq: -1 for one at the end of each level of the encoder and after the first coupling of each of
            the decoder; n for one after every n-th coupling; 0 for none.
        channel_mixing_method: as `resampling_method`.
        channel_mixing_kwargs: only None or an empty dictionary.
        padding_mode: as in `torch.nn.functional.pad`; None to refuse sizes that do not divide.
        padding_value: of images whose size does not divide, with `padding_mode="constant"`.
        revert_input_padding: whether the output has the size of the input.
        disable_custom_gradient: whether activations are stored.
        verbose: of no effect.
        in_channels: in place of `channels`: channels of the images, or their shape without the batch.

    Raises:
        ValueError: for arguments that describe no network.

    Warns:
        UserWarning: when the channels wanted at a level cannot be reached; the nearest are built, those of the head.

    Example:
        >>> net = iUNet(in_channels=4, architecture=(2, 2), dim=2)
        >>> net(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
        >>> iUNet(channels=(4, 12, 20), architecture=(1, 1, 1), dim=2).print_layout()
        4-(1/3)---------------(1/3)-4
        ----12-(7/5)----(7/5)-12-----
        -----------20--20------------
    """

    def __init__(
        self,
        channels: int | Sequence[int] | None = None,
        architecture: Sequence[int] = (),
        dim: int = 0,
        create_module_fn: Callable[..., nn.Module] | None = None,
        module_kwargs: Mapping[str, Any] | None = None,
        slice_mode: str | None = None,
        learnable_resampling: bool = True,
        resampling_stride: Any = 2,
        resampling_method: str = "cayley",
        resampling_init: Any = "haar",
        resampling_kwargs: Mapping[str, Any] | None = None,
        learnable_channel_mixing: bool = True,
        channel_mixing_freq: int = -1,
        channel_mixing_method: str = "cayley",
        channel_mixing_kwargs: Mapping[str, Any] | None = None,
        padding_mode: str | None = "constant",
        padding_value: float = 0,
        revert_input_padding: bool = True,
        disable_custom_gradient: bool = False,
        verbose: int = 1,
        in_channels: int | Sequence[int] | None = None,
    ) -> None:
        if (channels is None) == (in_channels is None):
            raise ValueError("Give either channels, per level, or in_channels, and not both.")
        if not architecture or dim not in (1, 2, 3):
            raise ValueError(f"architecture, couplings per level, and dim, 1 to 3, needed; got {architecture}, {dim}.")
        for name, method, extra in (
            ("resampling", resampling_method, resampling_kwargs),
            ("channel_mixing", channel_mixing_method, channel_mixing_kwargs),
        ):
            if method not in ORTHOGONAL_MAPS:
                raise ValueError(f"{name}_method must be one of {', '.join(ORTHOGONAL_MAPS)}, got {method!r}.")
            if extra:
                raise ValueError(f"{name}_kwargs must be empty, got {', '.join(extra)}, which has no counterpart here.")
        if padding_value != 0 and padding_mode != "constant":
            raise ValueError(f'padding_value needs padding_mode="constant", got {padding_mode!r}.')
        if channel_mixing_freq < -1:
            raise ValueError(f"channel_mixing_freq must be -1, 0 or positive, got {channel_mixing_freq!r}.")
        count = len(architecture) - 1
        strides = list(resampling_stride) if isinstance(resampling_stride, list) else [resampling_stride] * count
        strides = [(stride,) * dim if isinstance(stride, int) else tuple(stride) for stride in strides]
        per_level = not (channels is None or isinstance(channels, int))
        super().__init__(
            dim,
            _channels(in_channels if channels is None else channels, per_level, strides, slice_mode),
            strides=strides,
            couplings=tuple(architecture),
            channel_mixing=None,
            orthogonal_map=ORTHOGONAL_MAPS[resampling_method],
            resampling_init=_resampling_init(resampling_init, strides),
            learnable_resampling=learnable_resampling,
            padding_mode=padding_mode,
            make_branch=_branches(create_module_fn, per_level, architecture, dict(module_kwargs or {})),
        )
        self.architecture = tuple(architecture)
        self.revert_input_padding = revert_input_padding
        self.padding_value = padding_value
        self.dim, self.num_levels, self.verbose = dim, count + 1, verbose
        self.create_module_fn, self.module_kwargs = create_module_fn, dict(module_kwargs or {})
        self.disable_custom_gradient = disable_custom_gradient
        self.resampling_stride, self.downsampling_factors = strides, self.factors
        self.channel_multipliers = [math.prod(stride) for stride in strides]
        self.skipped_channels = list(self.design.skips)
        self.channels_before_downsampling = [
            total - skipped for total, skipped in zip(self.channels, self.skipped_channels)
        ]
        self.resampling_method, self.resampling_init = resampling_method, resampling_init
        self.resampling_kwargs = dict(resampling_kwargs or {})
        self.learnable_channel_mixing, self.channel_mixing_freq = learnable_channel_mixing, channel_mixing_freq
        self.channel_mixing_method = channel_mixing_method
        self.channel_mixing_kwargs = dict(channel_mixing_kwargs or {})
        for level, total in enumerate(self.channels):
            for stage in (self.encoder, self.decoder):
                mixed = _mixed(self.couplings[level], channel_mixing_freq, stage is self.decoder, level == count)
                _insert_mixing(stage[level], total, mixed, channel_mixing_method, learnable_channel_mixing)
        self.activations = "store" if disable_custom_gradient else "invert"

    def forward(self, x: Tensor | list[Tensor], crop: bool | None = None) -> Tensor:
        """Apply the network as `IUNet.forward` does; without `crop` as `revert_input_padding` says."""
        return super().forward(x, self.revert_input_padding if crop is None else crop)

    def encode(self, x: Tensor, use_padding: bool = False) -> tuple[Tensor, ...]:
        """Return the codes of an image; sizes that do not divide are padded if `use_padding` says so, else refused."""
        if not use_padding:
            self.design.check_divides(x.shape[2:], "encode", "Pass use_padding=True.")
        return super().encode(x)

    def decode(self, *codes: Any) -> Tensor:
        """Return the image of codes, given separately or together as a tuple."""
        return super().decode(codes[0] if len(codes) == 1 and not isinstance(codes[0], Tensor) else codes)

    def encoder_inverse(self, *codes: Tensor) -> Tensor:
        """Apply `encode_inverse` to codes that are given separately."""
        return self.encode_inverse(codes)

    def decoder_inverse(self, x: Tensor, use_padding: bool = False) -> tuple[Tensor, ...]:
        """Apply `decode_inverse`, to a padded image if `use_padding` says so."""
        return self.decode_inverse(self.pad(x) if use_padding else x)

    def get_padding(self, x: Tensor) -> tuple[list[int], list[int]]:
        """Return the padded size of an image, and the padding as `torch.nn.functional.pad` takes it."""
        missing = [-size % factor for size, factor in zip(x.shape[2:], self.factors)]
        sides = [side for extent in reversed(missing) for side in (extent // 2, extent - extent // 2)]
        return [size + extent for size, extent in zip(x.shape[2:], missing)], sides

    def pad(self, x: Tensor) -> Tensor:
        """Pad images whose size does not divide.

        Raises:
            ValueError: when `padding_mode` is None and the size does not divide.
        """
        return self._pad(x)

    def revert_padding(self, x: Tensor, padding: Sequence[int]) -> Tensor:
        """Undo a padding that `get_padding` returned."""
        for axis, (before, behind) in enumerate(zip(padding[::2], padding[1::2])):
            x = x.narrow(-1 - axis, before, x.shape[-1 - axis] - before - behind)
        return x

    def _pad(self, x: Tensor) -> Tensor:
        if self.padding_value == 0:
            return super()._pad(x)
        return super()._pad(x - self.padding_value) + self.padding_value  # zeros become the value


def load_iunets_state_dict(network: iUNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of a network of the package `iunets` into ours, built with the same arguments.

    Args:
        network: is changed; its orthogonal matrices become functions of the weights alone, as there.
        state_dict: what `state_dict()` of the other network returned; load a file of one with `weights_only=True`.

    Raises:
        ValueError: when names or shapes are not those of such a network, or one that uses Householder reflections,
            which were not orthogonal matrices there; nothing is changed then.

    Example:
        >>> net = iUNet(in_channels=4, architecture=(1,), dim=2)
        >>> load_iunets_state_dict(net, {})
        Traceback (most recent call last):
            ...
        ValueError: encoder_modules.0.0._fn.F.F.0.weight is missing, but (2, 2, 3, 3) is needed. Build the network ...
    """
    matrices = [module for module in network.modules() if isinstance(module, OrthogonalMatrix)]
    if any(matrix.orthogonal_map == "householder" for matrix in matrices):
        raise ValueError("Householder matrices of iunets cannot be taken over: they were one reflection each.")
    moves = _places(network)
    for tensor, name in moves:
        if name not in state_dict or state_dict[name].shape != tensor.shape:
            problem = f"has the shape {tuple(state_dict[name].shape)}" if name in state_dict else "is missing"
            raise ValueError(
                f"{name} {problem}, but {tuple(tensor.shape)} is needed. Build the network with the other's arguments."
            )
    # Blocks are listed there twice, as `seq` and as `F`.
    unused = {name for name in state_dict if ".F.seq." not in name} - {name for _, name in moves}
    if unused:
        raise ValueError(f"The network has no place for {sorted(unused)[0]} and {len(unused) - 1} others.")
    with torch.no_grad():
        for tensor, name in moves:
            tensor.copy_(state_dict[name])
        for matrix in matrices:
            if matrix.base is not None:
                matrix.base.copy_(torch.eye(matrix.base.shape[-1]).expand_as(matrix.base))
    network.train(network.training)


def _places(network: iUNet) -> list[tuple[Tensor, str]]:
    """Return the parameters and buffers of a network, each with its name in a state of the package."""
    places: list[tuple[Tensor, str]] = []
    for stage, levels in (("encoder_modules", network.encoder), ("decoder_modules", network.decoder)):
        for level, layers in enumerate(levels):
            for index, layer in enumerate(layers):
                prefix = f"{stage}.{level}.{index}._fn."
                if isinstance(layer, ChannelMixing):
                    places.append((layer.matrix.weight, f"{prefix}weight"))
                    continue
                branch = next(layer.children())
                inner = f"{prefix}F.F." if isinstance(branch, (StandardBlock, HeadBlock)) else prefix
                places += [(tensor, inner + name) for name, tensor in branch.state_dict(keep_vars=True).items()]
    for name, layers in (("downsampling_layers", network.downsamplings), ("upsampling_layers", network.upsamplings)):
        for level, layer in enumerate(layers):
            places.append((layer.matrix.weight, f"{name}.{level}._fn.weight"))
    return places


def _branches(
    create_module_fn: Callable[..., nn.Module] | None,
    per_level: bool,
    architecture: Sequence[int],
    arguments: dict[str, Any],
) -> MakeBranch:
    """Return what makes the branches: the default blocks of head or release, or the modules of the function."""
    if create_module_fn is None and not per_level and "depth" in arguments:
        arguments["block_depth"] = arguments.pop("depth")

    def make_branch(dims: int, inputs: int, outputs: int, stage: str, level: int, index: int) -> nn.Module:
        if create_module_fn is None:
            return (HeadBlock if per_level else StandardBlock)(dims, inputs, outputs, **arguments)
        side = {"branch": stage} if per_level else {"LR": {"encoder": "L", "decoder": "R"}[stage]}
        place = {**side, "level": level, "module_index": index}
        return create_module_fn(inputs + outputs, dim=dims, architecture=architecture, **place, **arguments)

    return make_branch


def _channels(given: Any, per_level: bool, strides: Sequence[Sequence[int]], slice_mode: str | None) -> list[int]:
    """Return the channels of the levels that the package would build."""
    if not per_level:
        return _sliced_channels(given if isinstance(given, int) else given[0], strides, slice_mode or "double")
    if slice_mode is not None:
        raise ValueError("slice_mode goes with in_channels; with channels per level leave it out.")
    if len(given) != len(strides) + 1:
        raise ValueError(f"channels must be one per level, {len(strides) + 1} as in architecture, got {given!r}.")
    built = _nearest_channels(given, strides)
    if min(built) < 1:
        raise ValueError(
            f"channels={tuple(given)}: no channels would be left at a level. Ask for more, or less stride."
        )
    if built != list(given):
        warnings.warn(
            f"channels={tuple(given)} cannot be reached with resampling_stride={strides}. Built instead, the nearest: "
            f"{tuple(built)}.",
            stacklevel=3,
        )
    return built


def _nearest_channels(wanted: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """Return the channels that the head of the repository builds; of two equally near ones, those that skip are even.

    The operations are in its order, because the last bit decides such cases.
    """
    built = [wanted[0]]
    for total, stride in zip(wanted[1:], strides):
        values = math.prod(stride)
        skipped = max(1, round(built[-1] * ((values - total / built[-1]) / values)))
        built.append(values * (built[-1] - skipped))
    return built


def _sliced_channels(first: int, strides: Sequence[Sequence[int]], slice_mode: str) -> list[int]:
    """Return the channels that the release builds."""
    if slice_mode not in ("double", "constant"):
        raise ValueError(f'slice_mode must be "double" or "constant", got {slice_mode!r}.')
    factor = {"double": 2, "constant": 1}[slice_mode]
    channels = [first]
    for stride in strides:
        values = math.prod(stride)
        skipped = max(1, channels[-1] * (values - factor) // values)
        channels.append(values * (channels[-1] - skipped))
    return channels


def _mixed(couplings: int, freq: int, decoder: bool, last: bool) -> set[int]:
    """Return after which couplings of a level channels are mixed."""
    if freq >= 0:
        return set(range(freq - 1, couplings, freq)) if freq else set()
    return set() if last else {0} if decoder else {couplings - 1}


def _insert_mixing(layers: nn.ModuleList, total: int, after: Iterable[int], method: str, learnable: bool) -> None:
    small, large = total // 2, total - total // 2
    for index in sorted(after, reverse=True):
        halves = (small, large) if index % 2 else (large, small)
        mixing = ChannelMixing(halves, halves, ORTHOGONAL_MAPS[method])
        mixing.matrix.weight.requires_grad_(learnable)
        layers.insert(index + 1, mixing)


def _resampling_init(init: Any, strides: Sequence[Sequence[int]]) -> Any:
    """Return where the resampling starts: at the identity, as in the package, where a stride has no Haar matrix."""
    if not isinstance(init, str):
        return init
    no_haar = init == "haar" and any(factor not in (1, 2, 4) for stride in strides for factor in stride)
    return "pixel_shuffle" if no_haar or init in SAME_AS_IDENTITY else init
