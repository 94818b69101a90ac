"""Channel mixing as on a GPU, in slabs of joined pieces, gives what block by block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iunet.engine.pytorch_private import frees_gradients_before_converting
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


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("sizes", [((2, 3), (4, 1)), ((5,), (2, 3)), ((1, 1, 3), (5,)), ((3, 2), (2, 3))], ids=str)
def test_in_place_as_beside(sizes: Any, joined: bool, request: pytest.FixtureRequest) -> None:
    if joined:
        request.getfixturevalue("as_on_a_gpu")
    layer = randomize(ChannelMixing(*sizes), std=0.5).double()
    for transposed in (False, True):
        parts = [torch.randn(1, size, 5, 3, dtype=torch.double) for size in (sizes[1] if transposed else sizes[0])]
        matrix = layer.matrix().detach()
        expected = layer.multiply(tuple(parts), matrix, transposed)
        addresses = {part.data_ptr() for part in parts}
        results = layer.multiply_in_place(parts, matrix, transposed)
        assert not parts
        torch.testing.assert_close(results, expected, atol=1e-12, rtol=1e-10)
        assert all(result.untyped_storage().nbytes() == result.nbytes for result in results)
        if max(sizes[0]) == max(sizes[1]):
            assert any(result.data_ptr() in addresses for result in results)


@pytest.fixture
def mixing_of_float32() -> tuple[ChannelMixing, list[Tensor]]:
    inputs = [torch.randn(2, size, 6, 7, requires_grad=True) for size in (2, 3)]
    return randomize(ChannelMixing((2, 3), (4, 1)), std=0.5), inputs


def test_small_gradients_pass_under_autocast_to_float16(mixing_of_float32: tuple[ChannelMixing, list[Tensor]]) -> None:
    layer, inputs = mixing_of_float32
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = sum(output.sum() * 1e-12 for output in layer(*inputs))
        found.append(torch.autograd.grad(loss, inputs))
    for one, other in zip(*found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=0)


def test_gradients_of_the_input_are_rounded_under_autocast_to_bfloat16_alone(
    mixing_of_float32: tuple[ChannelMixing, list[Tensor]],
) -> None:
    layer, inputs = mixing_of_float32
    wanted = [*inputs, layer.matrix.weight]

    def loss() -> Any:
        return sum(output.pow(3).sum() for output in layer(*inputs))

    exact = torch.autograd.grad(loss(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss()
    with_graph = torch.autograd.grad(under_autocast, wanted, create_graph=True)
    rounded = torch.autograd.grad(under_autocast, wanted)
    for one, other in zip(exact[:2], rounded):
        assert other.dtype == torch.float32
        assert torch.equal(other, other.bfloat16().float()) == frees_gradients_before_converting()
        torch.testing.assert_close(other, one, rtol=2**-8, atol=1e-6)
    for one, other in zip(exact, (with_graph[0], with_graph[1], rounded[2])):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
