"""A picture of a segmentation: contours over three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from monai_iunet.io.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_overlay", "save_overlay"]


def save_overlay(
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    path: Path,
    title: str | None = None,
    window: tuple[float, float] | None = None,
) -> None:
    """Save the picture of `draw_overlay`.

    Args:
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        path: PNG file to write.
        title: text above.
        window: see `draw_overlay`.

    Example:
        >>> import tempfile
        >>> image = nibabel.Nifti1Image(np.random.rand(20, 20, 20), np.eye(4))
        >>> picture = Path(tempfile.mkdtemp(), "picture.png")
        >>> save_overlay(image, np.ones((20, 20, 20), np.uint8), {1: "liver"}, picture)
        >>> picture.exists()
        True
    """
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4.6), facecolor="black")
    try:
        draw_overlay(figure, image, labels, names, title, window=window)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, facecolor="black", format="png"))
    finally:
        plt.close(figure)


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
) -> None:
    """Draw contours of each label over a coronal, a sagittal and an axial plane, zoomed to what was found.

    Args:
        figure: where to draw.
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        title: text above.
        reference: true labels, of the same shape; drawn dashed.
        window: intensities that become black and white; by default the 0.5 and 99.5 percentiles of what is shown.
        bottom: lower edge of what is used of the figure, as a part of its height.
        height: height of what is used of the figure, as a part of its height.
        margin: mm shown around the labels.

    Example:
        >>> from matplotlib.figure import Figure
        >>> image = nibabel.Nifti1Image(np.random.rand(20, 20, 20), np.eye(4))
        >>> labels = np.zeros((20, 20, 20), np.uint8)
        >>> labels[5:15, 5:15, 5:15] = 1
        >>> draw_overlay(Figure(), image, labels, {1: "liver"})
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from nilearn import plotting
    from scipy import ndimage

    shown_labels = labels if reference is None else np.where(labels > 0, labels, reference)
    found = np.argwhere(shown_labels > 0)
    box = tuple(slice(0, extent) for extent in labels.shape)
    if len(found):
        pad = np.ceil(margin / voxel_sizes(image.affine)).astype(int)
        box = tuple(slice(max(low, 0), high) for low, high in zip(found.min(0) - pad, found.max(0) + pad + 1))
    shown = image.slicer[box]
    # The planes go through the middle of the largest connected structure, not between the two of a pair.
    center = np.array(shown.shape) / 2
    if len(found):
        parts, _ = ndimage.label(shown_labels[box] > 0)
        center = np.median(np.argwhere(parts == np.bincount(parts[parts > 0]).argmax()), axis=0)
    low, high = window or np.percentile(np.asarray(shown.dataobj), (0.5, 99.5))
    display = plotting.plot_anat(
        shown,
        cut_coords=tuple(nibabel.affines.apply_affine(shown.affine, center)),
        figure=figure,
        axes=(0, bottom + 0.1 * height, 1, 0.8 * height),
        dim=0,
        vmin=float(low),
        vmax=float(high),
        draw_cross=False,
        colorbar=False,
        black_bg=True,
    )
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    handles = []
    for index, (value, name) in enumerate(names.items()):
        color = colors[index % len(colors)]
        handles.append(Line2D([], [], color=color, linewidth=2, label=name))
        for volume, style in ((labels, "solid"), (reference, "dashed")):
            if volume is not None and (volume[box] == value).any():
                structure = nibabel.Nifti1Image((volume[box] == value).astype(np.uint8), shown.affine)
                display.add_contours(structure, levels=[0.5], colors=[color], linewidths=1.5, linestyles=style)
    if reference is not None:
        handles.append(Line2D([], [], color="white", linestyle="solid", label="found"))
        handles.append(Line2D([], [], color="white", linestyle="dashed", label="true"))
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, bottom),
        ncols=min(len(handles), 8),
        fontsize="small" if len(handles) > 5 else "medium",
        labelcolor="white",
        facecolor="black",
        frameon=False,
    )
    if title:
        figure.text(0.5, bottom + 0.97 * height, title, color="white", size="large", ha="center", va="top")
