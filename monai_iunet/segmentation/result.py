"""The result of a segmentation: labels of an image, their names, and the volumes of the structures."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.checks import planes
from monai_iunet.io.labels import label_bytes

__all__ = ["Segmentation"]


@dataclass(frozen=True)
class Segmentation:
    """Holds the labels of an image.

    Attributes:
        image: the image.
        labels: uint8, on the grid of the image; whole numbers of other types are converted.
        names: name of each label but the background.
        probabilities: of the background and each label, `(1 + len(names), *spatial)`, float32; None unless asked for.
        quality: predicted Dice of each structure by its name, see `monai_iunet.segmentation.quality`; None if the
            bundle has no model of it, so that the quality is unknown.
        warn_below: predicted Dice below which a structure is doubtful; None if the quality is unknown.
        weights: name of the bundle's weights that found each structure; None if it is unknown.

    Raises:
        InputError: when labels or probabilities are not on the grid of the image, labels are not whole numbers from 0
            to 255, or two of them share a name.

    Example:
        >>> image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.diag([1, 1, 3, 1]))
        >>> Segmentation(image, np.ones((2, 2, 2), np.uint8), {1: "liver", 2: "tumor"}).volumes()["tumor"]
        0.0
    """

    image: nibabel.Nifti1Image
    labels: np.ndarray
    names: dict[int, str]
    probabilities: np.ndarray | None = None
    quality: dict[str, float] | None = None
    warn_below: float | None = None
    weights: dict[str, str] | None = None

    def __post_init__(self) -> None:
        shapes = [self.labels.shape, *([] if self.probabilities is None else [self.probabilities.shape[1:]])]
        if any(shape != self.image.shape[:3] for shape in shapes):
            found = " and ".join(map(str, shapes))
            raise InputError(
                f"a segmentation of the shape {found} for an image of {self.image.shape}: one grid is needed."
            )
        object.__setattr__(self, "labels", label_bytes(self.labels))  # which a frozen dataclass sets in no other way
        if len(set(self.names.values())) < len(self.names):  # volumes are told apart by names
            raise InputError(f"two labels of a segmentation share a name: {self.names}. Give each its own.")

    def volumes(self) -> dict[str, float]:
        """Return the volume of each structure in mm³.

        If the structures are parts of one organ on each side, whose name ends theirs, that of each side as a whole is
        given too.

        Raises:
            InputError: when there are labels that have no name.
        """
        voxel_volume = abs(float(np.linalg.det(self.image.affine[:3, :3])))
        counts = np.zeros(np.iinfo(np.uint8).max + 1, dtype=np.int64)
        for plane in planes(self.labels):
            counts += np.bincount(plane.ravel(), minlength=len(counts))
        nameless = sorted(set(np.flatnonzero(counts).tolist()) - {0, *self.names})
        if nameless:
            raise InputError(f"labels {', '.join(map(str, nameless))} have no name: there are {self.names}.")
        volumes = {name: float(counts[value]) * voxel_volume for value, name in self.names.items()}
        organs = {name.rpartition(" ")[2] for name in self.names.values()}
        for side in ("left", "right") if len(organs) == 1 else ():
            parts = [volume for name, volume in volumes.items() if name.startswith(f"{side} ")]
            if len(parts) > 1:
                volumes[f"{side}, whole"] = sum(parts)
        return volumes

    def qualities(self) -> dict[str, float | None]:
        """Return the predicted Dice of each structure of `volumes`, of a whole side the least of its parts.

        It is None where it is unknown.
        """
        quality: dict[str, float | None] = dict(self.quality or {})
        for side in ("left", "right"):
            parts = [dice for name, dice in (self.quality or {}).items() if name.startswith(f"{side} ")]
            quality[f"{side}, whole"] = min(parts, default=None)
        return {name: quality.get(name) for name in self.volumes()}

    def doubts(self) -> str | None:
        """Return a line that names the structures whose predicted Dice is below the bound; None if there are none."""
        if self.quality is None or self.warn_below is None:
            return None
        low = [f"{name} {dice:.2f}" for name, dice in self.quality.items() if dice < self.warn_below]
        return f"doubtful, predicted Dice below {self.warn_below:.2f}: {', '.join(low)}" if low else None
