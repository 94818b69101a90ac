"""DICOM series: which are in a folder, and whether the slices of one make up a volume.

A slice says where it lies: Image Position (Patient) is the center of its first voxel, Image Orientation (Patient) the
directions of its rows and columns, both in LPS. Slices make up a volume if they share size, orientation and spacing,
and their positions, sorted along the normal, follow each other in equal steps along it. What departs from that is named
instead of being averaged away: a wrong volume looks right.

Source: DICOM PS3.3, C.7.6.2 Image Plane Module.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from monai_iunet.errors import InputError

__all__ = ["Series", "find_series", "list_series", "read_series", "series_files"]

STEP_TOLERANCE = 0.1  # of a step, by which steps may differ: positions are rounded when they are written
TILT_TOLERANCE = 1.0  # degrees
DIRECTION_TOLERANCE = 1e-3  # of cosines
TAGS = {
    "description": "0008|103e",
    "modality": "0008|0060",
    "orientation": "0020|0037",
    "position": "0020|0032",
    "spacing": "0028|0030",
}


@dataclasses.dataclass(frozen=True)
class Series:
    """Describes a DICOM series of a folder.

    Attributes:
        uid: Series Instance UID.
        files: its files, in no particular order.
        modality: such as CT or MR.
        description: what the scanner calls it.
    """

    uid: str
    files: tuple[str, ...]
    modality: str
    description: str

    def __str__(self) -> str:
        return f"{self.uid} ({self.modality}, {len(self.files)} files, {self.description or 'no description'})"


def list_series(folder: Path) -> list[Series]:
    """Return the DICOM series of a folder, those with the most files first; folders in it are not searched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> list_series(folder)
        []
    """
    all_series = []
    for uid in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        if files:
            header = _header(files[0])
            all_series.append(Series(uid, tuple(files), _tag(header, "modality"), _tag(header, "description")))
    return sorted(all_series, key=lambda series: (-len(series.files), series.uid))


def find_series(folder: Path, series: str | None = None) -> Series:
    """Return the series to read.

    Args:
        folder: with files of one or several series.
        series: Series Instance UID, or its beginning or end; None if there is only one.

    Raises:
        InputError: when there is none, or several to choose from, which are then listed.
    """
    all_series = list_series(folder)
    if not all_series:
        raise InputError(f"{folder}: no DICOM series in this folder. Name the folder that holds the files.")
    listed = "; ".join(map(str, all_series))
    chosen = [
        candidate
        for candidate in all_series
        if series is None or candidate.uid.startswith(series) or candidate.uid.endswith(series)
    ]
    if not chosen:
        raise InputError(f"{folder}: no series {series}. There are: {listed}.")
    if len(chosen) > 1:
        raise InputError(f"{folder}: {len(chosen)} DICOM series, choose one with --series UID: {listed}.")
    return chosen[0]


def read_series(folder: Path, series: str | None = None) -> Any:
    """Read a series as a 3D SimpleITK image, its slices in the order of their positions; CT in Hounsfield units.

    Args:
        folder: with files of one or several series.
        series: Series Instance UID, or its beginning or end; None if there is only one.

    Raises:
        InputError: when no series can be chosen, or its slices do not make up a volume.
    """
    chosen = find_series(folder, series)
    files, step = _sorted_slices(chosen, folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{folder}: a slice cannot be read. Copy or export the series again.") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise InputError(f"{folder}: color images. Name a series of gray values.")
    image.SetSpacing((*image.GetSpacing()[:2], step))
    return image


def series_files(folder: Path, series: str | None = None) -> list[str]:
    """Return the files of a series in the order of their positions, which is that of the slices of `read_series`.

    Raises:
        InputError: as `read_series`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> series_files(folder)
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: ...: no DICOM series in this folder. Name the folder that holds the files.
    """
    return _sorted_slices(find_series(folder, series), folder)[0]


def _sorted_slices(series: Series, folder: Path) -> tuple[list[str], float]:
    """Files in the order of their positions, and the step between them in mm.

    Raises:
        InputError: when they do not make up a volume.
    """
    headers = [_header(name) for name in series.files]
    if len(headers) == 1:
        raise InputError(f"{folder}: the series has a single slice, a volume is needed. Name the whole series.")
    names = np.array(series.files)
    positions = np.array([_values(header, "position", 3, name) for header, name in zip(headers, names)])
    directions = np.array([_values(header, "orientation", 6, name) for header, name in zip(headers, names)])
    grids = {(*header.GetSize()[:2], *_values(header, "spacing", 2, name)) for header, name in zip(headers, names)}
    if np.abs(directions - directions[0]).max() > DIRECTION_TOLERANCE:
        raise InputError(
            f"{folder}: the slices of series {series.uid} have several orientations, as localizers do. Name a series "
            "of parallel slices."
        )
    if len(grids) > 1:
        raise InputError(f"{folder}: the slices of series {series.uid} differ in size or spacing. Name a uniform one.")
    normal = np.cross(directions[0, :3], directions[0, 3:])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    step = float(np.median(steps))
    repeated = int((steps <= STEP_TOLERANCE * steps.max()).sum())
    if repeated:
        raise InputError(
            f"{folder}: {repeated} slices of series {series.uid} lie where another one lies, as in several phases or a "
            "copy. Leave one volume in the folder."
        )
    uneven = np.flatnonzero(np.abs(steps - step) > STEP_TOLERANCE * step)
    if len(uneven):
        low, high = heights[order][uneven[0] : uneven[0] + 2]
        raise InputError(
            f"{folder}: slices of series {series.uid} are {step:.2f} mm apart, but {high - low:.2f} mm between "
            f"{low:.1f} and {high:.1f} mm: slices are missing or uneven. Copy the whole series, or resample it."
        )
    way = positions[order[-1]] - positions[order[0]]
    tilt = np.degrees(np.arccos(np.clip(way @ normal / np.linalg.norm(way), -1, 1)))
    if tilt > TILT_TOLERANCE:
        raise InputError(
            f"{folder}: series {series.uid} was taken with a gantry tilt of {tilt:.1f} degrees, so its slices are "
            "sheared. Resample it first, for example with dcm2niix."
        )
    return names[order].tolist(), (heights[order[-1]] - heights[order[0]]) / len(steps)


def _header(name: str) -> Any:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{name}: a DICOM file that cannot be read. Copy or export the series again.") from error
    return reader


def _tag(header: Any, name: str) -> str:
    return header.GetMetaData(TAGS[name]).strip() if header.HasMetaDataKey(TAGS[name]) else ""


def _values(header: Any, tag: str, number: int, name: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in _tag(header, tag).split("\\"))
    except ValueError:
        values = ()
    if len(values) != number or not np.isfinite(values).all():
        raise InputError(f"{name}: DICOM without a valid {tag} of the slice. Name a series of slices with geometry.")
    return values
