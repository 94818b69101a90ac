"""Scrolling through the slices of a volume in a notebook, and the picture that stands for it elsewhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SliceSlider", "draw_slice"]

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


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

    The patient's left is on the left of axial and coronal slices, as in nilearn's pictures; letters say so.

    Args:
        figure: where to draw; what is in it is removed.
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
    import matplotlib.pyplot as plt

    if plane not in PLANES:
        raise ValueError(f"plane must be one of {', '.join(PLANES)}, got {plane!r}.")
    axis = PLANES[plane]
    image, labels = _canonical(image, labels)
    index = _fullest(labels, axis) if index is None else index
    data = image.get_fdata(dtype=np.float32)
    low, high = window or np.percentile(data, (0.5, 99.5))
    across, up = np.delete(nibabel.affines.voxel_sizes(image.affine), axis)
    figure.clear()
    axes = figure.add_axes((0, 0, 1, 0.92))
    options: dict[str, Any] = {"origin": "lower", "aspect": up / across}
    axes.imshow(np.take(data, index, axis).T, cmap="gray", vmin=float(low), vmax=float(high), **options)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    shown = np.take(labels, index, axis).T
    horizontal, vertical = (_extent(data > low, other) for other in range(3) if other != axis)
    axes.set_xlim(*horizontal)
    axes.set_ylim(*vertical)
    for number, value in enumerate(names):
        if (shown == value).any():
            axes.contour(shown == value, levels=[0.5], colors=[colors[number % len(colors)]], linewidths=1.5)
    if axis > 0:
        for place, letter in ((0.03, "L"), (0.97, "R")):
            axes.text(place, 0.97, letter, color="white", ha="center", va="top", transform=axes.transAxes)
    axes.set_title(title or f"{plane} slice {index}", fontsize="medium")
    axes.set_axis_off()


class SliceSlider:
    """In a live notebook, a slider through the slices of a plane; where there is none, a picture of the fullest one.

    The slider needs ipywidgets. As what a cell shows it offers the widget and the picture, and the front end takes
    what it can: a page on the web or an export shows the picture.

    Args:
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        plane: "axial", "coronal" or "sagittal".
        window: see `draw_slice`.
        size: of the picture, in inches.

    Example:
        >>> image = nibabel.Nifti1Image(np.random.rand(4, 5, 6), np.eye(4))
        >>> SliceSlider(image, np.zeros((4, 5, 6)), {1: "liver"}).png()[1:4]
        b'PNG'
    """

    def __init__(
        self,
        image: nibabel.Nifti1Image,
        labels: np.ndarray,
        names: Mapping[int, str],
        plane: str = "axial",
        window: tuple[float, float] | None = None,
        size: tuple[float, float] = (5.0, 5.0),
    ) -> None:
        self.image, self.labels = _canonical(image, labels)
        self.names, self.plane, self.window, self.size = names, plane, window, size

    def png(self, index: int | None = None) -> bytes:
        """The picture of a slice."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=80)
        draw_slice(figure, self.image, self.labels, self.names, self.plane, index, self.window)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        import base64

        bundle: dict[str, Any] = {
            "text/plain": f"{self.plane} slices with {', '.join(self.names.values())}",
            "image/png": base64.b64encode(self.png()).decode(),
        }
        try:
            import ipywidgets
        except ImportError:
            return bundle
        axis = PLANES[self.plane]
        slider = ipywidgets.IntSlider(_fullest(self.labels, axis), 0, self.image.shape[axis] - 1, description="slice")
        picture = ipywidgets.Image(value=self.png(), format="png")
        slider.observe(lambda change: setattr(picture, "value", self.png(change["new"])), names="value")
        return ipywidgets.VBox([slider, picture])._repr_mimebundle_() | bundle


def _canonical(image: nibabel.Nifti1Image, labels: np.ndarray) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """Both with their axes to the right, to the front and up."""
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(labels.astype(np.uint8), image.affine))
    return nibabel.as_closest_canonical(image), np.asarray(turned.dataobj)


def _extent(mask: np.ndarray, axis: int) -> tuple[float, float]:
    """Where a mask begins and ends along an axis; the whole axis if it is empty."""
    found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
    first, last = (found[0], found[-1]) if len(found) else (0, mask.shape[axis] - 1)
    return first - 0.5, last + 0.5


def _fullest(labels: np.ndarray, axis: int) -> int:
    amounts = (labels > 0).sum(axis=tuple(other for other in range(3) if other != axis))
    return int(amounts.argmax()) if amounts.any() else labels.shape[axis] // 2
