"""Reading and writing of volumes such that bad files are named, and no file is ever half written."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

__all__ = [
    "NIFTI",
    "SUFFIXES",
    "InputError",
    "check_extent",
    "check_folder",
    "check_image",
    "check_names",
    "check_not_constant",
    "image_name",
    "label_image",
    "read_image",
    "read_with_simpleitk",
    "write_atomically",
    "write_labels",
]

NIFTI = (".nii.gz", ".nii")
SIMPLEITK = (".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
SUFFIXES = NIFTI + SIMPLEITK
# What deflate, the compression of all these formats, can reach at best (zlib's technical notes).
LARGEST_COMPRESSION = 1032
LARGEST_VOXEL = 50.0  # mm
LARGEST_EXTENT = 2500.0  # mm, a tall person with some air around
SMALLEST_EXTENT = 1.0  # mm, of the longest axis
BROKEN = (
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


class InputError(ValueError):
    """Something that a user handed in cannot be used; the message names it and the remedy in one line."""


def image_name(path: str | os.PathLike[str], suffixes: Sequence[str] = NIFTI) -> str:
    """File name without folder and suffix.

    Raises:
        InputError: when the name has none of the suffixes.

    Example:
        >>> image_name("folder/scan.nii.gz")
        'scan'
    """
    name = Path(path).name
    for suffix in suffixes:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    raise InputError(
        f"{path}: not the name of an image that can be read ({', '.join(suffixes)}). Convert the image to NIfTI first."
    )


def check_names(names: Sequence[str]) -> None:
    """Make sure that results named after images do not overwrite each other.

    Raises:
        InputError: when a name is there twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"Several images have the name {', '.join(twice)}: results would overwrite each other. Rename."
        )


def read_image(
    path: str | os.PathLike[str], series: str | None = None, read_before: bool = False
) -> nibabel.Nifti1Image:
    """Read a 3D image and make sure that it can be segmented.

    Args:
        path: a file of NIfTI, NRRD or MetaImage, a DICOM file that holds a volume, or a folder with a DICOM series.
        series: Series Instance UID, or its beginning or end, where a folder holds several.
        read_before: whether this file was read before, so that it needs no process of its own to be tried in.

    Returns:
        The image with its data read, float32; the affine is in RAS.

    Raises:
        InputError: when there is no such file, it is damaged, not a 3D image, without orientation or not finite.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file. Check the path.")
    if not path.is_dir():
        image_name(path, SUFFIXES)
        if path.name.lower().endswith(NIFTI):
            return check_image(_read_nifti(path), str(path))
    if not read_before:
        from monai_iunet.probe import probe

        probe(path, series)
    return check_image(read_with_simpleitk(path, series), str(path))


def _read_nifti(path: Path) -> nibabel.Nifti1Image:
    try:
        image = nibabel.load(path)
    except BROKEN as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_one_line(error)}). Export or copy it again.") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(f"{path}: {type(image).__name__} with the name of a NIfTI file. Convert it to NIfTI first.")
    _check_size(path, math.prod(image.shape) * image.get_data_dtype().itemsize, path.stat().st_size)
    return image


def read_with_simpleitk(path: Path, series: str | None = None) -> nibabel.Nifti1Image:
    """Read a file, or a DICOM series of a folder, in this process, whatever that does to it: see `read_image`.

    Raises:
        InputError: when it cannot be read as a volume of scalars.
    """
    import SimpleITK

    from monai_iunet.geometry import from_simpleitk

    if path.is_dir():
        from monai_iunet.dicom import read_series

        return from_simpleitk(read_series(path, series))
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() > 1 or reader.GetDimension() < 3 or 1 in reader.GetSize()[2:3]:
            raise InputError(
                f"{path}: has the size {reader.GetSize()} with {reader.GetNumberOfComponents()} components, a 3D "
                "volume of scalars is needed. Name one, or the folder of a DICOM series."
            )
        # A header may lie beside its data.
        parts = path.parent.iterdir() if path.suffix.lower() in (".nhdr", ".mhd") else [path]
        _check_size(path, math.prod(reader.GetSize()), sum(part.stat().st_size for part in parts if part.is_file()))
        return from_simpleitk(reader.Execute())
    except RuntimeError as error:
        raise InputError(f"{path}: not readable, damaged or of another format. Export or copy it again.") from error


def _check_size(path: Path, claimed: int, stored: int) -> None:
    """Refuse a header that promises more than its file can hold, before memory is taken for it."""
    if claimed > LARGEST_COMPRESSION * stored:
        raise InputError(
            f"{path}: its header promises {claimed} bytes, the file has {stored}: truncated or damaged. Copy it again."
        )


def check_image(image: nibabel.Nifti1Image, name: str) -> nibabel.Nifti1Image:
    """Make sure that an image can be segmented.

    Args:
        image: is given back.
        name: what an error calls it.

    Raises:
        InputError: when it is not 3D, without orientation, of a size that no scan has, damaged or not finite.

    Example:
        >>> check_image(nibabel.Nifti1Image(np.zeros((4, 5)), np.eye(4)), "x")
        Traceback (most recent call last):
            ...
        monai_iunet.images.InputError: x: has the shape (4, 5), a 3D volume is needed. Extract one volume of it first.
    """
    shape = image.shape
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{name}: has the shape {shape}, a 3D volume is needed. Extract one volume of it first.")
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
            f"{name}: {_times(shape)} voxels of {_times(spacing)} mm, which is no scan of a person. Set the affine in "
            "millimeters with nibabel's `set_sform`."
        )
    try:
        data = image.get_fdata(dtype=np.float32)
    except BROKEN as error:
        raise InputError(f"{name}: truncated or damaged ({_one_line(error)}). Copy it again.") from error
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise InputError(f"{name}: {bad} voxels are NaN or infinite. Replace them, for example by `numpy.nan_to_num`.")
    return image


def _check_forms(image: nibabel.Nifti1Image, name: str) -> None:
    """Refuse a header that says two things: programs would read it differently, and tell sides and sizes differently.

    Small differences are common, since an image that was registered to another has a sform that says so.
    """
    header = image.header
    try:
        forms = [form for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)) if code > 0]
        axes = ["".join(map(str, nibabel.aff2axcodes(form))) for form in forms]
        header.get_xyzt_units()
    except BROKEN as error:
        raise InputError(
            f"{name}: its header is damaged ({_one_line(error)}). Set a valid one with nibabel: "
            "`image.set_qform(image.affine, code=1)`, `image.header.set_xyzt_units('mm')`."
        ) from error
    if len(set(axes)) > 1:
        raise InputError(
            f"{name}: its axes run to {axes[0]} by its sform, to {axes[1]} by its qform, so left and right are in "
            "doubt. Keep the right one with nibabel: `image.set_sform(image.get_qform(), code=1)`, or the other way."
        )
    given, found = header.get_zooms(), voxel_sizes(image.affine)
    if not np.allclose(given, found, rtol=0.01):
        raise InputError(
            f"{name}: voxels of {_times(given)} mm by its pixdim, of {_times(found)} mm by its affine. If the affine "
            "is right, make all agree with nibabel: `image.set_qform(image.affine, code=1)`."
        )


def check_not_constant(image: nibabel.Nifti1Image, name: str) -> None:
    """Make sure that an image shows something.

    Raises:
        InputError: when all voxels have the same value.
    """
    if np.ptp(image.get_fdata(dtype=np.float32)) == 0:
        raise InputError(f"{name}: all voxels have the same value, so there is nothing to segment. Check the export.")


def check_extent(image: nibabel.Nifti1Image, limit: float, name: str, advice: str) -> None:
    """Make sure that an image shows no more than a network has learned from.

    Raises:
        InputError: when an axis is longer than `limit`, in mm; it ends with the advice.
    """
    extent = voxel_sizes(image.affine) * image.shape
    if extent.max() > limit:
        raise InputError(f"{name}: {_times(extent.round())} mm, images of up to {limit:g} mm are needed. {advice}")


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Make sure that files can be written into a folder; it is created if need be.

    Raises:
        InputError: when it cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another output folder.") from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside `path`, and give it its name when it is complete."""
    handle, name = tempfile.mkstemp(suffix="".join(path.suffixes[-2:]), prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def label_image(labels: np.ndarray, like: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """A label volume as uint8 NIfTI image in the geometry of an image.

    Args:
        labels: of the shape of the image.
        like: the image whose affine, codes and units it gets.

    Example:
        >>> image = nibabel.Nifti1Image(np.zeros((4, 5, 6)), np.diag([1, 1, 2, 1]))
        >>> label_image(np.ones((4, 5, 6)), image).get_data_dtype()
        dtype('uint8')
    """
    image = nibabel.Nifti1Image(labels.astype(np.uint8), like.affine)
    for name in ("qform", "sform"):
        matrix, code = getattr(like, f"get_{name}")(coded=True)
        getattr(image, f"set_{name}")(matrix, int(code))
    image.header.set_xyzt_units(*like.header.get_xyzt_units())
    return image


def write_labels(labels: np.ndarray, like: nibabel.Nifti1Image, path: Path) -> None:
    """Write the `label_image` of a label volume; a file is there whole or not at all."""
    image = label_image(labels, like)
    write_atomically(path, lambda temporary: nibabel.save(image, temporary))


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
