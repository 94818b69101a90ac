"""Convolutions whose outputs are kept, so that a branch is evaluated again without them.

Convolutions take most of the time of a branch, and their outputs a small part of what autograd saves of it: of a
convolution, a normalization and an activation it saves three tensors. With the output of the first, the second and the
third are quick to compute once more. Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv
1604.06174), likewise drop what is cheap to compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from monai_iunet.engine.pytorch_private import FakeTensor, saved_tensor_hooks, version
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.networks.layers.autocast import autocast_type

__all__ = ["KeptConvolutions", "apply_convolution"]

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


class KeptConvolutions(TorchFunctionMode):
    """Keeps, within its context, the outputs of convolutions, or takes those of an earlier evaluation.

    Not where somebody else has set saved-tensor hooks within, as `torch.utils.checkpoint` does, which evaluates a part
    of the module once more by itself.

    Args:
        given: `outputs()` of an earlier evaluation of the same module; of none in the first one.

    Example:
        >>> layer, x = nn.Conv1d(1, 1, 3), torch.rand(1, 1, 8)
        >>> with KeptConvolutions() as first:
        ...     y = layer(x)
        >>> with KeptConvolutions(first.outputs()):
        ...     torch.equal(layer(x + 1), y)  # is not computed
        True
    """

    def __init__(self, given: Sequence[Tensor | None] = ()) -> None:
        super().__init__()
        self._given = list(reversed(given))
        self._kept: list[tuple[Tensor, int]] = []
        self._outer: KeptConvolutions | None = None

    def __enter__(self) -> KeptConvolutions:
        self._outer, _INNERMOST.context = getattr(_INNERMOST, "context", None), self
        super().__enter__()  # type: ignore[no-untyped-call]
        self._hooks = saved_tensor_hooks()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _INNERMOST.context, self._outer = self._outer, None

    def outputs(self) -> list[Tensor | None]:
        """Return the outputs in their order, None for those that were changed in place since, as autograd counts.

        It does not count what is written to `output.data`: a branch that does so cannot keep convolutions.
        """
        return [output if version(output) == before else None for output, before in self._kept]

    def apply(self, convolution: type[torch.autograd.Function], *arguments: Any) -> Tensor:
        """Apply an operation of autograd whose first argument is its output, in a tuple, if that is given."""
        given = self._given.pop() if self._given else None
        output: Tensor = convolution.apply(None if given is None else (given,), *arguments)
        self._kept.append((output.detach(), version(output)))
        return output

    def is_concerned(self) -> bool:
        """Return whether what is computed now is computed again within the context of the second evaluation."""
        return torch.is_grad_enabled() and saved_tensor_hooks() == self._hooks

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in CONVOLUTIONS and self.is_concerned():
            return self._convolve(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _convolve(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        axes = weight.ndim - 2
        strides, dilations = _per_axis(stride, axes), _per_axis(dilation, axes)
        paddings = _paddings(padding, weight, strides, dilations)
        tensors = [tensor for tensor in (input, weight, bias) if tensor is not None]
        if (
            paddings is None
            or input.ndim != weight.ndim
            or not all(map(_is_ordinary, tensors))
            or needs_plain_operators(*tensors)
        ):
            return function(input, weight, bias, stride, padding, dilation, groups)
        dtype = autocast_type(input.device)
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
        return self.apply(_Convolution, input, weight, bias, strides, paddings, dilations, groups)


def apply_convolution(convolution: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Apply an operation of autograd that takes its output, if it is given, before these arguments; see `apply`."""
    context: KeptConvolutions | None = getattr(_INNERMOST, "context", None)
    if context is not None and context.is_concerned():
        return context.apply(convolution, *arguments)
    output: Tensor = convolution.apply(None, *arguments)
    return output


_INNERMOST = threading.local()  # context of each thread


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: tuple[Tensor] | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, False, [0] * len(stride), groups
        if given is not None:
            return given[0].detach()
        return torch.convolution(x, weight, bias, *ctx.options)

    # Where the backward pass is compiled, as with a whole training step, it would ask twice for what was saved.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:
            return (None,) * 8
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[1:4]]
        # Autograd records this operation, too, if a second derivative is asked for.
        gradients = torch.ops.aten.convolution_backward(gradient, x, weight, [len(weight)], *ctx.options, wanted)
        return None, *gradients, None, None, None, None


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    return [*value] * (axes // len(value)) if isinstance(value, Sequence) else [int(value)] * axes


def _paddings(
    padding: str | int | Sequence[int], weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> list[int] | None:
    """Return the padding of each axis; None where it differs between the sides, or PyTorch has an error to raise."""
    if not isinstance(padding, str):
        return _per_axis(padding, len(dilation))
    if padding != "same":
        return [0] * len(dilation) if padding == "valid" else None
    reaches = [(extent - 1) * step for extent, step in zip(weight.shape[2:], dilation)]
    return None if {*stride} != {1} or any(reach % 2 for reach in reaches) else [reach // 2 for reach in reaches]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in a type of autocast, if there is one, which leaves float64 alone."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.is_floating_point()
