"""Whether a CUDA graph is recorded, in which nothing has values that a program could look at."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_captured"]


def is_captured(tensor: Tensor) -> bool:
    """Return whether what is done to a tensor is recorded in a CUDA graph.

    Example:
        >>> is_captured(torch.zeros(1))
        False
    """
    return tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
