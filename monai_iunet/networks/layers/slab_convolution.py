"""A convolution of a large tensor, one slab after another.

For its kernels cuDNN rearranges what goes in and comes out: channels last, and in 16 bits filled up to a multiple of
eight: 12 channels take the place of 16, twice, on a whole CT several GiB. A slab of the first spatial axis takes its
part of that. It is read with the neighbors that its kernel reaches, and what comes out for these is dropped, since it
belongs to the next slab.

The gradient of the input is that of a convolution too, and is computed in the same way. That of the weight is a sum
over the voxels of the output, so over the slabs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_iunet.engine.pytorch_private import has_hooks
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.slabs import slabs
from monai_iunet.networks.layers.autocast import autocast_type
from monai_iunet.networks.layers.kept_convolution import apply_convolution

__all__ = ["convolve"]

LARGE = 2**25  # values of an input or output beyond which slabs pay
MOST = 12  # slabs


def convolve(x: Tensor, layer: nn.Module) -> Tensor:
    """Return layer(x); of a convolution that keeps the size of images, in slabs where they are large, on a GPU.

    Not if somebody looks at the layer, by hooks.

    Args:
        x: `(batch, channels, *spatial)`.
        layer: of any kind.
    """
    if not _is_large(x, layer):
        y: Tensor = layer(x)
        return y
    dtype = (None if x.dtype == torch.float64 else autocast_type(x.device)) or x.dtype  # which autocast leaves alone
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (layer.weight, layer.bias))
    return apply_convolution(_SlabConvolution, x.to(dtype), weight, bias, layer.dilation, layer.groups)


def _is_large(x: Tensor, layer: Any) -> bool:
    return (
        type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and x.is_cuda
        and x.ndim == layer.weight.ndim  # a convolution takes a single image, too
        and max(x.numel(), x.numel() // layer.in_channels * layer.out_channels) > LARGE
        and _keeps_size(layer)
        and not (has_hooks(layer) or "forward" in layer.__dict__)
        and not needs_plain_operators(x, *layer.parameters())
    )


class _SlabConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: tuple[Tensor] | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation, ctx.groups = dilation, groups
        if given is not None:
            return given[0].detach()
        y = x.new_empty((len(x), len(weight), *x.shape[2:]))
        for slab, wide, inner in _slabs(x, y, weight, dilation):
            y[:, :, slab] = _convolve(x[:, :, wide], weight, bias, dilation, groups)[:, :, inner]
        return y

    # Where the backward pass is compiled, as with a whole training step, it would ask twice for what was saved.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = wanted = ctx.needs_input_grad[1:4]
        sizes = [1] * len(ctx.dilation), _padding(weight, ctx.dilation), ctx.dilation
        rest = *sizes, False, [0] * len(ctx.dilation), ctx.groups
        if torch.is_grad_enabled():  # a second derivative is asked for, of the whole
            whole = torch.ops.aten.convolution_backward(gradient, x, weight, [len(weight)], *rest, list(wanted))
            return None, *whole, None, None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
        precision = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=precision) if of_weight else None
        for slab, wide, inner in _slabs(x, gradient, weight, ctx.dilation):
            before = x[:, :, wide].contiguous()
            after = gradient[:, :, wide].clone(memory_format=torch.contiguous_format)
            if grad_x is not None:
                found = torch.ops.aten.convolution_backward(after, before, weight, None, *rest, [True, False, False])
                grad_x[:, :, slab] = found[0][:, :, inner]
                del found
            if grad_weight is not None:
                after[:, :, : inner.start] = 0  # counted with the slab that they belong to
                after[:, :, inner.stop :] = 0
                found = torch.ops.aten.convolution_backward(after, before, weight, None, *rest, [False, True, False])
                grad_weight += found[1]
                del found
        grad_bias = gradient.sum([0, *range(2, gradient.ndim)]) if of_bias else None
        return None, grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int], groups: int) -> Tensor:
    convolution = functional.conv3d if x.ndim == 5 else functional.conv2d if x.ndim == 4 else functional.conv1d
    return convolution(x, weight, bias, 1, _padding(weight, dilation), dilation, groups)


def _slabs(x: Tensor, y: Tensor, weight: Tensor, dilation: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slabs of the first spatial axis, each with what its kernel reaches, and where it lies therein."""
    size, reach = x.shape[2], _padding(weight, dilation)[0]
    for slab in slabs(size, max(x.numel(), y.numel()) // size, x.device, MOST):
        wide = slice(max(0, slab.start - reach), min(size, slab.stop + reach))
        yield slab, wide, slice(slab.start - wide.start, slab.stop - wide.start)


def _padding(weight: Tensor, dilation: Sequence[int]) -> list[int]:
    return [extent // 2 * step for extent, step in zip(weight.shape[2:], dilation)]


def _keeps_size(layer: Any) -> bool:
    """Return whether a convolution has stride 1, an odd kernel, and is padded with zeros by half of it."""
    padding = [extent // 2 * step for extent, step in zip(layer.kernel_size, layer.dilation)]
    return (
        all(extent % 2 for extent in layer.kernel_size)
        and set(layer.stride) == {1}
        and layer.padding_mode == "zeros"
        and (layer.padding == "same" or list(layer.padding) == padding)
    )
