"""The result of a segmentation: labels of an image, their names, and the volumes of the structures."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel
import numpy as np

from monai_iunet.io.checks import planes

__all__ = ["Segmentation"]


@dataclass(frozen=True)
class Segmentation:
    """Holds the labels of an image.

    Attributes:
        image: the image.
        labels: uint8, on the grid of the image.
        names: name of each label but the background.
        probabilities: of the background and each label, `(1 + len(names), *spatial)`, float32; None unless asked for.

    Example:
        >>> image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.diag([1, 1, 3, 1]))
        >>> Segmentation(image, np.ones((2, 2, 2), np.uint8), {1: "liver", 2: "tumor"}).volumes()["tumor"]
        0.0
    """

    image: nibabel.Nifti1Image
    labels: np.ndarray
    names: dict[int, str]
    probabilities: np.ndarray | None = None

    def volumes(self) -> dict[str, float]:
        """Return the volume of each structure in mm³; if parts of both sides are named, of each side as a whole too."""
        voxel_volume = abs(float(np.linalg.det(self.image.affine[:3, :3])))
        counts = np.zeros(max(self.names) + 1, dtype=np.int64)
        for plane in planes(self.labels):
            counts += np.bincount(plane.ravel(), minlength=len(counts))[: len(counts)]
        volumes = {name: float(counts[value]) * voxel_volume for value, name in self.names.items()}
        for side in ("left", "right"):
            parts = [volume for name, volume in volumes.items() if name.startswith(f"{side} ")]
            if len(parts) > 1:
                volumes[f"{side}, whole"] = sum(parts)
        return volumes
