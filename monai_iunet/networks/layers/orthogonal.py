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
the linear algebra, but for that of the Cayley transform.

Sources: Cayley 1846; Lezcano-Casado and Martinez-Rubio, Cheap Orthogonal Constraints, 2019 (arXiv 1901.08428); Golub
and Van Loan, Matrix Computations, section 5.1; Etmann, Ke, Schönlieb 2020 (arXiv 2005.05220), appendix.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import has_values, is_exporting
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.networks.layers.cuda_graph import is_captured
from monai_iunet.networks.layers.full_precision import full_precision

__all__ = ["ORTHOGONAL_MAPS", "OrthogonalMatrix"]


def cayley(skew: Tensor) -> Tensor:
    """Return the Cayley transform of skew-symmetric matrices `(..., n, n)`; see Note [Orthogonal maps]."""
    if needs_plain_operators(skew):
        return _cayley(skew)
    matrix: Tensor = _Cayley.apply(skew)  # type: ignore[no-untyped-call]
    return matrix


def _cayley(skew: Tensor) -> Tensor:
    identity = _identity_like(skew)
    # solve_ex does not check for singularity, which cannot occur, and so does not wait for the GPU.
    return torch.linalg.solve_ex(identity + skew, identity - skew).result


class _Cayley(torch.autograd.Function):
    """The Cayley transform, whose gradient follows from the transform alone.

    That of `solve_ex` would solve once more, in the many small operations that a GPU makes of it. With Q = map(A), and
    (I + A)^-1 = (I + Q) / 2, a change dA changes Q by -(I + Q) dA (I + Q) / 2.
    """

    @staticmethod
    def forward(ctx: Any, skew: Tensor) -> Tensor:
        matrix = _cayley(skew)
        ctx.save_for_backward(matrix)
        return matrix

    # Where the backward pass is compiled, as with a whole training step, it would ask twice for what was saved.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        with full_precision(matrix.device.type):
            twice_inverse = matrix.mT + _identity_like(matrix)
            return twice_inverse @ gradient @ (-0.5 * twice_inverse)


def _identity_like(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def householder(skew: Tensor) -> Tensor:
    """Multiply one reflection per column of skew-symmetric matrices `(..., n, n)`; see Note [Orthogonal maps]."""
    tails = skew.tril(-1)
    return -torch.linalg.householder_product(tails, 2 / (1 + tails.square().sum(-2)))


# The position of a map is the version of a state dictionary: append, do not sort.
ORTHOGONAL_MAPS = {"cayley": cayley, "matrix_exp": torch.matrix_exp, "householder": householder}


class OrthogonalMatrix(nn.Module):
    """A batch of orthogonal matrices, trainable without constraint; see Note [Orthogonal maps].

    In evaluation, without gradients, the matrices are computed once and used again for as long as the weights have the
    values that they were computed from. Exporters get them as constants, because they do not know the maps.

    The same weights are another matrix by another map, so a state dictionary that was saved with one map is not loaded
    into another; what holds nothing but tensors, as a safetensors file, cannot tell.

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
        self._start = None if base is None else _checked(base, size, shape)
        self.shape = shape
        self.orthogonal_map = orthogonal_map
        self._version = 1 + list(ORTHOGONAL_MAPS).index(orthogonal_map)  # which PyTorch saves with a state dictionary
        self.register_buffer("base", None if base is None else torch.empty(base.shape))
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=learnable)
        # Weight and base, their values, and the matrices that were computed from these.
        self._constant: tuple[tuple[Tensor, ...], list[Tensor], Tensor] | None = None
        if base is not None and self._start is None and has_values(self.weight):
            raise ValueError("base must have values, but it is on the device meta, or fake.")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to where training starts; a module that was built without values gets them."""
        with torch.no_grad():
            self.weight.zero_()
            if self.base is not None and self._start is not None:
                self.base.copy_(self._start)

    def forward(self) -> Tensor:
        """Return the matrices, `(size, size)` or `(count, size, size)`, in float32 or the weight's higher precision."""
        sources = self._sources()
        if self.training or torch.compiler.is_dynamo_compiling():
            return self._compute(*sources)
        if is_exporting() and self._constant is not None and "weight" in self._parameters:
            sources = self._constant[0]  # for the exporter has put tensors without values in their place
        if not all(map(has_values, sources)):
            return self._compute(*sources)
        if torch.jit.is_tracing() or is_exporting():
            # In a thread of its own nothing is recorded.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self._constant_of, sources).result()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self._compute(*sources)
        return self._constant_of(sources)

    def train(self, mode: bool = True) -> OrthogonalMatrix:
        """Set the mode.

        In evaluation the matrices are constants, which are computed here, because an exporter will ask for them.
        """
        super().train(mode)
        self._constant = None
        sources = self._sources()
        if not mode and all(map(has_values, sources)):
            self._constant_of(sources)
        return self

    def _sources(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.base is None else (self.weight, self.base)

    def _constant_of(self, sources: tuple[Tensor, ...]) -> Tensor:
        """Return the matrices of weight and base in evaluation, computed anew only if the values of these have changed.

        Values are compared, not versions: writing to `.data`, as averages of weights do, leaves no trace but them.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self._constant is not None:
                made_of, values, matrices = self._constant
                same = len(made_of) == len(sources) and all(a is b for a, b in zip(made_of, sources))
                # Values cannot be compared while a CUDA graph is recorded; its warm-up has compared them.
                if same and (is_captured(sources[0]) or all(map(_equal, values, sources))):
                    return matrices
            matrices = self._compute(*sources)
            self._constant = sources, [source.detach().clone() for source in sources], matrices
            return matrices

    def _compute(self, weight: Tensor, base: Tensor | None = None) -> Tensor:
        precision = torch.promote_types(weight.dtype, torch.float32)
        with full_precision(weight.device.type):
            weight = weight.to(precision)
            matrix = ORTHOGONAL_MAPS[self.orthogonal_map](weight - weight.mT)
            return _to_the_last_digit(matrix if base is None else _polish(base.to(precision)) @ matrix)

    def _apply(self, fn: Any, recurse: bool = True) -> OrthogonalMatrix:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.train(self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        saved = local_metadata.get("version", self._version)
        if saved != self._version:
            name = dict(enumerate(ORTHOGONAL_MAPS, 1)).get(saved)
            (*_, errors) = args
            told = f"was saved with orthogonal_map={name!r}, this network has {self.orthogonal_map!r}"
            if not any(told in error for error in errors):  # once for all matrices of a network
                errors.append(f"{prefix}weight {told}, which makes another matrix of it. Build the network as it was.")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.train(self.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constant": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.shape}, orthogonal_map={self.orthogonal_map!r}, learnable={self.weight.requires_grad}"


def _checked(base: Tensor, size: int, shape: tuple[int, ...]) -> Tensor | None:
    """Return a copy of orthogonal matrices on the CPU; None of ones without values."""
    if base.shape not in ((size, size), shape):
        raise ValueError(f"base must have the shape {(size, size)} or {shape}, got {tuple(base.shape)}.")
    if not has_values(base):
        return None
    base = base.detach().to("cpu", torch.double, copy=True)
    defect = (base.mT @ base - torch.eye(size, dtype=torch.double, device="cpu")).abs().max()
    if not defect < 1e-4:
        raise ValueError(f"base must be orthogonal, but B^T B differs from the identity by up to {defect:.3g}.")
    return base


def _equal(first: Tensor, second: Tensor) -> bool:
    same_kind = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return same_kind and torch.equal(first, second)


def _to_the_last_digit(matrix: Tensor) -> Tensor:
    """Return an orthogonal matrix without the errors of the arithmetic that it was computed in; the gradient stays.

    Computed in float32, Q^T Q of 512 x 512 weights of size 1 differs from I by 4e-6. A step of the iteration of
    `_polish` in float64 leaves what rounding to float32 makes, 6e-8. Not on devices that may have no float64, such as
    the GPUs of Apple and some of Intel.
    """
    if matrix.device.type not in ("cpu", "cuda"):
        return matrix
    with torch.no_grad():
        precise = matrix.double()
        change = 0.5 * (precise - precise @ (precise.mT @ precise))
    return matrix + change.to(matrix.dtype)


def _polish(matrix: Tensor) -> Tensor:
    """Return an orthogonal matrix, from one that was rounded to fewer digits.

    Two steps of the Newton-Schulz iteration B (3 I - B^T B) / 2, each of which squares the error; they undo a rounding
    to bfloat16. A network may be cast to a lower precision and back.
    """
    for _ in range(2):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.mT @ matrix)
    return matrix
