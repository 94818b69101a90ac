"""What MONAI's tensors carry beside their values, affine matrix and file name, through a network.

Within it tensors are plain: a `MetaTensor` copies what it carries with every operation, and loses it where memory is
written over. What comes out carries what the image did, as behind the networks of MONAI.
"""

from __future__ import annotations

from typing import Any

from monai.data import MetaTensor
from torch import Tensor

__all__ = ["with_metadata", "without_metadata"]


def without_metadata(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values and memory that carries nothing else."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def with_metadata(tensor: Tensor, image: Tensor) -> Tensor:
    """Return a tensor of the same values and memory that carries what an image does, if that is a `MetaTensor`."""
    if not isinstance(image, MetaTensor):
        return tensor
    wrapped: Any = tensor.as_subclass(MetaTensor)
    # As MONAI does for the result of an operation: nothing where it is told not to track.
    (result,) = MetaTensor.update_meta([wrapped], None, (image,), {})
    return result
