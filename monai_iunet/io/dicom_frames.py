"""DICOM frames: where a slice lies, and the values in it.

A slice is a file, or a frame of a multi-frame file, which keeps the attributes of its frames in functional groups, of
each frame or shared. Image Position (Patient) is the center of the first voxel, Image Orientation (Patient) the
directions in which columns and rows are counted, both in LPS; Pixel Spacing is the distance between rows, then that
between columns. Stored values become Hounsfield units and the like by a slope and an intercept, which may differ from
frame to frame. How a viewer shows them (MONOCHROME1, windows) does not change them.

Source: DICOM PS3.3, C.7.6.2 Image Plane, C.7.6.16 Multi-frame Functional Groups, C.11.1 Modality LUT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from pydicom import uid
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID, MediaStorageDirectoryStorage

from monai_iunet.errors import InputError
from monai_iunet.io.text import in_one_line

__all__ = ["CONTRAST", "Frame", "frame_values", "frames_of", "read_header"]

# Without the preamble that a DICOM file begins with, a file of such a name is tried all the same.
DICOM_SUFFIXES = (".dcm", ".ima")
# Attributes that may not differ within a volume.
CONSTANT = ("PatientID", "Modality", "FrameOfReferenceUID", "Units", "ConvolutionKernel")
# Numbers that differ by rounding only: functional group and attribute of a frame, attribute of a file.
CONTRAST = {
    "echo times in ms": ("MREchoSequence", "EffectiveEchoTime", "EchoTime"),
    "inversion times in ms": ("MRModifierSequence", "InversionTimes", "InversionTime"),
    "diffusion b-values": ("MRDiffusionSequence", "DiffusionBValue", "DiffusionBValue"),
    "tube voltages in kV": ("CTXRayDetailsSequence", "KVP", "KVP"),
}
# Images of which SimpleITK applies a rescale that stands in functional groups; of others only one of the file.
RESCALED_BY_GROUPS = (
    uid.EnhancedCTImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
    uid.XRay3DAngiographicImageStorage,
    uid.XRay3DCraniofacialImageStorage,
    uid.BreastTomosynthesisImageStorage,
)
# What pydicom raises for a damaged file.
DAMAGED = (AttributeError, EOFError, IndexError, KeyError, NotImplementedError, OSError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Frame:
    """Describes a slice.

    Attributes:
        file: the file that holds it.
        number: of the frame in the file, from 0.
        name: name of the frame in errors.
        position: of the center of its first voxel, `(3,)`, mm in LPS.
        orientation: directions in which columns and rows are counted, `(2, 3)`, in LPS.
        spacing: of rows and of columns, mm.
        size: number of rows and of columns.
        rescale: slope and intercept; None if the file has neither.
        contrast: numbers of `CONTRAST` that the file has, by their names.
        constant: attributes that may not differ within a volume, by their names.
    """

    file: str
    number: int
    name: str
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    size: tuple[int, int]
    rescale: tuple[float, float] | None
    contrast: dict[str, float]
    constant: dict[str, Any]


def read_header(file: str | Path) -> Any:
    """Read the attributes of a DICOM file without its pixels.

    Returns:
        A `pydicom.Dataset`; None for a file that is not DICOM.

    Raises:
        InputError: when the file is damaged.
    """
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except InvalidDicomError:
        if Path(file).suffix.lower() not in DICOM_SUFFIXES:
            return None
        header = _read_without_preamble(file)
    except DAMAGED as error:
        raise InputError(f"{file}: a DICOM file that cannot be read ({error}). Copy or export it again.") from error
    kind = header.get("SOPClassUID")
    is_index = kind is None and header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    if "Rows" not in header and not is_index and (not kind or "Image Storage" in UID(kind).name):
        raise InputError(f"{file}: a damaged DICOM file, without the attributes of an image. Copy or export it again.")
    return header


def _read_without_preamble(file: str | Path) -> Any:
    """Read the attributes of a file that lacks the mark of a DICOM file."""
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, force=True)
    except DAMAGED as error:
        raise InputError(f"{file}: not a DICOM file that can be read. Copy or export it again.") from error


def frames_of(header: Any, file: str | Path) -> list[Frame]:
    """Return the frames of a DICOM file.

    Args:
        header: what `read_header` returned.
        file: the file.

    Raises:
        InputError: when the images are in color, or a frame has no position, orientation or spacing.
    """
    if int(header.get("SamplesPerPixel") or 1) > 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise InputError(f"{file}: color images. Name a series of gray values.")
    count = int(header.get("NumberOfFrames") or 1)
    constant = {name: header.get(name) for name in CONSTANT}
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    if count > 1 and len(per_frame) != count and not shared:
        raise InputError(
            f"{file}: {count} frames without the geometry of each, as of ultrasound, angiography or screenshots. Name "
            "a series of slices with geometry."
        )
    if count > 1 and per_frame and len(per_frame) != count:  # whose positions are which is in doubt
        raise InputError(
            f"{file}: Number of Frames is {count}, but {len(per_frame)} frames are described: damaged, or frames were "
            "taken out. Export it again."
        )
    return [
        _frame(header, [*per_frame[number : number + 1], *shared], file, number, constant) for number in range(count)
    ]


def _frame(header: Any, groups: Sequence[Any], file: str | Path, number: int, constant: dict[str, Any]) -> Frame:
    """Return a frame from its functional groups and the header."""
    several = int(header.get("NumberOfFrames") or 1) > 1
    name = f"{file}, frame {number + 1}" if several else str(file)

    def numbers(what: str, sequence: str, attribute: str, count: int) -> tuple[float, ...]:
        # Of several frames the position is that of one, never that of the file.
        top_level = [] if several and what == "position" else [header]
        values = _numbers(_find(groups, sequence, attribute, top_level), count)
        if values is None or (what == "spacing" and min(values) <= 0):
            raise InputError(
                f"{name}: DICOM without a valid {what} of the slice. Name a series of slices with geometry."
            )
        return values

    position = numbers("position", "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = numbers("orientation", "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    between_rows, between_columns = numbers("spacing", "PixelMeasuresSequence", "PixelSpacing", 2)
    return Frame(
        file=str(file),
        number=number,
        name=name,
        position=np.array(position),
        orientation=np.array(orientation).reshape(2, 3),
        spacing=(between_rows, between_columns),
        size=(int(header.Rows), int(header.Columns)),
        rescale=_rescale(groups, header, name),
        contrast=_contrast(groups, header),
        constant={
            **constant,
            "RescaleType": _find(groups, "PixelValueTransformationSequence", "RescaleType", [header]),
            "part of complex numbers": _component(groups, header),
        },
    )


def _contrast(groups: Sequence[Any], header: Any) -> dict[str, float]:
    """Return the numbers of a frame that its contrast depends on."""
    found = {}
    for name, (sequence, of_frame, of_file) in CONTRAST.items():
        value = _find(groups, sequence, of_frame, [])
        numbers = _numbers(header.get(of_file) if value is None else value, 1)
        if numbers is not None:
            found[name] = numbers[0]
    return found


def _component(groups: Sequence[Any], header: Any) -> str | None:
    """Return whether an MR frame shows magnitudes, phases, real or imaginary parts; None if nothing says so."""
    named = _find(groups, "MRImageFrameTypeSequence", "ComplexImageComponent", [header])
    kind = header.get("ImageType") if header.get("Modality") == "MR" else None
    letters = [part for part in kind or [] if part in ("M", "P", "R", "I")]
    return str(named) if named else next(iter(letters), None)


def _rescale(groups: Sequence[Any], header: Any, name: str) -> tuple[float, float] | None:
    """Return slope and intercept of a frame, None if there are none."""
    sequence = "PixelValueTransformationSequence"
    found = [_find(groups, sequence, attribute, [header]) for attribute in ("RescaleSlope", "RescaleIntercept")]
    if found == [None, None]:
        return None
    slope, intercept = (_numbers(value, 1) for value in found)
    if slope is None or intercept is None or not slope[0]:
        raise InputError(
            f"{name}: DICOM without a valid Rescale Slope and Intercept ({found[0]}, {found[1]}). Export it again."
        )
    return slope[0], intercept[0]


def _find(groups: Sequence[Any], sequence: str, attribute: str, top_level: Sequence[Any]) -> Any:
    """Return an attribute of a frame from its functional groups, else from the header itself."""
    items = [group[sequence].value[0] for group in groups if sequence in group and group[sequence].value]
    for dataset in [*items, *top_level]:
        if attribute in dataset:
            return dataset[attribute].value
    return None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers; None if the value is anything else."""
    try:
        values = tuple(float(part) for part in (value if count > 1 else [value]))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def frame_values(frames: Sequence[Frame]) -> np.ndarray:
    """Read the values of frames, rescaled, float32, `(columns, rows, frames)`.

    Raises:
        InputError: when a file cannot be decoded.
    """
    slices = [
        values for file, part in groupby(frames, lambda frame: frame.file) for values in _decode(file, list(part))
    ]
    return np.stack([values.T for values in slices], axis=-1)


def _decode(file: str, frames: Sequence[Frame]) -> list[np.ndarray]:
    """Decode frames of a file, `(rows, columns)` each."""
    dataset = None
    try:
        dataset = pydicom.dcmread(file, force=True)
        if "PixelData" in dataset and dataset.get("PixelRepresentation") not in (0, 1):
            raise InputError(
                f"{file}: DICOM without a valid Pixel Representation, which says whether its values are signed. "
                "Export it again."
            )
        highest, bits = dataset.get("HighBit"), dataset.get("BitsStored")
        if "PixelData" in dataset and None not in (highest, bits) and highest != bits - 1:
            raise InputError(
                f"{file}: DICOM whose High Bit is {highest}, of {bits} Bits Stored; {bits - 1} is needed, since values "
                "that begin above the lowest bit are not read. Export it again."
            )
        several = int(dataset.get("NumberOfFrames") or 1) > 1
        stored = [pixel_array(dataset, index=frame.number if several else None, raw=True) for frame in frames]
    except InputError:
        raise
    except (*DAMAGED, RuntimeError) as error:
        values = None if dataset is None else _decode_by_simpleitk(dataset, frames)
        if values is None:
            raise InputError(
                f"{file}: its pixels cannot be decoded ({in_one_line(error)}). Copy the file again, or "
                "decompress it, for example with dcmdjpeg or gdcmconv."
            ) from error
        return values
    if "ModalityLUTSequence" in dataset:
        return [apply_modality_lut(values, dataset).astype(np.float32) for values in stored]
    rescales = [frame.rescale or (1.0, 0.0) for frame in frames]
    return [
        (values.astype(np.float64) * slope + intercept).astype(np.float32)
        for values, (slope, intercept) in zip(stored, rescales)
    ]


def _decode_by_simpleitk(dataset: Any, frames: Sequence[Frame]) -> list[np.ndarray] | None:
    """Decode what pydicom has no decoder for; None if that fails, or would not give the values that are meant.

    SimpleITK rescales by itself, in one way for all frames, and inverts what a viewer should show inverted.
    """
    rescales = {frame.rescale for frame in frames_of(dataset, frames[0].file)}
    if dataset.get("SOPClassUID") not in RESCALED_BY_GROUPS:
        rescales.add(_rescale([], dataset, frames[0].name))
    if None in rescales:  # which leaves values as they are
        rescales = rescales - {None} | {(1.0, 0.0)}
    if (
        dataset.get("PhotometricInterpretation") != "MONOCHROME2"
        or "ModalityLUTSequence" in dataset
        or len(rescales) > 1
        or _is_damaged(dataset)
    ):
        return None
    try:
        values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(frames[0].file, SimpleITK.sitkFloat32))
    except RuntimeError:
        return None
    return [values[frame.number] for frame in frames] if values.ndim == 3 else None


def _is_damaged(dataset: Any) -> bool:
    """Return whether pixels that pydicom failed to decode are too few, or compressed in a way that it can decode.

    SimpleITK fills up a slice whose pixels end too early with what happens to be in memory.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        if syntax is not None and syntax.is_encapsulated:
            return get_decoder(syntax).is_available
        return len(dataset.PixelData) < get_expected_length(dataset)
    except NotImplementedError:  # a compression that pydicom does not know
        return False
    except DAMAGED:
        return True
