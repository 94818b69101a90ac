"""An inferer that runs a network in bfloat16."""

from __future__ import annotations

import torch

from monai_iunet import AutocastInferer, SegIUNet


def test_all_levels_of_deep_supervision_are_float32() -> None:
    network = SegIUNet(2, 1, 3, (4, 8, 8), couplings=1, deep_supervision=True)
    images = torch.rand(1, 1, 8, 8)
    levels = AutocastInferer()(images, network)
    assert [(tuple(level.shape), level.dtype) for level in levels] == [
        ((1, 3, 8, 8), torch.float32),
        ((1, 3, 4, 4), torch.float32),
    ]
    assert AutocastInferer()(images, network.eval()).dtype == torch.float32


def test_outputs_in_any_containers_are_float32() -> None:
    convolution = torch.nn.Conv2d(1, 2, 1)
    outputs = AutocastInferer()(
        torch.rand(1, 1, 8, 8), lambda x: (convolution(x), {"again": [convolution(x)], "depth": 2})
    )
    assert isinstance(outputs, tuple)
    assert outputs[1]["depth"] == 2
    assert outputs[0].dtype == outputs[1]["again"][0].dtype == torch.float32
