"""Label volumes as files, in the geometry of their images."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.checks import planes
from monai_iunet.io.files import write_atomically

__all__ = ["label_bytes", "label_image", "write_labels", "write_probability_image"]


def label_image(labels: np.ndarray, like: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """Return a label volume as a uint8 NIfTI image in the geometry of an image.

    Args:
        labels: of the shape of the image, whole numbers from 0 to 255; an array, or a tensor on the CPU.
        like: the image whose affine, codes and units it gets; of another format of nibabel, such as MGH, its affine.

    Raises:
        InputError: when the labels are others, or have another shape.

    Example:
        >>> image = nibabel.Nifti1Image(np.zeros((4, 5, 6)), np.diag([1, 1, 2, 1]))
        >>> label_image(np.ones((4, 5, 6)), image).get_data_dtype()
        dtype('uint8')
    """
    if labels.shape != like.shape[:3]:
        raise InputError(
            f"labels have the shape {labels.shape}, but their image {like.shape}. Resample them to its grid."
        )
    image = nibabel.Nifti1Image(label_bytes(labels), like.affine)
    if isinstance(like, nibabel.Nifti1Pair):  # which a Nifti1Image is, too
        _copy_geometry(image, like)
    return image


def label_bytes(labels: np.ndarray) -> np.ndarray:
    """Return labels as an array of uint8.

    Raises:
        InputError: when they are not whole numbers from 0 to 255.
    """
    labels = np.asarray(labels)  # of a tensor, too
    is_numeric = labels.dtype.kind in "buif"
    if not is_numeric or (labels.dtype not in (np.uint8, bool) and not all(map(_are_bytes, planes(labels)))):
        raise InputError("labels must be whole numbers from 0 to 255, but there are others. Map them first.")
    return labels.astype(np.uint8, copy=False)


def _copy_geometry(image: nibabel.Nifti1Image, like: nibabel.Nifti1Image) -> None:
    """Give an image qform, sform and units of another; where the forms differ, programs read the one or the other."""
    for name in ("qform", "sform"):
        matrix, code = getattr(like, f"get_{name}")(coded=True)
        getattr(image, f"set_{name}")(matrix, int(code))
    image.header.set_xyzt_units(*like.header.get_xyzt_units())


def _are_bytes(values: np.ndarray) -> bool:
    """Return whether values are whole numbers that a byte holds; NaN is none."""
    return bool(((values >= 0) & (values <= np.iinfo(np.uint8).max) & (values == np.rint(values))).all())


def write_labels(labels: np.ndarray, like: nibabel.Nifti1Image, path: Path) -> None:
    """Write the `label_image` of a label volume, whole or not at all."""
    image = label_image(labels, like)
    write_atomically(path, lambda temporary: nibabel.save(image, temporary))


def write_probability_image(
    probabilities: np.ndarray, affine: np.ndarray, path: Path, like: nibabel.Nifti1Image | None = None
) -> None:
    """Write the probabilities of classes, `(classes, *spatial)`, as a NIfTI file with the classes last.

    NIfTI has no float16: such probabilities are written as uint16 with a slope, which keeps more digits than they have.

    Args:
        probabilities: to write.
        affine: from voxels to millimeters in RAS.
        path: file to write.
        like: the image whose codes and units it gets, too.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "prob.nii.gz")
        >>> write_probability_image(np.full((2, 3, 4, 5), 0.5, np.float16), np.eye(4), path)
        >>> image = nibabel.load(path)
        >>> image.shape, image.get_data_dtype(), float(abs(image.get_fdata() - 0.5).max()) < 1e-4
        ((3, 4, 5, 2), dtype('<u2'), True)
    """
    values = np.moveaxis(probabilities, 0, -1)
    stored = np.uint16 if values.dtype == np.float16 else np.float32
    image = nibabel.Nifti1Image(np.broadcast_to(stored(0), values.shape), affine)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    if like is not None:
        _copy_geometry(image, like)
    image.header.set_data_dtype(stored)
    scale = 65535 if stored is np.uint16 else 1
    image.header.set_slope_inter(1 / scale, 0)
    with nibabel.openers.Opener(str(path), "wb") as file:
        image.header.write_to(file)
        for number in range(values.shape[-1]):
            for index in range(values.shape[2]):
                plane = values[:, :, index, number].astype(np.float32)
                plane = np.rint(plane.clip(0, 1) * scale) if scale > 1 else plane
                file.write(plane.astype(stored).tobytes(order="F"))
