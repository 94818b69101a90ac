"""Which numbers of channels the levels of an invertible U-Net can have.

Of the c channels of a level, k are downsampled, with 1 <= k < c, and the others skip to the decoder. A stride of n
voxels makes n k channels of the k, so these are the numbers that the next level can have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["reachable_channels"]


def reachable_channels(channels: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The reachable numbers of channels that are nearest to those that are wanted, the smaller of two.

    Args:
        channels: wanted per level; the first is taken as it is.
        strides: per downsampling, the factor of each axis.

    Raises:
        ValueError: when a level would have fewer than 2 channels.

    Example:
        >>> reachable_channels((4, 20, 64), [(2, 2), (2, 2)])
        (4, 12, 44)
    """
    built = [channels[0]]
    for wanted, stride in zip(channels[1:], strides):
        factor = math.prod(stride)
        # Half a channel goes to the smaller number.
        downsampled = min(max(-((factor - 2 * wanted) // (2 * factor)), 1), built[-1] - 1)
        if factor * downsampled < 2:
            raise ValueError(
                f"From {built[-1]} channels, stride {tuple(stride)} reaches fewer than 2 channels; use more channels."
            )
        built.append(factor * downsampled)
    return tuple(built)
