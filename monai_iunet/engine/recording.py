"""Who records what is computed: autograd alone, or something that knows PyTorch's own operators only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from monai_iunet.engine.pytorch_private import can_pack_saved_tensors, is_exporting, is_in_forward_mode

__all__ = ["is_transformed", "needs_plain_operators"]


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether `torch.func` or forward-mode differentiation works on tensors."""
    if not can_pack_saved_tensors():
        return True
    return is_in_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def needs_plain_operators(*tensors: Tensor) -> bool:
    """Return whether what is done to tensors is watched by something that knows PyTorch's own operators only.

    That is `torch.func`, forward-mode differentiation, a tracer, a compiler or an exporter.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or is_exporting() or is_transformed(*tensors)
