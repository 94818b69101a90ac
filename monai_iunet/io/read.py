"""Reading of images that can be segmented."""

from __future__ import annotations

import math
import os
from pathlib import Path

import nibabel

from monai_iunet.errors import InputError
from monai_iunet.io.checks import DAMAGED, check_image, check_size, first_line
from monai_iunet.io.files import NIFTI, SUFFIXES, image_name
from monai_iunet.io.formats import read_format
from monai_iunet.io.untrusted import try_in_a_process

__all__ = ["read_image"]


def read_image(path: str | os.PathLike[str], series: str | None = None) -> nibabel.Nifti1Image:
    """Read a 3D image and check that it can be segmented.

    Args:
        path: a file of NIfTI, NRRD or MetaImage, a DICOM file that holds a volume, or a folder with a DICOM series.
        series: Series Instance UID, or its beginning or end, where a folder holds several.

    Returns:
        The image with its voxels in memory, small integers as they are, others as float32; the affine is in RAS.

    Raises:
        InputError: when there is no such file, it is damaged, not a 3D image, without orientation or not finite.

    Example:
        >>> import tempfile
        >>> import numpy
        >>> path = Path(tempfile.mkdtemp(), "scan.nii.gz")
        >>> nibabel.save(nibabel.Nifti1Image(numpy.random.rand(8, 9, 10), numpy.eye(4)), path)
        >>> read_image(path).shape
        (8, 9, 10)
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file. Check the path.")
    if not path.is_dir():
        image_name(path, SUFFIXES)
        if path.name.lower().endswith(NIFTI):
            return check_image(_read_nifti(path), str(path))
    try_in_a_process(path, series)
    return check_image(read_format(path, series), str(path))


def _read_nifti(path: Path) -> nibabel.Nifti1Image:
    try:
        image = nibabel.load(path)
    except DAMAGED as error:
        raise InputError(
            f"{path}: not a readable NIfTI file ({first_line(error)}). Export or copy it again."
        ) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(f"{path}: {type(image).__name__} with the name of a NIfTI file. Convert it to NIfTI first.")
    check_size(path, math.prod(image.shape) * image.get_data_dtype().itemsize, path.stat().st_size)
    return image
