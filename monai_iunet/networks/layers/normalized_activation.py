"""Instance normalization and the activation behind it, as one operation of autograd.

One after the other they save two tensors of the size of their output: the input of each. That of the activation
follows from that of the normalization, whose statistics belong to a channel each. So the backward pass computes both
once more, a few channels at a time, and saves the input alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_iunet.engine.pytorch_private import has_hooks
from monai_iunet.engine.reversible import is_recorded_by_autograd_alone
from monai_iunet.networks.layers.slabs import slabs

__all__ = ["can_be_joined", "normalized_activation"]


def can_be_joined(x: Tensor, norm: Any, act: nn.Module) -> bool:
    """Return whether a normalization and an activation are of the kinds that `normalized_activation` computes.

    Not if somebody looks between them, by hooks, nor if nothing is saved for a backward pass.
    """
    joined: bool = (
        type(norm) in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        and norm.affine
        and not norm.track_running_stats
        and type(act) in (nn.LeakyReLU, nn.ReLU)
        and not any(has_hooks(module) or "forward" in module.__dict__ for module in (norm, act))
        and torch.is_grad_enabled()
        and not is_recorded_by_autograd_alone(x, norm.weight, norm.bias)
    )
    return joined


def normalized_activation(x: Tensor, norm: Any, act: nn.Module) -> Tensor:
    """Return act(norm(x)), saving x alone.

    Args:
        x: `(batch, channels, *spatial)`.
        norm: instance normalization with weight and bias.
        act: a LeakyReLU or a ReLU.

    Example:
        >>> norm, act = nn.InstanceNorm1d(2, affine=True), nn.LeakyReLU(0.1)
        >>> x = torch.rand(1, 2, 5)
        >>> torch.equal(normalized_activation(x, norm, act), act(norm(x)))
        True
    """
    slope = float(getattr(act, "negative_slope", 0.0))
    y: Tensor = _NormalizedActivation.apply(x, norm.weight, norm.bias, norm.eps, slope)  # type: ignore[no-untyped-call]
    return y


class _NormalizedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps, ctx.slope = eps, slope
        y = torch.empty_like(x)
        for group in _groups(x):
            y[:, group] = _compute(x[:, group], weight[group], bias[group], eps, slope)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            y = _compute(x, weight, bias, ctx.eps, ctx.slope)
            wanted = [tensor for tensor, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        gradients = [torch.empty_like(tensor) for tensor in (x, weight, bias)]
        for group in _groups(x):
            parts = x[:, group], weight[group], bias[group]
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                y = _compute(leaves[0], leaves[1], leaves[2], ctx.eps, ctx.slope)
            of_x, of_weight, of_bias = torch.autograd.grad(y, leaves, gradient[:, group])
            gradients[0][:, group], gradients[1][group], gradients[2][group] = of_x, of_weight, of_bias
            del y, of_x
        return *gradients, None, None


def _compute(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = functional.instance_norm(x, weight=weight, bias=bias, eps=eps)
        return functional.leaky_relu(y, slope, inplace=slope > 0)


def _groups(x: Tensor) -> list[slice]:
    return list(slabs(x.shape[1], x.numel() // x.shape[1], x.device, most=4))
