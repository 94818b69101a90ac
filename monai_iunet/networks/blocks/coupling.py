"""Additive coupling: a bijection made of an arbitrary network.

The state is a pair (a, b) of tensors, which split the channels. The branch F may be any network:

    forward   (a, b) -> (b, a + F(b))
    inverse   (b, c) -> (c - F(b), b)

Halves change places, so that the next coupling changes the other one. Autograd saves nothing of the sum, so the
backward pass evaluates F once: that evaluation gives both the rebuilt a = c - F(b) and what autograd was to save of F.

Source: Dinh, Krueger, Bengio, NICE, 2014 (arXiv 1410.8516).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from monai_iunet.engine.pytorch_private import compiled_part, function_modes, has_hooks, is_in_forward_mode, version
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.reversible import Call, InvertibleLayer, Tensors
from monai_iunet.engine.saved_tensors import Converted, Saved
from monai_iunet.networks.blocks.branch import Branch
from monai_iunet.networks.blocks.grid import add, add_, is_integer, round_to_grid, values
from monai_iunet.networks.blocks.second_result import check_second_result, is_to_be_checked, sample, sampled_shift
from monai_iunet.networks.layers.autocast import autocast_type
from monai_iunet.networks.layers.kept_convolution import KeptConvolutions
from monai_iunet.networks.layers.small_convolution import right_gradients

__all__ = ["AdditiveCoupling", "WholeCoupling"]


class AdditiveCoupling(InvertibleLayer):
    """Couples a pair of tensors additively.

    Args:
        branch: the network F, from `(batch, channels of the second, *spatial)` to `(batch, channels of the first,
            *spatial)`.

    Attributes:
        keeps_convolutions: whether outputs of convolutions are kept, so that the second evaluation is quick.

    Raises:
        ValueError: from a call, when the branch returns another shape than that of the first.
        RuntimeError: from a call, when the branch changes its input.

    Example:
        >>> coupling = AdditiveCoupling(nn.Conv2d(2, 1, 3, padding=1))
        >>> first, second = coupling(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
        >>> first.shape, second.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 1, 4, 4]))
    """

    keeps_convolutions: bool = False

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def weights(self) -> Tensors:
        # The branch reads its parameters itself; those that have tangents must be seen.
        return super().weights() if is_in_forward_mode() else ()

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        changed, kept = inputs
        kept, taken = self._take(kept)
        return kept, self._sum(changed, self._shift(taken, changed), 1)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        kept, changed = outputs
        kept, taken = self._take(kept)
        return self._sum(changed, self._shift(taken, changed), -1), kept

    def remember(self, inputs: Tensors, outputs: Tensors, weights: Tensors, inverse: bool) -> Tensors:
        changed = outputs[0 if inverse else 1]
        if not is_to_be_checked(self.branch, changed, self.exact):
            return ()
        return (self._sampled_shift(inputs, outputs, inverse),)

    def _sampled_shift(self, inputs: Tensors, outputs: Tensors, inverse: bool) -> Tensor:
        """Return a few values of F of a call."""
        before, after = (outputs[0], inputs[1]) if inverse else (inputs[0], outputs[1])
        return sampled_shift(before, after, self.exact)

    def _check_shift(self, remembered: Tensors, shift: Tensor, changed: Tensor) -> None:
        """Check, by a few values of F, that the branch has repeated itself."""
        for first in remembered:
            check_second_result(self.branch, first, shift, changed, self.exact)

    def watch(self) -> AbstractContextManager[Any]:
        # What is compiled, and what a mode of a user's sees, is not known to repeat itself without its convolutions.
        is_compiled = _is_compiled(self.branch) or (isinstance(self.branch, Branch) and self.branch.is_compiled)
        keeps = self.keeps_convolutions and not is_compiled and not function_modes()
        return KeptConvolutions() if keeps else nullcontext()

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        # Gradients are enabled as in the forward pass, since kernels may depend on it; nothing of them is stored.
        with torch.enable_grad(), saved_tensors_hooks(_store_nothing, _store_nothing):
            inputs = super().recover(outputs, weights, remembered, inverse)
        inputs = tuple(map(Tensor.detach, inputs))
        if remembered:
            self._check_shift(remembered, self._sampled_shift(inputs, outputs, inverse), outputs[0 if inverse else 1])
        return inputs

    def replace(self, inputs: list[Tensor], inverse: bool = False) -> Tensors:
        kept, changed = inputs if inverse else inputs[::-1]
        inputs.clear()
        shift = self._shift(self._take(kept)[1], changed)
        sign = -1 if inverse else 1
        if self.exact:
            add_(changed, shift, sign, out=changed, check=True)
        elif torch.promote_types(changed.dtype, shift.dtype) == changed.dtype:
            changed.add_(shift, alpha=sign)
        else:
            changed = self._sum(changed, shift, sign)
        return (changed, kept) if inverse else (kept, changed)

    def _sum(self, changed: Tensor, shift: Tensor, sign: int) -> Tensor:
        if not self.exact:
            return changed + shift if sign == 1 else changed - shift
        if not needs_plain_operators(changed, shift):
            return add(changed, shift, sign)
        shift = round_to_grid(shift)
        return changed + shift if sign == 1 else changed - shift

    def _shift(self, inputs: list[Tensor], changed: Tensor) -> Tensor:
        """Return F of the input in the list, which is emptied."""
        shape = inputs[0].shape
        if not torch.compiler.is_compiling() and _is_compiled(self.branch):
            # The backward pass meets the same strides, for which parts are compiled; those of a view have gaps.
            inputs = [inputs.pop().clone(memory_format=torch.contiguous_format)]
        if (
            type(self.branch) is Branch
            and self._begins_with_convolution
            and not has_hooks(self.branch)
            and not needs_plain_operators(*inputs)
        ):
            with right_gradients(inputs[0]):
                shift = self.branch(inputs)
        else:
            kept = inputs.pop()
            before = version(kept)
            with right_gradients(kept):
                shift = self.branch(kept)
            if version(kept) != before:
                raise RuntimeError(
                    "A coupling branch must leave its input as it is; "
                    f"{type(self.branch).__name__} changes it in place. Use inplace=False in what it begins with."
                )
        if shift.shape != changed.shape:
            raise ValueError(
                f"A coupling branch must map {tuple(shape)} to {tuple(changed.shape)}, the shape of the half that "
                f"it is added to; {type(self.branch).__name__} returned {tuple(shift.shape)}."
            )
        return shift

    @property
    def _begins_with_convolution(self) -> bool:
        return isinstance(self.branch, Branch) and isinstance(self.branch[0], (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def _take(self, kept: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the half that is kept, and in a list its values in the type that the branch computes in."""
        dtype = self._branch_type(kept)
        if self.exact and is_integer(kept):
            return kept, [values(kept, dtype)]
        if dtype == kept.dtype:
            return kept, [kept]
        if needs_plain_operators(kept):
            return kept, [kept.to(dtype)]
        kept, taken = _Cast.apply(kept, dtype)  # type: ignore[no-untyped-call]
        return kept, [taken]

    def _branch_type(self, kept: Tensor) -> torch.dtype:
        """Return the type that the branch computes in, as far as that is known, else that of the half."""
        if self.exact and is_integer(kept):
            return kept.dtype if self._begins_with_convolution else torch.float32
        if kept.dtype == torch.float32:
            if self._begins_with_convolution and (autocast := autocast_type(kept.device)) is not None:
                return autocast  # as the convolution would
            for parameter in self.branch.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    return parameter.dtype
                if parameter.is_floating_point():  # the first one decides
                    break
        return kept.dtype

    def rebuild(self, outputs: list[Tensor], overwrite: Sequence[bool], call: Call) -> tuple[Tensors, Sequence[Saved]]:
        changed_at, kept_at = (0, 1) if call.inverse else (1, 0)
        changed, kept = outputs[changed_at], outputs[kept_at]
        outputs.clear()
        # In `transform` the half that is kept is the second input, in `restore` the first.
        (leaf,) = call.leaves([kept], first=0 if call.inverse else 1)
        with call.repeat() as saved:
            taken = self._take(leaf)[1]
            if taken[0] is not leaf:
                # It follows from the half itself, if autograd asks for it.
                convert = partial(values if self.exact and is_integer(leaf) else Tensor.to, dtype=taken[0].dtype)
                saved.stands = Converted(taken[0], leaf.detach(), convert)
            given = call.kept
            with nullcontext() if given is None else KeptConvolutions(given):
                shift = self._shift(taken, changed).detach()
        if call.remembered:
            call.check_saved(saved)
            self._check_shift(call.remembered, sample(shift), changed)
        if call.inputs_wanted:
            # `.data` has a version counter of its own: the halves may be views of one tensor, and writing to this one
            # leaves the other, which the branch has saved, as it is.
            place = changed.data if overwrite[changed_at] else torch.empty_like(changed)
            sign = 1 if call.inverse else -1
            if self.exact:
                changed = add_(changed, shift, sign, out=place, check=False)
            else:
                changed = torch.add(changed, shift, alpha=sign, out=place)
        return ((kept, changed) if call.inverse else (changed, kept)), saved


def _is_compiled(branch: nn.Module) -> bool:
    """Return whether a branch or a part of it is compiled."""
    return compiled_part(branch) is not None or any(map(_is_compiled, branch.children()))


def _store_nothing(_: Any) -> Any:
    """Store nothing in the place of a tensor that autograd would save."""


class _Cast(torch.autograd.Function):
    """A tensor and its values in another type, whose gradients are added without a copy of one in the other's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        return x.detach(), x.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        of_x, of_values = gradients
        if of_x is not None and of_values is not None:
            return of_x + of_values, None
        return of_x if of_values is None else of_values.to(ctx.dtype), None


class WholeCoupling(InvertibleLayer):
    """Any invertible module of one's own, in the place of a coupling.

    Args:
        module: has `forward` and `inverse`, each from a tensor of all channels to one of the same shape.
        in_sizes: channels of the two halves before.
        out_sizes: channels of the two halves after.
    """

    def __init__(self, module: nn.Module, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.in_sizes = tuple(in_sizes)
        self.out_sizes = tuple(out_sizes)

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        with right_gradients(inputs[0]):
            return self.module(torch.cat(inputs, 1)).split(self.out_sizes, 1)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        with right_gradients(outputs[0]):
            whole: Tensor = self.module.inverse(torch.cat(outputs, 1))  # type: ignore[operator]
        return whole.split(self.in_sizes, 1)
