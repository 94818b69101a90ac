"""Regions: where the structures are in an image that shows more than a network has learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import nibabel
import numpy as np

__all__ = ["CoarseSegmenter", "Labels", "RegionFinder", "SegmentCrop"]


class Labels(NamedTuple):
    """Labels of an image or of a crop.

    Attributes:
        labels: uint8, on the grid of the image.
        probabilities: of each class, `(classes, *spatial)`, float32; None unless asked for.
        quality: predicted Dice by label; None if it is unknown.
        weights: name of the weights that found each label.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None
    quality: dict[int, float] | None
    weights: dict[int, str]


# Segments a crop, mirrored if the second argument says so.
SegmentCrop = Callable[[nibabel.Nifti1Image, bool], Labels]


class CoarseSegmenter(Protocol):
    """Segments an image at the resolution of its network, as `BundleSegmenter` does.

    Attributes:
        labels: name of each label but the background.
    """

    @property
    def labels(self) -> dict[int, str]: ...

    def segment_coarsely(self, image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
        """Return labels, uint8, and the affine of their grid."""


class RegionFinder(Protocol):
    """Finds regions, and segments them with a network that has learned from crops.

    Attributes:
        names: name of each label of the whole image but the background.
    """

    names: dict[int, str]

    def find(self, image: nibabel.Nifti1Image) -> np.ndarray:
        """Return where the region is, as a 4 x 4 matrix.

        Raises:
            InputError: when the region is not in the image.
        """

    def segment(
        self, image: nibabel.Nifti1Image, region: np.ndarray, segment_crop: SegmentCrop, probabilities: bool = False
    ) -> Labels:
        """Return labels on the grid of the image, quality if `segment_crop` gives it, and probabilities if asked."""

    def example(self) -> tuple[nibabel.Nifti1Image, np.ndarray]:
        """Return an image that needs no download, and its region."""
