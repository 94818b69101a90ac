"""Structures as surfaces in 3D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np

from monai_iunet.visualization.palette import label_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_surfaces"]


def draw_surfaces(
    figure: Figure,
    labels: np.ndarray,
    affine: np.ndarray,
    names: Mapping[int, str],
    elevation: float = 20.0,
    azimuth: float = 60.0,
) -> None:
    """Draw the surface of each structure, shaded, in millimeters of the patient: x right, y front, z up.

    Surfaces are those of marching cubes (Lorensen and Cline, 1987) at one half of the slightly smoothed labels, or of
    the labels themselves where smoothing would leave nothing.

    Args:
        figure: figure to draw into.
        labels: label volume.
        affine: 4 x 4, from voxels to millimeters in RAS.
        names: name of each label; those that are not there are left out.
        elevation: of the viewer, in degrees.
        azimuth: of the viewer, in degrees.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure, labels = Figure(), np.zeros((9, 9, 9), np.uint8)
        >>> labels[3:6, 3:6, 3:6] = 1
        >>> draw_surfaces(figure, labels, np.eye(4), {1: "liver"})
    """
    from matplotlib.colors import LightSource
    from scipy import ndimage
    from skimage import measure

    axes: Any = figure.add_subplot(projection="3d")
    colors = label_colors(names)
    shown = []
    for value, name in names.items():
        voxels = np.argwhere(labels == value)
        if not len(voxels):
            continue
        low, high = voxels.min(0), voxels.max(0) + 1
        box = tuple(slice(start, stop) for start, stop in zip(low, high))
        solid = np.pad((labels[box] == value).astype(np.float32), 3)
        smooth = ndimage.gaussian_filter(solid, 0.7)
        # Smoothing leaves nothing of a structure of a few voxels, such as a nerve on a coarse grid.
        vertices, faces, _, _ = measure.marching_cubes(smooth if smooth.max() > 0.5 else solid, 0.5)
        points = nibabel.affines.apply_affine(affine, vertices + low - 3)
        axes.plot_trisurf(
            *points.T,
            triangles=faces,
            color=colors[value],
            lightsource=LightSource(azdeg=azimuth, altdeg=45),
            label=name,
        )
        shown.append(points)
    axes.view_init(elevation, azimuth)
    axes.locator_params(nbins=4)
    axes.set(xlabel="right, mm", ylabel="front, mm", zlabel="up, mm")
    if shown:
        axes.set_box_aspect(np.ptp(np.concatenate(shown), axis=0))
        for text in axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.6), fontsize="small").get_texts():
            text.set_parse_math(False)  # names of people, where "$" is no formula
