"""A picture of a segmentation: contours over three planes."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from monai_iunet.io.files import write_atomically
from monai_iunet.visualization.palette import label_colors
from monai_iunet.visualization.plane import PLANES, canonical, draw_plane, intensity_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_overlay", "save_overlay"]

MOST_VOXELS = 20_000_000  # among which the largest structure is looked for
GAP = 0.06  # inches between planes


def save_overlay(
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    path: Path,
    title: str | None = None,
    window: tuple[float, float] | None = None,
    warning: str | None = None,
) -> None:
    """Save the picture of `draw_overlay`.

    Args:
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        path: PNG file to write.
        title: text above.
        window: see `draw_overlay`.
        warning: see `draw_overlay`.

    Example:
        >>> import tempfile
        >>> image = nibabel.Nifti1Image(np.random.rand(20, 20, 20), np.eye(4))
        >>> picture = Path(tempfile.mkdtemp(), "picture.png")
        >>> save_overlay(image, np.ones((20, 20, 20), np.uint8), {1: "liver"}, picture)
        >>> picture.exists()
        True
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=110, facecolor="black")  # in which letters are as wide as when it is saved
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # not every font has every script
        draw_overlay(figure, image, labels, names, title, window=window, warning=warning)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, facecolor="black", format="png"))


def draw_overlay(
    figure: Figure,
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    title: str | None = None,
    reference: np.ndarray | None = None,
    window: tuple[float, float] | None = None,
    bottom: float = 0.0,
    height: float = 1.0,
    margin: float = 20.0,
    warning: str | None = None,
) -> None:
    """Draw contours of each label over a coronal, a sagittal and an axial plane, zoomed to the labels.

    Args:
        figure: figure to draw into.
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        title: text above.
        reference: true labels, of the same shape; drawn dashed.
        window: intensities that become black and white; by default the 0.5 and 99.5 percentiles of what is shown.
        bottom: lower edge of the part of the figure to use, as a fraction of its height.
        height: height of the part of the figure to use, as a fraction of its height.
        margin: mm shown around the labels.
        warning: text below the title, in orange.

    See Also:
        `draw_slice` for one plane, `draw_surfaces` for structures in 3D.

    Example:
        >>> from matplotlib.figure import Figure
        >>> image = nibabel.Nifti1Image(np.random.rand(20, 20, 20), np.eye(4))
        >>> labels = np.zeros((20, 20, 20), np.uint8)
        >>> labels[5:15, 5:15, 5:15] = 1
        >>> draw_overlay(Figure(), image, labels, {1: "liver"})
    """
    image, volumes = canonical(image, labels, *([] if reference is None else [reference]))
    box, center = _region(reduce(np.maximum, volumes), margin / voxel_sizes(image.affine))
    image = image.slicer[box]
    labels, reference = volumes[0][box], volumes[1][box] if reference is not None else None
    intensities = intensity_range(np.asarray(image.dataobj), window)
    top = bottom + 0.9 * height  # the title is above
    if title:
        # A name may have dollar signs in it, which are no formula.
        options = {"color": "white", "size": "large", "ha": "center", "va": "top", "parse_math": False}
        figure.text(0.5, bottom + 0.97 * height, title, None, **options)
    if warning:
        top = min(top, _draw_warning(figure, warning, bottom + 0.915 * height, height))
    low = max(_draw_legend(figure, names, reference is not None, bottom, height), bottom + 0.1 * height)
    places = _places(figure, voxel_sizes(image.affine) * image.shape, low, top - low)
    for plane, place in places.items():
        index = center[PLANES[plane]]
        draw_plane(figure.add_axes(place), image, labels, names, plane, index, intensities, reference)


def _draw_warning(figure: Figure, warning: str, top: float, height: float) -> float:
    """Draw a warning, at most a quarter of a height high, and return its lower edge."""
    text = figure.text(0.5, top, textwrap.fill(f"Warning: {warning}", 150), color="orange", ha="center", va="top")
    text.set_parse_math(False)
    most = 0.25 * height * figure.get_size_inches()[1] * figure.dpi
    text.set_fontsize(text.get_fontsize() * min(1.0, most / text.get_window_extent().height))
    return float(text.get_window_extent().transformed(figure.transFigure.inverted()).y0) - 0.01 * height


def _region(labels: np.ndarray, margin: np.ndarray) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """Return a box around the labels, and the voxel in it that the planes go through.

    That is the middle of the largest connected structure, so that planes do not lie between the two of a pair.
    """
    from scipy import ndimage

    inside = [labels.any(axis=tuple(other for other in range(3) if other != axis)).nonzero()[0] for axis in range(3)]
    if not len(inside[0]):
        return tuple(slice(0, extent) for extent in labels.shape), tuple(extent // 2 for extent in labels.shape)
    pad = np.ceil(margin).astype(int).tolist()
    box = tuple(slice(max(each[0] - part, 0), each[-1] + part + 1) for each, part in zip(inside, pad))
    # In large images it is found among every second or third voxel, and so on.
    step = int(np.ceil((labels[box].size / MOST_VOXELS) ** (1 / 3)))
    structures, _ = ndimage.label(labels[box][::step, ::step, ::step] > 0)
    if not structures.any():
        return box, tuple(extent // 2 for extent in labels[box].shape)
    largest = np.argwhere(structures == np.bincount(structures[structures > 0]).argmax())
    return box, tuple(step * int(value) for value in np.median(largest, axis=0))


def _places(
    figure: Figure, size: np.ndarray, bottom: float, height: float
) -> dict[str, tuple[float, float, float, float]]:
    """Return where the planes of a box lie beside each other in a figure, all at one scale.

    Args:
        figure: the figure.
        size: of the box, in mm.
        bottom: lower edge, as a fraction of the figure's height.
        height: height, as a fraction of the figure's height.
    """
    extents = {"coronal": (size[0], size[2]), "sagittal": (size[1], size[2]), "axial": (size[0], size[1])}
    figure_width, figure_height = figure.get_size_inches()
    total, gap = sum(across for across, _ in extents.values()), GAP / figure_width
    scale = min((0.98 - 2 * gap) * figure_width / total, height * figure_height / max(up for _, up in extents.values()))
    left = (1 - scale * total / figure_width) / 2 - gap
    places = {}
    for plane, (across, up) in extents.items():
        width, plane_height = scale * across / figure_width, scale * up / figure_height
        places[plane] = (left, bottom + (height - plane_height) / 2, width, plane_height)
        left += width + gap
    return places


def _draw_legend(figure: Figure, names: Mapping[int, str], with_reference: bool, bottom: float, height: float) -> float:
    """Draw the color of each label in as few lines as fit the figure's width, and return its upper edge.

    Of very many labels, or of long names, it is so small that it leaves the upper half of the height to the planes.
    """
    if not names and not with_reference:
        return bottom
    from matplotlib.lines import Line2D

    colors = label_colors(names)
    handles: list[Any] = [Line2D([], [], color=colors[label], linewidth=2, label=name) for label, name in names.items()]
    if with_reference:
        handles.append(Line2D([], [], color="white", linestyle="solid", label="found"))
        handles.append(Line2D([], [], color="white", linestyle="dashed", label="true"))

    def draw(columns: int, size: float | str) -> tuple[Any, Any]:
        legend = figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, bottom),
            ncols=columns,
            fontsize=size,
            labelcolor="white",
            facecolor="black",
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        return legend, legend.get_window_extent().transformed(figure.transFigure.inverted())

    size = "medium" if len(handles) <= 5 else "small" if len(handles) <= 16 else "x-small"
    for columns in range(min(len(handles), 8), 0, -1):
        legend, extent = draw(columns, size)
        if extent.width <= 1 or columns == 1:
            break
        legend.remove()
    if extent.height > height / 2:
        legend.remove()
        _, extent = draw(columns, legend.get_texts()[0].get_fontsize() * height / 2 / extent.height)
    return float(extent.y1)
