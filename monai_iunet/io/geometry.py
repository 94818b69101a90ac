"""The same volume as a nibabel and as a SimpleITK image.

nibabel's affine takes voxels `(i, j, k)` to millimeters in RAS, where x runs to the right and y to the front;
SimpleITK's origin, spacing and direction take them to millimeters in LPS, where both run the other way. The array of a
SimpleITK image has its axes in the order k, j, i.
"""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import SimpleITK

from monai_iunet.errors import InputError

__all__ = ["RAS_TO_LPS", "from_simpleitk", "simpleitk_affine", "to_simpleitk"]

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# In place of types that SimpleITK has not.
LARGER: dict[str, np.dtype[Any]] = {"bool": np.dtype(np.uint8), "float16": np.dtype(np.float32)}


def simpleitk_affine(image: Any) -> np.ndarray:
    """Return the 4 x 4 affine of a 3D SimpleITK image, from voxels to millimeters in RAS.

    Example:
        >>> image = SimpleITK.Image(4, 5, 6, SimpleITK.sitkFloat32)
        >>> image.SetOrigin((10.0, 20.0, 30.0))
        >>> simpleitk_affine(image)[:3, 3].tolist()
        [-10.0, -20.0, 30.0]
    """
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return RAS_TO_LPS @ nibabel.affines.from_matvec(direction * image.GetSpacing(), image.GetOrigin())


def from_simpleitk(image: Any) -> nibabel.Nifti1Image:
    """Convert a 3D SimpleITK image of scalars to a nibabel image, with the type of its voxels.

    Raises:
        InputError: when it has another number of axes, several components per voxel, or is a label map without voxels.

    Example:
        >>> import SimpleITK
        >>> image = SimpleITK.Image(4, 5, 6, SimpleITK.sitkFloat32)
        >>> image.SetSpacing((1.0, 1.0, 2.5))
        >>> nibabel.affines.voxel_sizes(from_simpleitk(image).affine).tolist()
        [1.0, 1.0, 2.5]
    """
    axes, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if axes != 3 or components != 1:
        raise InputError(
            f"a SimpleITK image of {axes} axes and {components} components per voxel: one of 3 axes and 1 component is "
            "needed. Take a volume of it, or a component, by SimpleITK's VectorIndexSelectionCast."
        )
    if image.GetPixelIDTypeAsString().startswith("label"):  # whose voxels SimpleITK ends the process over
        raise InputError("a SimpleITK label map: an image is needed. Convert it by SimpleITK.LabelMapToLabel.")
    converted = nibabel.Nifti1Image(
        np.ascontiguousarray(SimpleITK.GetArrayFromImage(image).T),
        simpleitk_affine(image),
        dtype=SimpleITK.GetArrayViewFromImage(image).dtype,
    )
    converted.set_sform(converted.affine, code=1)
    converted.set_qform(converted.affine, code=1)
    converted.header.set_xyzt_units("mm")
    return converted


def to_simpleitk(image: nibabel.Nifti1Image, data: np.ndarray | None = None) -> Any:
    """Convert a 3D nibabel image to a SimpleITK image, whose directions are sheared if those of the image are.

    NRRD and MetaImage keep shear; as NIfTI, SimpleITK would write directions without it.

    Args:
        image: gives the geometry.
        data: voxels on its grid; None for those of the image, as float32. What SimpleITK has no type for, such as a
            mask of bool, gets the next larger one.

    Raises:
        InputError: when the voxels are not on its grid.

    Example:
        >>> import nibabel, numpy
        >>> to_simpleitk(nibabel.Nifti1Image(numpy.zeros((4, 5, 6)), numpy.eye(4))).GetSize()
        (4, 5, 6)
    """
    data = image.get_fdata(dtype=np.float32) if data is None else data
    if data.shape != image.shape or data.ndim != 3:
        raise InputError(f"data of the shape {data.shape} for an image of {image.shape}: one 3D grid is needed.")
    kind = LARGER.get(data.dtype.name, data.dtype.newbyteorder("="))
    data = data.astype(kind, copy=False)
    affine = RAS_TO_LPS @ image.affine
    spacing = nibabel.affines.voxel_sizes(affine)
    converted = SimpleITK.GetImageFromArray(np.ascontiguousarray(data.T))
    converted.SetOrigin(affine[:3, 3].tolist())
    converted.SetSpacing(spacing.tolist())
    converted.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return converted
