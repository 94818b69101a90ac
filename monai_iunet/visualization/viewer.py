"""Looking through a volume in a notebook, and the picture that stands for it elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

import nibabel
import numpy as np

from monai_iunet.visualization.overlay import draw_overlay
from monai_iunet.visualization.page import image_view
from monai_iunet.visualization.palette import label_colors
from monai_iunet.visualization.plane import canonical

__all__ = ["VolumeViewer"]


class VolumeViewer:
    """Shows an image with its labels in a live notebook: slices in three planes, and structures in 3D.

    The viewer is niivue, which needs ipyniivue and a browser with WebGL 2. A cell offers beside it the picture of
    `draw_overlay`, which a page on the web or an export shows.

    Args:
        image: the image.
        labels: label volume of the same shape.
        names: name of each label.
        window: intensities that become black and white; by default the 0.5 and 99.5 percentiles.
        opacity: of the labels.
        height: of the viewer, in pixels.

    Example:
        >>> image = nibabel.Nifti1Image(np.random.rand(8, 9, 10), np.eye(4))
        >>> VolumeViewer(image, np.ones((8, 9, 10), np.uint8), {1: "liver"}).png()[1:4]
        b'PNG'
    """

    def __init__(
        self,
        image: nibabel.Nifti1Image,
        labels: np.ndarray,
        names: Mapping[int, str],
        window: tuple[float, float] | None = None,
        opacity: float = 0.5,
        height: int = 480,
    ) -> None:
        self.image, (self.labels,) = canonical(image, labels)
        self.names, self.window = names, window
        self.opacity, self.height = opacity, height

    def png(self) -> bytes:
        """Return the picture, as PNG."""
        from matplotlib.figure import Figure

        figure, buffer = Figure(figsize=(12, 4.6), dpi=80, facecolor="black"), io.BytesIO()
        draw_overlay(figure, self.image, self.labels, self.names, window=self.window)
        figure.savefig(buffer, format="png", dpi=80, facecolor="black")
        return buffer.getvalue()

    def widget(self) -> Any:
        """Return the viewer, an `ipyniivue.NiiVue`, whose options and volumes can be changed.

        Raises:
            ImportError: when ipyniivue is not installed.
        """
        from ipyniivue import NiiVue, ShowRender, SliceType, Volume

        view = image_view("image", self.image, self.labels, self.names, self.window)
        volumes = {
            "image": Volume(name="image.nii.gz", data=base64.b64decode(view["image"]), colormap="gray"),
            "labels": Volume(name="labels.nii.gz", data=base64.b64decode(view["labels"]), opacity=self.opacity),
        }
        volumes["labels"].set_colormap_label(view["colors"])
        viewer = NiiVue(height=self.height)
        viewer.load_volumes(list(volumes.values()))
        viewer.set_slice_type(SliceType.MULTIPLANAR)
        viewer.opts.multiplanar_show_render = ShowRender.ALWAYS
        # The place is a fraction of the extent to the right, to the front and up.
        center = nibabel.affines.apply_affine(np.linalg.inv(self.image.affine), view["center"])
        viewer.scene.crosshair_pos = ((center + 0.5) / self.image.shape).tolist()
        return viewer

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = {
            "text/plain": f"image with {', '.join(self.names.values())}",
            "image/png": base64.b64encode(self.png()).decode(),
        }
        try:
            widget = self.widget()
        except ImportError:
            return bundle
        from ipywidgets import HTML, VBox

        colors = label_colors(self.names)
        legend = "&emsp;".join(
            f'<span style="color: {colors[label]}">&#9632;</span> {html.escape(name)}'
            for label, name in self.names.items()
        )
        shown: dict[str, Any] = VBox([HTML(legend), widget])._repr_mimebundle_(**options)
        return shown | bundle
