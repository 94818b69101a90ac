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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from monai_iunet.engine.reversible import is_transformed

__all__ = ["LIMIT", "STEP", "check_range", "note_largest", "on_grid", "round_to_grid"]

STEP = 2.0**-16
LIMIT = 2.0**8


def round_to_grid(x: Tensor) -> Tensor:
    """Round to the nearest multiples of `STEP`, in float32 or better; the gradient goes straight through."""
    if torch.jit.is_tracing():  # which takes operators only, and no gradients
        return on_grid(x)
    recorded = (torch.is_grad_enabled() and x.requires_grad) or is_transformed(x)
    return _Rounding.apply(x) if recorded else on_grid(x)  # type: ignore[no-untyped-call]


def on_grid(x: Tensor) -> Tensor:
    """Round to the nearest multiples of `STEP`, in float32 or better, without a gradient.

    Example:
        >>> on_grid(torch.tensor([0.1])).item() * 2**16
        6554.0
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(precision, copy=True).div_(STEP).round_().mul_(STEP)


class _Rounding(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return on_grid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.input_dtype, ctx.output_dtype = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to(ctx.input_dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.to(ctx.output_dtype, copy=True)


_sizes: ContextVar[list[Tensor] | None] = ContextVar("sizes", default=None)


@contextmanager
def check_range() -> Iterator[None]:
    """Raise an error, on leaving, if values within have left the range of the grid: one wait for a GPU, not one each.

    Raises:
        OverflowError: when a value is not below `LIMIT` in size, or no number.
    """
    token = _sizes.set([])
    try:
        yield
        noted = _sizes.get()
    finally:
        _sizes.reset(token)
    if noted:
        _check(torch.stack(noted).amax())


def note_largest(x: Tensor, scale: float = 1.0) -> None:
    """Have the size of the largest value, times a scale, checked by `check_range`; at once where that is not around.

    In an export nothing is checked: what is exported has no place for errors.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or is_transformed(x):
        return
    low, high = x.detach().aminmax()
    size = torch.maximum(-low, high) * scale
    noted = _sizes.get()
    if noted is None:
        _check(size)
    else:
        noted.append(size)


def _check(size: Tensor) -> None:
    largest = float(size)
    if not largest < LIMIT:  # nor NaN
        raise OverflowError(
            f"With exact=True activations must stay below {LIMIT:.0f}, but they reach {largest:.0f}. Scale the "
            "images, train with a lower learning rate or weight decay, or use exact=False."
        )
