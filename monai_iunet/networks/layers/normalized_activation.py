"""Instance normalization and the activation behind it, as one operation of autograd.

One after the other they save two tensors of the size of their output: the input of each. That of the activation
follows from that of the normalization, whose statistics belong to a channel each. So the backward pass computes both
once more, a few channels at a time, and saves the input alone.

A GPU works on a channel with one of its hundred multiprocessors, so a large image of few channels keeps it waiting.
There the channels are cut into parts, which take the place of channels. Of parts of equal size, mean and variance of
the whole are

    m = mean of m_i        v = mean of v_i + variance of m_i

and with x' = (x - m) / sqrt(v + eps), y = s x' + b, and g the gradient of y, that of x is

    s / sqrt(v + eps) (g - mean of g - x' mean of g x')

whose means are of sums over the parts. Sources: Chan et al., Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances, 1979; Ioffe and Szegedy, Batch Normalization, 2015 (arXiv 1502.03167).
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

ROWS = 256  # that keep every multiprocessor of a GPU busy


def can_be_joined(x: Tensor, norm: Any, act: nn.Module) -> bool:
    """Return whether a normalization and an activation are of the kinds that `normalized_activation` computes.

    Not if somebody looks between them, by hooks, nor where it saves nothing: neither memory nor time.
    """
    joined: bool = (
        type(norm) in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        and norm.affine
        and not norm.track_running_stats
        and type(act) in (nn.LeakyReLU, nn.ReLU)
        and not any(has_hooks(module) or "forward" in module.__dict__ for module in (norm, act))
        and x.numel() > x.shape[0] * x.shape[1]  # else the normalization has an error to raise
        and (torch.is_grad_enabled() or _parts(x) > 1)
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
        scales, shifts, parts = weight.repeat(len(x)), bias.repeat(len(x)), _parts(x)
        y, means, factors = _normalized(_rows(x, parts), scales, shifts, parts, eps)
        ctx.save_for_backward(x, weight, bias, means, factors)
        ctx.eps, ctx.slope, ctx.parts = eps, slope, parts
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
            normalized = _applied(
                _rows(rows[:, group], ctx.parts), scales[group], shifts[group], means[group], variances[group]
            )
            of_normalized = torch.ops.aten.leaky_relu_backward(
                of_y[:, group], normalized.view(1, -1, rows.shape[2]), ctx.slope, False
            )
            del normalized
            _rows(of_x)[:, group], of_scales[group], of_shifts[group] = _gradients(
                of_normalized, rows[:, group], scales[group], means[group], factors[group], ctx.eps, ctx.parts
            )
            del of_normalized
        return of_x, *(of.view(len(x), -1).sum(0) for of in (of_scales, of_shifts)), None, None


def _normalized(rows: Tensor, scales: Tensor, shifts: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized rows, each in so many parts, and mean and 1 / sqrt(variance + eps) of each row."""
    if parts == 1:
        return torch.native_batch_norm(rows, scales, shifts, None, None, True, 0.0, eps)
    of_part = _of_part(scales, parts), _of_part(shifts, parts)
    # The values, normalized by the statistics of their part, are of no use and given back at once.
    statistics = torch.native_batch_norm(rows, *of_part, None, None, True, 0.0, eps)[1:]
    means, factors = (each.view(-1, parts) for each in statistics)
    variances = (factors**-2 - eps).mean(1) + means.var(1, correction=0) + eps
    means = means.mean(1)
    return _applied(rows, scales, shifts, means, variances), means, variances.rsqrt()


def _applied(rows: Tensor, scales: Tensor, shifts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return rows, each in some parts, normalized with given statistics."""
    parts = rows.shape[1] // len(scales)
    scales, shifts, means, variances = (_of_part(each, parts) for each in (scales, shifts, means, variances))
    return torch.native_batch_norm(rows, scales, shifts, means, variances, False, 0.0, 0.0)[0]


def _gradients(
    of_y: Tensor, rows: Tensor, scales: Tensor, means: Tensor, factors: Tensor, eps: float, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, scales and shifts by that of the normalized rows."""
    if parts > 1:
        scales = scales.to(means.dtype)  # in which sums over parts are kept
    of_part = [_of_part(each, parts) for each in (means, factors)]
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        _rows(of_y, parts), _rows(rows, parts), _of_part(scales, parts), None, None, *of_part, True, eps, [True] * 3
    )
    if parts == 1:
        return gradients
    # The sums are those of the parts. The gradient of the rows takes the sums of all.
    of_scales, of_shifts = (of.view(-1, parts).sum(1) for of in gradients[1:])
    del gradients
    by_gradient = scales * factors
    by_x = -by_gradient * factors * of_scales / rows.shape[2]
    constant = -by_gradient * of_shifts / rows.shape[2] - by_x * means
    of_rows = (rows * by_x[:, None]).add_(constant[:, None]).add_(of_y * by_gradient[:, None])
    return of_rows, of_scales, of_shifts


def _of_part(of_row: Tensor, parts: int) -> Tensor:
    """Return a number of each row for each of its parts."""
    return of_row[:, None].expand(-1, parts).reshape(-1)


def _rows(x: Tensor, parts: int = 1) -> Tensor:
    """Return `(1, batch * channels * parts, voxels)`: what is normalized together in a row, or in several."""
    return x.contiguous().view(1, x.shape[0] * x.shape[1] * parts, -1)


def _parts(x: Tensor) -> int:
    """Return into how many parts to cut a row: along the first spatial axis, where there are few rows on a GPU."""
    return x.shape[2] if x.is_cuda and x.ndim > 3 and x.shape[0] * x.shape[1] < ROWS else 1
