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
from monai_iunet.engine.slabs import slabs

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
        and x.numel() > x.shape[0] * x.shape[1]  # else the normalization has an error to raise
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
        scales, shifts = weight.repeat(len(x)), bias.repeat(len(x))
        y, means, factors = torch.native_batch_norm(_rows(x), scales, shifts, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, bias, means, factors)
        ctx.eps, ctx.slope = eps, slope
        return functional.leaky_relu_(y, slope).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, means, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            with torch.autocast(x.device.type, enabled=False):
                y = functional.instance_norm(x, weight=weight, bias=bias, eps=ctx.eps)
                y = functional.leaky_relu(y, ctx.slope)
            wanted = [tensor for tensor, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        rows, of_y, of_x = _rows(x), _rows(gradient), torch.empty_like(x, memory_format=torch.contiguous_format)
        scales, shifts = weight.repeat(len(x)), bias.repeat(len(x))
        of_scales, of_shifts = torch.empty_like(scales), torch.empty_like(shifts)
        variances = factors**-2  # with eps in them
        for group in slabs(rows.shape[1], rows.shape[2], x.device):
            normalized, _, _ = torch.native_batch_norm(
                rows[:, group], scales[group], shifts[group], means[group], variances[group], False, 0.0, 0.0
            )
            of_normalized = torch.ops.aten.leaky_relu_backward(of_y[:, group], normalized, ctx.slope, False)
            del normalized
            _rows(of_x)[:, group], of_scales[group], of_shifts[group] = torch.ops.aten.native_batch_norm_backward(
                of_normalized, rows[:, group], scales[group], None, None, means[group], factors[group], True, ctx.eps,
                [True] * 3,
            )  # fmt: skip
            del of_normalized
        return of_x, *(of.view(len(x), -1).sum(0) for of in (of_scales, of_shifts)), None, None


def _rows(x: Tensor) -> Tensor:
    """Return `(1, batch * channels, voxels)`: what is normalized together in a row."""
    return x.contiguous().view(1, x.shape[0] * x.shape[1], -1)
