"""What channel mixing and resampling share: a layer that multiplies by orthogonal matrices Q.

    forward  y = Q x        inverse  x = Q^T y        gradients  grad x = Q^T grad y,  grad Q = sum of grad y x^T

The gradient of Q can be had from x as well as from y = Q x, whichever is cheaper. It is all that has to be saved beside
Q, and what the backward pass rebuilds.

On the grid (see `grid.py`) y is rounded, and rounding Q^T y does not always give x again. The difference is a few steps
of the grid, because Q changes no norm, and is kept in one byte per value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_iunet.engine.reversible import Call, InvertibleLayer, Tensors, is_recorded_by_autograd_alone
from monai_iunet.networks.blocks.grid import LIMIT, STEP, note_largest, on_grid, round_to_grid
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix

__all__ = ["OrthogonalLayer"]


class OrthogonalLayer(InvertibleLayer):
    """Base of the layers that multiply by orthogonal matrices.

    A subclass sets `matrix` and defines `multiply` and `matrix_gradient`.

    Attributes:
        uses_outputs: whether `matrix_gradient` of a call of `forward` takes outputs, not inputs; of `inverse`, always
            inputs.
    """

    is_function_of_weights = True
    uses_outputs: bool = False
    matrix: OrthogonalMatrix

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        """Q x, or Q^T y where `transposed`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `multiply(pieces, matrix, transposed)`.")

    def matrix_gradient(
        self, states: Tensors, grad_inputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> Tensor:
        """The gradient of Q of a call, from its inputs or, if `uses_outputs` and not `inverse`, from its outputs."""
        raise NotImplementedError(f"{type(self).__name__} does not define `matrix_gradient`.")

    def weights(self) -> Tensors:
        return (self.matrix(),)

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        return self._call(inputs, weights[0], inverse=False)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        return self._call(outputs, weights[0], inverse=True)

    def remember(self, inputs: Tensors, outputs: Tensors, weights: Tensors, inverse: bool) -> Tensors:
        if not self.exact:
            return ()
        again = self._rounded(outputs, weights[0], not inverse)
        steps = [piece.sub_(original).div_(-STEP) for piece, original in zip(again, inputs)]
        for piece in steps:
            note_largest(piece, LIMIT / 127)
        return tuple(piece.to(torch.int8) for piece in steps)

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        if not self.exact:
            return self.multiply(outputs, weights[0], not inverse)
        rounded = self._rounded(outputs, weights[0], not inverse)
        return tuple(piece.add_(steps, alpha=STEP) for piece, steps in zip(rounded, remembered))

    def rebuild(self, outputs: list[Tensor], overwrite: Sequence[bool], call: Call) -> tuple[Tensors, list[Tensor]]:
        (matrix,) = (weight.detach() for weight in call.weights)
        inputs = self.recover(tuple(outputs), (matrix,), call.remembered, call.inverse)
        saved = self._saved(tuple(outputs), inputs, call.inverse) if call.weights[0].requires_grad else ()
        outputs.clear()
        return inputs, [matrix, *map(Tensor.detach, saved)]

    def _saved(self, outputs: Tensors, inputs: Tensors, inverse: bool) -> Tensors:
        """What autograd is to save for the gradient of Q."""
        return outputs if self.uses_outputs and not inverse else inputs

    def _call(self, pieces: Tensors, matrix: Tensor, inverse: bool) -> Tensors:
        if is_recorded_by_autograd_alone(*pieces, matrix):
            products = self.multiply(pieces, matrix, inverse)
            return tuple(map(round_to_grid, products)) if self.exact else products
        return _Product.apply(self, inverse, matrix, *pieces)  # type: ignore[no-untyped-call]

    def _rounded(self, pieces: Tensors, matrix: Tensor, inverse: bool) -> Tensors:
        return tuple(map(on_grid, self.multiply(pieces, matrix, inverse)))


class _Product(torch.autograd.Function):
    """The product, whose gradients are the same to the last bit whether activations are stored or rebuilt."""

    @staticmethod
    def forward(ctx: Any, layer: OrthogonalLayer, inverse: bool, matrix: Tensor, *pieces: Tensor) -> Tensors:
        if layer.exact:
            outputs = layer._rounded(pieces, matrix, inverse)
            for piece in outputs:
                note_largest(piece)
        else:
            outputs = layer.multiply(pieces, matrix, inverse)
        ctx.layer, ctx.inverse = layer, inverse
        saved = layer._saved(outputs, pieces, inverse) if matrix.requires_grad else ()
        ctx.save_for_backward(matrix, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        matrix, *states = ctx.saved_tensors
        grad_inputs = ctx.layer.multiply(grad_outputs, matrix, not ctx.inverse)
        grad_matrix = None
        if ctx.needs_input_grad[2]:
            grad_matrix = ctx.layer.matrix_gradient(tuple(states), grad_inputs, grad_outputs, matrix, ctx.inverse)
        return None, None, grad_matrix, *grad_inputs
