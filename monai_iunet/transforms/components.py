"""The largest connected component of each structure, looked for where the structure is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage

from monai_iunet.errors import InputError
from monai_iunet.losses.class_numbers import check_one_channel

__all__ = ["LargestComponentsd"]


class LargestComponentsd(MapTransform):
    """Keep the largest connected component of each structure, as MONAI's `KeepLargestConnectedComponentd` does.

    Components are counted in the box around a structure, not in the whole volume, of which each count would take some
    eight copies. The label map is changed in place, but for an array that must not be written to.

    Args:
        keys: label maps `(1, *spatial)`.
        applied_labels: numbers of the structures.

    Raises:
        InputError: for numbers that are no structures', and for maps of several channels, such as one-hot ones, or of
            floating-point numbers of 16 bits.

    Example:
        >>> labels = torch.tensor([[[1, 0, 1, 1, 2]]], dtype=torch.uint8)
        >>> LargestComponentsd("pred", [1, 2])({"pred": labels})["pred"].tolist()
        [[[0, 0, 1, 1, 2]]]
    """

    def __init__(self, keys: KeysCollection, applied_labels: Sequence[int]) -> None:
        super().__init__(keys)
        self.applied_labels = list(applied_labels)
        if not all(isinstance(label, int) and label > 0 for label in self.applied_labels):
            raise InputError(f"applied_labels {self.applied_labels}: must be the numbers of structures, from 1.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            check_one_channel(item[key], str(key))
            if isinstance(item[key], np.ndarray):  # PyTorch would write to memory that is only to be read
                item[key] = np.require(item[key], requirements="W")
            tensor = torch.as_tensor(item[key])
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise InputError(
                    f"{key}: a label map of whole numbers is needed, such as torch.uint8, got {tensor.dtype}. Convert "
                    "it, or take the argmax of logits first."
                )
            labels = tensor[0].numpy()
            boxes = ndimage.find_objects(labels, max(self.applied_labels, default=0))
            for label in self.applied_labels:
                box = boxes[label - 1]
                if box is not None:
                    structure = labels[box] == label
                    largest: Any = get_largest_connected_component_mask(structure)
                    labels[box][structure & ~largest] = 0
        return item
