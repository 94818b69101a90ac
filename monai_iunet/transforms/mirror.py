"""Mirroring left and right: what is on the left becomes what is on the right, in the labels too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.inferers import SlidingWindowInfererAdapt
from monai.transforms import Flip, MapLabelValue, MapTransform, RandomizableTransform
from torch import Tensor

__all__ = ["MirrorInferer", "RandMirrord"]


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


class MirrorInferer(SlidingWindowInfererAdapt):
    """Averages the logits of an image and of its mirror image, mirrored back, both by sliding windows.

    Args:
        swap: pairs of classes that change places in the mirror.
        spatial_axis: axis that runs from left to right.
        enabled: if False, the mirror image is left out.
        options: of MONAI's `SlidingWindowInferer`, such as `roi_size` and `overlap`.

    Example:
        >>> inferer = MirrorInferer(swap=[], roi_size=[2])
        >>> inferer(torch.tensor([[[1.0, 3.0]]]), lambda image: image * torch.tensor([2.0, 0.0])).tolist()
        [[[1.0, 3.0]]]
    """

    def __init__(
        self, swap: Sequence[Sequence[int]], spatial_axis: int = 0, enabled: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.swap = [tuple(pair) for pair in swap]
        self.axis = 2 + spatial_axis
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        logits: Any = super().__call__(inputs, network, *args, **kwargs)
        if not self.enabled:
            return logits
        mirrored: Any = super().__call__(inputs.flip(self.axis), network, *args, **kwargs)
        order = list(range(logits.shape[1]))
        for first, second in self.swap:
            order[first], order[second] = second, first
        return (logits + torch.as_tensor(mirrored).flip(self.axis)[:, order]) / 2
