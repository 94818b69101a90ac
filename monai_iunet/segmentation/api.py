"""Segmentation of an image in memory or on the disk with one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.checks import check_image
from monai_iunet.io.geometry import RAS_TO_LPS, from_simpleitk
from monai_iunet.io.labels import label_image
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.segmenter import BundleSegmenter

__all__ = ["segment"]

logger = logging.getLogger(__name__)

Image = TypeVar("Image")


def segment(
    image: Image | str | Path | Sequence[str | Path],
    bundle: str | Path | BundleSegmenter | None = None,
    *,
    affine: np.ndarray | None = None,
    mirrored: bool = False,
    device: str | torch.device | None = None,
    series: str | None = None,
) -> Any:
    """Segment an image with a bundle: in comes any of the usual kinds of images, out comes the same kind.

    Args:
        image: path of an image file or of a folder with a DICOM series; or a nibabel image, a SimpleITK image, a
            `MetaTensor` or, with `affine`, an array or a tensor. 3D, with or without a channel in front where it is a
            tensor or an array. Of a bundle that takes several channels: a path for each, a 4D NIfTI file or nibabel
            image with the channels last, or a tensor or an array with them in front.
        bundle: name or folder of a bundle, see `monai-iunet bundles`; or a `BundleSegmenter`, so that the weights of
            many images are loaded once. By default the hippocampus bundle.
        affine: 4 x 4, from voxels to millimeters in RAS, for an array without one.
        mirrored: segment the left-right mirror image, and mirror the result back: for crops of the other side.
        device: where the network runs; None for the first GPU, or the CPU if there is none.
        series: which DICOM series, where a folder holds several.

    Returns:
        Labels, uint8, on the grid of the image; for a path, as a nibabel image. Nothing is written. If the
        predicted Dice is low, the log has a warning; `BundleSegmenter.segment` gives the numbers.

    Raises:
        InputError: when the image or the bundle cannot be used, or a mirror image of one that tells left from right.

    Example:
        >>> import numpy
        >>> labels = segment(numpy.random.rand(35, 51, 36), bundle="hippocampus", affine=numpy.eye(4), device="cpu")
        >>> labels.shape, labels.dtype
        ((35, 51, 36), dtype('uint8'))
    """
    if affine is not None and not isinstance(image, (np.ndarray, torch.Tensor)):
        raise InputError(f"affine: {type(image).__name__} has an affine of its own. Leave the argument out.")
    segmenter = bundle if isinstance(bundle, BundleSegmenter) else BundleSegmenter(bundle_folder(bundle), device)
    volume, name = _as_nibabel(image, affine, series, segmenter.channels)
    segmentation = segmenter.segment(volume, name, mirrored)
    doubts = segmentation.doubts()
    if doubts:
        logger.warning("%s: %s", name, doubts)
    return _as_kind_of(image, segmentation)


def _as_nibabel(
    image: Any, affine: np.ndarray | None, series: str | None, channels: int
) -> tuple[nibabel.Nifti1Image, str]:
    """Return the image as the segmenter takes it, and its name in errors."""
    if isinstance(image, (str, Path)):
        return read_image(image, series, channels), str(image)
    if isinstance(image, (list, tuple)) and image and all(isinstance(path, (str, Path)) for path in image):
        return read_image(image, series, channels), str(image[0])
    name = f"image ({type(image).__name__})"
    if isinstance(image, nibabel.spatialimages.SpatialImage):
        return check_image(nibabel.Nifti1Image.from_image(image), name, channels), name
    if isinstance(image, SimpleITK.Image):
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() > 1:
            raise InputError(f"{name}: has the size {image.GetSize()}, a 3D volume of scalars is needed.")
        return check_image(from_simpleitk(image), name, channels), name
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise InputError(
            f"{name}: a path, a nibabel or SimpleITK image, a MetaTensor, or an array with an affine is needed."
        )
    if isinstance(image, MetaTensor) and affine is None:
        affine = _ras_affine(image, name)
    volume = nibabel.Nifti1Image(_voxels(image, name), _checked_affine(affine, name))
    return check_image(volume, name, channels), name


def _ras_affine(image: MetaTensor, name: str) -> np.ndarray:
    """Return the affine of a `MetaTensor` to millimeters in RAS, whichever space its meta data name."""
    affine = np.asarray(image.affine, dtype=float)
    space = str(image.meta.get(MetaKeys.SPACE) or SpaceKeys.RAS)
    if space not in (SpaceKeys.RAS, SpaceKeys.LPS):
        raise InputError(f"{name}: its meta data name the space {space!r}, RAS or LPS is needed. Set `meta['space']`.")
    return RAS_TO_LPS @ affine if space == SpaceKeys.LPS and affine.shape == (4, 4) else affine


def _checked_affine(affine: Any, name: str) -> np.ndarray:
    """Check that an affine is an invertible matrix from voxels to millimeters."""
    try:
        matrix = np.asarray(affine, dtype=float)
        valid = matrix.shape == (4, 4) and np.isfinite(matrix).all() and bool(np.linalg.det(matrix))
        valid = valid and np.allclose(matrix[3], [0, 0, 0, 1])  # of a transposed matrix it is the translation
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{name}: has no valid affine. Pass the 4 x 4 matrix from voxels to millimeters in RAS as `affine`."
        )
    return matrix


def _voxels(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Return the voxels of an array or tensor in a type that NIfTI has, one channel left out, several last."""
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        tensor = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
        data = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    else:
        data = np.asarray(image)
    if data.dtype.kind not in "biuf":
        raise InputError(f"{name}: has voxels of type {data.dtype}, real numbers are needed. Convert it first.")
    if data.ndim == 4:
        data = data[0] if len(data) == 1 else np.moveaxis(data, 0, -1)
    return data.astype(np.float64 if data.dtype.itemsize > 4 else np.float32)


def _as_kind_of(image: Any, segmentation: Segmentation) -> Any:
    """Return labels as the kind of image that was handed in."""
    labels = segmentation.labels
    if isinstance(image, SimpleITK.Image):
        converted = SimpleITK.GetImageFromArray(np.ascontiguousarray(labels.T))
        converted.CopyInformation(image)
        return converted
    if isinstance(image, (np.ndarray, torch.Tensor)):
        labels = labels.reshape((1,) * (image.ndim - 3) + labels.shape)
        if isinstance(image, np.ndarray):
            return labels
        tensor = torch.from_numpy(labels.copy()).to(image.device)
        if not isinstance(image, MetaTensor):
            return tensor
        space = image.meta.get(MetaKeys.SPACE)
        return MetaTensor(tensor, affine=image.affine, meta={} if space is None else {MetaKeys.SPACE: space})
    return label_image(labels, segmentation.image)
