"""How well activations are rebuilt."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from monai_iunet.networks.nets.iunet import IUNet
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["reconstruction_error"]


def reconstruction_error(network: IUNet | SegIUNet, input: Tensor) -> list[float]:
    """By how much the activations that a backward pass rebuilds differ from those of the forward pass.

    In float32 some 1e-6, growing slowly with depth. Under 16-bit autocast the errors, and with them those of the
    gradients, can reach hundredths; with `exact=True` they are zero. Call it in the precision of the training, under
    autocast if that is used.

    Args:
        network: examined as if all its levels were inverted; a copy is run, so that it stays as it is.
        input: what the network takes, `(batch, channels, *spatial)`.

    Returns:
        Per level, finest first, the relative error (norm of the difference over norm) of what goes into its couplings,
        the larger one of encoder and decoder.

    Example:
        >>> errors = reconstruction_error(IUNet(2, (4, 8)), torch.randn(1, 4, 8, 8))
        >>> len(errors), max(errors) < 1e-4
        (2, True)
    """
    network = copy.deepcopy(network)
    network.activations = "invert"
    invertible = network.iunet if isinstance(network, SegIUNet) else network
    errors = [0.0] * invertible.levels
    for stage in (invertible.encoder, invertible.decoder):
        for level, layers in enumerate(stage):
            _watch(layers[0], errors, level)
    with torch.enable_grad():
        output = network(input.detach())
        outputs = [output] if isinstance(output, Tensor) else output
        loss = torch.stack([part.float().square().mean() for part in outputs]).sum()
        torch.autograd.grad(loss, [each for each in network.parameters() if each.requires_grad], allow_unused=True)
    return errors


def _watch(layer: Any, errors: list[float], level: int) -> None:
    """Compare what the backward pass of a layer rebuilds with what went into it."""
    originals: list[Tensor] = []
    pull_back: Any = layer.pull_back

    def compare(*arguments: Any) -> Any:
        result = pull_back(*arguments)
        difference = sum(
            float((one.double() - other.double()).square().sum()) for one, other in zip(result[0], originals)
        )
        norm = sum(float(original.double().square().sum()) for original in originals)
        errors[level] = max(errors[level], (difference / norm) ** 0.5 if norm else 0.0)
        return result

    layer.register_forward_pre_hook(lambda _, inputs: originals.extend(tensor.detach().clone() for tensor in inputs))
    layer.pull_back = compare
