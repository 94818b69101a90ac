"""Orthogonal matrices that any optimizer can train.

Note [Orthogonal maps]
A matrix A = W - W^T is skew-symmetric whatever the square matrix W is, so W is an ordinary parameter: no constraint, no
projection after a step. A map takes A to an orthogonal matrix, the zero matrix to the identity, and a fixed base B
moves the identity to where training shall start:

    Q = B map(A),    map(0) = I.

    cayley       map(A) = (I + A)^-1 (I - A)
                 The eigenvalues of I + A are 1 + it, so it is invertible for every skew-symmetric A.
    matrix_exp   map(A) = exp(A)
    householder  map(A) = -H_1 ... H_n,   H_j = I - 2 v_j v_j^T / |v_j|^2
                 Reflections along v_j = e_j + the entries of A below its diagonal in column j. No v_j is ever zero, and
                 at A = 0 the product of the reflections is -I.

All three have determinant 1, so Q stays in the component of B. That is why there is a base: the Haar matrix
[[1, 1], [1, -1]] / sqrt(2) has the eigenvalue -1, which no Cayley transform has. Gradients come from autograd through
the linear algebra; nothing is differentiated by hand.

Sources: Cayley 1846; Lezcano-Casado and Martinez-Rubio, Cheap Orthogonal Constraints, 2019 (arXiv 1901.08428); Golub
and Van Loan, Matrix Computations, section 5.1; Etmann, Ke, Schönlieb 2020 (arXiv 2005.05220), appendix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monai_iunet.reversible import is_exporting

__all__ = ["ORTHOGONAL_MAPS", "OrthogonalMatrix"]


def cayley(skew: Tensor) -> Tensor:
    """Cayley transform of skew-symmetric matrices `(..., n, n)`; see Note [Orthogonal maps]."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # solve_ex does not check for singularity, which cannot occur, and so does not wait for the GPU.
    return torch.linalg.solve_ex(identity + skew, identity - skew).result


def householder(skew: Tensor) -> Tensor:
    """Product of one reflection per column of skew-symmetric matrices `(..., n, n)`; see Note [Orthogonal maps]."""
    tails = skew.tril(-1)
    return -torch.linalg.householder_product(tails, 2 / (1 + tails.square().sum(-2)))


ORTHOGONAL_MAPS = {"cayley": cayley, "matrix_exp": torch.matrix_exp, "householder": householder}


class OrthogonalMatrix(nn.Module):
    """A batch of orthogonal matrices, trainable without constraint; see Note [Orthogonal maps].

    Args:
        size: the matrices are `size` x `size`.
        count: number of matrices; None for a single one without batch dimension.
        base: orthogonal matrices `(size, size)` or `(count, size, size)` that training starts from; None for the
            identity.
        orthogonal_map: "cayley", "matrix_exp" or "householder".
        learnable: if False, the matrices stay at `base`.

    Raises:
        ValueError: when `orthogonal_map` is unknown or `base` is not orthogonal.

    Example:
        >>> matrix = OrthogonalMatrix(3, count=2)
        >>> matrix().shape
        torch.Size([2, 3, 3])
    """

    base: Tensor | None
    constant: Tensor | None

    def __init__(
        self,
        size: int,
        count: int | None = None,
        base: Tensor | None = None,
        orthogonal_map: str = "cayley",
        learnable: bool = True,
    ) -> None:
        super().__init__()
        if orthogonal_map not in ORTHOGONAL_MAPS:
            raise ValueError(f"orthogonal_map must be one of {sorted(ORTHOGONAL_MAPS)}, got {orthogonal_map!r}.")
        shape = (size, size) if count is None else (count, size, size)
        if base is not None:
            if base.shape not in ((size, size), shape):
                raise ValueError(f"base must have the shape {(size, size)} or {shape}, got {tuple(base.shape)}.")
            defect = (base.double().mT @ base.double() - torch.eye(size, dtype=torch.double)).abs().max()
            if not defect < 1e-4:
                raise ValueError(f"base must be orthogonal, but B^T B differs from the identity by up to {defect:.3g}.")
            base = base.detach().to(torch.get_default_dtype(), copy=True)
        self.shape = shape
        self.orthogonal_map = orthogonal_map
        self.register_buffer("base", base)
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=learnable)
        self.register_buffer("constant", None, persistent=False)  # the matrices in evaluation
        self._constant_of: tuple[Tensor, int] | None = None  # the weight it was computed from, and its version

    def forward(self) -> Tensor:
        """The matrices, `(size, size)` or `(count, size, size)`, in float32 or the higher precision of the weight."""
        if self.constant is None:
            return self._compute()
        if is_exporting():
            return self.constant
        # The version of a weight, which tells whether it has changed, cannot be read in a compiled graph.
        with_gradients = torch.is_grad_enabled() and self.weight.requires_grad and not torch.jit.is_tracing()
        if with_gradients or torch.compiler.is_compiling():
            return self._compute()
        made_of, version = self._constant_of or (None, -1)
        if made_of is not self.weight or version != self.weight._version:
            self._make_constant()
        return self.constant

    def train(self, mode: bool = True) -> OrthogonalMatrix:
        """In evaluation the matrices are computed once, here: faster, and exporters do not know the maps."""
        super().train(mode)
        self.constant, self._constant_of = None, None
        if not mode:
            self._make_constant()
        return self

    def _make_constant(self) -> None:
        # A sharded or inference weight does not tell when it changes; then each call computes the matrices.
        if hasattr(self.weight, "full_tensor") or self.weight.is_inference():
            return
        with torch.inference_mode(False), torch.no_grad():
            self.constant = self._compute()
        self._constant_of = (self.weight, self.weight._version)

    def _compute(self) -> Tensor:
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight.to(precision)
            matrix = ORTHOGONAL_MAPS[self.orthogonal_map](weight - weight.mT)
            return matrix if self.base is None else _polish(self.base.to(precision)) @ matrix

    def _apply(self, fn: Any, recurse: bool = True) -> OrthogonalMatrix:
        # A cast would round the constant: compute it anew from what became of the weight.
        self.constant = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self if self.training else self.train(False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.shape}, orthogonal_map={self.orthogonal_map!r}, learnable={self.weight.requires_grad}"


def _polish(matrix: Tensor) -> Tensor:
    """An orthogonal matrix, from one that was rounded to fewer digits.

    Two steps of the Newton-Schulz iteration B (3 I - B^T B) / 2, each of which squares the error; they undo a rounding
    to bfloat16. A network may be cast to a lower precision and back.
    """
    for _ in range(2):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.mT @ matrix)
    return matrix
