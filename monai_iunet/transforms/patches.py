"""What a step of training sees of an image: a patch of it, or the whole, deformed at random; and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, list_data_collate
from monai.transforms import (
    Compose,
    DivisiblePadd,
    MapTransform,
    RandCropByLabelClassesd,
    Randomizable,
    RandSpatialCropd,
    SpatialPad,
    SpatialPadd,
    Transform,
)
from nibabel.affines import voxel_sizes

from monai_iunet.errors import InputError
from monai_iunet.io.checks import grids_apart

__all__ = ["WHOLE", "CollatePadded", "TrainingPatchd", "check_one_place", "read_size"]

WHOLE = "whole"  # in the place of a size: the image as it is
AXES = 3


def read_size(roi_size: Any) -> str | tuple[int, ...]:
    """Return a size of patches: `"whole"`, or a positive number of voxels per axis.

    Raises:
        InputError: for anything else.

    Example:
        >>> read_size([96, 72, 48]), read_size("whole")
        ((96, 72, 48), 'whole')
    """
    if roi_size == WHOLE:
        return WHOLE
    is_list = isinstance(roi_size, Sequence) and not isinstance(roi_size, str) and len(roi_size) == AXES
    if is_list and all(isinstance(extent, int) and extent > 0 for extent in roi_size):
        return tuple(roi_size)
    raise InputError(f'roi_size {roi_size!r}: must be "whole", or three numbers of voxels, such as [96, 96, 96].')


def check_one_place(volumes: Mapping[str, Any]) -> None:
    """Check that volumes of one size lie in one place; what is no `MetaTensor`, or has the identity, does not say.

    Args:
        volumes: `(channels, *spatial)`, by their names in the error.

    Raises:
        ValueError: when corners are more than two voxels apart, as where one of two has been turned. Files may differ
            by a part of a voxel, which resampling to smaller ones makes more of.

    Example:
        >>> check_one_place({"image": MetaTensor([[[[1.0]]]]), "label": torch.ones(1, 1, 1, 1)})
    """
    first, reference = "", None
    for name, volume in volumes.items():
        affine = np.asarray(volume.affine, dtype=float) if isinstance(volume, MetaTensor) else np.eye(4)
        if affine.shape != (4, 4) or np.array_equal(affine, np.eye(4)):
            continue
        if reference is None:
            first, reference = name, affine
        elif (apart := grids_apart(affine, reference, volume.shape[1:])) > 2 * voxel_sizes(reference).max():
            raise ValueError(
                f"{first} and {name} are up to {apart:.3g} mm apart, so voxels of one are not those of the other. Turn "
                "and resample both to one grid, as by MONAI's Orientationd and Spacingd."
            )


class TrainingPatchd(Randomizable, MapTransform):
    """Cut the patch of an image that a step of training gets, or take the whole image; deform it at random.

    A whole image is padded behind the deformation, so that its size divides, as `StreamingInferer` pads whole images.

    Args:
        keys: images and label map.
        roi_size: voxels per axis, or "whole". May be set again: patches can grow during a training.
        deformation: makes a transform of `keys`, such as `partial(RandAffined, keys=..., prob=0.7)`; for patches at
            structures it is called with `shifted` and with `spatial_size`, the patch. None to deform nothing.
        divisible_by: what the size of a whole image is padded to multiples of, an int or one per axis.
        num_classes: to cut patches at structures, each class as often as the background, the number of all of them;
            None to cut patches anywhere.
        shifted: arguments of `deformation` for patches at structures.
        cval: value of voxels beyond an image; labels are 0 there.
        label_key: the label map among `keys`.

    Raises:
        InputError: when `roi_size` is not a valid size.

    Example:
        >>> item = {"image": torch.rand(1, 9, 20, 17), "label": torch.zeros(1, 9, 20, 17)}
        >>> cut = TrainingPatchd(["image", "label"], roi_size=(8, 8, 24))
        >>> cut(item)["image"].shape
        torch.Size([1, 8, 8, 24])
        >>> cut.roi_size, cut.divisible_by = "whole", 8
        >>> cut(item)["label"].shape
        torch.Size([1, 16, 24, 24])
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int] | str,
        deformation: Callable[..., Transform] | None = None,
        divisible_by: Sequence[int] | int = 1,
        num_classes: int | None = None,
        shifted: Mapping[str, Any] | None = None,
        cval: float = 0.0,
        label_key: str = "label",
    ) -> None:
        MapTransform.__init__(self, keys)
        self.deformation = deformation
        self.divisible_by = divisible_by
        self.num_classes = num_classes
        self.shifted = dict(shifted or {})
        self.cval = cval
        self.label_key = label_key
        self.roi_size = roi_size

    @property
    def roi_size(self) -> str | tuple[int, ...]:
        """Voxels per axis, or "whole"."""
        return self._roi_size

    @roi_size.setter
    def roi_size(self, size: Any) -> None:
        self._roi_size = read_size(size)
        self._steps: Compose | None = None

    def set_random_state(self, seed: int | None = None, state: Any = None) -> TrainingPatchd:
        """Seed the random numbers; those of the steps follow from them when they are made for the next image."""
        super().set_random_state(seed, state)
        self._steps = None
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the entries with a patch in the place of each image.

        Raises:
            ValueError: when images and labels are not on one grid.
        """
        shapes = {key: tuple(data[key].shape[1:]) for key in self.key_iterator(data)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images and labels must have the same size, got {shapes}. Resample them to one grid.")
        check_one_place({str(key): data[key] for key in shapes})
        if self._steps is None:
            self._steps = Compose(self._make_steps()).set_random_state(int(self.R.randint(2**31)))
        found: Any = self._steps(dict(data))
        return dict(found[0] if isinstance(found, list) else found)  # what is cut at structures is a list of one

    def _make_steps(self) -> list[Any]:
        size = self._roi_size
        if isinstance(size, str):
            return [*self._deform(), *self._pad(DivisiblePadd, self.divisible_by)]
        if self.num_classes is None:
            anywhere = RandSpatialCropd(self.keys, size, random_size=False)
            return [*self._pad(SpatialPadd, size), *self._deform(), anywhere]
        # With a margin that the deformation takes what it moves in from.
        larger = tuple(extent * 5 // 4 for extent in size) if self.deformation else size
        crop = RandCropByLabelClassesd(
            self.keys, self.label_key, larger, num_classes=self.num_classes, allow_smaller=False, warn=False
        )
        return [*self._pad(SpatialPadd, larger), crop, *self._deform(spatial_size=size, **self.shifted)]

    def _deform(self, **options: Any) -> list[Transform]:
        return [] if self.deformation is None else [self.deformation(**options)]

    def _pad(self, kind: Any, size: Any) -> list[Transform]:
        images = [key for key in self.keys if key != self.label_key]
        labels = [key for key in self.keys if key == self.label_key]
        padded = [kind(images, size, value=self.cval)] if images else []
        return [*padded, *([kind(labels, size)] if labels else [])]


class CollatePadded:
    """Makes a batch of cases, whose images and labels are padded to a common size, and are plain tensors.

    Args:
        cval: value of voxels beyond an image; labels are 0 there.
        image_key: the images.
        label_key: the label maps, which are padded too.

    Example:
        >>> cases = [{"image": torch.rand(1, *size), "label": torch.zeros(1, *size)} for size in ([8, 9], [10, 4])]
        >>> CollatePadded()(cases)["image"].shape
        torch.Size([2, 1, 10, 9])
    """

    def __init__(self, cval: float = 0.0, image_key: str = "image", label_key: str = "label") -> None:
        self.cval = cval
        self.image_key = image_key
        self.label_key = label_key

    def __call__(self, cases: Sequence[Any]) -> Any:
        """Return the batch; cases may be lists of several, as transforms make that cut several patches of an image.

        Raises:
            ValueError: when the cases differ in the number of channels or of axes, or labels in size from their image.
        """
        cases = [case for part in cases for case in (part if isinstance(part, list) else [part])]
        for key in (self.image_key, self.label_key):
            kinds = {(case[key].shape[0], case[key].ndim - 1) for case in cases}
            if len(kinds) > 1:
                found = ", ".join(f"{channels} in {axes}D" for channels, axes in sorted(kinds))
                raise ValueError(f"{key}: the cases of a batch have different channels ({found}).")
        for image, labels in ((case[self.image_key], case[self.label_key]) for case in cases):
            if labels.shape[1:] != image.shape[1:]:  # padded to one size, they would lie elsewhere than their image
                raise ValueError(
                    f"{self.label_key}: the size {tuple(labels.shape[1:])} is not that of the image, "
                    f"{tuple(image.shape[1:])}. Resample both to one grid."
                )
        common = torch.tensor([case[self.image_key].shape[1:] for case in cases]).amax(0).tolist()
        values = {self.image_key: self.cval, self.label_key: 0.0}
        padded = [
            {**case, **{key: _plain(SpatialPad(common, value=value)(case[key])) for key, value in values.items()}}
            for case in cases
        ]
        return list_data_collate(padded)


def _plain(tensor: Any) -> torch.Tensor:
    """Return a tensor without meta data, which would pass through the whole network, where nobody asks for them."""
    plain: torch.Tensor = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain
