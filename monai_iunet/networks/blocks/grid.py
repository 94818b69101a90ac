"""Numbers on a grid: what makes a sum that can be taken back to the last bit.

Sums and differences of integers are exact as long as they fit into the type, so c = a + r gives back a = c - r, bit for
bit. So with

    the input of the network and every F(b) of a coupling    rounded to multiples of a step,
    y = Q x of an orthogonal layer                           rounded to them, and x - round(Q^T y), a small number of
                                                             steps, kept beside,

a network rebuilds its activations as they were, provided that F is evaluated twice with the same result. To the
gradient a rounding is the identity (straight through), as if it had not happened.

The activations between two layers, the *stream*, are kept in one of two types:

    32 bits  A float32 has 24 binary digits, so it holds the multiples of 2^-16 below 2^8 in size.
    16 bits  Under autocast to 16 bits, an integer of 16 bits holds the multiples of 2^-7 below 2^8 in size. Branches
             read numbers of 8 or 11 digits anyway. To autograd, which knows no gradients of integers, the stream is a
             tensor of bfloat16 or float16, whose bytes are these integers, and whose gradients are of that type. Its
             values are had by `values` alone.

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

from monai_iunet.engine.pytorch_private import is_exporting
from monai_iunet.engine.recording import is_transformed
from monai_iunet.engine.slabs import slabs
from monai_iunet.networks.layers.cuda_graph import is_captured

__all__ = [
    "INTEGER_STEP",
    "LIMIT",
    "STEP",
    "add",
    "add_",
    "check_range",
    "enter",
    "is_integer",
    "note_largest",
    "pack",
    "read",
    "read_steps",
    "round_to_grid",
    "step_of",
    "unpack",
    "values",
    "write",
    "write_steps",
]

LIMIT = 2.0**8
STEP = 2.0**-16
INTEGER_STEP = 2.0**-7  # LIMIT / 2^15


def is_integer(stream: Tensor) -> bool:
    """Return whether the bytes of a stream are integers of 16 bits."""
    return stream.dtype in (torch.bfloat16, torch.float16)


def step_of(stream: Tensor) -> float:
    """Return the step of the grid that a stream lies on."""
    return INTEGER_STEP if is_integer(stream) else STEP


def read_steps(stream: Tensor) -> Tensor:
    """Return the steps that a piece of a stream is of, without a gradient: in float32 or better, a contiguous copy."""
    if is_integer(stream):
        return stream.view(torch.int16).to(torch.float32, memory_format=torch.contiguous_format)
    return stream.detach().clone(memory_format=torch.contiguous_format).div_(STEP)


def write_steps(stream: Tensor, steps: Tensor) -> None:
    """Write whole numbers of steps, which are overwritten, to a piece of a stream."""
    if is_integer(stream):
        stream.view(torch.int16).copy_(steps)
    else:
        stream.copy_(steps.mul_(STEP))


def read(stream: Tensor) -> Tensor:
    """Return the values of a piece of a stream, without a gradient: in float32 or better, a contiguous copy."""
    if is_integer(stream):
        return _scaled(stream, torch.float32)
    return stream.detach().clone(memory_format=torch.contiguous_format)


def _scaled(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a stream of integers, rounded to a type, a contiguous copy."""
    steps = stream.view(torch.int16)
    if _multiplied_at_once(steps):
        numbers = torch.empty_like(steps, dtype=dtype, memory_format=torch.contiguous_format)
        return torch.mul(steps, INTEGER_STEP, out=numbers)
    return steps.to(dtype, memory_format=torch.contiguous_format).mul_(INTEGER_STEP)


def _multiplied_at_once(steps: Tensor) -> bool:
    """Return whether integers are multiplied by a number without a copy, and with all their digits.

    PyTorch does so in its default type. A CPU would keep a copy in it on the way.
    """
    return steps.is_cuda and torch.get_default_dtype() in (torch.float32, torch.float64)


def write(stream: Tensor, numbers: Tensor) -> None:
    """Round numbers in place, write them to a piece of a stream, and note the largest."""
    steps = numbers.div_(step_of(stream)).round_()
    note_largest(steps, step_of(stream))
    write_steps(stream, steps)


def add_(stream: Tensor, shift: Tensor, sign: int, out: Tensor, check: bool) -> Tensor:
    """Add or subtract a shift, rounded to the grid of the stream.

    Args:
        stream: on its grid.
        shift: of any floating-point type, of the same shape; stays as it is.
        sign: 1 or -1.
        out: like the stream; may be the stream.
        check: whether to note the largest sum.
    """
    step = step_of(stream)
    integers = is_integer(stream)
    precision = torch.promote_types(shift.dtype, torch.float32 if integers else stream.dtype)
    for slab in slabs(stream.shape[2], stream.numel() // stream.shape[2], stream.device):
        before, after = stream[:, :, slab], out[:, :, slab]
        steps = shift[:, :, slab].to(precision, copy=True).div_(step).round_()
        if integers:
            total = torch.add(before.view(torch.int16), steps, alpha=sign, out=steps)
            after.view(torch.int16).copy_(total)
        else:
            total = torch.add(before, steps, alpha=sign * step, out=after)
        if check:
            note_largest(total, step if integers else 1.0)
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        stream = torch.empty_like(x, dtype=dtype)
        for slab in slabs(x.shape[2], x.numel() // x.shape[2], x.device):
            write(stream[:, :, slab], x[:, :, slab].to(torch.float32, copy=True))
        return stream

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient.to(ctx.dtype), None


def enter(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stream of integers with the values of a tensor `(batch, channels, *spatial)`, rounded.

    Args:
        x: the tensor.
        dtype: of the stream, bfloat16 or float16.

    Example:
        >>> stream = enter(torch.tensor([[[0.1, -1.5]]]), torch.bfloat16)
        >>> stream.dtype, values(stream, torch.float32).tolist()
        (torch.bfloat16, [[[0.1015625, -1.5]]])
    """
    stream: Tensor = _Enter.apply(x, dtype)  # type: ignore[no-untyped-call]
    return stream


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = stream.dtype
        return _scaled(stream, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient.to(ctx.dtype), None


def values(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a stream of integers, in a floating-point type, to which they are rounded."""
    numbers: Tensor = _Values.apply(stream, dtype)  # type: ignore[no-untyped-call]
    return numbers


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, shift: Tensor, sign: int) -> Tensor:
        ctx.dtype, ctx.sign = shift.dtype, sign
        return add_(stream, shift, sign, torch.empty_like(stream), check=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        to_shift = gradient.to(ctx.dtype)
        return gradient, to_shift if ctx.sign == 1 else -to_shift, None


def add(stream: Tensor, shift: Tensor, sign: int) -> Tensor:
    """Add or subtract a shift, rounded to the grid of the stream, to which gradients go straight through."""
    result: Tensor = _Add.apply(stream, shift, sign)  # type: ignore[no-untyped-call]
    return result


def round_to_grid(x: Tensor) -> Tensor:
    """Round to the nearest multiples of `STEP`, in float32 or better; the gradient goes straight through."""
    recorded = (torch.is_grad_enabled() and x.requires_grad) or is_transformed(x)
    # These take operators only. A trace is compared with a second one, which is made without gradients.
    if torch.jit.is_tracing() or (recorded and is_exporting()):
        rounded = on_grid(x)
        x = x.to(rounded.dtype)
        return x + (rounded - x).detach()  # to the last bit, since the difference has no more digits than x
    return _Rounding.apply(x) if recorded else on_grid(x)  # type: ignore[no-untyped-call]


def on_grid(x: Tensor) -> Tensor:
    """Round to the nearest multiples of `STEP`, in float32 or better, without a gradient.

    Example:
        >>> on_grid(torch.tensor([0.1])).item() * 2**16
        6554.0
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    return put_on_grid(x.detach().to(precision, copy=True))


def put_on_grid(x: Tensor) -> Tensor:
    """Round a tensor in place, in float32 or better, to the nearest multiples of `STEP`."""
    return x.div_(STEP).round_().mul_(STEP)


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


def _digits(stream: Tensor) -> tuple[int, torch.dtype]:
    """Return how many values the residue of a channel may have, and the type of an integer for three of them."""
    return (5, torch.int8) if is_integer(stream) else (39, torch.int16)


def pack(residue: Tensor, stream: Tensor) -> Tensor:
    """Return a residue x - round(Q^T y), in steps of a stream, `(batch, channels, ...)`, three channels in an integer.

    That y is rounded changes Q^T y by 0.29 steps in the standard deviation. So for a stream of integers -2 to 2 is room
    enough, since 2.5 steps are nine standard deviations. On the grid of a float32 stream, float32, in which the product
    is computed, adds errors that grow with the values: up to 5 steps in 512 channels of a standard deviation of 10, and
    22 where it is 55, whose largest values reach `LIMIT`. So -19 to 19 is room enough there. A larger one is an error,
    which `check_range` raises.

    Args:
        residue: overwritten.
        stream: that it belongs to.

    Example:
        >>> steps = torch.tensor([[[0.0], [-2.0], [1.0], [2.0]]])
        >>> packed = pack(steps.clone(), stream=steps.bfloat16())
        >>> packed.shape, unpack(packed, stream=steps.bfloat16(), channels=4).flatten().tolist()
        (torch.Size([1, 2, 1]), [0.0, -2.0, 1.0, 2.0])
    """
    base, dtype = _digits(stream)
    _note(_residues, residue, 2 / base)
    first, *others = residue.split(-(-residue.shape[1] // 3), 1)
    for power, part in enumerate(others, 1):
        first[:, : part.shape[1]].add_(part, alpha=base**power)
    return first.to(dtype)


def unpack(packed: Tensor, stream: Tensor, channels: int) -> Tensor:
    """Return the steps of a residue that was packed, in a floating-point type."""
    base, _ = _digits(stream)
    rest = packed.to(torch.float32)
    parts = []
    for power in (2, 1):
        # What lies below is less than half of this power, so rounding finds the digit.
        digit = torch.div(rest, base**power).round_()
        parts.append(digit)
        rest.sub_(digit, alpha=base**power)
    return torch.cat([rest, *reversed(parts)], 1)[:, :channels]


class _Noted:
    """Keeps the bounds of some numbers until their sizes are checked.

    Args:
        message: of the error when the share that a number has of what it may be is not below 1.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.bounds: ContextVar[dict[float, list[Tensor]] | None] = ContextVar("bounds", default=None)

    def check(self, share: Tensor) -> None:
        largest = float(share)
        if not largest < 1:  # nor NaN
            raise OverflowError(self.message.format(largest=largest * LIMIT))


_values = _Noted(
    f"With exact=True activations must stay below {LIMIT:.0f}, but they reach {{largest:.0f}}. Scale the images, train "
    "with a lower learning rate or weight decay, or use exact=False."
)
_residues = _Noted(
    "With exact=True orthogonal products must be taken back within a few steps of the grid, which failed: "
    "a matrix is not orthogonal, or products have fewer digits than float32. Compute in float32 or use exact=False."
)


class _Checked:
    """Returns outputs as they are, or as NaN where an error could not be raised.

    Attributes:
        doubt: NaN if values have left the range, else 0; None where this is known already.
    """

    doubt: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        return output if self.doubt is None else output + self.doubt.to(output.dtype)


@contextmanager
def check_range() -> Iterator[_Checked]:
    """Raise an error, on leaving, if values within have left the range of the grid: one wait for a GPU, not one each.

    While a CUDA graph is recorded nothing has values, and its replay can raise no error. There the outputs become NaN:
    what this yields is called with each of them, after leaving.

    Raises:
        OverflowError: when a value is not below `LIMIT` in size, or no number, or a residue does not fit its place.
    """
    checked = _Checked()
    tokens = [(kind, kind.bounds.set({})) for kind in (_values, _residues)]
    try:
        yield checked
        noted = [(kind, scale, bounds) for kind, _ in tokens for scale, bounds in (kind.bounds.get() or {}).items()]
    finally:
        for kind, token in tokens:
            kind.bounds.reset(token)
    found = [(kind, _share(bounds, scale)) for kind, scale, bounds in noted]
    if not found:
        return
    largest = torch.stack([share for _, share in found]).amax()
    if is_captured(largest):
        checked.doubt = torch.zeros_like(largest).masked_fill_(~(largest < 1), torch.nan)
    # As numbers: to compare tensors that only pretend to have values would say no.
    elif not float(largest) < 1:
        for kind, share in found:
            kind.check(share)


def _share(bounds: list[Tensor], scale: float) -> Tensor:
    return torch.stack(bounds).abs().amax() * scale


def note_largest(x: Tensor, scale: float = 1.0) -> None:
    """Have the size of the largest value, times a scale, checked by `check_range`; at once where that is not around.

    In an export nothing is checked: what is exported has no place for errors. On meta there is nothing to check.
    """
    _note(_values, x, scale / LIMIT)


def _note(kind: _Noted, x: Tensor, scale: float) -> None:
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or x.is_meta or is_transformed(x):
        return
    bounds = list(x.detach().aminmax())
    noted = kind.bounds.get()
    if noted is None:
        kind.check(_share(bounds, scale))
    else:
        noted.setdefault(scale, []).extend(bounds)
