"""Reading of images that can be segmented."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.channels import CHANNEL_FILES
from monai_iunet.io.checks import DAMAGED, check_compressed, check_image, check_same_grid, check_size, raw_voxels
from monai_iunet.io.files import NIFTI, SUFFIXES, image_name
from monai_iunet.io.formats import read_format
from monai_iunet.io.text import first_line
from monai_iunet.io.untrusted import try_in_a_process

__all__ = ["read_image"]

PathLike = str | os.PathLike[str]


def read_image(
    path: PathLike | Sequence[PathLike], series: str | None = None, channels: int | None = None
) -> nibabel.Nifti1Image:
    """Read an image and check that it can be segmented.

    Args:
        path: a file of NIfTI, NRRD or MetaImage, a DICOM file that holds a volume, or a folder with a DICOM series; or
            one for each channel.
        series: Series Instance UID, or its beginning or end, where a folder holds several.
        channels: that the image must have, in a file each or all in one 4D NIfTI file; by default one per file.

    Returns:
        The image with its voxels in memory, small integers as they are, others as float32; the affine is in RAS. It is
        3D, or with several channels 4D, the channels last.

    Raises:
        InputError: when there is no such file, it is damaged, not a 3D image, without orientation or not finite; when
            there are other channels, or their grids differ.

    Example:
        >>> import tempfile
        >>> import numpy
        >>> path = Path(tempfile.mkdtemp(), "scan.nii.gz")
        >>> nibabel.save(nibabel.Nifti1Image(numpy.random.rand(8, 9, 10), numpy.eye(4)), path)
        >>> read_image(path).shape
        (8, 9, 10)
    """
    paths = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(part) for part in path]
    wanted = len(paths) if channels is None else channels
    if len(paths) == 1:
        return _read(paths[0], series, wanted)
    if len(paths) != wanted:
        needed = "1 is" if wanted == 1 else f"{wanted} are"
        raise InputError(f"{paths[0]}: {len(paths)} channels were named, {needed} needed: {CHANNEL_FILES}")
    images = [_read(part, series, channels=1) for part in paths]
    for name, image in zip(paths[1:], images[1:]):
        check_same_grid(str(name), image, "the first channel", images[0])
    stacked = np.moveaxis(np.stack([raw_voxels(image) for image in images]), 0, -1)
    return nibabel.Nifti1Image(stacked, images[0].affine, images[0].header, dtype=stacked.dtype)


def _read(path: Path, series: str | None, channels: int) -> nibabel.Nifti1Image:
    """Read one file, or a folder with a DICOM series."""
    if not path.exists():
        raise InputError(f"{path}: no such file. Check the path.")
    if not path.is_dir():
        image_name(path, SUFFIXES)
        if path.name.lower().endswith(NIFTI):
            return check_image(_read_nifti(path), str(path), channels)
    try_in_a_process(path, series)
    return check_image(read_format(path, series), str(path), channels)


def _read_nifti(path: Path) -> nibabel.Nifti1Image:
    try:
        image = nibabel.load(path.absolute())  # since nibabel looks for the folder ~ elsewhere
    except DAMAGED as error:
        raise InputError(
            f"{path}: not a readable NIfTI file ({first_line(error)}). Export or copy it again."
        ) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(f"{path}: {type(image).__name__} with the name of a NIfTI file. Convert it to NIfTI first.")
    stored: Any = image.dataobj
    begin, least = stored.offset, image.header.single_vox_offset
    if begin < least:  # which nibabel takes for voxels
        raise InputError(
            f"{path}: its header says that voxels begin at byte {begin} (vox_offset), where the header itself is; "
            f"{least} or more is needed. Export it again."
        )
    check_size(path, math.prod(image.shape) * image.get_data_dtype().itemsize, path.stat().st_size)
    if path.suffix.lower() == ".gz":
        check_compressed(path, path)
    return image
