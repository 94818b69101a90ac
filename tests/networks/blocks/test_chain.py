"""The engine without a U-Net: a residual stack and a transformer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from monai_iunet.networks.blocks.chain import InvertibleChain
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.planning.live_bytes import LiveBytes


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)
        return self.heads(tokens, tokens, tokens, need_weights=False)[0]


def transformer(depth: int) -> InvertibleChain:
    def feed_forward() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    return InvertibleChain(AdditiveCoupling(make()) for _ in range(depth) for make in (Attention, feed_forward))


def residual_stack(depth: int) -> InvertibleChain:
    def branch() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    return InvertibleChain(AdditiveCoupling(branch()) for _ in range(2 * depth))


KINDS: dict[str, tuple[Callable[[int], InvertibleChain], tuple[int, ...]]] = {
    "transformer": (transformer, (2, 5, 8)),
    "residual stack": (residual_stack, (2, 8, 6, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_autograd(kind: str) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    chain = make(3).double()
    x = torch.randn(shape, dtype=torch.double)
    gradients = []
    for rebuilds in (True, False):
        for layer in chain:
            layer.rebuilds = rebuilds
        chain.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)  # of dropout
        first, second = chain(inputs, 2 * inputs)
        (first * second).sum().backward()
        gradients.append([inputs.grad, *(parameter.grad for parameter in chain.parameters())])
    for rebuilt, stored in zip(*gradients, strict=True):
        torch.testing.assert_close(rebuilt, stored)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse(kind: str) -> None:
    make, shape = KINDS[kind]
    chain = make(4).eval()
    x = torch.randn(shape)
    first, second = chain.inverse(*chain(x, -x))
    torch.testing.assert_close(first, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, -x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_depth(kind: str) -> None:
    make, shape = KINDS[kind]
    x = torch.randn(shape)
    alive, buffers = [], []
    for depth in (2, 8):
        chain = make(depth)
        with LiveBytes(ignore=[*chain.parameters(), *chain.buffers()]) as live:
            first, second = chain(x * 1, x * 2)
            del first
            alive.append(live.now())
        assert second.requires_grad
        buffers.append(sum(buffer.nbytes for buffer in chain.buffers()))
    # What is left is what dropout needs to repeat its numbers, some KiB per layer at most.
    assert alive[1] - alive[0] < (8 - 2) * 2 * 8192
    # Without dropout, the values that buffers had, such as the statistics of a normalization.
    assert kind == "transformer" or alive[1] - alive[0] <= buffers[1] - buffers[0]
