"""How well activations are rebuilt."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from monai_iunet.networks.nets.iunet import IUNet
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["reconstruction_error"]


def reconstruction_error(network: IUNet | SegIUNet, input: Tensor) -> list[float]:
    """Return by how much the activations that a backward pass rebuilds differ from those of the forward pass.

    In float32 some 1e-6, growing slowly with depth. Under 16-bit autocast the errors, and with them those of the
    gradients, can reach hundredths; with `exact=True` they are zero. Call it in the precision of the training, under
    autocast if that is used.

    Args:
        network: examined as if all its levels were inverted, and all parameters trained; a copy is run, so that it
            stays as it is.
        input: what the network takes, `(batch, channels, *spatial)`.

    Returns:
        Per level, finest first, the relative error (norm of the difference over norm) of what the network in its first
        coupling reads, the larger one of encoder and decoder.

    Raises:
        ValueError: when activations are not finite, which no error can be told of.

    Example:
        >>> errors = reconstruction_error(IUNet(2, (4, 8)), torch.randn(1, 4, 8, 8))
        >>> len(errors), max(errors) < 1e-4
        (2, True)
    """
    with torch.inference_mode(False), torch.enable_grad():
        errors = _errors(copy.deepcopy(network).requires_grad_(), input.detach().clone())
    if not np.isfinite(errors).all():
        raise ValueError("input or weights give activations that are not finite, whose error cannot be told.")
    return errors


def _errors(network: IUNet | SegIUNet, input: Tensor) -> list[float]:
    network.activations = "invert"
    invertible = network.iunet if isinstance(network, SegIUNet) else network
    errors = [0.0] * invertible.levels
    for stage in (invertible.encoder, invertible.decoder):
        for level, layers in enumerate(stage):
            _watch(layers[0], errors, level)
    output = network(input)
    outputs = [output] if isinstance(output, Tensor) else output
    loss = torch.stack([part.float().square().mean() for part in outputs]).sum()
    torch.autograd.grad(loss, [*network.parameters()], allow_unused=True)
    return errors


def _watch(layer: nn.Module, errors: list[float], level: int) -> None:
    """Compare what the network in a coupling gets in its second evaluation with what it got in the first."""
    originals: list[Tensor] = []

    def compare(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not originals:
            originals.append(inputs[0].detach().double())
            return
        norm = float(originals[0].norm())
        difference = float((inputs[0].detach().double() - originals[0]).norm())
        errors[level] = float(np.maximum(errors[level], difference / norm if norm else 0.0))  # NaN stays

    next(layer.children()).register_forward_pre_hook(compare)
