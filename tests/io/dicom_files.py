"""DICOM series as scanners write them, well-formed or not."""

from __future__ import annotations

import locale
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

UID = "1.2.826.0.1.3680043.2.1125.7"


def write_series(
    folder: Path,
    volume: np.ndarray,
    spacing: tuple[float, float, float] = (1.5, 1.25, 2.0),
    heights: Sequence[float] | None = None,
    shift: float = 0.0,
    number: int = 1,
    orientations: Sequence[str] | None = None,
    modality: str = "CT",
    description: str | None = None,
) -> Path:
    """Write axial slices, the last axis of the volume, in a random order of file names.

    Args:
        folder: is made.
        volume: Hounsfield units, axes to the left, to the back and up.
        spacing: in mm.
        heights: of the slices in mm.
        shift: mm by which each slice lies farther back than the one below: a gantry tilt.
        number: of the series.
        orientations: of the slices.
        modality: CT or MR.
        description: of the series.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heights = [spacing[2] * index for index in range(volume.shape[2])] if heights is None else heights
    before = locale.setlocale(locale.LC_ALL)  # GDCM, when it writes, sets the process back to "C"
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    names = np.random.default_rng(number).permutation(len(heights))
    for index, height in enumerate(heights):
        stored = np.round(volume[:, :, index].T[None]).astype(np.int16)
        image = SimpleITK.GetImageFromArray(stored)
        image.SetSpacing(spacing)
        orientation = "1\\0\\0\\0\\1\\0" if orientations is None else orientations[index]
        tags = {
            "0008|0060": modality,
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0016": {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}[modality],
            "0008|0018": f"{UID}.{number}.{index + 1}",
            "0008|0020": "20200101",
            "0008|0030": "120000",
            "0008|103e": description or f"made series {number}",
            "0010|0010": "Made^Up",
            "0010|0020": "made-up",
            "0020|000d": f"{UID}.100",
            "0020|000e": f"{UID}.{number}",
            "0020|0010": "1",
            "0020|0011": str(number),
            "0020|0013": str(index + 1),
            "0020|0032": f"-10\\{20 + shift * index:.6f}\\{height:.6f}",
            "0020|0037": orientation,
            "0020|0052": f"{UID}.200",
        }
        if modality == "CT":
            tags |= {"0028|1052": "-1000", "0028|1053": "1"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{number}_{names[index]:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return folder
