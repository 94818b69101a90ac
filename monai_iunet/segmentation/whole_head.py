"""Both hippocampi in a whole head: registration finds them, the network, which has only seen crops, segments them.

The MNI152 template is registered to the image by mutual information, which needs no equal contrast: from several
orientations at a coarse resolution, then rigid, then affine from coarse to fine. The template is skull-stripped, so
only its brain, somewhat dilated, is compared. A box around where each hippocampus of the template lies is then cut out
of the image in the template's orientation and the head's own size, segmented, the right one in the mirror image, and
pasted back.

Source of the metric: Mattes et al., PET-CT image registration in the chest using free-form deformations, 2003.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from scipy import ndimage
from scipy.linalg import polar

from monai_iunet.errors import InputError
from monai_iunet.io.geometry import RAS_TO_LPS, to_simpleitk
from monai_iunet.segmentation.regions import Labels, SegmentCrop

__all__ = ["WholeHead", "load_template", "register_template"]

# Around the left hippocampus, in mm of MNI space, about as large as the images of the training data.
LEFT_BOX = ((-44.0, -46.0, -31.0), (-7.0, 5.0, 8.0))

START_ANGLES = (-25.0, 25.0)  # degrees about each axis, beside none
LEAST_SIMILARITY = 0.5


def load_template(resolution: int = 1) -> nibabel.Nifti1Image:
    """Return the skull-stripped T1 template ICBM 152 2009, which nilearn ships: no download.

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

    Example:
        >>> WholeHead({1: "front", 2: "back"}).names
        {1: 'left front', 2: 'left back', 3: 'right front', 4: 'right back'}
    """

    def __init__(self, parts: dict[int, str]) -> None:
        self.parts = parts
        self.names = {
            **{value: f"left {name}" for value, name in parts.items()},
            **{value + len(parts): f"right {name}" for value, name in parts.items()},
        }

    def find(self, image: nibabel.Nifti1Image) -> np.ndarray:
        """Return the 4 x 4 matrix from millimeters of MNI space to those of an image of a head.

        Raises:
            InputError: when the image is not like the template anywhere.
        """
        return register_template(image)

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


def register_template(image: nibabel.Nifti1Image) -> np.ndarray:
    """Return the 4 x 4 matrix from millimeters of MNI space to those of an image of a head.

    Raises:
        InputError: when the image is not like the template anywhere.
    """
    fixed, moving = to_simpleitk(load_template(resolution=2)), to_simpleitk(image)
    brain = SimpleITK.BinaryDilate(SimpleITK.Cast(fixed > 0.01, SimpleITK.sitkUInt8), [3, 3, 3])
    try:
        affine = _align(fixed, moving, brain)
    except RuntimeError as error:  # nothing to compare: a constant image, or no overlap
        raise InputError("registration failed: the image does not look like a head at all.") from error
    resampled = SimpleITK.Resample(moving, fixed, affine, SimpleITK.sitkLinear, 0.0)
    similarity = _similarity(fixed, resampled, brain)
    if similarity < LEAST_SIMILARITY:
        raise InputError(
            f"registration failed: the correlation of the image with the MNI152 template is {similarity:.2f}, at least "
            f"{LEAST_SIMILARITY} is needed. Use a T1-weighted MRI of a whole head, or crop it around a hippocampus."
        )
    matrix = np.array(affine.GetMatrix()).reshape(3, 3)
    center, translation = np.array(affine.GetCenter()), np.array(affine.GetTranslation())
    return RAS_TO_LPS @ nibabel.affines.from_matvec(matrix, center + translation - matrix @ center) @ RAS_TO_LPS


def _align(fixed: Any, moving: Any, brain: Any) -> Any:
    """Return the affine transform from the fixed to the moving image."""
    coarse = _method(brain, shrink=[4], smoothing=[6], sampled=0.3)
    starts: list[tuple[float, int, Any]] = []
    for start in _starts(fixed, moving):
        coarse.SetInitialTransform(start, inPlace=True)
        starts.append((coarse.MetricEvaluate(fixed, moving), len(starts), start))
    results = []
    for _, number, start in sorted(starts)[:4]:
        coarse.SetInitialTransform(start, inPlace=True)
        coarse.Execute(fixed, moving)
        results.append((coarse.GetMetricValue(), number, start))
    rigid = min(results)[2]
    affine = SimpleITK.AffineTransform(rigid.GetMatrix(), rigid.GetTranslation(), rigid.GetCenter())
    fine = _method(brain, shrink=[4, 2, 1], smoothing=[6, 3, 1], sampled=0.1)
    fine.SetInitialTransform(affine, inPlace=True)
    fine.Execute(fixed, moving)
    return affine


def _starts(fixed: Any, moving: Any) -> list[Any]:
    """Return rigid transforms to begin from: two ways to align the centers, seven orientations each."""
    angles = [np.zeros(3)]
    angles += [np.deg2rad(angle) * np.eye(3)[axis] for axis, angle in itertools.product(range(3), START_ANGLES)]
    kinds = SimpleITK.CenteredTransformInitializerFilter
    starts = []
    for kind, angle in itertools.product((kinds.MOMENTS, kinds.GEOMETRY), angles):
        centered = SimpleITK.CenteredTransformInitializer(fixed, moving, SimpleITK.Euler3DTransform(), kind)
        start = SimpleITK.Euler3DTransform(centered)
        start.SetRotation(*angle.tolist())
        starts.append(start)
    return starts


def _method(brain: Any, shrink: list[int], smoothing: list[int], sampled: float) -> Any:
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(brain)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(sampled, 7)  # a fixed seed
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.02, 150, 0.6, 1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel(smoothing)  # mm
    return method


def _similarity(fixed: Any, resampled: Any, brain: Any) -> float:
    """Return the correlation within the brain of both images, smoothed so that noise does not count."""
    inside = SimpleITK.GetArrayFromImage(brain) > 0
    template_values, image_values = (
        SimpleITK.GetArrayFromImage(SimpleITK.SmoothingRecursiveGaussian(image, 3.0))[inside]
        for image in (fixed, resampled)
    )
    if image_values.std() == 0:
        return 0.0
    return float(np.corrcoef(template_values, image_values)[0, 1])
