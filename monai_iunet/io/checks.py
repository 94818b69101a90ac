"""Checks that an image can be segmented; what is wrong is named together with the remedy."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from monai_iunet.errors import InputError
from monai_iunet.io.channels import CHANNEL_FILES
from monai_iunet.io.text import first_line, times

__all__ = [
    "DAMAGED",
    "check_compressed",
    "check_extent",
    "check_image",
    "check_not_constant",
    "check_same_grid",
    "check_size",
    "grids_apart",
    "planes",
    "raw_voxels",
]

# What deflate, the compression of all these formats, can reach at best (zlib's technical notes).
LARGEST_COMPRESSION = 1032
LARGEST_VOXEL = 50.0  # mm
LARGEST_EXTENT = 2500.0  # mm, a tall person with some air around
SMALLEST_EXTENT = 1.0  # mm, of the longest axis
LARGEST_WHOLE = 2**24  # above it float32 leaves out whole numbers
FEWEST_STEPS = 1024  # between the smallest and the largest value, of those that float32 has there
COMPRESSED_PART = 2**14  # bytes that are decompressed at a time, to 16 MiB at most
LARGEST_TURN = 20.0  # degrees, between qform and sform whose axes bear other names
SMALL_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16))  # which PyTorch computes with too
DAMAGED = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    ValueError,
    np.linalg.LinAlgError,
    zlib.error,
)


def check_image(image: nibabel.Nifti1Image, name: str, channels: int = 1) -> nibabel.Nifti1Image:
    """Check that an image can be segmented, and read its voxels.

    Args:
        image: image to check.
        name: name of the image in errors.
        channels: that it must have; several are the last axis of a 4D image.

    Returns:
        The image with its voxels in memory, as `raw_voxels` gives them.

    Raises:
        InputError: when it is not 3D, or of other channels, without orientation, of a size that no scan has, damaged or
            not finite, or when its values are too large and too alike for float32.

    Example:
        >>> check_image(nibabel.Nifti1Image(np.zeros((4, 5)), np.eye(4)), "x")
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: x: has the shape (4, 5), a 3D volume is needed. Extract one volume of it first.
    """
    shape = image.shape[:3]
    if channels > 1 and image.ndim in (3, 4) and image.shape[3:] != (channels,):
        found = "1 channel" if image.ndim == 3 else f"{image.shape[3]} channels"
        raise InputError(f"{name}: has {found}, {channels} are needed: {CHANNEL_FILES}")
    if image.ndim != (3 if channels == 1 else 4) or min(shape) < 1:
        raise InputError(f"{name}: has the shape {image.shape}, a 3D volume is needed. Extract one volume of it first.")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{name}: has voxels of type {image.get_data_dtype()}, numbers are needed. Convert it first.")
    header = image.header
    if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        raise InputError(
            f"{name}: has no orientation (qform and sform codes are 0), so left and right cannot be told apart. "
            "Set the affine, for example with nibabel: `image.set_sform(affine, code=1)`."
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise InputError(f"{name}: has an affine that cannot be inverted. Set a valid one with nibabel's `set_sform`.")
    _check_forms(image, name)
    spacing = voxel_sizes(image.affine)
    if spacing.max() > LARGEST_VOXEL or not SMALLEST_EXTENT <= (spacing * shape).max() <= LARGEST_EXTENT:
        raise InputError(
            f"{name}: {times(shape)} voxels of {times(spacing)} mm, which is no scan of a person. Set the affine in "
            "millimeters with nibabel's `set_sform`."
        )
    try:
        data = raw_voxels(image)
    except DAMAGED as error:
        raise InputError(f"{name}: truncated or damaged ({first_line(error)}). Copy it again.") from error
    bad = 0 if data.dtype.kind in "iu" else sum(plane.size - int(np.isfinite(plane).sum()) for plane in planes(data))
    if bad:
        raise InputError(f"{name}: {bad} voxels are NaN or infinite. Replace them, for example by `numpy.nan_to_num`.")
    _check_digits(data, name)
    if data is image.dataobj:
        return image
    read = nibabel.Nifti1Image(data, image.affine, header, dtype=data.dtype)
    read.header.set_data_dtype(data.dtype)
    return read


def raw_voxels(image: nibabel.Nifti1Image) -> np.ndarray:
    """Return the voxels of an image: small integers as they are, all other numbers as float32.

    Example:
        >>> raw_voxels(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))).dtype
        dtype('int16')
    """
    stored: Any = image.dataobj
    if isinstance(stored, nibabel.arrayproxy.ArrayProxy):
        is_scaled = (stored.slope, stored.inter) != (1, 0)
        if is_scaled or stored.dtype.newbyteorder("=") not in SMALL_INTEGERS:
            return image.get_fdata(dtype=np.float32, caching="unchanged")
        stored = stored.get_unscaled()
        stored = np.array(stored) if isinstance(stored, np.memmap) else stored  # whose file may be gone or changed
    kind = stored.dtype.newbyteorder("=")
    return stored.astype(kind if kind in SMALL_INTEGERS else np.float32, copy=False)


def planes(data: np.ndarray) -> Iterator[np.ndarray]:
    """Go through a volume plane by plane, so that what is computed of it takes little memory."""
    axis = int(np.argmax(np.abs(data.strides)))
    yield from np.moveaxis(data, axis, 0)


def _check_digits(data: np.ndarray, name: str) -> None:
    """Refuse values so large and so alike that float32, into which they were read, hardly tells them apart."""
    if data.dtype.kind in "iu" or max(float(np.abs(plane).max()) for plane in planes(data)) <= LARGEST_WHOLE:
        return
    inside = (plane[plane != 0] for plane in planes(data))  # zeros may lie around an image
    ends = [float(end) for values in inside if values.size for end in (values.min(), values.max())]
    low, high = min(ends), max(ends)
    if high - low < FEWEST_STEPS * np.spacing(np.float32(max(-low, high))):
        raise InputError(
            f"{name}: its values lie between {low:.10g} and {high:.10g}, which float32, the type that images are "
            "computed in, hardly tells apart. Subtract their minimum before it is saved."
        )


def _check_forms(image: nibabel.Nifti1Image, name: str) -> None:
    """Refuse a header that says two things: programs would read it differently, and tell sides and sizes differently.

    Small differences are common, since an image that was registered to another has a sform that says so.
    """
    header = image.header
    try:
        forms = [form for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)) if code > 0]
        axes = ["".join(map(str, nibabel.aff2axcodes(form))) for form in forms]
        unit = header.get_xyzt_units()[0]
    except DAMAGED as error:
        raise InputError(
            f"{name}: its header is damaged ({first_line(error)}). Set a valid one with nibabel: "
            "`image.set_qform(image.affine, code=1)`, `image.header.set_xyzt_units('mm')`."
        ) from error
    if unit not in ("mm", "unknown"):
        raise InputError(
            f"{name}: its header gives voxels of {times(header.get_zooms()[:3])} in the unit {unit}, millimeters are "
            "needed. Set the affine in millimeters with nibabel's `set_sform`, and `image.header.set_xyzt_units('mm')`."
        )
    if len(set(axes)) > 1 and _are_apart(*forms):
        raise InputError(
            f"{name}: its axes run to {axes[0]} by its sform, to {axes[1]} by its qform, so left and right are in "
            "doubt. Keep the right one with nibabel: `image.set_sform(image.get_qform(), code=1)`, or the other way."
        )
    zooms, spacing = header.get_zooms()[:3], voxel_sizes(image.affine)
    if not np.allclose(zooms, spacing, rtol=0.01):
        raise InputError(
            f"{name}: voxels of {times(zooms)} mm by its pixdim, of {times(spacing)} mm by its affine. If the affine "
            "is right, make all agree with nibabel: `image.set_qform(image.affine, code=1)`."
        )


def _are_apart(form: np.ndarray, other: np.ndarray) -> bool:
    """Return whether axes of two affines run in directions that differ by more than registration and rounding.

    Near 45 degrees an axis is named after the one or the other of two directions, however little the affines differ.
    """
    directions = (matrix[:3, :3] / voxel_sizes(matrix) for matrix in (form, other))
    cosines = np.prod(list(directions), axis=0).sum(axis=0)
    return bool(cosines.min() < np.cos(np.radians(LARGEST_TURN)))


def check_not_constant(image: nibabel.Nifti1Image, name: str) -> None:
    """Check that the voxels of an image differ, in each of its channels.

    Raises:
        InputError: when all voxels of one have the same value.
    """
    data = raw_voxels(image)
    for number, channel in enumerate([data] if data.ndim == 3 else np.moveaxis(data, -1, 0)):
        first = channel.flat[0]
        if all((plane == first).all() for plane in planes(channel)):
            where = "" if data.ndim == 3 else f" of channel {number}"
            raise InputError(
                f"{name}: all voxels{where} have the same value, so there is nothing to segment. Check the export."
            )


def check_same_grid(name: str, image: nibabel.Nifti1Image, other: str, reference: nibabel.Nifti1Image) -> None:
    """Check that two images lie on the same grid.

    Args:
        name: of the image in errors.
        image: to check.
        other: name of the reference in errors.
        reference: the other image.

    Raises:
        InputError: when shapes differ, or corners are a tenth of a voxel apart.
    """
    if image.shape[:3] != reference.shape[:3]:
        raise InputError(f"{name}: has the shape {image.shape[:3]}, {other} {reference.shape[:3]}.")
    apart = grids_apart(image.affine, reference.affine, reference.shape[:3])
    if apart > 0:
        raise InputError(f"{name}: its grid and that of {other} are up to {apart:.3g} mm apart.")


def grids_apart(affine: np.ndarray, reference: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far corners of two grids of the same shape are apart, in mm; 0 within a tenth of a voxel."""
    # All eight, since two would also meet where the axes of a cube have changed places.
    corners = np.array(list(itertools.product(*((0, extent) for extent in shape), [1])))
    apart = float(np.abs(corners @ (affine - reference).T).max())
    return apart if apart > 0.1 * voxel_sizes(reference).min() else 0.0


def check_extent(image: nibabel.Nifti1Image, limit: float, name: str, advice: str) -> None:
    """Check that an image is no larger than what a network has learned from.

    Raises:
        InputError: when an axis is longer than `limit`, in mm; it ends with the advice.
    """
    extent = voxel_sizes(image.affine) * image.shape[:3]
    if extent.max() > limit:
        raise InputError(f"{name}: {times(extent.round())} mm, images of up to {limit:g} mm are needed. {advice}")


def check_size(path: Path, claimed: int, stored: int) -> None:
    """Refuse a header that promises more than its file can hold, before memory is taken for it."""
    if claimed > LARGEST_COMPRESSION * stored:
        raise InputError(
            f"{path}: its header promises {claimed} bytes, the file has {stored}: truncated or damaged. Copy it again."
        )


def check_compressed(path: Path, data: Path, start: int = 0) -> tuple[int, int]:
    """Decompress a file to its end, where its check sum tells whether a bit has changed; readers of images stop before.

    Args:
        path: of the image, for errors.
        data: file that is compressed by gzip or zlib; what follows the compressed data is left alone.
        start: byte where the compressed data begin.

    Returns:
        Bytes that the data have, and those that they take compressed.

    Raises:
        InputError: when the sum is another one, or the data end too early.
    """
    inflater, wrong, size = zlib.decompressobj(zlib.MAX_WBITS | 32), "it ends too early", 0
    with data.open("rb") as file:
        file.seek(start)
        while part := file.read(COMPRESSED_PART):
            try:
                size += len(inflater.decompress(part))
                while inflater.eof:
                    following = inflater.unused_data or file.read(COMPRESSED_PART)
                    if not following.startswith(b"\x1f"):
                        return size, file.tell() - len(following) - start
                    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip may write several parts
                    size += len(inflater.decompress(following))
            except zlib.error as error:
                wrong = first_line(error)
                break
    raise InputError(f"{path}: truncated or damaged ({wrong}). Copy it again.")
