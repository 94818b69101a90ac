"""A chain of invertible layers of any kind: residual stacks, transformers, or what else has couplings."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from monai_iunet.engine.reversible import InvertibleLayer, Tensors

__all__ = ["InvertibleChain"]


class InvertibleChain(nn.ModuleList):
    """Runs invertible layers one after another, in memory that does not grow with their number in training.

    Args:
        layers: each takes what the one before it returns.

    Example:
        A reversible transformer: attention and a feed-forward network take turns in changing two streams of tokens.

        >>> import torch
        >>> from monai_iunet.networks.blocks.coupling import AdditiveCoupling
        >>> class Attention(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.norm, self.heads = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        ...     def forward(self, tokens):
        ...         tokens = self.norm(tokens)
        ...         return self.heads(tokens, tokens, tokens, need_weights=False)[0]
        >>> def feed_forward(width):
        ...     layers = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        ...     return nn.Sequential(nn.LayerNorm(width), *layers)
        >>> blocks = [AdditiveCoupling(make(8)) for _ in range(6) for make in (Attention, feed_forward)]
        >>> transformer = InvertibleChain(blocks)
        >>> tokens = torch.randn(2, 5, 8)
        >>> streams = transformer(tokens, tokens)
        >>> (streams[0] + streams[1]).square().mean().backward()
        >>> torch.allclose(transformer.inverse(*streams)[0], tokens, atol=1e-4)
        True
    """

    def __init__(self, layers: Iterable[InvertibleLayer]) -> None:
        super().__init__(layers)

    def forward(self, *state: Tensor) -> Tensors:
        """Return the state after the last layer."""
        last = len(self) - 1
        for number, layer in enumerate(self):
            state = layer(*state, keep=number == last)
        return state

    def inverse(self, *state: Tensor) -> Tensors:
        """Return the state before the first layer."""
        for number in reversed(range(len(self))):
            layer: InvertibleLayer = self[number]  # type: ignore[assignment]
            state = layer.inverse(*state, keep=number == 0)
        return state
