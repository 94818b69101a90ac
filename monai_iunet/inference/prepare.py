"""Preprocessing that leaves an image as it was read, and is done where a window is cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    MapTransform,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from torch import Tensor

from monai_iunet.inference.image_grid import ImageGrid
from monai_iunet.inference.images import Image, ResampledImage, WholeImage
from monai_iunet.inference.linear import parallel_axes

__all__ = ["KEY", "prepare", "steps_around_spacing"]

KEY = "image"
# What leaves the type of an image as it is.
TURNING = (EnsureChannelFirstd, Orientationd, CropForegroundd)


def prepare(preprocessing: Compose, image: MetaTensor, device: torch.device | str) -> tuple[Image, MetaTensor]:
    """Preprocess an image, as far as that must be done before windows are cut.

    If all that is done to it is to turn, crop, resample and scale intensities by fixed numbers, then it is only turned
    and cropped here, and keeps its type. Else it is preprocessed as a whole, in float32.

    Args:
        preprocessing: transforms of the key "image".
        image: `(channels, *spatial)`, as it was read.
        device: where its windows are to be.

    Returns:
        The image, and a tensor of its shape with its meta data; its values are only those of the image if that was
        preprocessed as a whole.

    Raises:
        ValueError: when a crop to the foreground leaves nothing.

    Example:
        >>> prepare(Compose([Spacingd("image", (2, 2, 2))]), MetaTensor(torch.rand(1, 9, 9, 9)), "cpu")[0].shape
        (1, 5, 5, 5)
    """
    steps = steps_around_spacing(preprocessing)
    if steps is not None:
        before, spacing, after = steps
        turned = image
        for transform in before:
            turned = transform({KEY: turned})[KEY]
            if not turned.numel():
                raise ValueError(
                    f"{type(transform).__name__} leaves no voxel of the image, whose intensities are up to "
                    f"{float(image.max()):g}: none counts as foreground. Bring them to the unit that the network has "
                    "learned from, of CT Hounsfield units."
                )
        windowed = _resampled_in_windows(turned, spacing, after, device)
        if windowed is not None:
            return windowed
    whole: Any = preprocessing({KEY: image.float()})[KEY]
    return WholeImage(whole.as_tensor().to(device)), whole


def steps_around_spacing(
    preprocessing: Compose,
) -> tuple[list[MapTransform], Spacingd, list[ScaleIntensityRanged]] | None:
    """Return what is done before an image is resampled, the resampling, and what is done then.

    Returns:
        None unless it is first only turned and cropped, and then only scaled by fixed numbers.
    """
    transforms = list(preprocessing.transforms)
    for place, spacing in enumerate(transforms):
        if isinstance(spacing, Spacingd):
            before, after = transforms[:place], transforms[place + 1 :]
            turns = all(isinstance(each, TURNING) for each in before)
            if turns and all(isinstance(each, ScaleIntensityRanged) for each in after):
                return before, spacing, after
    return None


def _resampled_in_windows(
    turned: MetaTensor, spacing: Spacingd, after: list[ScaleIntensityRanged], device: torch.device | str
) -> tuple[Image, MetaTensor] | None:
    """Return an image that is resampled where a window is cut; None if that is not linear along parallel axes."""
    planned: Any = spacing({KEY: turned}, lazy=True)[KEY]  # which says what would be done
    operation = dict(planned.pending_operations[-1])
    shape, affine = tuple(map(int, planned.peek_pending_shape())), planned.peek_pending_affine()
    source = tuple(turned.shape[1:])
    operation["orig_size"] = source
    meta = MetaTensor(torch.zeros(1).expand(1, *shape), meta=turned.meta)
    meta.affine = affine
    meta.applied_operations = [*turned.applied_operations, operation]
    if ImageGrid.of(meta) is None:
        return None
    matrix = np.linalg.solve(np.asarray(turned.affine, dtype=np.float64), np.asarray(affine, dtype=np.float64))
    axes = parallel_axes(matrix, source, shape)
    if axes is None:
        return None
    return ResampledImage(turned.as_tensor(), axes, partial(_finish, after), device), meta


def _finish(transforms: list[ScaleIntensityRanged], window: Tensor) -> Tensor:
    item: Any = {KEY: window}
    for transform in transforms:
        item = transform(item)
    values = item[KEY]
    return values.as_tensor() if isinstance(values, MetaTensor) else values
