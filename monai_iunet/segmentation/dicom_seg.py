"""Labels as DICOM Segmentation, which a PACS and viewers such as OHIF and 3D Slicer show over the series it belongs to.

Source: DICOM PS3.3, A.51 Segmentation IOD; highdicom writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom

from monai_iunet.errors import InputError
from monai_iunet.io.checks import grids_apart
from monai_iunet.io.dicom_frames import Frame, frames_of, read_header
from monai_iunet.io.dicom_stack import stack_frames
from monai_iunet.segmentation.result import Segmentation

__all__ = ["write_dicom_seg"]

LONGEST_NAME = 64  # characters of a text of one line, the standard's LO
# Of patient and study: type 2 attributes, which must be there but may be empty.
MAY_BE_EMPTY = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
# Functional groups that highdicom looks for among the shared ones.
SHARED = ("PlaneOrientationSequence", "PixelMeasuresSequence")


def write_dicom_seg(files: Sequence[str], segmentation: Segmentation, path: Path) -> None:
    """Write labels as a DICOM Segmentation object, one segment per structure, empty ones too.

    Args:
        files: of the series, or one file of several frames.
        segmentation: labels on the grid of the series, as `read_image` reads it.
        path: file to write.

    Raises:
        InputError: when highdicom is not installed, no list of files is given, the labels are on another grid, the
            standard allows no such name of a structure, or the series lacks what it asks for.

    Example:
        >>> write_dicom_seg(series_files("folder"), segmentation, Path("labels.dcm"))  # doctest: +SKIP
    """
    try:
        import highdicom
    except ImportError as error:
        raise InputError(
            "DICOM SEG needs highdicom: pip install highdicom, or leave --format out for NIfTI."
        ) from error
    if isinstance(files, (str, os.PathLike)) or not files:
        given = files or "no files"
        raise InputError(f"{given}: the files of a series are needed, as series_files(folder) returns them.")
    _check_names(segmentation.names)
    frames = _frames(files, segmentation.image)
    files = list(dict.fromkeys(frame.file for frame in frames))
    labels = np.ascontiguousarray(segmentation.labels.T)
    if len(files) == 1:  # frames in the order of the file, not of their positions
        labels = labels[np.argsort([frame.number for frame in frames])]
    thickness = float(segmentation.image.header.get_zooms()[2])
    source_images = [_source_image(file, thickness) for file in files]
    descriptions = _descriptions(segmentation.names)
    try:
        seg_object = highdicom.seg.Segmentation(
            source_images=source_images,
            pixel_array=labels,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="The monai_iunet developers",
            manufacturer_model_name="monai_iunet",
            software_versions=version("monai-iunet"),
            device_serial_number="0",
            series_description="monai_iunet segmentation, for research only",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{Path(files[0]).parent}: lacks what a DICOM SEG has to refer to ({error!r}). Leave --format out."
        ) from error
    seg_object.save_as(path)


def _check_names(names: Mapping[int, str]) -> None:
    """Check that the standard allows the numbers and names of structures: a backslash would begin a second name."""
    if list(names) != list(range(1, len(names) + 1)):
        raise InputError(f"the labels of a DICOM SEG must be 1, 2, ..., in this order, got {names}. Map them first.")
    for name in names.values():
        if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable() or "\\" in name:
            raise InputError(
                f"{name!r}: in a DICOM SEG the name of a structure has 1 to {LONGEST_NAME} characters, without "
                "backslash or end of a line. Rename it in the bundle's metadata.json, or leave --format out for NIfTI."
            )


def _frames(files: Sequence[str], image: nibabel.Nifti1Image) -> Sequence[Frame]:
    """Return the frames of files in the order of the slices of their volume, on whose grid an image is."""
    folder = Path(files[0]).parent
    frames = [frame for file in files for frame in frames_of(read_header(file), file)]
    stack = stack_frames(frames, str(folder))
    if stack.tilt:
        raise InputError(
            f"{folder}: the gantry was tilted, so the slices of the labels are not those of the series. "
            "Leave --format out for NIfTI."
        )
    shape = (*frames[0].size[::-1], len(frames))
    if image.shape != shape or grids_apart(image.affine, stack.affine, shape) > 0:
        raise InputError(
            f"{folder}: the labels are not on the grid of the series, as other programs turn or flip it. Segment what "
            "read_image reads, or resample them."
        )
    return stack.frames


def _source_image(file: str, thickness: float) -> Any:
    """Read a slice with all that highdicom asks for, which scanners and anonymizers may have left out."""
    dataset = pydicom.dcmread(file)
    dataset.SliceThickness = dataset.get("SliceThickness") or thickness
    for name in MAY_BE_EMPTY:
        if name not in dataset:
            setattr(dataset, name, None)
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if frames and not dataset.get("SharedFunctionalGroupsSequence"):
        dataset.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    for name in SHARED if frames else ():
        shared = dataset.SharedFunctionalGroupsSequence[0]
        if name not in shared and name in frames[0]:  # some scanners repeat in each frame what all have in common
            shared[name] = frames[0][name]
    # What is written takes over the character set, in which structures may have no name.
    dataset.decode()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    return dataset


def _descriptions(names: Mapping[int, str]) -> list[Any]:
    """Return the description of each segment, which says what it shows and what found it."""
    import highdicom
    from pydicom.sr.codedict import codes  # takes a while

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="monai_iunet", version=version("monai-iunet"), family=codes.DCM.ArtificialIntelligence
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=value,
            segment_label=name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=_code(name, codes.SCT),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for value, name in names.items()
    ]


def _code(name: str, codes: Any) -> Any:
    """Return the SNOMED code of a structure by its name, leaving out more and more first words; else of an organ."""
    keywords = {keyword.lower(): keyword for keyword in dir(codes)}
    words = name.lower().split()
    for start in range(len(words)):
        for ending in ("", "gland"):
            keyword = keywords.get("".join(words[start:]) + ending)
            if keyword:
                return getattr(codes, keyword)
    return codes.Organ
