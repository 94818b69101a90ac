"""What `torch.jit.script` gets: a network that `torch.jit.trace` has recorded.

The compiler of TorchScript takes a part of Python only. What a trace cannot record, padding by conditions on the size,
is written in that part (`padding.py`), so a traced network takes images of all sizes and batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Traced"]


class Traced(nn.Module):
    """A network in evaluation, traced, in a module that can be scripted.

    Args:
        network: from a tensor to a tensor; has parameters.
        in_channels: of its images; None if unknown.
        factors: per axis, what the network downsamples by.

    Raises:
        RuntimeError: when the network is in training mode, or its channels are unknown.

    Example:
        >>> from monai_iunet import IUNet
        >>> scripted = torch.jit.script(IUNet(2, (4, 8)).eval())
        >>> scripted(torch.rand(1, 4, 9, 11)).shape
        torch.Size([1, 4, 9, 11])
    """

    def __init__(self, network: nn.Module, in_channels: int | None, factors: Sequence[int]) -> None:
        super().__init__()
        name = type(network).__name__
        if network.training:
            raise RuntimeError(
                f"{name} cannot be scripted in training mode. Call eval(), or use torch.jit.trace(network, example)."
            )
        if in_channels is None:
            raise RuntimeError(
                f"{name} cannot be scripted, because its stem does not say how many channels images have. Set the "
                "attribute in_channels of the stem, or use torch.jit.trace(network, example)."
            )
        # More than one voxel at the coarsest level, where a normalization may need them.
        weight = next(network.parameters())
        example = torch.zeros(
            1, in_channels, *(4 * factor for factor in factors), dtype=weight.dtype, device=weight.device
        )
        with warnings.catch_warnings(), torch.no_grad():
            # What depends on the size of the example is checked by tests that run the traced network on others.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            self.traced = torch.jit.trace(network, example, check_trace=False)
        self.eval()

    def train(self, mode: bool = True) -> Traced:
        """Refuse to be trained: PyTorch leaves the trace, whose matrices are constants, in what holds the network."""
        if mode:
            raise RuntimeError(
                "torch.jit.script has put a trace in the place of this network, which cannot be trained. Script a copy "
                "of the module that holds it, by copy.deepcopy."
            )
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the traced network."""
        y: Tensor = self.traced(x)
        return y
