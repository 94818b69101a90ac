"""Mirroring left and right: what is on the left becomes what is on the right, in the labels too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import Flip, MapLabelValue, MapTransform, RandomizableTransform

__all__ = ["RandMirrord"]


class RandMirrord(RandomizableTransform, MapTransform):
    """Flip images and label maps along an axis at random, and swap the labels of paired structures.

    Where `NoteContouredd` has noted which structures of a label map were contoured, the notes are swapped too.

    Args:
        keys: images and label maps.
        label_keys: those of them that are label maps.
        swap: pairs of labels that change places, such as `[[3, 4]]` for a right and a left parotid.
        prob: probability of a flip.
        spatial_axis: axis that runs from left to right.

    Example:
        >>> import torch
        >>> flip = RandMirrord(["image", "label"], "label", swap=[[1, 2]], prob=1)
        >>> found = flip({"image": torch.tensor([[5.0, 6.0]]), "label": torch.tensor([[1.0, 0.0]])})
        >>> found["image"].tolist(), found["label"].tolist()
        ([[6.0, 5.0]], [[0.0, 2.0]])
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
        self.before = [label for pair in swap for label in pair]
        self.after = [label for first, second in swap for label in (second, first)]
        self.swap = MapLabelValue(self.before, self.after) if self.before else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(item):
                item[key] = self.flip(item[key])
                if key in self.label_keys and self.swap is not None:
                    item[key] = self.swap(item[key])
                    self._swap_contoured(item, f"{key}_contoured")
        return item

    def _swap_contoured(self, item: dict[Hashable, Any], key: str) -> None:
        if key in item:
            contoured = item[key].clone()
            contoured[self.before] = item[key][self.after]
            item[key] = contoured
