"""Mirroring left and right: what is on the left becomes what is on the right, in the labels too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta
from monai.transforms import Flip, InvertibleTransform, MapTransform, RandomizableTransform
from monai.utils import TraceKeys, convert_to_tensor

from monai_iunet.errors import InputError
from monai_iunet.losses.class_numbers import check_one_channel

__all__ = ["RandMirrord", "check_sides", "mirrored_pairs", "read_swap"]


def read_swap(swap: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return pairs of labels that change places in the mirror.

    Raises:
        InputError: when one is no pair of two labels, or a label is in two pairs.

    Example:
        >>> read_swap([[3, 4]])
        ((3, 4),)
    """
    pairs = [tuple(pair) if isinstance(pair, Sequence) else (pair,) for pair in swap]
    labels = [label for pair in pairs for label in pair]
    numbers = all(isinstance(label, int) and label >= 0 for label in labels)
    if not numbers or any(len(pair) != 2 for pair in pairs) or len(set(labels)) < len(labels):
        raise InputError(f"swap {list(swap)}: must be pairs of labels, each label in one pair, such as [[3, 4]].")
    return tuple((int(first), int(second)) for first, second in pairs)


def mirrored_pairs(pairs: list[list[int]], num_classes: int, of_classes: int) -> list[list[int]]:
    """Return the pairs of classes that change places in the mirror, if a bundle's classes are those it was made for.

    Raises:
        InputError: when they are others, whose pairs nobody has named.

    Example:
        >>> mirrored_pairs([[3, 4]], num_classes=8, of_classes=8)
        [[3, 4]]
    """
    if num_classes != of_classes:
        raise InputError(
            f"num_classes {num_classes}: which of them change places in a mirror image is not known, only of the "
            f"bundle's own {of_classes}. Name the pairs as swap of RandMirrord (--train#random_transforms#1#swap) and "
            'of the inferer (--inferer#mirror#swap), such as "[[1, 2]]", or "[]" where no class has a side.'
        )
    return pairs


def check_sides(volume: Any, spatial_axis: int, name: str) -> None:
    """Check that an axis runs between left and right; what is no `MetaTensor` does not say.

    Args:
        volume: `(channels, *spatial)`.
        spatial_axis: along which sides change places.
        name: of the volume in the error.

    Raises:
        InputError: when it runs in another direction.

    Example:
        >>> check_sides(MetaTensor([[[1.0]]]), spatial_axis=0, name="image")
    """
    if not isinstance(volume, MetaTensor):
        return
    codes = nibabel.aff2axcodes(np.asarray(volume.affine, dtype=float))[: volume.ndim - 1]
    if codes[spatial_axis] not in ("L", "R"):
        raise InputError(
            f"{name}: is turned {''.join(map(str, codes))}, so spatial_axis {spatial_axis} does not run from left to "
            "right, and sides would change places that do not. Turn images and labels by MONAI's Orientationd, or name "
            "another axis."
        )


class RandMirrord(RandomizableTransform, MapTransform, InvertibleTransform):
    """Flip images and label maps along an axis at random, and swap the labels of paired structures.

    Where `NoteContouredd` has noted which structures of a label map were contoured, the notes are swapped too.

    Args:
        keys: images and label maps.
        label_keys: those of them that are label maps `(1, *spatial)`.
        swap: pairs of labels that change places, such as `[[3, 4]]` for a right and a left parotid.
        prob: probability of a flip.
        spatial_axis: axis that runs from left to right, or from right to left.

    Raises:
        InputError: when `swap` does not consist of pairs, a label map is not among `keys`, or one has several channels;
            when `spatial_axis` is no number; when sides change places although the axis runs in another direction, as
            far as a `MetaTensor` says.

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
        if others := [key for key in self.label_keys if key not in self.keys]:
            raise InputError(
                f"label_keys {others}: are not among keys {list(self.keys)}, so labels would not be swapped."
            )
        if not isinstance(spatial_axis, int):
            raise InputError(f"spatial_axis {spatial_axis!r}: must be the number of a single axis, such as 0.")
        self.spatial_axis = spatial_axis
        self.flip = Flip(spatial_axis)
        self.swap = read_swap(swap)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize(None)
        for key in self.key_iterator(item):
            if self._do_transform:
                if self.swap:
                    check_sides(item[key], self.spatial_axis, str(key))
                self._mirror(item, key)
            else:
                item[key] = convert_to_tensor(item[key], track_meta=get_track_meta())
            self.push_transform(item[key], replace=True)  # type: ignore[no-untyped-call]
        return item

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror once more what was mirrored.

        Raises:
            InputError: when sides changed places and no label map is there, as where `Invertd` takes what was found in
                an image for the image: its labels would keep the wrong side.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            if self.pop_transform(item[key])[TraceKeys.DO_TRANSFORM]:
                if self.swap and not any(label_key in item for label_key in self.label_keys):
                    raise InputError(
                        f"{key}: was mirrored, and no label map is beside it, so labels that were found in it would "
                        f"keep the wrong side. Bring them back as {self.label_keys[0]!r}, by orig_keys of Invertd."
                    )
                with self.flip.trace_transform(False):
                    self._mirror(item, key)
        return item

    def _mirror(self, item: dict[Hashable, Any], key: Hashable) -> None:
        item[key] = self.flip(item[key])
        if key in self.label_keys:
            check_one_channel(item[key], str(key))
            item[key] = self._swapped(item[key])
            self._swap_contoured(item, f"{key}_contoured")

    def _swapped(self, labels: Any) -> Any:
        """Return a label map, of the type that it has, whose paired labels have changed places."""
        swapped = labels.clone()
        for first, second in self.swap:
            swapped[labels == first], swapped[labels == second] = second, first
        return swapped

    def _swap_contoured(self, item: dict[Hashable, Any], key: str) -> None:
        if key in item:
            contoured = item[key].clone()
            for first, second in self.swap:
                contoured[[first, second]] = item[key][[second, first]]
            item[key] = contoured
