"""Segmentation network: an invertible U-Net between two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from monai_iunet.networks.layers.metadata import with_metadata, without_metadata
from monai_iunet.networks.layers.slab_convolution import convolve
from monai_iunet.networks.layers.small_convolution import right_gradients
from monai_iunet.networks.nets.activations import ChosenActivations
from monai_iunet.networks.nets.architecture import is_positive_int
from monai_iunet.networks.nets.iunet import IUNet, MakeBranch
from monai_iunet.networks.nets.scripting import Traced

__all__ = ["SegIUNet"]


class SegIUNet(ChosenActivations):
    """Segments images: a convolution to `channels[0]`, an `IUNet`, a 1x1 convolution to the classes.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes, background included.
        channels: channels per level of the `IUNet`. This and the arguments that follow are those of `IUNet`.
        strides: see `IUNet`, as is every argument that follows.
        couplings: couplings per level.
        convs_per_coupling: convolutions in each coupling branch.
        kernel_size: of the branches' and the stem's convolutions.
        act: activation of the branches.
        norm: normalization of the branches.
        dropout: dropout of the branches.
        channel_mixing: where channels are mixed.
        orthogonal_map: parametrization of the orthogonal matrices.
        resampling_init: where the resampling starts.
        learnable_resampling: whether the resampling is trained.
        padding_mode: how images are padded whose size does not divide.
        activations: "invert", "convolutions" or "store", one of them per level, or "auto".
        memory_budget: for "auto".
        exact: whether activations are rebuilt to the last bit.
        branch: kind of the coupling branches, "conv", "residual" or "mednext".
        make_branch: coupling branches of one's own.
        deep_supervision: in training, return logits for each level of the decoder too, as a list, finest first, of
            `len(strides)` entries (see `IUNet.forward_levels`); in evaluation the finest alone.

    Raises:
        ValueError: for arguments that describe no network, and for inputs of the wrong shape or type.

    Example:
        >>> import torch
        >>> net = SegIUNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16), couplings=1)
        >>> net(torch.rand(2, 1, 16, 16, 15)).shape
        torch.Size([2, 3, 16, 16, 15])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
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
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if not is_positive_int(in_channels) or not is_positive_int(out_channels):
            raise ValueError(f"in_channels and out_channels must be positive, got {in_channels} and {out_channels}.")
        if not isinstance(
            deep_supervision, bool
        ):  # a config may well bring the text "false", which would count as true
            raise ValueError(f"deep_supervision must be True or False, got {deep_supervision!r}.")
        self.iunet = IUNet(
            spatial_dims,
            channels,
            strides=strides,
            couplings=couplings,
            convs_per_coupling=convs_per_coupling,
            kernel_size=kernel_size,
            act=act,
            norm=norm,
            dropout=dropout,
            channel_mixing=channel_mixing,
            orthogonal_map=orthogonal_map,
            resampling_init=resampling_init,
            learnable_resampling=learnable_resampling,
            padding_mode=padding_mode,
            exact=exact,
            branch=branch,
            make_branch=make_branch,
        )
        convolution = Conv[Conv.CONV, spatial_dims]
        self.stem = convolution(in_channels, self.iunet.channels[0], kernel_size, padding="same")
        self.head = convolution(self.iunet.channels[0], out_channels, 1)
        self.deep_supervision = deep_supervision
        coarser = self.iunet.channels[1:-1] if deep_supervision else ()
        self.deep_heads = nn.ModuleList(convolution(width, out_channels, 1) for width in coarser)
        self.memory_budget = memory_budget
        self.activations = activations

    @property
    def levels(self) -> int:
        """Number of levels."""
        return self.iunet.levels

    def set_levels(self, choice: Sequence[str]) -> None:
        """Let each level "invert", keep "convolutions", or "store"."""
        self.iunet.activations = choice

    def couplings_of(self, level: int) -> list[nn.Module]:
        """Return the couplings of a level of the `IUNet`."""
        return self.iunet.couplings_of(level)

    @property
    def exact(self) -> bool:
        """See `IUNet.exact`."""
        return self.iunet.exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self.iunet.exact = value

    @property
    def in_channels(self) -> int | None:
        """Channels of the image; None where what was put in the place of the stem does not say so."""
        return getattr(self.stem, "in_channels", None)

    def __prepare_scriptable__(self) -> nn.Module:
        return Traced(self, self.in_channels, self.iunet.factors)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits `(batch, out_channels, *spatial)` of images `(batch, in_channels, *spatial)`.

        With `deep_supervision`, in training, a list of them, finest first.
        """
        self.iunet.design.check_images(x, "x", self.in_channels)
        most = max(self.iunet.channels[0], getattr(self.head, "out_channels", 0))  # a head of one's own need not say
        self.iunet.design.check_number(x.shape, most, "Features or logits")
        self._fit(x)
        image, x = x, without_metadata(x)
        with right_gradients(x):
            features: Any = convolve(x, self.stem)
        if not torch.is_grad_enabled():
            # In a list, from which the network takes them, so that nobody else holds them; a checkpoint asks again.
            features = [features]
        if not (self.deep_supervision and self.training):
            return with_metadata(convolve(self.iunet(features), self.head), image)
        levels = self.iunet.forward_levels(features)
        return [
            with_metadata(convolve(level, head), image) for head, level in zip((self.head, *self.deep_heads), levels)
        ]
