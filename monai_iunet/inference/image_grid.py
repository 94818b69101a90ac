"""From the grid of the network back to that of the image's file.

Preprocessing turns an image to a standard orientation, crops, resamples and pads it. Orientation and crop are undone
without a copy: labels are written through a view of the array that is turned and cropped as the image was. What is left
is linear interpolation along parallel axes, which asks for no voxel of the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.utils import MetaKeys
from nibabel import orientations

from monai_iunet.inference.linear import LinearAxis, parallel_axes

__all__ = ["ImageGrid"]

AGREES = 1e-3  # mm, in which affines that should be the same may differ


@dataclass(frozen=True)
class ImageGrid:
    """The grid of an image's file, seen from the grid of the network.

    Attributes:
        shape: of the file.
        axes: per axis of the network's grid, from its voxels to those of the turned and cropped image.
        orientation: how the file's axes were turned, as nibabel has it.
        crop: part of the turned image that was kept.
        affine: of the file.
    """

    shape: tuple[int, ...]
    axes: tuple[LinearAxis, ...]
    orientation: np.ndarray
    crop: tuple[slice, ...]
    affine: np.ndarray

    @classmethod
    def of(cls, image: MetaTensor) -> ImageGrid | None:
        """Read from a preprocessed image, `(channels, *spatial)`, what was done to it.

        Returns:
            None if the affine of the file is not known, or the image was turned, cropped, resampled or padded in a way
            that cannot be undone here: by other transforms than `Orientationd`, `CropForegroundd`, `Spacingd`,
            `SpatialPadd` in this order, or to axes that are not parallel.

        Example:
            >>> import torch
            >>> from monai.transforms import Compose, Orientationd, Spacingd
            >>> prepare = Compose([Orientationd("image", "RAS", labels=None), Spacingd("image", (2, 2, 2))])
            >>> image = MetaTensor(torch.rand(1, 9, 9, 9), affine=torch.eye(4), meta={"original_affine": np.eye(4)})
            >>> grid = ImageGrid.of(prepare({"image": image})["image"])
            >>> grid.shape, [axis.target for axis in grid.axes]
            ((9, 9, 9), [9, 9, 9])
        """
        operations = list(image.applied_operations)
        affine = _first_affine(image)
        padded = operations.pop() if operations and operations[-1]["class"] == "SpatialPad" else None
        network = tuple(image.shape[1:]) if padded is None else tuple(map(int, padded["orig_size"]))
        before = [0, 0, 0] if padded is None else [first for first, _ in padded["extra_info"]["padded"][1:]]
        if affine is None or affine.shape != (4, 4) or len(network) != 3:
            return None
        resampled = operations.pop() if operations and operations[-1]["class"] == "SpatialResample" else None
        to_world = np.asarray(image.affine, dtype=np.float64).copy()  # of voxels of the network, padding left out
        to_world[:3, 3] += to_world[:3, :3] @ before
        source = to_world if resampled is None else _as_matrix(resampled["extra_info"]["src_affine"])
        cropped = network if resampled is None else tuple(map(int, resampled["orig_size"]))
        shape = tuple(map(int, operations[0]["orig_size"])) if operations else cropped
        if source is None or (resampled is not None and not _is_linear(resampled["extra_info"])):
            return None
        turned = operations.pop(0) if operations and operations[0]["class"] == "Orientation" else None
        orientation = orientations.ornt_transform(
            orientations.io_orientation(affine), orientations.io_orientation(source if turned else affine)
        )
        extents = [shape[int(axis)] for axis in np.argsort(orientation[:, 0])]
        crop = _crop_of(operations, extents)
        if crop is None or tuple(part.stop - part.start for part in crop) != cropped:
            return None
        expected = affine @ orientations.inv_ornt_aff(orientation, shape)
        expected[:3, 3] += expected[:3, :3] @ [part.start for part in crop]
        corners = np.array([*cropped, 1.0])
        if not np.allclose(expected * corners, source * corners, atol=AGREES):
            return None
        axes = parallel_axes(np.linalg.solve(to_world, source), network, cropped)
        if axes is None:
            return None
        axes = tuple(axis.padded(first, extent) for axis, first, extent in zip(axes, before, image.shape[1:]))
        return cls(shape, axes, orientation, crop, affine)

    def view(self, array: np.ndarray) -> np.ndarray:
        """Return the part of an array of the file's shape that the network's grid covers, turned as that is.

        The array may have further axes in front. What is written to the result is written to the array.
        """
        further = array.ndim - len(self.shape)
        turned = np.moveaxis(array, range(further), range(-further, 0)) if further else array
        turned = orientations.apply_orientation(turned, self.orientation)[self.crop]
        return np.moveaxis(turned, range(-further, 0), range(further)) if further else turned


def _first_affine(image: MetaTensor) -> np.ndarray | None:
    """Return the affine of the file: what the image was turned from, or what the reader noted."""
    first: Any = image.applied_operations[0] if image.applied_operations else {"class": ""}
    turned = first["class"] == "Orientation"
    return _as_matrix(first["extra_info"]["original_affine"] if turned else image.meta.get(MetaKeys.ORIGINAL_AFFINE))


def _crop_of(operations: Sequence[Mapping[Any, Any]], extents: Sequence[int]) -> tuple[slice, ...] | None:
    """Return what is kept of an image by crops, and None if anything else was done to it."""
    crop = [slice(0, extent) for extent in extents]
    for operation in operations:
        extra = operation["extra_info"]
        if operation["class"] != "CropForeground" or np.any(extra["pad_info"]["extra_info"]["padded"]):
            return None
        removed = np.reshape(extra["cropped"], (-1, 2)).tolist()
        crop = [slice(part.start + before, part.stop - behind) for part, (before, behind) in zip(crop, removed)]
    return tuple(crop)


def _is_linear(resampling: Mapping[Any, Any]) -> bool:
    mode, padding = str(resampling["mode"]), str(resampling["padding_mode"])
    return mode == "bilinear" and padding == "border" and resampling["align_corners"] in (False, "none")


def _as_matrix(affine: Any) -> np.ndarray | None:
    return None if affine is None else np.asarray(affine, dtype=np.float64)
