"""A plane of an image with the contours of labels over it: what all pictures are made of.

Planes are seen as the patient sees them: the patient's left is on the left of coronal and axial ones; letters say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.labels import label_image
from monai_iunet.visualization.palette import label_colors

__all__ = ["PLANES", "canonical", "draw_plane", "intensity_range"]

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis that a plane is cut along, of an image in RAS


def canonical(image: nibabel.Nifti1Image, *volumes: np.ndarray) -> tuple[nibabel.Nifti1Image, list[np.ndarray]]:
    """Turn an image, and label volumes on its grid, so that the axes run to the right, to the front and up.

    Raises:
        InputError: when the image is not 3D, its voxels are no real numbers, a label volume is not on its grid, or its
            labels are no bytes.
    """
    if image.ndim != 3:
        raise InputError(
            f"an image of the shape {image.shape} cannot be drawn: a 3D image is needed. Take one of its volumes, as "
            "by image.slicer[..., 0]."
        )
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(
            f"an image with voxels of type {image.get_data_dtype()} cannot be drawn: real numbers are needed. Take one "
            "of its colors or parts."
        )
    turned = [np.asarray(nibabel.as_closest_canonical(label_image(volume, image)).dataobj) for volume in volumes]
    return nibabel.as_closest_canonical(image), turned


def intensity_range(data: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float]:
    """Return the intensities to show as black and white: the window, or the 0.5 and 99.5 percentiles.

    Infinite values and NaN, which some programs write outside of a mask, do not count.
    """
    if window is None:
        is_finite = np.isfinite(data)
        data = data if is_finite.all() else data[is_finite]
        window = tuple(np.percentile(data, (0.5, 99.5))) if data.size else (0.0, 1.0)
    low, high = window
    return float(low), float(high)


def draw_plane(
    axes: Any,
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    plane: str,
    index: int,
    intensities: tuple[float, float],
    reference: np.ndarray | None = None,
) -> None:
    """Draw a plane of an image in gray, and the contour of each label in its color.

    Args:
        axes: matplotlib axes to draw into.
        image: as `canonical` returns it.
        labels: label volume of the same shape.
        names: name of each label.
        plane: "axial", "coronal" or "sagittal".
        index: of the slice along the third axis.
        intensities: that become black and white.
        reference: true labels, of the same shape; drawn dashed.
    """
    axis = PLANES[plane]
    across, up = np.delete(nibabel.affines.voxel_sizes(image.affine), axis)
    is_read = isinstance(image.dataobj, np.ndarray)
    data = image.dataobj if is_read else image.get_fdata(dtype=np.float32)  # which reads its file once
    shown = np.take(data, index, axis).T.astype(np.float32)
    low, high = intensities
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=up / across)
    for volume, style in ((labels, "solid"), (reference, "dashed")):
        if volume is None:
            continue
        part = np.take(volume, index, axis).T
        for label, color in label_colors(names).items():
            if (part == label).any():
                # With a border of a voxel, structures at the edge have closed contours, and one row is enough.
                mask = np.pad(part == label, 1)
                rows, columns = (np.arange(extent) - 1 for extent in mask.shape)
                axes.contour(columns, rows, mask, levels=[0.5], colors=[color], linewidths=1.5, linestyles=style)
    # The borders that contours were given are no part of the plane, which would have another scale with them.
    axes.set(xlim=(-0.5, shown.shape[1] - 0.5), ylim=(-0.5, shown.shape[0] - 0.5))
    if plane != "sagittal":
        options = {"color": "white", "va": "top", "transform": axes.transAxes}
        options["bbox"] = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}
        axes.text(0.01, 0.98, "L", ha="left", **options)
        axes.text(0.99, 0.98, "R", ha="right", **options)
    axes.set_axis_off()
