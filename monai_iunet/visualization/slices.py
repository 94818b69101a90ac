"""A picture of one slice of a volume, with the contours of its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import nibabel
import numpy as np

from monai_iunet.visualization.plane import PLANES, canonical, draw_plane, intensity_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_slice"]


def draw_slice(
    figure: Figure,
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    plane: str = "axial",
    index: int | None = None,
    window: tuple[float, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw a slice with the contours of each label, cropped to what is not black; seen as the patient sees it.

    Args:
        figure: figure to draw into; what is in it is removed.
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        plane: "axial", "coronal" or "sagittal".
        index: of the slice, counted in RAS; None for the one with the most of the labels in it.
        window: intensities that become black and white; by default the 0.5 and 99.5 percentiles of the image.
        title: text above; by default the plane and the number of the slice.

    Raises:
        ValueError: for another plane.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure, image = Figure(), nibabel.Nifti1Image(np.random.rand(4, 5, 6), np.eye(4))
        >>> draw_slice(figure, image, np.zeros((4, 5, 6)), {}, plane="coronal", index=2)
        >>> figure.axes[0].get_title()
        'coronal slice 2'
    """
    if plane not in PLANES:
        raise ValueError(f"plane must be one of {', '.join(PLANES)}, got {plane!r}.")
    axis = PLANES[plane]
    image, (labels,) = canonical(image, labels)
    index = _fullest(labels, axis) if index is None else index
    data = image.get_fdata(dtype=np.float32)
    low, high = intensity_range(data, window)
    figure.clear()
    axes = figure.add_axes((0, 0, 1, 0.92))
    draw_plane(axes, image, labels, names, plane, index, (low, high))
    horizontal, vertical = (_extent(data > low, across) for across in range(3) if across != axis)
    axes.set_xlim(*horizontal)
    axes.set_ylim(*vertical)
    axes.set_title(title or f"{plane} slice {index}", fontsize="medium", parse_math=False)


def _extent(mask: np.ndarray, axis: int) -> tuple[float, float]:
    """Return where a mask begins and ends along an axis; the whole axis if it is empty."""
    slices = np.flatnonzero(mask.any(axis=tuple(across for across in range(3) if across != axis)))
    first, last = (slices[0], slices[-1]) if len(slices) else (0, mask.shape[axis] - 1)
    return first - 0.5, last + 0.5


def _fullest(labels: np.ndarray, axis: int) -> int:
    """Return the slice with the most voxels of labels; the middle one if there are none."""
    amounts = (labels > 0).sum(axis=tuple(across for across in range(3) if across != axis))
    return int(amounts.argmax()) if amounts.any() else labels.shape[axis] // 2
