"""Reading of what SimpleITK reads: NRRD, MetaImage, DICOM."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel
import SimpleITK

from monai_iunet.errors import InputError
from monai_iunet.io.checks import check_size
from monai_iunet.io.dicom_series import read_series
from monai_iunet.io.geometry import from_simpleitk

__all__ = ["read_with_simpleitk"]


def read_with_simpleitk(path: Path, series: str | None = None) -> nibabel.Nifti1Image:
    """Read a file, or a DICOM series of a folder, in this process; damaged ones may end it, see `untrusted.py`.

    Raises:
        InputError: when it cannot be read as a volume of scalars.
    """
    if path.is_dir():
        return from_simpleitk(read_series(path, series))
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() > 1 or reader.GetDimension() < 3 or 1 in reader.GetSize()[2:3]:
            raise InputError(
                f"{path}: has the size {reader.GetSize()} with {reader.GetNumberOfComponents()} components, a 3D "
                "volume of scalars is needed. Name one, or the folder of a DICOM series."
            )
        # A header may lie beside its data.
        parts = path.parent.iterdir() if path.suffix.lower() in (".nhdr", ".mhd") else [path]
        check_size(path, math.prod(reader.GetSize()), sum(part.stat().st_size for part in parts if part.is_file()))
        return from_simpleitk(reader.Execute())
    except RuntimeError as error:
        raise InputError(f"{path}: not readable, damaged or of another format. Export or copy it again.") from error
