"""Both hippocampi in a whole head of any contrast: one network finds them, another, which has only seen crops, segments
them.

The brain bundle segments the head at 2 mm. The centers of its structures beside those of the MNI152 template give the
affine map from the template to the image, which takes the place of a registration. A box around where each hippocampus
of the template lies is then cut out of the image in the template's orientation and the head's own size, segmented, the
right one in the mirror image, and pasted back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import nibabel
import numpy as np
from scipy import ndimage
from scipy.linalg import polar

from monai_iunet.errors import InputError
from monai_iunet.segmentation.landmarks import check_sides, locate_head, structure_centers
from monai_iunet.segmentation.regions import CoarseSegmenter, Labels, SegmentCrop

__all__ = ["WholeHead", "load_template"]

# Around the left hippocampus, in mm of MNI space, about as large as the images of the training data.
LEFT_BOX = ((-44.0, -46.0, -31.0), (-7.0, 5.0, 8.0))


def load_template(resolution: int = 1) -> nibabel.Nifti1Image:
    """Return the skull-stripped T1 template ICBM 152 2009, which nilearn ships: no download.

    Args:
        resolution: size of a voxel in mm, a whole number.

    Example:
        >>> load_template(resolution=2).shape
        (99, 117, 95)
    """
    from nilearn.datasets import load_mni152_template

    return load_mni152_template(resolution=resolution)


class WholeHead:
    """Finds both hippocampi in a head, and segments the left one as it is and the right one in the mirror image.

    Args:
        parts: name of each label of one hippocampus; those of the right one are counted on.
        open_brain: opens the brain bundle, when it is needed.

    Example:
        >>> WholeHead({1: "front", 2: "back"}, open_brain=lambda: None).names
        {1: 'left front', 2: 'left back', 3: 'right front', 4: 'right back'}
    """

    def __init__(self, parts: dict[int, str], open_brain: Callable[[], CoarseSegmenter]) -> None:
        self.parts = parts
        self.open_brain = open_brain
        self.names = {
            **{value: f"left {name}" for value, name in parts.items()},
            **{value + len(parts): f"right {name}" for value, name in parts.items()},
        }

    def find(self, image: nibabel.Nifti1Image) -> np.ndarray:
        """Return the 4 x 4 matrix from millimeters of MNI space to those of an image of a head.

        Raises:
            InputError: when the image does not show a head with both hippocampi.
        """
        brain = self.open_brain()
        labels, affine = brain.segment_coarsely(image)
        centers = structure_centers(labels, affine, brain.labels)
        matrix = locate_head(centers)
        check_sides(labels, brain.labels)
        missing = [side for side in ("left", "right") if f"{side} hippocampus" not in centers]
        if missing:
            raise InputError(
                f"the {' and the '.join(missing)} hippocampus is not seen in this head. Use an image that shows both, "
                "or crop it around the other one."
            )
        return matrix

    def example(self) -> tuple[nibabel.Nifti1Image, np.ndarray]:
        """Return the template, and the matrix to it, which is the identity."""
        return load_template(), np.eye(4)

    def segment(
        self, image: nibabel.Nifti1Image, region: np.ndarray, segment_crop: SegmentCrop, probabilities: bool = False
    ) -> Labels:
        """Segment both hippocampi.

        Args:
            image: MRI of a head, with or without skull.
            region: 4 x 4 matrix from millimeters of MNI space to those of the image.
            segment_crop: segments a crop around the left hippocampus, or, mirrored, around the right one.
            probabilities: whether to give the probabilities of the background and each label, if `segment_crop` does.

        Returns:
            Labels as in `names`, the quality of each if `segment_crop` gives it, and the weights that found each.
        """
        labels = np.zeros(image.shape, dtype=np.uint8)
        classes = np.zeros((1 + len(self.names), *image.shape), np.float32) if probabilities else None
        quality: dict[int, float] = {}
        weights: dict[int, str] = {}
        data = image.get_fdata(dtype=np.float32)
        for mirrored in (False, True):
            box, shape, box_to_head = _box(region, mirrored)
            box_to_image = np.linalg.inv(image.affine) @ box_to_head  # voxels to voxels
            crop = ndimage.affine_transform(data, box_to_image, output_shape=shape, order=1)
            found = segment_crop(nibabel.Nifti1Image(crop, box), mirrored)
            part = _bounds(box_to_image, shape, image.shape)
            extent = tuple(axis.stop - axis.start for axis in part)
            first_voxel = nibabel.affines.from_matvec(np.eye(3), [axis.start for axis in part])
            from_image = np.linalg.inv(box_to_image) @ first_voxel
            values = [value + len(self.parts) * mirrored for value in self.parts]
            shares = np.zeros((len(values), *extent), np.float32)  # of each label in each voxel
            for share, value, label in zip(shares, self.parts, values):
                of_crop = found.labels == value if found.probabilities is None else found.probabilities[value]
                ndimage.affine_transform(of_crop.astype(np.float32), from_image, output=share, order=1)
                weights[label] = found.weights[value]
                if found.quality is not None:
                    quality[label] = found.quality[value]
            inside = shares.sum(0) > 0.5  # more than half of the voxel is hippocampus
            labels[part][inside] = np.array(values, np.uint8)[shares.argmax(0)[inside]]
            if classes is not None:
                for label, share in zip(values, shares):
                    classes[label][part] = share
        if classes is not None:
            classes[0] = 1 - classes[1:].sum(0)
        return Labels(labels, classes, quality or None, weights)


def _box(region: np.ndarray, mirrored: bool) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Place the crop around a hippocampus: it lies and is turned as `region` says, but is not stretched.

    The network has learned from 1 mm voxels of hippocampi as large as they are in their heads; those of the template
    are larger than most.

    Returns:
        The affine of the crop, around the box of the template; its shape, at least that of the template's box, and more
        where a larger head takes more; and the matrix from its voxels to millimeters of the head.
    """
    corners = np.array(LEFT_BOX) * ([-1, 1, 1] if mirrored else [1, 1, 1])
    center, half = corners.mean(0), np.ptp(corners, axis=0) / 2
    rotation, stretch = polar(region[:3, :3])
    half = np.ceil(2 * np.maximum(np.abs(stretch) @ half, half)) / 2
    box = nibabel.affines.from_matvec(np.eye(3), center - half)
    to_head = nibabel.affines.from_matvec(rotation, (region @ [*center, 1])[:3] - rotation @ center)
    return box, tuple(int(extent) + 1 for extent in 2 * half), to_head @ box


def _bounds(matrix: np.ndarray, shape: Sequence[int], within: Sequence[int]) -> tuple[slice, ...]:
    """Return which part of an image a box covers, whose voxels a matrix takes to those of the image."""
    corners = np.array(list(itertools.product(*((-1, extent) for extent in shape))))
    reached = nibabel.affines.apply_affine(matrix, corners)
    low = np.clip(np.floor(reached.min(0)).astype(int), 0, np.array(within) - 1)
    high = np.clip(np.ceil(reached.max(0)).astype(int) + 1, low + 1, within)
    return tuple(map(slice, low.tolist(), high.tolist()))
