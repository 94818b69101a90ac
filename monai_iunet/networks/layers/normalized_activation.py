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
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.slabs import slabs
from monai_iunet.networks.layers.autocast import without_autocast

__all__ = ["can_be_joined", "normalized_activation"]

ROWS = 256  # that keep every multiprocessor of a GPU busy
AXES = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}  # of a batch
LARGE = 2**18  # values of a row, above which a multiprocessor is slower than starting the operations on parts


def can_be_joined(x: Tensor, norm: Any, act: nn.Module) -> bool:
    """Return whether a normalization and an activation are of the kinds that `normalized_activation` computes.

    Not if somebody looks between them, by hooks, nor where it saves nothing: neither memory nor time.
    """
    joined: bool = (
        AXES.get(type(norm)) == x.ndim  # these layers take a single image, too
        and norm.affine
        and not norm.track_running_stats
        and type(act) in (nn.LeakyReLU, nn.ReLU)
        and not any(has_hooks(module) or "forward" in module.__dict__ for module in (norm, act))
        and x.numel() > x.shape[0] * x.shape[1]  # else the normalization has an error to raise
        and (torch.is_grad_enabled() or _parts(x) > 1)
        and not needs_plain_operators(x, norm.weight, norm.bias)
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
        parts = _parts(x)
        scales, shifts = _of_samples(len(x), weight, bias)
        y, means, factors = _normalized(_rows(x, parts), scales, shifts, parts, eps)
        ctx.save_for_backward(x, weight, bias, means, factors)
        ctx.eps, ctx.slope, ctx.parts = eps, slope, parts
        return functional.leaky_relu_(y, slope).view(x.shape)

    # Where the backward pass is compiled, as with a whole training step, it would ask twice for what was saved.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, means, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            # Views, which do not depend on each other, as x does on a weight that is used twice.
            x, weight, bias = (tensor.view_as(tensor) for tensor in (x, weight, bias))
            with without_autocast(x.device.type):
                y = functional.instance_norm(x, weight=weight, bias=bias, eps=ctx.eps)
                y = functional.leaky_relu(y, ctx.slope)
            wanted = [tensor for tensor, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        rows, of_y = _rows(x), _rows(gradient)
        scales, shifts = (of_channel.to(means.dtype) for of_channel in _of_samples(len(x), weight, bias))
        numbers = scales, shifts, means, factors
        options = ctx.parts, ctx.eps, ctx.slope
        groups = [*slabs(rows.shape[1], rows.shape[2], x.device)]
        if len(groups) == 1:
            of_rows, of_scales, of_shifts = _gradients(rows, of_y, numbers, *options)
        else:
            of_rows, of_scales, of_shifts = (torch.empty_like(of) for of in (rows, scales, shifts))
            for group in groups:
                of_group = tuple(number[group] for number in numbers)
                _, of_scales[group], of_shifts[group] = _gradients(
                    rows[:, group], of_y[:, group], of_group, *options, place=of_rows[:, group]
                )
        if len(x) > 1:
            of_scales, of_shifts = (of.view(len(x), -1).sum(0) for of in (of_scales, of_shifts))
        return of_rows.view(x.shape), of_scales, of_shifts, None, None


def _gradients(
    rows: Tensor,
    of_y: Tensor,
    numbers: tuple[Tensor, ...],
    parts: int,
    eps: float,
    slope: float,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, of their scales and of their shifts.

    Args:
        rows: `(1, rows, voxels)`.
        of_y: gradient of the outputs, of the same shape.
        numbers: scale, shift, mean and 1 / sqrt(variance + eps) of each row.
        parts: of a row.
        eps: added to the variance.
        slope: of the activation.
        place: to write the gradient of the rows to, where it is not to be a new tensor.
    """
    of_parts = numbers if parts == 1 else _of_parts(parts, *numbers)
    scale, shift, mean, factor = (number.flatten() for number in of_parts)
    before, after = _rows(rows, parts), _rows(of_y, parts)
    variance = factor**-2  # with eps in it
    y = torch.native_batch_norm(before, scale, shift, mean, variance, False, 0.0, 0.0)[0]
    after = torch.ops.aten.leaky_relu_backward(after, y, slope, False)
    del y
    of_rows, of_scales, of_shifts = torch.ops.aten.native_batch_norm_backward(
        after, before, scale, None, None, mean, factor, True, eps, [True] * 3
    )
    if parts == 1:
        return of_rows if place is None else place.copy_(of_rows), of_scales, of_shifts
    del of_rows  # which took the sums of the parts, where those of the rows belong
    sums = torch.stack((of_scales, of_shifts)).view(2, -1, parts).sum(2)
    place = torch.empty_like(rows) if place is None else place
    scale, _, mean, factor = numbers
    _put_gradient(place, after.view_as(rows), rows, scale, mean, factor, sums)
    return place, *sums


def _put_gradient(
    place: Tensor, of_y: Tensor, rows: Tensor, scales: Tensor, means: Tensor, factors: Tensor, sums: Tensor
) -> None:
    """Write the gradient of rows by that of the normalized rows.

    Args:
        place: to write to.
        of_y: gradient of the normalized rows.
        rows: as they were before.
        scales: of each row, as the next two.
        means: of the rows.
        factors: 1 / sqrt(variance + eps).
        sums: gradients of scales and shifts.
    """
    by_gradient = scales * factors
    by_x, constant = sums * torch.stack((by_gradient * factors, by_gradient)) / -rows.shape[2]
    constant = constant - by_x * means
    total = torch.addcmul(constant[:, None], rows, by_x[:, None])
    torch.addcmul(total, of_y, by_gradient[:, None], out=place)


def _normalized(rows: Tensor, scales: Tensor, shifts: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized rows, each in so many parts, and mean and 1 / sqrt(variance + eps) of each row."""
    if parts == 1:
        return torch.native_batch_norm(rows, scales, shifts, None, None, True, 0.0, eps)
    # The values, normalized by the statistics of their part, are of no use and given back at once.
    scale, shift = _of_parts(parts, scales, shifts).flatten(1)
    means, factors = torch.native_batch_norm(rows, scale, shift, None, None, True, 0.0, eps)[1:]
    between, means = torch.var_mean(means.view(-1, parts), 1, correction=0)
    variances = (factors**-2).view(-1, parts).mean(1) + between  # with eps in them
    scale, shift, mean, variance = _of_parts(parts, scales, shifts, means, variances).flatten(1)
    y = torch.native_batch_norm(rows, scale, shift, mean, variance, False, 0.0, 0.0)[0]
    return y, means, variances.rsqrt()


def _of_samples(count: int, *of_channels: Tensor) -> list[Tensor]:
    """Return numbers of the channels for the channels of each of so many samples."""
    return [of_channel.expand(count, -1).flatten() for of_channel in of_channels]


def _of_parts(parts: int, *of_rows: Tensor) -> Tensor:
    """Return numbers of the rows for each of their parts, `(kinds of numbers, rows, parts)`."""
    return torch.stack(of_rows)[:, :, None].expand(-1, -1, parts)


def _rows(x: Tensor, parts: int = 1) -> Tensor:
    """Return `(1, batch * channels * parts, voxels)`: what is normalized together in a row, or in several."""
    return x.contiguous().view(1, x.shape[0] * x.shape[1] * parts, -1)


def _parts(x: Tensor) -> int:
    """Return into how many parts to cut a row: along the first spatial axis, of few and large rows on a GPU."""
    large = x.numel() > LARGE * len(x) * x.shape[1]
    return x.shape[2] if x.is_cuda and x.ndim > 3 and large and x.shape[0] * x.shape[1] < ROWS else 1
