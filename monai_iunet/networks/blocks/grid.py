"""Numbers on a grid: what makes a sum that can be taken back to the last bit.

Float32 has 24 binary digits. Multiples of 2^-16 below 2^8 in size have no more than that, so their sums and
differences, as long as those stay below 2^8 too, are exact: c = a + r gives back a = c - r, bit for bit. So with

    the input of the network and every F(b) of a coupling    rounded to the grid,
    y = Q x of an orthogonal layer                           rounded to the grid, and x - round(Q^T y), a small
                                                             number of grid steps, kept in a byte,

a network rebuilds its activations as they were, provided that F is evaluated twice with the same result. To the
gradient a rounding is the identity (straight through), as if it had not happened.

Sources: Maclaurin et al., Gradient-based Hyperparameter Optimization through Reversible Learning, 2015 (arXiv
1502.03492); Zhang et al., On Exact Bit-level Reversible Transformers Without Changing Architectures, 2024
(arXiv 2407.09093).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LIMIT", "STEP", "on_grid", "round_to_grid"]

STEP = 2.0**-16
LIMIT = 2.0**8


def round_to_grid(x: Tensor) -> Tensor:
    """The nearest multiples of `STEP`, in float32 or better; the gradient goes straight through."""
    return _Rounding.apply(x) if torch.is_grad_enabled() and x.requires_grad else on_grid(x)  # type: ignore[no-untyped-call]


def on_grid(x: Tensor) -> Tensor:
    """The nearest multiples of `STEP`, in float32 or better, without a gradient.

    Example:
        >>> on_grid(torch.tensor([0.1])).item() * 2**16
        6554.0
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(precision, copy=True).div_(STEP).round_().mul_(STEP)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return on_grid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to(ctx.dtype)
