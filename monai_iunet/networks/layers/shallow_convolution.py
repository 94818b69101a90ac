"""Convolutions whose gradients oneDNN, which PyTorch computes with on a CPU, gets wrong.

In bfloat16, on a processor with AVX-512, the gradient of the weight of a 3D convolution reads memory that nobody has
written when the image has fewer slices than the kernel, and more than one: 2 slices for a kernel of 3, 2 to 4 for one
of 5. What comes out is right, or a little wrong, or 1e33, or NaN; with a kernel of 7 the interpreter may crash. Seen
with PyTorch 2.13 (oneDNN 3.12). The coarsest level of a U-Net soon has 2 slices. In float32 the gradient is right.
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

# Of those that may be wrong. A transposed convolution of one slice may give the few slices that are.
FEWEST_SLICES: dict[Callable[..., Any], int] = {functional.conv3d: 2, functional.conv_transpose3d: 1}


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
        if function in FEWEST_SLICES:
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
    dtype = _computed_in(input)
    if dtype != torch.bfloat16 or not FEWEST_SLICES[function] <= input.shape[-3] < weight.shape[-3]:
        return function(input, weight, bias, *rest, **options)
    with without_autocast(input.device.type):
        bias = None if bias is None else bias.float()
        return function(input.float(), weight.float(), bias, *rest, **options).to(dtype)
