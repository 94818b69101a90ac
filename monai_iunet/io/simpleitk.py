"""Reading of NRRD and MetaImage by SimpleITK.

SimpleITK takes a file that says nothing of its orientation for one in LPS. Here it is refused, as NIfTI is.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import nibabel
import SimpleITK

from monai_iunet.errors import InputError
from monai_iunet.io.checks import check_compressed, check_size
from monai_iunet.io.files import files_in
from monai_iunet.io.geometry import from_simpleitk

__all__ = ["read_with_simpleitk"]

LARGEST_HEADER = 1000  # lines
LARGEST_LINE = 10_000  # bytes
AXES = 3  # of a volume
# NRRD has others, such as "scanner-xyz", which do not say where left and right are.
PATIENT_SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las")


def read_with_simpleitk(path: Path) -> nibabel.Nifti1Image:
    """Read a file in this process; a damaged one may end it, see `untrusted.py`.

    Raises:
        InputError: when it cannot be read as a volume of scalars.
    """
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        if len(size) != 3 or components > 1:
            shape = f"{size} with {components} components" if components > 1 else f"{size}"
            raise InputError(
                f"{path}: has the shape {shape}, a 3D volume of scalars is needed. Extract one volume of it first."
            )
        # A header may lie beside its data, or name them in another folder.
        parts = {*path.parent.iterdir(), *files_in(path)} if path.suffix.lower() in (".nhdr", ".mhd") else {path}
        check_size(path, math.prod(size), sum(part.stat().st_size for part in parts if part.is_file()))
        _check_orientation(path)
        voxel = SimpleITK.GetArrayViewFromImage(SimpleITK.Image(1, 1, 1, reader.GetPixelID())).itemsize
        _check_data(path, math.prod(size) * voxel)
        return from_simpleitk(reader.Execute())
    except RuntimeError as error:
        raise InputError(f"{path}: not readable, damaged or of another format. Export or copy it again.") from error


def _check_orientation(path: Path) -> None:
    """Check that the header of a NRRD or MetaImage names the directions of the axes, in millimeters.

    Sources: the specifications of NRRD ("space", "space directions") and of MetaImage ("TransformMatrix", which has the
    older names "Rotation" and "Orientation").
    """
    suffix = path.suffix.lower()
    if suffix in (".nrrd", ".nhdr"):
        fields, _ = _read_header(path)
        known = fields.get("space", "").lower() in PATIENT_SPACES and "space directions" in fields
        units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"", "mm", "millimeter", "millimeters"}
        if units:
            raise InputError(
                f"{path}: its voxels are given in the unit {', '.join(sorted(units))}, millimeters are needed. Write "
                "it again with `space units` mm and `space directions` in millimeters."
            )
        advice = "Write it again with `space` RAS, LAS or LPS and `space directions`, for example with 3D Slicer."
        # Of a time or a list the direction is "none" or not a number; SimpleITK takes it for one of 1 mm.
        vectors = re.findall(r"\([^()]*\)", fields.get("space directions", "").lower())
        if known and sum("nan" not in vector for vector in vectors) < AXES:
            raise InputError(
                f"{path}: its `space directions` are {fields['space directions']}, so an axis has none in space and no "
                "size of a voxel. Extract a 3D volume, or write it again with the direction of each axis."
            )
    elif suffix in (".mha", ".mhd"):
        fields, _ = _read_header(path)
        if not fields.keys() & {"ElementSpacing", "ElementSize"}:  # which would be taken for 1 mm
            raise InputError(
                f"{path}: says nothing of the size of its voxels. Write it again with ElementSpacing, in millimeters."
            )
        _check_meaning(path, fields)
        known = bool(fields.keys() & {"TransformMatrix", "Rotation", "Orientation"})
        advice = "Write it again with a TransformMatrix, for example with SimpleITK."
    else:
        return
    if not known:
        raise InputError(f"{path}: has no orientation, so left and right cannot be told apart. {advice}")


def _check_meaning(path: Path, fields: dict[str, str]) -> None:
    """Check that a MetaImage is in millimeters and its voxels are the intensities; SimpleITK takes both for granted.

    Source: the specification of MetaImage ("DistanceUnits", "ElementToIntensityFunctionSlope" and "...Offset").
    """
    fields = {name.lower(): value for name, value in fields.items()}  # for the writer meant it
    unit = fields.get("distanceunits", "mm")
    if unit not in ("mm", "?"):
        raise InputError(
            f"{path}: its voxels are given in the unit {unit}, millimeters are needed. Write it again with "
            "ElementSpacing and Offset in millimeters."
        )
    for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        value = fields.get(name.lower(), str(neutral))
        try:
            changes = float(value) != neutral
        except ValueError:
            changes = True
        if changes:
            raise InputError(
                f"{path}: its {name} is {value}, by which voxels become intensities; that is not read. Apply it to the "
                "voxels, and write the image again without it."
            )


def _check_data(path: Path, needed: int) -> None:
    """Check the data of a NRRD or MetaImage, of which SimpleITK takes what is damaged, or of another image.

    Sources: the specifications of NRRD ("encoding", "data file", "line skip", "byte skip") and of MetaImage
    ("CompressedData", "CompressedDataSize", "BinaryData", "ElementDataFile", "HeaderSize"). Data in several files are
    left to SimpleITK.

    Args:
        path: the file, or the header beside the data.
        needed: bytes of the data, not compressed.
    """
    fields, end = _read_header(path)
    if "ElementDataFile" in fields:
        is_compressed = fields.get("CompressedData", "").lower() in ("true", "1")
        is_raw = not is_compressed and fields.get("BinaryData", "").lower() in ("true", "1")
        file = "" if fields["ElementDataFile"].upper() == "LOCAL" else fields["ElementDataFile"]
    else:
        is_compressed = fields.get("encoding", "").lower() in ("gzip", "gz") and fields.get("line skip", "0") == "0"
        is_raw = fields.get("encoding", "").lower() == "raw"
        file = fields.get("data file", fields.get("datafile", ""))
    data = path.parent / file if file else path
    begins_later = fields.keys() & {"HeaderSize", "byte skip", "byteskip", "line skip", "lineskip"}
    if not data.is_file():
        return
    size = needed
    if is_compressed:
        size, compressed = check_compressed(path, data, 0 if file else end)
        if "ElementDataFile" in fields:
            _check_compressed_size(path, fields.get("CompressedDataSize", "0"), compressed, bool(file))
    elif file and is_raw:
        size = max(needed, data.stat().st_size)  # SimpleITK notices data that end too early
    if size != needed and not begins_later:
        raise InputError(
            f"{path}: its size and type need {needed} bytes, {data.name} has {size}: it is that of another image, or "
            "the header is wrong. Export or copy both again."
        )


def _check_compressed_size(path: Path, claimed: str, found: int, is_detached: bool) -> None:
    """Check that SimpleITK will take all compressed data of a MetaImage: it leaves out voxels, and goes on."""
    if claimed == "0" and is_detached:  # all of the file
        return
    if not claimed.isdigit() or int(claimed) < found:
        raise InputError(
            f"{path}: its CompressedDataSize is {claimed}, its data take {found} bytes: they would be read in part. "
            "Export it again, for example with SimpleITK."
        )


def _read_header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields of a header in text, and the byte where it ends.

    Names of NRRD are in lower case; those of MetaImage stay, since SimpleITK passes over others than its own.
    """
    is_nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    separator = ":" if is_nrrd else "="
    fields = {}
    with path.open("rb") as file:
        for _ in range(LARGEST_HEADER):
            line = file.readline(LARGEST_LINE).decode("utf-8", "surrogateescape").strip()
            name, sign, value = line.partition(separator)
            if sign and not value.startswith("="):  # `name:=value` is no field of NRRD
                fields[name.strip().lower() if is_nrrd else name.strip()] = value.strip()
            if not line or name.strip() == "ElementDataFile":
                break
        return fields, file.tell()
