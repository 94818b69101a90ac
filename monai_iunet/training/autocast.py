"""Training in bfloat16 on processors that compute faster in it."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor

from monai_iunet.engine.pytorch_private import tree_map
from monai_iunet.networks.layers.small_convolution import right_gradients

__all__ = ["AutocastInferer"]


class AutocastInferer(SimpleInferer):
    """Runs a network in bfloat16, on a GPU or a CPU, and returns float32, in the network's lists and dictionaries.

    MONAI's trainer, with `amp`, does this on GPUs alone. Use it as `train#inferer` on a CPU with AVX-512 BF16 or AMX.
    Convolutions whose gradients would be wrong there, see `right_gradients`, are computed in float32.

    Example:
        >>> network = torch.nn.Linear(2, 1)
        >>> AutocastInferer()(torch.rand(1, 2), network).dtype
        torch.float32
    """

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, torch.bfloat16), right_gradients(inputs):
            outputs: Any = super().__call__(inputs, network, *args, **kwargs)
        return tree_map(lambda output: output.float() if isinstance(output, Tensor) else output, outputs)
