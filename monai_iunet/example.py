"""Both hippocampi of a real MRI that needs no download: the MNI152 template that nilearn ships, at 1 mm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nibabel
import numpy as np

if TYPE_CHECKING:
    from monai_iunet.inference import BundleSegmenter

__all__ = ["hippocampus_labels", "load_template", "segment_both_hippocampi"]

# Around the hippocampus, in mm of MNI space, about as large as the images of the training data.
LEFT_BOX = ((-44.0, -46.0, -31.0), (-7.0, 5.0, 8.0))


def load_template() -> nibabel.Nifti1Image:
    """The skull-stripped T1 template ICBM 152 2009, 1 mm."""
    from nilearn.datasets import load_mni152_template

    return load_mni152_template(resolution=1)


def hippocampus_labels(parts: dict[int, str]) -> dict[int, str]:
    """Labels of both sides from those of one: left ones as they are, right ones counted on."""
    return {
        **{value: f"left {name}" for value, name in parts.items()},
        **{value + len(parts): f"right {name}" for value, name in parts.items()},
    }


def segment_both_hippocampi(template: nibabel.Nifti1Image, segmenter: BundleSegmenter) -> np.ndarray:
    """Segment the left hippocampus as it is and the right one in the mirror image.

    The training images all show one side's orientation.

    Args:
        template: image in MNI space.
        segmenter: of the hippocampus bundle.

    Returns:
        Labels as in `hippocampus_labels`, uint8, on the grid of the template.
    """
    labels = np.zeros(template.shape, dtype=np.uint8)
    for mirrored in (False, True):
        corners = np.array(LEFT_BOX) * ([-1, 1, 1] if mirrored else [1, 1, 1])
        voxels = nibabel.affines.apply_affine(np.linalg.inv(template.affine), corners)
        low, high = np.round(voxels.min(0)).astype(int), np.round(voxels.max(0)).astype(int)
        box = tuple(slice(max(a, 0), b + 1) for a, b in zip(low, high))
        part = segmenter(template.slicer[box], mirrored=mirrored)
        offset = len(segmenter.labels) if mirrored else 0
        labels[box] = np.where(part > 0, part + offset, labels[box])
    return labels
