"""Invertible U-Nets in nnU-Net v2: the class that its plans name, and the plans.

nnU-Net builds the class that a configuration names under `architecture` with `input_channels`, `num_classes` and the
configuration's `arch_kwargs`, sets `network.decoder.deep_supervision`, and expects a list of logits, finest first, one
per stage but the last, where that is on. Its `strides` begin with that of the first stage, which is 1.

Source: nnU-Net v2.8 (Isensee et al., Nature Methods 18, 2021), `get_network_from_plans.py` and `nnUNetTrainer.py`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DynUNet
from torch import nn

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.networks.nets.architecture import reachable_channels
from monai_iunet.networks.nets.seg_iunet import SegIUNet
from monai_iunet.planning.budget import largest_patch
from monai_iunet.planning.plan import plan_training

__all__ = ["PlannedIUNet", "add_configurations"]

logger = logging.getLogger(__name__)

NETWORK = "monai_iunet.PlannedIUNet"
SEG_LAYERS = "decoder.seg_layers"
DTYPE = torch.bfloat16  # 16-bit autocast, as nnU-Net trains on a GPU; on a CPU PyTorch has no other for convolutions


class PlannedIUNet(SegIUNet):
    """Builds a `SegIUNet` as nnU-Net's plans name it: `monai_iunet.PlannedIUNet`.

    Args:
        input_channels: channels of the images.
        num_classes: classes, background included.
        strides: per stage, one number per axis; those of the first stage are 1.
        deep_supervision: whether logits of the coarser stages are returned too; nnU-Net may set it later.
        arguments: further ones of `SegIUNet`, such as `channels` and `couplings`.

    Raises:
        ValueError: for strides that do not begin with 1.

    Example:
        >>> net = PlannedIUNet(1, 3, strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]], channels=[8, 16, 32])
        >>> net.decoder.deep_supervision = True
        >>> [tuple(logits.shape[2:]) for logits in net(torch.zeros(1, 1, 8, 8, 8))]
        [(8, 8, 8), (4, 4, 4)]
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
        **arguments: Any,
    ) -> None:
        if len(strides) < 2 or any(factor != 1 for factor in strides[0]):
            raise ValueError(f"strides must be one per stage, at least two, and begin with that of 1, got {strides}.")
        super().__init__(
            len(strides[0]), input_channels, num_classes, strides=strides[1:], deep_supervision=True, **arguments
        )
        self.deep_supervision = deep_supervision
        names = {"head.": f"{SEG_LAYERS}.0."}
        names |= {f"deep_heads.{number}.": f"{SEG_LAYERS}.{number + 1}." for number in range(len(self.deep_heads))}
        self._names = names
        self.register_state_dict_post_hook(_to_names_of_nnunet)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_names_of_nnunet)  # type: ignore[no-untyped-call]

    @property
    def decoder(self) -> PlannedIUNet:
        """The network itself: nnU-Net switches deep supervision at `network.decoder.deep_supervision`."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return logits, with deep supervision a list, finest first, in evaluation too: nnU-Net validates with it."""
        if self.training or not self.deep_supervision:
            return super().forward(x)
        self.iunet.design.check_images(x, "x", self.stem.in_channels)
        levels = self.iunet.forward_levels(self.stem(x))
        return [head(level) for head, level in zip((self.head, *self.deep_heads), levels)]


def _to_names_of_nnunet(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state_dict, prefix, module._names)


def _from_names_of_nnunet(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, prefix, {theirs: ours for ours, theirs in module._names.items()})


def _rename(state_dict: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    """Replace the beginnings of names in a state."""
    for name in list(state_dict):
        for old, new in names.items():
            if name.startswith(prefix + old):
                state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)


def add_configurations(plans_file: str | Path, configuration: str = "3d_fullres", couplings: int = 2) -> list[str]:
    """Add two configurations to a plans file of nnU-Net, which use the data that are preprocessed for another one.

    `CONFIGURATION_iunet` has nnU-Net's patch and batch; `CONFIGURATION_iunet_large` the largest patch of the same
    proportions, no larger than the median image, whose training step fits the memory that nnU-Net's own network takes.
    Where the patch cannot grow, as nnU-Net's is the median image already, it has twice the couplings instead, if those
    fit.

    Args:
        plans_file: such as `nnUNetPlans.json`; what is in it stays. The `dataset.json` that nnU-Net puts beside it says
            how many classes there are, whose logits take memory too.
        configuration: whose patch, batch and strides are taken.
        couplings: per level; with a patch that cannot grow, the larger configuration has twice as many.

    Returns:
        The names of the two.

    Raises:
        InputError: when the file is not one of plans or has no such configuration, or it is the second stage of a
            cascade, whose first stage is another network.

    Example:
        >>> add_configurations("nnUNetPlans.json")  # doctest: +SKIP
        ['3d_fullres_iunet', '3d_fullres_iunet_large']
    """
    path = Path(plans_file)
    described = path.with_name("dataset.json")
    classes = _count_classes(described) if described.is_file() else 2
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
        settings = _resolved(plans["configurations"], configuration)
        arguments, patch, batch = (
            settings["architecture"]["arch_kwargs"],
            settings["patch_size"],
            settings["batch_size"],
        )
        strides, features = arguments["strides"], arguments["features_per_stage"]
        channels = max(1, len(plans.get("foreground_intensity_properties_per_channel", {})))
        architecture = _architecture(strides, features, couplings)
        network = PlannedIUNet(channels, classes, **architecture["arch_kwargs"])
        own = _own_network(strides, features, arguments["kernel_sizes"], channels, classes)
        median = settings.get("median_image_size_in_voxels", patch)
        _check_sizes(patch, median, batch, network.iunet.factors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: no plans of nnU-Net v2 with a configuration {configuration} ({error!r}). Run nnU-Net's planning."
        ) from error
    if settings.get("previous_stage"):
        raise InputError(
            f"{path}: {configuration} is the second stage of a cascade and reads what {settings['previous_stage']} "
            "predicts, which is not linked to an invertible network. Name another configuration, such as 3d_fullres."
        )
    options: dict[str, Any] = {
        "batch_size": batch,
        "dtype": DTYPE,
        "optimizer": torch.optim.SGD,
        "in_channels": channels,
    }
    if not described.is_file():
        logger.warning("%s: not there, so memory is planned for two classes. Put it beside the plans.", described)
    budget = plan_training(own, patch, **options).training_peak
    factors = network.iunet.factors
    limit = [max(small, factor * math.ceil(size / factor)) for small, size, factor in zip(patch, median, factors)]
    try:
        large = list(largest_patch(network.train(), budget, patch, factors, patch, limit, **options).spatial_size)
    except ValueError as error:
        raise InputError(f"{path}: the invertible network does not fit where nnU-Net's does. {error}") from error
    names = [f"{configuration}_iunet", f"{configuration}_iunet_large"]
    plain: dict[str, Any] = {"inherits_from": configuration, "architecture": architecture}
    if settings.get("next_stage"):
        plain["next_stage"] = None  # not the first stage of a cascade either
    larger = {**copy.deepcopy(plain), "patch_size": large}
    if large == list(patch):
        deeper = _architecture(strides, features, 2 * couplings)
        deep = PlannedIUNet(channels, classes, **deeper["arch_kwargs"]).train()
        if plan_training(deep, patch, **options).training_peak <= budget:
            larger["architecture"] = deeper
    plans["configurations"].update({names[0]: plain, names[1]: larger})
    write_text(path, json.dumps(plans, indent=4) + "\n")
    return names


def _count_classes(path: Path) -> int:
    """Return how many logits a voxel has: one per label, or per region where there are any, but none to be ignored."""
    try:
        labels = dict(json.loads(path.read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: has no labels as nnU-Net v2 writes them ({error!r}). Copy it again.") from error
    labels.pop("ignore", None)
    has_regions = any(isinstance(label, list) and len(label) > 1 for label in labels.values())
    return max(1, len(labels) - has_regions)  # of regions none is the background


def _check_sizes(patch: Any, median: Any, batch: Any, factors: Sequence[int]) -> None:
    """Raise a `ValueError` for a patch, a median image or a batch that no network can be planned for."""
    for name, sizes in (("patch_size", patch), ("median_image_size_in_voxels", median)):
        if len(sizes) != len(factors) or not all(1 <= size < math.inf for size in sizes):
            raise ValueError(f"{name} must be {len(factors)} positive numbers, got {sizes}")
    if any(type(size) is not int or size % factor for size, factor in zip(patch, factors)):
        raise ValueError(f"patch_size must be multiples of {list(factors)}, got {patch}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch!r}")


def _resolved(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits."""
    own = configurations[name]
    parent = own.get("inherits_from")
    return {**_resolved(configurations, parent), **own} if parent else own


def _architecture(strides: Sequence[Sequence[int]], features: Sequence[int], couplings: int) -> dict[str, Any]:
    """Return what the plans say of our network: as many channels as nnU-Net's, as far as they can be reached."""
    channels = list(reachable_channels(features, strides[1:]))
    arguments = {"strides": strides, "channels": channels, "couplings": couplings, "kernel_size": 3}
    return {"network_class_name": NETWORK, "arch_kwargs": arguments, "_kw_requires_import": []}


def _own_network(strides: Any, features: Any, kernels: Any, channels: int, classes: int) -> nn.Module:
    """Return nnU-Net's plain network, built of MONAI's."""
    return DynUNet(
        len(strides[0]), channels, classes, kernels, strides, strides[1:], filters=features, deep_supervision=False
    )
