"""Other contrasts of an image: its intensities along a random curve, which may turn dark into bright."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

__all__ = ["RandIntensityCurved"]


class RandIntensityCurved(RandomizableTransform, MapTransform):
    """Map the intensities of an image by a random curve of straight pieces, from its range to its range.

    MONAI's `RandHistogramShift` keeps the order of intensities. This one does not: T1-weighted images turn into
    something like T2-weighted ones, proton density or FLAIR, or into what no scanner makes.

    Args:
        keys: images, of any shape; what is changed of integers is float32.
        prob: probability of a change.
        max_knots: the curve has from 2 to so many points, the ends among them.
        prob_monotone: probability of a curve that keeps the order of intensities or, as often, turns it round;
            otherwise it may be any.

    Raises:
        ValueError: when `max_knots` is less than 2.

    Example:
        >>> change = RandIntensityCurved("image", prob=1.0).set_random_state(0)
        >>> change({"image": torch.linspace(0, 1, 5)[None]})["image"].shape
        torch.Size([1, 5])
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5, max_knots: int = 6, prob_monotone: float = 0.5) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if max_knots < 2:
            raise ValueError(f"max_knots must be at least 2, got {max_knots}.")
        self.max_knots = max_knots
        self.prob_monotone = prob_monotone
        self.curve = np.array([0.0, 1.0])

    def randomize(self, data: Any = None) -> None:
        super().randomize(None)
        if not self._do_transform:
            return
        self.curve = self.R.uniform(0, 1, int(self.R.randint(2, self.max_knots + 1)))
        if self.R.rand() < self.prob_monotone:
            self.curve = np.sort(self.curve)[:: self.R.choice((-1, 1))]
        if np.ptp(self.curve) < 0.2:  # a curve so flat would leave noise
            self.curve = np.array([1.0, 0.0])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize()
        if self._do_transform:
            for key in self.key_iterator(item):
                item[key] = self._mapped(item[key])
        return item

    def _mapped(self, image: Any) -> Tensor:
        given = torch.as_tensor(image)
        # A curve of integers would be 0 or 1, and a range of float16 may be beyond it.
        image = given.to(torch.promote_types(given.dtype, torch.float32))
        low, high = image.min(), image.max()
        if high != low:
            knots = torch.as_tensor(self.curve.copy(), dtype=image.dtype, device=image.device)
            place = (image - low) / (high - low) * (len(knots) - 1)
            piece = place.long().clamp(0, len(knots) - 2)
            share = place - piece
            image = low + (high - low) * (knots[piece] * (1 - share) + knots[piece + 1] * share)
        return image.to(given.dtype) if given.is_floating_point() else image
