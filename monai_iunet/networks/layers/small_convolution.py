"""Convolutions whose gradients oneDNN, which PyTorch computes with on a CPU, gets wrong.

In bfloat16, on a processor with AVX-512, the gradient of the weight, and of the bias, reads memory that nobody has
written where the image, before or behind the convolution, is smaller than the kernel along an axis: of 2 slices for a
kernel of 3, 2 to 4 for one of 5, 1 row for a kernel of 5, 1 or 2 for one of 7, 1 column with a stride of 2, and so on.
What comes out is right, or a little wrong, or 1e33, or NaN; or the interpreter crashes. Seen with PyTorch 2.13 (oneDNN
3.12). The coarsest level of a U-Net soon has 2 slices. In float32 the gradient is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from monai_iunet.networks.layers.autocast import autocast_type, without_autocast

__all__ = ["right_gradients"]

# Where the dilation is among the arguments behind the bias.
DILATION: dict[Callable[..., Any], int] = {
    functional.conv1d: 2,
    functional.conv2d: 2,
    functional.conv3d: 2,
    functional.conv_transpose1d: 4,
    functional.conv_transpose2d: 4,
    functional.conv_transpose3d: 4,
}


def right_gradients(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the convolutions that oneDNN gets wrong are computed in float32.

    Args:
        x: what they are computed of. On a GPU, in another type than bfloat16, and without gradients, nothing is wrong,
            and the context does nothing.

    Example:
        >>> convolution, images = torch.nn.Conv3d(1, 1, 3, padding=1), torch.rand(1, 1, 2, 8, 8)
        >>> with torch.autocast("cpu", torch.bfloat16), right_gradients(images):
        ...     convolution(images).dtype
        torch.bfloat16
    """
    concerned = x.device.type == "cpu" and torch.is_grad_enabled() and _computed_in(x) == torch.bfloat16
    return _InFloat32() if concerned else nullcontext()


def _computed_in(x: Tensor) -> torch.dtype:
    return (None if x.dtype == torch.float64 else autocast_type(x.device)) or x.dtype


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in DILATION:
            return _convolve(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _convolve(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    output = function(input, weight, bias, *rest, **options)
    place = DILATION[function]
    dilation = rest[place] if place < len(rest) else options.get("dilation", 1)
    if output.dtype != torch.bfloat16 or not _is_small(input, output, weight, dilation):
        return output
    with without_autocast(input.device.type):
        bias = None if bias is None else bias.float()
        return function(input.float(), weight.float(), bias, *rest, **options).to(output.dtype)


def _is_small(input: Tensor, output: Tensor, weight: Tensor, dilation: int | Sequence[int]) -> bool:
    """Return whether an image is smaller than the kernel along an axis, before or behind a convolution.

    A volume of a single slice counts as an image of that, whose gradients are right.
    """
    axes = weight.ndim - 2
    steps = [dilation] * axes if isinstance(dilation, int) else [*dilation] * (axes // len(dilation))
    extents = [*zip(input.shape[-axes:], output.shape[-axes:], weight.shape[2:], steps)]
    if axes == 3 and extents[0][:2] == (1, 1):
        del extents[0]
    return any(min(before, after) <= (kernel - 1) * step for before, after, kernel, step in extents)
