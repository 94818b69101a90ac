"""Reading and writing of volumes such that bad files are named, and no file is ever half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

__all__ = ["InputError", "check_folder", "image_name", "read_image", "write_atomically", "write_labels"]

SUFFIXES = (".nii.gz", ".nii")


class InputError(ValueError):
    """Something that a user handed in cannot be used; the message names it and the remedy in one line."""


def image_name(path: str | os.PathLike) -> str:
    """File name without folder and NIfTI suffix.

    Raises:
        InputError: when the name has no NIfTI suffix.
    """
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    raise InputError(f"{path}: not the name of a NIfTI file (.nii or .nii.gz). Convert the image to NIfTI first.")


def read_image(path: str | os.PathLike) -> nibabel.Nifti1Image:
    """Read a 3D NIfTI image and make sure that it can be segmented.

    Returns:
        The image with its data read, float32.

    Raises:
        InputError: when there is no such file, it is damaged, not a 3D image, without orientation or not finite.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder. Name the image files in it.")
    if not path.exists():
        raise InputError(f"{path}: no such file. Check the path.")
    image_name(path)
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, EOFError, OSError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_one_line(error)}). Export or copy it again.") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(f"{path}: {type(image).__name__} with the name of a NIfTI file. Convert it to NIfTI first.")
    shape = image.shape
    if len(shape) != 3 or 0 in shape:
        raise InputError(f"{path}: has the shape {shape}, a 3D volume is needed. Extract one volume of it first.")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: has voxels of type {image.get_data_dtype()}, numbers are needed. Convert it first.")
    header = image.header
    if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        raise InputError(
            f"{path}: has no orientation (qform and sform codes are 0), so left and right cannot be told apart. "
            "Set the affine, for example with nibabel: `image.set_sform(affine, code=1)`."
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: has an affine that cannot be inverted. Set a valid one with nibabel's `set_sform`.")
    try:
        data = image.get_fdata(dtype=np.float32)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({_one_line(error)}). Copy it again.") from error
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise InputError(f"{path}: {bad} voxels are NaN or infinite. Replace them, for example by `numpy.nan_to_num`.")
    return image


def check_folder(path: str | os.PathLike) -> Path:
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
    handle, name = tempfile.mkstemp(suffix="".join(path.suffixes[-2:]), prefix=".", dir=path.parent)
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


def write_labels(labels: np.ndarray, like: nibabel.Nifti1Image, path: Path) -> None:
    """Write a label volume as uint8 NIfTI in the geometry of an image.

    Args:
        labels: of the shape of the image.
        like: the image whose affine, codes and units it gets.
        path: file to write.
    """
    image = nibabel.Nifti1Image(labels.astype(np.uint8), like.affine)
    for name in ("qform", "sform"):
        matrix, code = getattr(like, f"get_{name}")(coded=True)
        getattr(image, f"set_{name}")(matrix, int(code))
    image.header.set_xyzt_units(*like.header.get_xyzt_units())
    write_atomically(path, lambda temporary: nibabel.save(image, temporary))


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
