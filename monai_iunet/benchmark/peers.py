"""Our network in its variants, and other packages that save memory by inversion, each in a U-Net as much like ours as
it allows.

`iunets` builds its own U-Net, here around our branches. `memcnn` and `revlib` have couplings only; they run in our
network, whose resampling and mixing is left to plain autograd.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_iunet.networks.blocks.branch import named_branch
from monai_iunet.networks.nets.iunet import IUNet

__all__ = ["CONTESTANTS", "INSTALL", "PEERS", "available_peers"]

PEERS = ("iunets", "memcnn", "revlib")
INSTALL = "pip install --no-deps iunets memcnn revlib"

MakeNetwork = Callable[[Sequence[int], int], nn.Module]


def available_peers() -> dict[str, str]:
    """Return the versions of the peers that can be imported."""
    return {name: version(name) for name in PEERS if _import(name) is not None}


def _import(name: str) -> ModuleType | None:
    # Their own imports warn of syntax and functions that are no longer welcome.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _branch(in_channels: int, out_channels: int) -> nn.Module:
    """Return the default branch of `IUNet`."""
    instance_norm = ("INSTANCE", {"affine": True})
    return named_branch("conv", 3, in_channels, out_channels, 1, (3, 3, 3), "LEAKYRELU", instance_norm, None)


class _Checkpointed(nn.Module):
    """A branch that is evaluated again in the backward pass, by `torch.utils.checkpoint`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.branch, x, use_reentrant=False)


class _Coupling(nn.Module):
    """Additive coupling of one tensor, for `memcnn` to invert."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        changed, kept = x.chunk(2, 1)
        return torch.cat([kept, changed + self.branch(kept)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        kept, changed = y.chunk(2, 1)
        return torch.cat([changed - self.branch(kept), kept], 1)


class _Chain(nn.Module):
    """Couplings of another package, where `IUNet` expects one coupling of its own; `IUNet` only runs it forwards."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("The chains of other packages are only trained here.")


def _ours(**options: Any) -> MakeNetwork:
    return lambda channels, couplings: IUNet(3, channels, couplings=couplings, **options)


def _checkpointing(channels: Sequence[int], couplings: int) -> nn.Module:
    def make_branch(dims: int, in_channels: int, out_channels: int, *_: Any) -> nn.Module:
        return _Checkpointed(_branch(in_channels, out_channels))

    return IUNet(3, channels, couplings=couplings, activations="store", make_branch=make_branch)


def _chains(make_chain: Callable[[list[nn.Module]], nn.Module]) -> MakeNetwork:
    """Return our network, with a chain of another package in the place of the couplings of each level."""

    def make(channels: Sequence[int], couplings: int) -> nn.Module:
        def make_branch(dims: int, in_channels: int, out_channels: int, *_: Any) -> nn.Module:
            return _Chain(make_chain([_branch(in_channels, out_channels) for _ in range(couplings)]))

        return IUNet(3, channels, couplings=1, activations="store", make_branch=make_branch)

    return make


def _memcnn(branches: list[nn.Module]) -> nn.Module:
    memcnn: Any = _import("memcnn")
    couplings = (memcnn.InvertibleModuleWrapper(_Coupling(branch)) for branch in branches)
    return nn.Sequential(*couplings)


def _revlib(branches: list[nn.Module]) -> nn.Module:
    revlib: Any = _import("revlib")
    return revlib.ReversibleSequential(*branches, split_dim=1)


def _iunets(channels: Sequence[int], couplings: int) -> nn.Module:
    iunets: Any = _import("iunets")
    coupling: Any = importlib.import_module("iunets.layers").StandardAdditiveCoupling

    def make_coupling(in_channels: int, **_: Any) -> nn.Module:
        half = in_channels // 2
        return coupling(F=_branch(half, half), channel_split_pos=half)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = iunets.iUNet(channels[0], (couplings,) * len(channels), 3, make_coupling, verbose=0)
    if tuple(net.channels) != tuple(channels):
        raise ValueError(f"iunets builds its own numbers of channels, {net.channels}; compare with {tuple(channels)}.")
    return net


CONTESTANTS: dict[str, MakeNetwork] = {
    "ours, invert": _ours(),
    "ours, exact": _ours(exact=True),
    "ours, convolutions": _ours(activations="convolutions"),
    "ours, auto": _ours(activations="auto", memory_budget=1),
    "ours, store": _ours(activations="store"),
    "torch checkpoint": _checkpointing,
    "iunets": _iunets,
    "memcnn": _chains(_memcnn),
    "revlib": _chains(_revlib),
}
