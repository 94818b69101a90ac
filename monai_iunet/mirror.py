"""Mirroring left and right: what is on the left becomes what is on the right, in the labels too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import Flip, MapLabelValue, MapTransform, RandomizableTransform

__all__ = ["RandMirrord"]


class RandMirrord(RandomizableTransform, MapTransform):
    """Flip images and label maps along an axis at random, and swap the labels of paired structures.

    Args:
        keys: images and label maps.
        label_keys: those of them that are label maps.
        swap: pairs of labels that change places, such as `[[3, 4]]` for a right and a left parotid.
        prob: probability of a flip.
        spatial_axis: axis that runs from left to right.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection,
        swap: Sequence[Sequence[int]],
        prob: float = 0.5,
        spatial_axis: int = 0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)  # type: ignore[arg-type]
        self.flip = Flip(spatial_axis)
        before = [label for pair in swap for label in pair]
        after = [label for one, other in swap for label in (other, one)]
        self.swap = MapLabelValue(before, after) if before else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(found):
                found[key] = self.flip(found[key])
                if key in self.label_keys and self.swap is not None:
                    found[key] = self.swap(found[key])
        return found
