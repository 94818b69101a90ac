"""Additive coupling: a bijection made of an arbitrary network.

The state is a pair (a, b) of tensors, which split the channels. The branch F may be any network:

    forward   (a, b) -> (b, a + F(b))
    inverse   (b, c) -> (c - F(b), b)

Halves change places, so that the next coupling changes the other one. The backward pass evaluates F once: that
evaluation gives both the rebuilt a = c - F(b) and the graph for the gradients

    grad a = grad c,    grad b += F'(b)^T grad c.

Source: Dinh, Krueger, Bengio, NICE, 2014 (arXiv 1410.8516).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from monai_iunet.networks.blocks.grid import on_grid, round_to_grid
from monai_iunet.reversible import InvertibleLayer, OptionalTensors, Recall, Tensors, differentiate

__all__ = ["AdditiveCoupling", "WholeCoupling"]


class AdditiveCoupling(InvertibleLayer):
    """Additive coupling of a pair of tensors.

    Args:
        branch: the network F, from tensors like the second of the pair to tensors like the first.

    Example:
        >>> coupling = AdditiveCoupling(nn.Conv2d(2, 1, 3, padding=1))
        >>> first, second = coupling(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
        >>> first.shape, second.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 1, 4, 4]))
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        changed, kept = inputs
        changed = changed + self._shift(kept, changed)
        if self.exact:
            self.note_largest(changed)
        return kept, changed

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        kept, changed = outputs
        changed = changed - self._shift(kept, changed)
        if self.exact:
            self.note_largest(changed)
        return changed, kept

    def _shift(self, kept: Tensor, changed: Tensor) -> Tensor:
        shift = self.branch(kept)
        if shift.shape != changed.shape:
            raise ValueError(
                f"A coupling branch must map {tuple(kept.shape)} to {tuple(changed.shape)}, the shape of the half that "
                f"it is added to; {type(self.branch).__name__} returned {tuple(shift.shape)}."
            )
        return round_to_grid(shift) if self.exact else shift

    def pull_back(
        self, outputs: list[Tensor], grad_outputs: OptionalTensors, call: Recall
    ) -> tuple[Tensors, OptionalTensors, OptionalTensors]:
        changed_at, kept_at = (0, 1) if call.inverse else (1, 0)
        changed, kept = outputs[changed_at], outputs[kept_at]
        grad_changed, grad_kept = grad_outputs[changed_at], grad_outputs[kept_at]
        leaf = kept.detach().requires_grad_()
        with call.replay() as leaf_weights:
            shift = self.branch(leaf)
        with torch.no_grad():
            # `.data` has a version counter of its own: the halves may be views of one tensor, and writing to this one
            # leaves the other, which the branch has saved, as it is.
            place = changed.data if call.overwrite[changed_at] else None
            added = on_grid(shift) if self.exact else shift.to(changed.dtype)
            changed = torch.add(changed, added, alpha=1 if call.inverse else -1, out=place)
            del added
        grad_shift = None
        if grad_changed is not None:
            grad_shift = (-grad_changed if call.inverse else grad_changed).to(shift.dtype)
        # Hold the place of the shift in the graph but not the shift, whose memory the gradients can then have.
        edge = get_gradient_edge(shift) if shift.requires_grad else None
        del shift
        gradients: OptionalTensors = (None,) * (1 + len(leaf_weights))
        if edge is not None:
            gradients = differentiate([edge], (leaf, *leaf_weights), (grad_shift,))
        through_branch = gradients[0]
        if grad_kept is None:
            grad_kept = through_branch
        elif through_branch is not None:
            grad_kept = grad_kept + through_branch
        inputs, grad_inputs = (changed, kept), (grad_changed, grad_kept)
        return (
            (inputs[::-1], grad_inputs[::-1], gradients[1:]) if call.inverse else (inputs, grad_inputs, gradients[1:])
        )


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
        return self.module(torch.cat(inputs, 1)).split(self.out_sizes, 1)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        whole: Tensor = self.module.inverse(torch.cat(outputs, 1))  # type: ignore[operator]
        return whole.split(self.in_sizes, 1)
