"""From the probabilities of a preprocessed image to a label map on the grid of the image's file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Invertd, InvertibleTransform, MapTransform, SaveImaged
from monai.utils import MetaKeys, SpaceKeys

from monai_iunet.errors import InputError
from monai_iunet.io.channels import result_name
from monai_iunet.io.checks import grids_apart
from monai_iunet.io.files import NIFTI, check_folder, check_target
from monai_iunet.io.geometry import RAS_TO_LPS
from monai_iunet.io.labels import write_labels
from monai_iunet.losses.class_numbers import check_one_channel

__all__ = ["LabelsOnImageGridd", "SaveImageLabelsd", "check_numbers"]


def check_numbers(logits: torch.Tensor) -> None:
    """Check that logits say something: of NaN any class could be made.

    Raises:
        ValueError: when one is NaN, or the largest is infinite.
    """
    if not logits.max().isfinite():  # which is NaN where a value is, and needs no copy
        raise ValueError(
            "The network's output is NaN or infinite, of which no labels can be made: its weights are damaged, of a "
            "training that diverged, or the image is beyond what the network computes with, such as float16."
        )


class LabelsOnImageGridd(MapTransform):
    """Find the most probable class of each voxel of the original image, `(1, *spatial)`, uint8.

    Probabilities, not labels, are brought back to the grid of the image, so that borders stay smooth. That is done for
    one class after another: beside the image only three volumes of its size are in memory, however many classes.

    Args:
        keys: probabilities `(classes, *spatial)` on the grid of the preprocessed image.
        transform: the preprocessing, which is undone.
        orig_keys: the preprocessed image.

    Raises:
        ValueError: when a probability is NaN or infinite, there is a single class, or the probabilities are not on the
            grid of the preprocessed image.

    Example:
        >>> from monai.data import MetaTensor
        >>> from monai.transforms import Spacingd
        >>> spacing = Spacingd("image", (2, 2, 2))
        >>> data = spacing({"image": MetaTensor(torch.rand(1, 9, 9, 9), affine=torch.eye(4))})
        >>> data["image"].shape
        torch.Size([1, 5, 5, 5])
        >>> data["pred"] = torch.rand(3, 5, 5, 5)
        >>> LabelsOnImageGridd("pred", spacing)(data)["pred"].shape
        torch.Size([1, 9, 9, 9])
    """

    def __init__(self, keys: KeysCollection, transform: InvertibleTransform, orig_keys: str = "image") -> None:
        super().__init__(keys)
        self.orig_key = orig_keys
        self.invert = Invertd("pred", transform, orig_keys, nearest_interp=False, to_tensor=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self._labels(item[key], item[self.orig_key])
        return item

    def _labels(self, probabilities: torch.Tensor, image: MetaTensor) -> MetaTensor:
        """Return the most probable class of each voxel, on the grid of the original image."""
        grid = tuple(image.shape[1:])
        if len(probabilities) < 2 or tuple(probabilities.shape[1:]) != grid:
            raise ValueError(
                "Probabilities of 2 classes or more, background included, are needed on the grid of the preprocessed "
                f"image, {grid}, got {tuple(probabilities.shape)}."
            )
        check_numbers(torch.as_tensor(probabilities))
        largest: Any = None
        labels: Any = None
        for number in range(len(probabilities)):
            # Invertd leaves a plain tensor as it is.
            channel: Any = MetaTensor(torch.as_tensor(probabilities[number : number + 1]).float().cpu())
            channel = self.invert({"pred": channel, self.orig_key: image})["pred"]
            if largest is None:
                largest, labels = channel, torch.zeros_like(channel, dtype=torch.uint8)
                continue
            larger = channel > largest
            labels[larger] = number
            largest = torch.where(larger, channel, largest)
        return labels


class SaveImageLabelsd(SaveImaged):
    """Write the label maps of images beside each other as `NAME_seg.nii.gz`, in the geometry of the image's file.

    Of an image of several channels in files NAME_0000, NAME_0001, ... it is NAME too.

    It writes all by itself. It is a `SaveImaged`, and is called so, because MONAI Label leaves out transforms of that
    class and MONAI Deploy those of such a name.

    Args:
        keys: the label map, a single key: `(1, *spatial)`, on the grid of the image's file.
        output_dir: folder of the files; created if need be.
        suffix: what is added to the name of the image.
        orig_keys: the image, whose file is named in its meta data.

    Raises:
        InputError: for what is no label map of one channel on the grid of the file, for several keys, and when a file
            would replace the image, or that of another image of the same name.

    Example:
        >>> SaveImageLabelsd("pred", "eval").suffix
        '_seg'
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, suffix: str = "_seg", orig_keys: str = "image"
    ) -> None:
        output_dir = str(output_dir)  # the command line of MONAI makes a number of a folder that is named 2024
        super().__init__(keys, output_dir=output_dir)
        if len(self.keys) > 1:
            raise InputError(
                f"keys {list(self.keys)}: all would be NAME{suffix}.nii.gz. Make a transform for each, with a suffix "
                "of its own."
            )
        self.output_dir = Path(output_dir)
        self.suffix = suffix
        self.orig_key = orig_keys
        self._targets: dict[Path, str] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            check_one_channel(item[key], str(key))
            source = item[self.orig_key].meta["filename_or_obj"]
            name = result_name(source, len(item[self.orig_key]), NIFTI)
            path = self.output_dir / f"{name}{self.suffix}.nii.gz"
            check_target(path, source, self._targets)
            image: Any = nibabel.load(source)
            labels = np.asarray(torch.as_tensor(item[key])[0].cpu())
            _check_place(item[key], image, str(key), source)
            check_folder(self.output_dir)
            write_labels(labels, image, path)
        return item


def _check_place(labels: Any, image: Any, key: str, source: str) -> None:
    """Check that labels lie where the image of a file does, unless they do not say: the affine is then the identity."""
    if not isinstance(labels, MetaTensor) or labels.shape[1:] != image.shape[:3]:  # which `write_labels` refuses
        return
    affine = np.asarray(labels.affine, dtype=float)
    is_said = not np.array_equal(affine, np.eye(4))
    affine = RAS_TO_LPS @ affine if labels.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS else affine
    if is_said and grids_apart(affine, image.affine, image.shape[:3]) > 0:
        raise InputError(
            f"{key}: the labels are on another grid than {source}, as one that was turned or resampled. Bring them "
            "back first, by LabelsOnImageGridd or MONAI's Invertd."
        )
