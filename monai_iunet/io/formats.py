"""Reading of formats whose parsers trust a file; `untrusted.py` tries them in a process of their own first."""

from __future__ import annotations

from pathlib import Path

import nibabel

from monai_iunet.io.dicom_series import read_dicom
from monai_iunet.io.simpleitk import read_with_simpleitk

__all__ = ["read_format"]


def read_format(path: Path, series: str | None = None) -> nibabel.Nifti1Image:
    """Read a file of NRRD, MetaImage or DICOM, or a DICOM series of a folder.

    Raises:
        InputError: when it cannot be read as a volume of scalars.
    """
    if path.is_dir() or path.suffix.lower() == ".dcm":
        return read_dicom(path, series)
    return read_with_simpleitk(path)
