"""A reader for MONAI's `LoadImage` that reads what SimpleITK reads: a folder with a DICOM series, NRRD, MetaImage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from monai_iunet.errors import InputError
from monai_iunet.io.files import SUFFIXES
from monai_iunet.io.read import read_image

__all__ = ["SimpleITKReader"]


class SimpleITKReader(ImageReader):
    """Reads a volume from NIfTI, NRRD, MetaImage or a folder with a DICOM series, and refuses what is not one.

    The slices of a series are sorted by position; missing and repeated ones, mixed orientations and a gantry tilt are
    errors, not artifacts. The affine is in RAS, as that of MONAI's `NibabelReader`.

    Args:
        series: Series Instance UID, or its beginning or end, where a folder holds several.

    Raises:
        InputError: when a file cannot be read as a volume.

    Example:
        >>> from monai.transforms import LoadImaged
        >>> load = LoadImaged(keys="image", reader=SimpleITKReader(), ensure_channel_first=True)
    """

    def __init__(self, series: str | None = None) -> None:
        self.series = series

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(Path(name).is_dir() or Path(name).name.lower().endswith(SUFFIXES) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        images = [read_image(Path(name), self.series) for name in ensure_tuple(data)]
        return images if len(images) > 1 else images[0]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[Any, Any]]:
        images = ensure_tuple(img)
        first = images[0]
        for image in images[1:]:
            if image.shape != first.shape or not np.allclose(image.affine, first.affine):
                raise InputError("The channels of an image have different grids. Resample them to one.")
        arrays = [image.get_fdata(dtype=np.float32) for image in images]
        stacked = len(arrays) > 1
        meta = {
            MetaKeys.AFFINE: first.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: first.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(first.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0 if stacked else float("nan"),
        }
        return np.stack(arrays) if stacked else arrays[0], meta
