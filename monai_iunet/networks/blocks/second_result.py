"""Noticing a branch whose second evaluation gives another result than the first.

The engine has again what a branch depends on, as far as it knows of it: not of objects of one's own, of global
variables, or of dispatch modes, which might count everything twice. A branch that has changed these adds something else
to the rebuilt state than it has taken from it, and all gradients are wrong. So of what a branch of one's own, one with
hooks, or any within a dispatch mode returns, a few values are kept until the backward pass, and compared with those
that it returns then. For the branches of this package nothing of it is needed outside of such modes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.pytorch_private import dispatch_modes, has_values
from monai_iunet.networks.blocks.grid import read, step_of
from monai_iunet.networks.layers.autocast import autocast_type
from monai_iunet.networks.layers.cuda_graph import is_captured

__all__ = ["check_second_result", "is_to_be_checked", "sample", "sampled_shift"]

PER_AXIS = 4  # values that are kept
# Of a second result, relative: by more it differs for another reason than the rounding of what it is computed from.
LARGEST_ERROR = 0.05
DIGITS = 10  # by how many steps of the last digit of the state values may differ
SHORT = {torch.float16, torch.bfloat16}


def is_to_be_checked(branch: nn.Module, state: Tensor, exact: bool) -> bool:
    """Return whether it is not known that a branch repeats itself, and can be seen.

    In 16 bits it cannot, unless states are exact: rounding alone may change most of what a branch returns.

    Args:
        branch: of a coupling.
        state: that its result was added to.
        exact: whether the state is on a grid, see `grid.py`.
    """
    has_some = has_values(state) and state.numel() > 0 and not is_captured(state)
    if not has_some or not (dispatch_modes() or any(map(runs_foreign_code, branch.modules()))):
        return False
    types = {autocast_type(state.device), state.dtype, *(parameter.dtype for parameter in branch.parameters())}
    return exact or not types & SHORT


def sample(x: Tensor, exact: bool = False) -> Tensor:
    """Return a few values of a tensor, in float32 or better.

    Args:
        x: what is added to a state, or a state.
        exact: whether it is a state on a grid.
    """
    places = tuple(slice(size // (2 * PER_AXIS), None, -(-size // PER_AXIS)) for size in x.shape)
    piece = x.detach()[places]
    return read(piece) if exact else piece.to(torch.promote_types(x.dtype, torch.float32))


def sampled_shift(before: Tensor, after: Tensor, exact: bool) -> Tensor:
    """Return a few values of what was added to a state."""
    return sample(after, exact) - sample(before, exact)


def check_second_result(branch: nn.Module, first: Tensor, second: Tensor, state: Tensor, exact: bool) -> None:
    """Compare what a branch returns in the backward pass with what it returned in the forward pass.

    Args:
        branch: that was evaluated.
        first: a few values of what it has added to a state, see `sampled_shift`.
        second: the same values, now.
        state: that it was added to.
        exact: whether the state is on a grid.

    Raises:
        RuntimeError: when they differ by more than rounding.
    """
    size = torch.maximum(*map(torch.linalg.vector_norm, (first, second)))
    # What was added is known to the last digits of the state, or to its grid.
    digit = step_of(state) if exact else torch.finfo(state.dtype).eps * sample(state).abs().max()
    error = torch.linalg.vector_norm(second - first)
    if error.isfinite() and error > LARGEST_ERROR * size + DIGITS * digit * first.numel() ** 0.5:
        raise RuntimeError(
            f"{type(branch).__name__} returns something else in the backward pass, which evaluates it once more, than "
            f"in the forward pass; they differ by {float(error / size):.0%}. It depends on what the engine does not "
            "know, such as an object of one's own, a global variable or a dispatch mode that has changed meanwhile, or "
            "it is so large that rounding changes states. Let it keep what it depends on in attributes that are "
            "tensors, numbers, or containers of them, stay in the mode for the backward pass, normalize it, or store "
            'activations (activations="store").'
        )
