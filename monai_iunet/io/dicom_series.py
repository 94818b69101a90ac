"""DICOM series: which are in a folder, and how one is read."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.dicom_frames import Frame, frame_values, frames_of, read_header
from monai_iunet.io.dicom_stack import Stack, stack_frames, straightened
from monai_iunet.io.files import NIFTI

__all__ = ["Series", "find_series", "list_series", "read_dicom", "series_files", "stack_of"]

logger = logging.getLogger(__name__)

HOUNSFIELD = ("HU", "US", "")  # Rescale Types of CT in Hounsfield units; "US" is what scanners write that do not say it


@dataclasses.dataclass(frozen=True)
class Series:
    """Describes a DICOM series of a folder.

    Attributes:
        uid: Series Instance UID.
        files: its files, in no particular order.
        modality: such as CT or MR.
        description: what the scanner calls it.
        study: Study Instance UID.
        frames: number of slices in the files.
    """

    uid: str
    files: tuple[str, ...]
    modality: str
    description: str
    study: str = ""
    frames: int = 0

    def __str__(self) -> str:
        return f"{self.uid} ({self.modality}, {len(self.files)} files, {self.description or 'no description'})"


def list_series(folder: str | Path) -> list[Series]:
    """Return the DICOM series of a folder, those with the most files first; folders in it are not searched.

    Of empty files, which may have been slices, the log says that they are left out.

    Args:
        folder: with the files of the series.

    Raises:
        InputError: when there is no such folder, a file is damaged, or a link leads to none.

    Example:
        >>> import tempfile
        >>> list_series(tempfile.mkdtemp())
        []
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: not a folder. Name the folder of the DICOM files.")
    headers: dict[str, list[tuple[str, Any]]] = {}
    empty: list[Path] = []
    for file in sorted(path for path in Path(folder).iterdir() if path.name[0] != "." and not path.is_dir()):
        if not file.exists():  # a gap would be noticed, but not a slice that is missing at an end
            raise InputError(f"{file}: a link to a file that is not there. Fetch the file, or remove the link.")
        if not file.is_file():
            continue
        header = read_header(file)
        if header is not None and "Rows" in header:  # an image, not a report or a directory of files
            headers.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((str(file), header))
        elif not file.stat().st_size:
            empty.append(file)
    if empty and headers:
        logger.warning(
            "%s: %d empty files, such as %s, are left out. If they were slices, copy the folder again.",
            *(folder, len(empty), empty[0].name),
        )
    all_series = []
    for uid, items in headers.items():
        first = items[0][1]
        modality, description, study = (
            str(first.get(name, "")).strip() for name in ("Modality", "SeriesDescription", "StudyInstanceUID")
        )
        frames = sum(int(header.get("NumberOfFrames") or 1) for _, header in items)
        all_series.append(Series(uid, tuple(file for file, _ in items), modality, description, study, frames))
    return sorted(all_series, key=lambda series: (-len(series.files), series.uid))


def find_series(folder: str | Path, series: str | None = None) -> Series:
    """Return the series to read.

    Args:
        folder: with files of one or several series.
        series: Series Instance UID, or its beginning or end; None if there is only one.

    Raises:
        InputError: when there is none, or several to choose from, which are then listed.
    """
    all_series = list_series(folder)
    if not all_series:
        images = [file for file in sorted(Path(folder).glob("[!.]*")) if file.name.lower().endswith(NIFTI)]
        advice = f"Name the images in it, such as {images[0]}." if images else "Name the folder that holds the files."
        raise InputError(f"{folder}: no DICOM series in this folder. {advice}")
    listed = "; ".join(map(str, all_series[:20])) + (" ..." if len(all_series) > 20 else "")
    exact = [candidate for candidate in all_series if candidate.uid == series]
    chosen = exact or [
        candidate
        for candidate in all_series
        if series is None or candidate.uid.startswith(series) or candidate.uid.endswith(series)
    ]
    if not chosen:
        raise InputError(f"{folder}: no series {series}. There are: {listed}.")
    if len(chosen) == 1:
        return chosen[0]
    of_one_slice = all(candidate.frames == 1 for candidate in chosen)
    if of_one_slice and len(chosen) > 2 and len({candidate.study for candidate in chosen}) == 1:
        # Some programs give every slice a series of its own. Geometry tells whether three or more are one volume.
        logger.warning("%s: %d series of one slice each are read as one volume", folder, len(chosen))
        files = tuple(file for candidate in chosen for file in candidate.files)
        return dataclasses.replace(chosen[0], files=files, frames=len(files))
    raise InputError(f"{folder}: {len(chosen)} DICOM series, choose one with --series UID: {listed}.")


def stack_of(path: str | Path, series: str | None = None) -> Stack:
    """Return the frames of a DICOM file, or of a series of a folder, in the order of their positions.

    Raises:
        InputError: when no series can be chosen, or its frames do not make up a volume.
    """
    path = Path(path)
    if path.is_dir():
        chosen = find_series(path, series)
        files, name = chosen.files, f"{path}: series {chosen.uid}"
    else:
        files, name = (str(path),), str(path)
    frames: list[Frame] = []
    for file in files:
        header = read_header(file)
        if header is None or "Rows" not in header:
            raise InputError(f"{file}: not a DICOM image. Name an image, or the folder of a series.")
        frames += frames_of(header, file)
    return stack_frames(frames, name)


def read_dicom(path: str | Path, series: str | None = None) -> nibabel.Nifti1Image:
    """Read a DICOM file, or a series of a folder, as a volume; CT in Hounsfield units.

    Args:
        path: a file with several frames, or a folder with files of one or several series.
        series: Series Instance UID, or its beginning or end; None if there is only one.

    Returns:
        The image, float32. A volume of a tilted gantry is resampled to right angles, which the log says.

    Raises:
        InputError: when no series can be chosen, or its frames do not make up a volume.
    """
    stack = stack_of(path, series)
    first = stack.frames[0]
    if first.constant["Modality"] == "CT" and first.rescale is None:
        logger.warning("%s: a CT without Rescale Slope and Intercept; its values are taken for Hounsfield units", path)
    kind = str(first.constant["RescaleType"] or "").strip()
    if first.constant["Modality"] == "CT" and kind.upper() not in HOUNSFIELD:
        logger.warning("%s: a CT whose values are %s by its Rescale Type, not Hounsfield units", path, kind)
    data, affine = frame_values(stack.frames), stack.affine
    if stack.tilt:
        logger.warning("%s: the gantry was tilted by %.1f degrees; resampled to right angles", path, stack.tilt)
        data, affine = straightened(data, stack)
    image = nibabel.Nifti1Image(np.ascontiguousarray(data), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def series_files(folder: str | Path, series: str | None = None) -> list[str]:
    """Return the files of a series in the order of their positions, which is that of the slices of `read_image`.

    Raises:
        InputError: as `read_image`.

    Example:
        >>> import tempfile
        >>> series_files(tempfile.mkdtemp())
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: ...: no DICOM series in this folder. Name the folder that holds the files.
    """
    return list(dict.fromkeys(frame.file for frame in stack_of(folder, series).frames))
