"""DICOM series and multi-frame files as scanners write them, well-formed or not."""

from __future__ import annotations

import locale
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

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


AXIAL = [1, 0, 0, 0, 1, 0]
CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4.1"


def dataset(stored: np.ndarray, sop_class: str = CT, instance: str = f"{UID}.9.1", **attributes: Any) -> FileDataset:
    """A DICOM image without geometry.

    Args:
        stored: stored values, `(rows, columns)` or `(frames, rows, columns)`, of 8 or 16 bits.
        sop_class: kind of the image.
        instance: UID of the image.
        attributes: to add or to change; None to leave one out.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    bits = 8 * stored.dtype.itemsize
    values: dict[str, Any] = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": instance,
        "SeriesInstanceUID": f"{UID}.9",
        "StudyInstanceUID": f"{UID}.100",
        "FrameOfReferenceUID": f"{UID}.200",
        "Modality": "CT" if sop_class == CT else "MR",
        "SeriesDescription": "made",
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        **({"NumberOfFrames": len(stored)} if stored.ndim == 3 else {}),
        "PixelData": stored.tobytes(),
        **attributes,
    }
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    for name, value in values.items():
        if value is not None:
            setattr(made, name, value)
    return made


def write_slices(
    folder: Path,
    stored: Sequence[np.ndarray],
    changed: Mapping[int, Mapping[str, Any]] | None = None,
    **attributes: Any,
) -> Path:
    """Write axial slices, 2 mm apart, of voxels of 1.25 (rows) x 1.5 (columns) mm, one file each.

    Args:
        folder: is made.
        stored: stored values of each slice `(rows, columns)`, from the lowest to the highest.
        changed: attributes of single slices, by their number.
        attributes: of all slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(stored):
        geometry = {
            "ImagePositionPatient": [-10, 20, 2 * index],
            "ImageOrientationPatient": AXIAL,
            "PixelSpacing": [1.25, 1.5],
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
        }
        own = (changed or {}).get(index, {})
        made = dataset(values, instance=f"{UID}.9.{index + 1}", **{**geometry, **attributes, **own})
        made.save_as(folder / f"{(7 * index + 3) % 101:03d}.dcm")  # not in the order of positions
    return folder


def group(**attributes: Any) -> list[Dataset]:
    """A sequence of one item."""
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return [item]


def write_multiframe(
    path: Path,
    stored: np.ndarray,
    heights: Sequence[float],
    slopes: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
    orientations: Sequence[Sequence[float]] | None = None,
    shift: float = 0.0,
    **attributes: Any,
) -> Path:
    """Write an enhanced MR of axial frames of 1.25 (rows) x 1.5 (columns) mm.

    Args:
        path: file to write.
        stored: stored values `(frames, rows, columns)`.
        heights: of the frames, in mm.
        slopes: of the frames.
        intercepts: of the frames.
        orientations: of the frames; shared if None.
        shift: mm by which a frame lies farther back for each mm that it lies higher.
        attributes: further ones.
    """
    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[1.25, 1.5], SliceThickness=2)
    if orientations is None:
        shared.PlaneOrientationSequence = group(ImageOrientationPatient=AXIAL)
    frames = []
    for index, height in enumerate(heights):
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[-10, 20 + shift * height, height])
        frame.PixelValueTransformationSequence = group(
            RescaleSlope=slopes[index] if slopes else 1,
            RescaleIntercept=intercepts[index] if intercepts else 0,
            RescaleType="US",
        )
        if orientations is not None:
            frame.PlaneOrientationSequence = group(ImageOrientationPatient=list(orientations[index]))
        frames.append(frame)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(stored, ENHANCED_MR, **{**groups, **attributes}).save_as(path)
    return path
