"""What channel mixing and resampling share: a layer that multiplies by orthogonal matrices Q.

    forward  y = Q x        inverse  x = Q^T y        gradients  grad x = Q^T grad y,  grad Q = sum of grad y x^T

Beside Q, x is all that has to be saved, and what the backward pass rebuilds.

On the grid (see `grid.py`) y is rounded, and rounding Q^T y does not always give x again. The difference is a few steps
of the grid, because Q changes no norm, and takes less than a byte per value. This is done in slabs of voxels, since
what is computed on the way takes more memory than the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from monai_iunet.engine.pytorch_private import frees_gradients_before_converting, is_batched
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.reversible import Call, InvertibleLayer, Tensors
from monai_iunet.engine.slabs import slabs
from monai_iunet.networks.blocks.grid import (
    is_integer,
    pack,
    read,
    read_steps,
    round_to_grid,
    step_of,
    unpack,
    values,
    write,
    write_steps,
)
from monai_iunet.networks.layers.autocast import autocast_type
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix

__all__ = ["OrthogonalLayer", "as_one_expression"]


class OrthogonalLayer(InvertibleLayer):
    """Base of the layers that multiply by orthogonal matrices.

    A subclass sets `matrix` and defines `multiply` and `matrix_gradient`.

    Attributes:
        in_sizes: channels of the pieces before.
        out_sizes: channels of the pieces after.
        stride: factor per axis by which the pieces after are smaller; empty for none.
        rounds_gradients: whether the gradients of the inputs are rounded to bfloat16 where autocast computes in it, as
            those of a convolution are, if that saves memory. Not to float16, whose range asks for a scaled loss.
    """

    is_function_of_weights = True
    matrix: OrthogonalMatrix
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    stride: tuple[int, ...] = ()
    rounds_gradients: bool = False

    def multiply(self, pieces: Tensors, matrix: Tensor, transposed: bool) -> Tensors:
        """Return Q x, or Q^T y where `transposed`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `multiply(pieces, matrix, transposed)`.")

    def multiply_in_place(self, pieces: list[Tensor], matrix: Tensor, transposed: bool) -> Tensors:
        """Do the same without a gradient, with pieces whose memory may be reused; the list is emptied.

        A subclass that can do with less memory than pieces and products overrides it.
        """
        products = self.multiply(tuple(pieces), matrix, transposed)
        pieces.clear()
        return products

    def matrix_gradient(
        self, states: Tensors, grad_inputs: Tensors, grad_outputs: Tensors, matrix: Tensor, inverse: bool
    ) -> Tensor:
        """Return the gradient of Q of a call with the inputs `states`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `matrix_gradient`.")

    def weights(self) -> Tensors:
        return (self.matrix(),)

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        return self._call(inputs, weights[0], inverse=False)

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        return self._call(outputs, weights[0], inverse=True)

    def replace(self, inputs: list[Tensor], inverse: bool = False) -> Tensors:
        return (
            super().replace(inputs, inverse) if self.exact else self.multiply_in_place(inputs, self.matrix(), inverse)
        )

    def remember(self, inputs: Tensors, outputs: Tensors, weights: Tensors, inverse: bool) -> Tensors:
        if not self.exact:
            return ()
        packed: Tensor | None = None
        for before, after in self._slabs(inputs, outputs, inverse):
            steps = torch.cat([read_steps(piece) for piece in _cut(inputs, before)], 1)
            steps.sub_(self._steps_back(_cut(outputs, after), weights[0], inverse))
            part = pack(steps, inputs[0])
            if packed is None:
                packed = part.new_empty((*part.shape[:2], *inputs[0].shape[2:]))
            packed[:, :, before] = part
        assert packed is not None
        return (packed,)

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        if not remembered:  # not by `exact`, which may have been set since
            return self.multiply(outputs, weights[0], not inverse)
        (packed,) = remembered
        inputs = self._empty(outputs, not inverse)
        for before, after in self._slabs(inputs, outputs, inverse):
            steps = self._steps_back(_cut(outputs, after), weights[0], inverse)
            steps.add_(unpack(packed[:, :, before], inputs[0], steps.shape[1]))
            for piece, part in zip(_cut(inputs, before), steps.split([piece.shape[1] for piece in inputs], 1)):
                write_steps(piece, part)
        return inputs

    def _steps_back(self, outputs: Tensors, matrix: Tensor, inverse: bool) -> Tensor:
        """Return Q^T y, or Q y where `inverse`, in whole steps of the grid."""
        back = self.multiply(tuple(map(read, outputs)), matrix, not inverse)
        return torch.cat(back, 1).div_(step_of(outputs[0])).round_()

    def rebuild(self, outputs: list[Tensor], overwrite: Sequence[bool], call: Call) -> tuple[Tensors, list[Tensor]]:
        (matrix,) = (weight.detach() for weight in call.weights)
        if all(overwrite) and not call.remembered:
            inputs = self.multiply_in_place(outputs, matrix, not call.inverse)
        else:
            inputs = self.recover(tuple(outputs), (matrix,), call.remembered, call.inverse)
            outputs.clear()
        # The gradient of the matrix is a sum over voxels, whose last digits depend on the order of axes in memory.
        inputs = tuple(map(Tensor.detach, call.leaves(inputs)))
        saved = inputs if call.weights[0].requires_grad else ()
        return inputs, [matrix, *map(Tensor.detach, saved)]

    def _call(self, pieces: Tensors, matrix: Tensor, inverse: bool) -> Tensors:
        integers = self.exact and is_integer(pieces[0])
        if needs_plain_operators(*pieces, matrix) and not integers:
            products = self.multiply(pieces, matrix, inverse)
            return tuple(map(round_to_grid, products)) if self.exact else products
        return _Product.apply(self, inverse, matrix, *pieces)  # type: ignore[no-untyped-call]

    def _empty(self, pieces: Tensors, inverse: bool, dtype: torch.dtype | None = None) -> Tensors:
        """Return tensors without values for the product of pieces, in a type, by default that of the pieces."""
        batch, _, *size = pieces[0].shape
        if self.stride:
            size = [extent * by if inverse else extent // by for extent, by in zip(size, self.stride)]
        return tuple(
            pieces[0].new_empty((batch, channels, *size), dtype=dtype)
            for channels in (self.in_sizes if inverse else self.out_sizes)
        )

    def _slabs(self, inputs: Tensors, outputs: Tensors, inverse: bool) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the first spatial axis of inputs and outputs that belong together."""
        factor = self.stride[0] if self.stride else 1
        low = inputs if inverse else outputs
        size = low[0].shape[2]
        for slab in slabs(size, sum(piece.numel() for piece in low) // size, low[0].device):
            high = slice(slab.start * factor, slab.stop * factor)
            yield (slab, high) if inverse else (high, slab)


class _Product(torch.autograd.Function):
    """The product, whose gradients are the same to the last bit whether activations are stored or rebuilt."""

    @staticmethod
    def forward(ctx: Any, layer: OrthogonalLayer, inverse: bool, matrix: Tensor, *pieces: Tensor) -> Tensors:
        if layer.exact:
            outputs = layer._empty(pieces, inverse)
            for before, after in layer._slabs(pieces, outputs, inverse):
                products = layer.multiply(tuple(map(read, _cut(pieces, before))), matrix, inverse)
                for piece, product in zip(_cut(outputs, after), products):
                    write(piece, product)
        else:
            outputs = layer.multiply(pieces, matrix, inverse)
        ctx.layer, ctx.inverse, ctx.integers = layer, inverse, layer.exact and is_integer(pieces[0])
        dtype, autocast = pieces[0].dtype, autocast_type(pieces[0].device)
        # Autograd makes float32 of them again, when the gradients of the outputs are gone.
        rounds = layer.rounds_gradients and frees_gradients_before_converting()
        ctx.dtype = torch.bfloat16 if rounds and dtype == torch.float32 and autocast == torch.bfloat16 else dtype
        ctx.save_for_backward(matrix, *(pieces if matrix.requires_grad else ()))
        return outputs

    # Where the backward pass is compiled, as with a whole training step, it would ask twice for what was saved.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        matrix, *states = ctx.saved_tensors
        layer, inverse = ctx.layer, ctx.inverse
        wanted = ctx.needs_input_grad[2]
        if is_batched(*grad_outputs):
            return None, None, *_of_batches(ctx, matrix, tuple(states), grad_outputs)
        in_slabs = ctx.integers or ctx.dtype != grad_outputs[0].dtype
        if in_slabs and not torch.is_grad_enabled():
            grad_inputs, grad_matrix = _in_slabs(layer, matrix, tuple(states), grad_outputs, inverse, ctx.dtype)
        elif not ctx.integers:
            grad_inputs = layer.multiply(grad_outputs, matrix, not inverse)
            grad_matrix = None
            if wanted:
                grad_matrix = layer.matrix_gradient(tuple(states), grad_inputs, grad_outputs, matrix, inverse)
        else:  # a second derivative is asked for
            numbers = tuple(values(state, torch.float32) for state in states)
            gradients = tuple(map(Tensor.float, grad_outputs))
            products = layer.multiply(gradients, matrix, not inverse)
            grad_matrix = layer.matrix_gradient(numbers, products, gradients, matrix, inverse) if wanted else None
            grad_inputs = tuple(product.to(grad_outputs[0].dtype) for product in products)
        return None, None, grad_matrix, *grad_inputs


def _of_batches(ctx: Any, matrix: Tensor, states: Tensors, grad_outputs: Tensors) -> tuple[Tensor | None, ...]:
    """Return the gradients of the matrix and of the inputs for several gradients at once, as PyTorch computes them."""
    layer, inverse, dtype = ctx.layer, ctx.inverse, grad_outputs[0].dtype
    is_recorded = torch.is_grad_enabled()
    if not states:  # any, since the gradients of the inputs do not depend on them
        states = layer._empty(tuple(matrix.new_empty(gradient.shape) for gradient in grad_outputs), not inverse)
    elif ctx.integers:
        states = tuple(values(state, torch.float32) for state in states)

    def asked(tensor: Tensor) -> Tensor:
        # A view, since the gradient of a matrix is not to go through inputs that depend on it.
        return tensor.view_as(tensor) if is_recorded and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        matrix, *inputs = map(asked, (matrix, *states))
        products = layer.multiply(tuple(inputs), matrix, inverse)
    gradients = [gradient.to(product.dtype) for gradient, product in zip(grad_outputs, products)]
    found = torch.autograd.grad(products, [matrix, *inputs], gradients, create_graph=is_recorded)
    of_matrix, *of_inputs = found
    return of_matrix if ctx.needs_input_grad[2] else None, *(gradient.to(dtype) for gradient in of_inputs)


def _in_slabs(
    layer: OrthogonalLayer,
    matrix: Tensor,
    states: Tensors,
    grad_outputs: Tensors,
    inverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensors, Tensor | None]:
    """Return the gradients of the inputs, in 16 bits, and of the matrix; in float32 between.

    Args:
        layer: what was applied.
        matrix: its matrix.
        states: the inputs; none if the gradient of the matrix is not wanted.
        grad_outputs: gradients of the outputs.
        inverse: whether the inverse was applied.
        dtype: of the gradients of the inputs.
    """
    grad_inputs = layer._empty(grad_outputs, not inverse, dtype)
    grad_matrix = None
    for before, after in layer._slabs(grad_inputs, grad_outputs, inverse):
        gradients = tuple(piece.float() for piece in _cut(grad_outputs, after))
        products = layer.multiply(gradients, matrix, not inverse)
        for piece, product in zip(_cut(grad_inputs, before), products):
            piece.copy_(product)
        if states:
            numbers = tuple(map(read, _cut(states, before)))
            part = layer.matrix_gradient(numbers, products, gradients, matrix, inverse)
            grad_matrix = part if grad_matrix is None else grad_matrix.add_(part)
    return grad_inputs, grad_matrix


def _cut(pieces: Tensors, slab: slice) -> Tensors:
    """Return a slab of the first spatial axis of pieces."""
    return tuple(piece[:, :, slab] for piece in pieces)


def as_one_expression(*tensors: Tensor) -> bool:
    """Return whether what is done to tensors is recorded, so that no result may be written into one made before."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return recorded or needs_plain_operators(*tensors)
