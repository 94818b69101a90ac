"""Label volumes as files, in the geometry of their images."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from monai_iunet.io.files import write_atomically

__all__ = ["label_image", "write_labels"]


def label_image(labels: np.ndarray, like: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """Return a label volume as a uint8 NIfTI image in the geometry of an image.

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
    """Write the `label_image` of a label volume, whole or not at all."""
    image = label_image(labels, like)
    write_atomically(path, lambda temporary: nibabel.save(image, temporary))
