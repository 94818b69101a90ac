"""A picture of a segmentation: contours over three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np

from monai_iunet.images import write_atomically

__all__ = ["save_overlay"]


def save_overlay(
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    path: Path,
    title: str | None = None,
    margin: float = 20.0,
) -> None:
    """Save contours of each label over a coronal, a sagittal and an axial plane, zoomed to what was found.

    Args:
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        path: PNG file to write.
        title: text above.
        margin: mm shown around the labels.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from nilearn import plotting
    from scipy import ndimage

    found = np.argwhere(labels > 0)
    box = tuple(slice(0, extent) for extent in labels.shape)
    if len(found):
        pad = np.ceil(margin / np.sqrt((image.affine[:3, :3] ** 2).sum(0))).astype(int)
        box = tuple(slice(max(low, 0), high) for low, high in zip(found.min(0) - pad, found.max(0) + pad + 1))
    shown = image.slicer[box]
    mask = labels[box]
    # The planes go through the middle of the largest connected structure, not between the two of a pair.
    center = np.array(mask.shape) / 2
    if len(found):
        parts, _ = ndimage.label(mask > 0)
        center = np.median(np.argwhere(parts == np.bincount(parts[parts > 0]).argmax()), axis=0)
    figure = plt.figure(figsize=(12, 4.6), facecolor="black")
    try:
        data = np.asarray(shown.dataobj)
        display = plotting.plot_anat(
            shown,
            cut_coords=tuple(nibabel.affines.apply_affine(shown.affine, center)),
            figure=figure,
            axes=(0, 0.1, 1, 0.8),
            dim=0,
            vmin=float(np.percentile(data, 0.5)),
            vmax=float(np.percentile(data, 99.5)),
            draw_cross=False,
            colorbar=False,
            black_bg=True,
        )
        colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        handles = []
        for index, (value, name) in enumerate(names.items()):
            color = colors[index % len(colors)]
            handles.append(Line2D([], [], color=color, linewidth=2, label=name))
            if (mask == value).any():
                structure = nibabel.Nifti1Image((mask == value).astype(np.uint8), shown.affine)
                display.add_contours(structure, levels=[0.5], colors=[color], linewidths=1.5)
        figure.legend(
            handles=handles, loc="lower center", ncols=4, labelcolor="white", facecolor="black", frameon=False
        )
        if title:
            figure.suptitle(title, color="white")
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, facecolor="black", format="png"))
    finally:
        plt.close(figure)
