"""What channel mixing and resampling share: a layer that multiplies by orthogonal matrices Q.

    forward  y = Q x        inverse  x = Q^T y        gradients  grad x = Q^T grad y,  grad Q = sum of grad y x^T

On the grid (see `grid.py`) y is rounded, and rounding Q^T y does not always give x again. The difference is a few steps
of the grid, because Q changes no norm, and is kept in one byte per value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_iunet.networks.blocks.grid import LIMIT, STEP, on_grid
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix
from monai_iunet.reversible import InvertibleLayer, OptionalTensors, Recall, Tensors, fill

__all__ = ["OrthogonalLayer"]


class OrthogonalLayer(InvertibleLayer):
    """Base of the layers that multiply by orthogonal matrices.

    A subclass sets `matrix` and defines `multiply` and `matrix_gradient`.
    """

    matrix: OrthogonalMatrix

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        """Q x, or Q^T y where `transposed`."""
        raise TypeError(f"{type(self).__name__} does not define `multiply(pieces, matrix, transposed)`.")

    def matrix_gradient(
        self,
        inputs: Tensors,
        outputs: Tensors,
        grad_inputs: Tensors,
        grad_outputs: Tensors,
        matrix: Tensor,
        inverse: bool,
    ) -> Tensor:
        """The gradient of Q of a call; `outputs` are there if `needs_outputs`."""
        raise TypeError(f"{type(self).__name__} does not define `matrix_gradient`.")

    def needs_outputs(self, inverse: bool) -> bool:
        """Whether the gradient of Q needs the outputs of a call, or of a call of `inverse`."""
        return False

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
        steps = [piece.sub_(other).div_(-STEP) for piece, other in zip(again, inputs)]
        for piece in steps:
            self.note_largest(piece, LIMIT / 127)
        return tuple(piece.to(torch.int8) for piece in steps)

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        if not self.exact:
            return self.multiply(outputs, weights[0], not inverse)
        rounded = self._rounded(outputs, weights[0], not inverse)
        return tuple(piece.add_(steps, alpha=STEP) for piece, steps in zip(rounded, remembered))

    def pull_back(
        self, outputs: list[Tensor], grad_outputs: OptionalTensors, call: Recall
    ) -> tuple[Tensors, OptionalTensors, OptionalTensors]:
        inputs = self.recover(tuple(outputs), call.weights, call.remembered, call.inverse)
        grads = fill(grad_outputs, outputs)
        needed = tuple(outputs) if self.needs_outputs(call.inverse) else ()
        outputs.clear()
        return inputs, *self.gradients(inputs, needed, grads, call.weights[0], call.inverse)

    def gradients(
        self, inputs: Tensors, outputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> tuple[Tensors, OptionalTensors]:
        """Gradients of the inputs of a call and of Q."""
        grad_inputs = self.multiply(grad_outputs, matrix, not inverse)
        if not matrix.requires_grad:
            return grad_inputs, (None,)
        return grad_inputs, (self.matrix_gradient(inputs, outputs, grad_inputs, grad_outputs, matrix, inverse),)

    def _call(self, pieces: Tensors, matrix: Tensor, inverse: bool) -> Tensors:
        if not self.exact:
            return self.multiply(pieces, matrix, inverse)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*pieces, matrix)):
            return _RoundedProduct.apply(self, inverse, matrix, *pieces)  # type: ignore[no-untyped-call]
        rounded = self._rounded(pieces, matrix, inverse)
        for piece in rounded:
            self.note_largest(piece)
        return rounded

    def _rounded(self, pieces: Tensors, matrix: Tensor, inverse: bool) -> Tensors:
        with torch.no_grad():
            return tuple(map(on_grid, self.multiply(pieces, matrix, inverse)))


class _RoundedProduct(torch.autograd.Function):
    """The product on the grid for plain autograd, differentiated as when it is rebuilt, to the last bit."""

    @staticmethod
    def forward(ctx: Any, layer: OrthogonalLayer, inverse: bool, matrix: Tensor, *pieces: Tensor) -> Tensors:
        outputs = layer._call(pieces, matrix, inverse)
        ctx.layer, ctx.inverse, ctx.count = layer, inverse, len(pieces)
        ctx.save_for_backward(matrix, *pieces, *(outputs if layer.needs_outputs(inverse) else ()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        matrix, *tensors = ctx.saved_tensors
        inputs, outputs = tuple(tensors[: ctx.count]), tuple(tensors[ctx.count :])
        grad_inputs, (grad_matrix,) = ctx.layer.gradients(inputs, outputs, grad_outputs, matrix, ctx.inverse)
        return None, None, grad_matrix, *grad_inputs
