"""Channel mixing as on a GPU, in slabs of joined pieces, gives what block by block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iunet.engine.slabs import slices
from monai_iunet.networks.blocks import mixing
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.orthogonal_layer import as_one_expression
from tests.helpers import randomize


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_are_joined", lambda *tensors: not as_one_expression(*tensors))
    monkeypatch.setattr(mixing, "slabs", lambda size, *_: slices(size, 2))
    monkeypatch.setattr(mixing, "PART", 8)


def pieces(layer: Any, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, size, *shape, generator=generator, dtype=torch.double, requires_grad=True)
        for size in layer.in_sizes
    ]


def found(layer: Any, shape: tuple[int, ...]) -> list[Tensor]:
    inputs = pieces(layer, shape)
    outputs = layer(*inputs)
    with torch.no_grad():
        inverse = layer.inverse(*outputs)
    sum(output.pow(3).sum() for output in outputs).backward()
    return [*outputs, *inverse, *(piece.grad for piece in inputs), layer.matrix.weight.grad]


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 4, 4), (3, 5), (1, 1), (6,)], ids=str)
@pytest.mark.parametrize("sizes", [((2, 3), (4, 1)), ((5,), (2, 3)), ((1, 1, 3), (5,))], ids=str)
def test_joined_as_block_by_block(sizes: Any, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    layer = randomize(ChannelMixing(*sizes), std=0.5).double()
    expected = found(layer, shape)
    layer.zero_grad()
    request.getfixturevalue("as_on_a_gpu")
    for ours, theirs in zip(found(layer, shape), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_finite_differences_of_joined_pieces() -> None:
    layer = randomize(ChannelMixing((2, 1), (1, 2)), std=0.5).double()
    inputs = pieces(layer, (3, 3))
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def function(first: Tensor, second: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return layer(first, second)

    assert torch.autograd.gradcheck(function, (*inputs, *parameters))
    assert torch.autograd.gradgradcheck(function, (*inputs, *parameters))
