"""Write `iunets_reference.pt`: small networks of the released package, their weights, and what they compute.

Run `python -m tests.interop.iunets_reference` where `iunets` and `memcnn` are installed. The file lets the agreement be
tested where they are not.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

FILE = Path(__file__).with_suffix(".pt")
NETWORKS: dict[str, dict[str, Any]] = {
    "1D": {"in_channels": 3, "architecture": (2, 1), "dim": 1},
    "2D, exp": {"in_channels": 4, "architecture": (2, 2), "dim": 2, "resampling_method": "exp"},
    "2D, deep blocks": {"in_channels": 3, "architecture": (1, 2), "dim": 2, "module_kwargs": {"block_depth": 2}},
    "3D, anisotropic": {"in_channels": 4, "architecture": (1, 1), "dim": 3, "resampling_stride": (2, 1, 2)},
    "2D, reflected": {"in_channels": 4, "architecture": (1, 1, 1), "dim": 2, "padding_mode": "reflect"},
}


def original(**arguments: Any) -> nn.Module:
    """A network of the released package with weights that are not its first ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import iunets

        net = iunets.iUNet(**{"verbose": 0, **arguments})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def images(dim: int, channels: int, size: int = 12) -> torch.Tensor:
    """The images that the networks are compared on, always the same."""
    return torch.randn(2, channels, *[size] * dim, generator=torch.Generator().manual_seed(1))


def record(arguments: dict[str, Any]) -> dict[str, Any]:
    net = original(**arguments)
    x = images(arguments["dim"], arguments["in_channels"], 9 if "padding_mode" in arguments else 8)
    y = images(arguments["dim"], arguments["in_channels"], 8)
    with torch.no_grad():
        output, inverse = net(x.clone()), net.inverse(y.clone())
    return {"state_dict": net.state_dict(), "x": x, "output": output, "y": y, "inverse": inverse}


if __name__ == "__main__":
    records = {name: record(arguments) for name, arguments in NETWORKS.items()}
    torch.save({"version": importlib.metadata.version("iunets"), "networks": records}, FILE)
