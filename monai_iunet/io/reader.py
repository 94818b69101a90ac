"""A reader for MONAI's `LoadImage` that reads what SimpleITK reads: a folder with a DICOM series, NRRD, MetaImage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from monai_iunet.io.files import SUFFIXES
from monai_iunet.io.read import read_image

__all__ = ["SimpleITKReader"]


class SimpleITKReader(ImageReader):
    """Reads a volume from NIfTI, NRRD, MetaImage or a folder with a DICOM series, and refuses what is not one.

    The slices of a series are sorted by position; missing and repeated ones and mixed orientations are errors, and
    those of a tilted gantry are resampled to right angles. The affine is in RAS, as that of MONAI's `NibabelReader`.

    Args:
        series: Series Instance UID, or its beginning or end, where a folder holds several.
        channels: that an image must have, see `read_image`; by default one per file.

    Raises:
        InputError: when a file cannot be read as a volume, or there are other channels.

    Example:
        >>> from monai.transforms import LoadImaged
        >>> load = LoadImaged(keys="image", reader=SimpleITKReader(), ensure_channel_first=True)
    """

    def __init__(self, series: str | None = None, channels: int | None = None) -> None:
        self.series = series
        self.channels = channels

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(Path(name).is_dir() or Path(name).name.lower().endswith(SUFFIXES) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        return read_image(ensure_tuple(data), self.series, self.channels)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[Any, Any]]:
        data = img.get_fdata(dtype=np.float32)
        stacked = data.ndim == 4
        meta = {
            MetaKeys.AFFINE: img.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: img.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(img.shape[:3]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0 if stacked else float("nan"),
        }
        return np.moveaxis(data, -1, 0) if stacked else data, meta
