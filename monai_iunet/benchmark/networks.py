"""Segmentation networks of about the cost of nnU-Net's default, and what PyTorch offers to save memory in any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from monai_iunet.benchmark.section import SkippedError
from monai_iunet.engine.pytorch_private import saving_a_part_of_activations
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["BUDGET", "EQUAL_COST", "CompiledWithBudget", "MakeNetwork", "SavedOnCPU", "saved_on_cpu"]

MakeNetwork = Callable[[], nn.Module]
BUDGET = 0.5  # of what a compiled network would save, the part that it may


def _checkpoint_unet(*args: Any, **kwargs: Any) -> nn.Module:
    try:
        from monai.networks.nets.unet import CheckpointUNet
    except ImportError as error:
        raise SkippedError("CheckpointUNet needs MONAI 1.6 or newer") from error
    return CheckpointUNet(*args, **kwargs)


# By multiply-accumulates per voxel and forward pass.
EQUAL_COST: dict[str, MakeNetwork] = {
    "SegIUNet": lambda: SegIUNet(3, 1, 2, (24, 112, 416, 512), couplings=3),
    "DynUNet": lambda: DynUNet(3, 1, 2, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=(32, 64, 128, 256, 320)),
    "SegIUNet, exact": lambda: SegIUNet(3, 1, 2, (24, 112, 416, 512), couplings=3, exact=True),
    "SegResNet": lambda: SegResNet(3, 28, 1, 2, norm=("GROUP", {"num_groups": 4})),
    "UNet": lambda: UNet(3, 1, 2, (100, 200, 400, 800), (2, 2, 2), num_res_units=2),
    "CheckpointUNet": lambda: _checkpoint_unet(3, 1, 2, (100, 200, 400, 800), (2, 2, 2), num_res_units=2),
}


class SavedOnCPU(nn.Module):
    """A network whose saved activations wait in the memory of the host, by `torch.autograd.graph.save_on_cpu`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=True):
            return self.net(x)


def saved_on_cpu(name: str, device: torch.device) -> nn.Module:
    """Return a network of `EQUAL_COST` as `SavedOnCPU`; on a CPU there is nothing to move."""
    if device.type != "cuda":
        raise SkippedError("save_on_cpu moves nothing where the network is on the CPU")
    return SavedOnCPU(EQUAL_COST[name]())


class CompiledWithBudget(nn.Module):
    """A network compiled whole, which saves a part of its activations and evaluates the others again."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._compiled = torch.compile(net)

    def forward(self, x: Tensor) -> Tensor:
        with saving_a_part_of_activations(BUDGET):
            return self._compiled(x)
