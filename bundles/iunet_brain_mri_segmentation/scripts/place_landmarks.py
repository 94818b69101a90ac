"""Print where the structures of label maps lie in MNI space: the table of `monai_iunet/segmentation/landmarks.py`.

    python scripts/place_landmarks.py MAP.nii.gz...

A T1-weighted brain is made of each map, and the MNI152 template registered to it by mutual information, which needs no
equal contrast: from several orientations at a coarse resolution, then rigid, then affine from coarse to fine. Only the
brain of the template, somewhat dilated, is compared. Centers and volumes are means over the maps, and over each
structure and the mirror image of the one on the other side.

Source of the metric: Mattes et al., PET-CT image registration in the chest using free-form deformations, 2003.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from scipy import ndimage

from monai_iunet.errors import InputError
from monai_iunet.io.geometry import RAS_TO_LPS, to_simpleitk
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.whole_head import load_template
from monai_iunet.transforms.head_labels import OUTSIDE, STRUCTURES, TYPICAL, structure_labels, tissue_numbers

MIRRORED = np.array([-1.0, 1.0, 1.0])
START_ANGLES = (-25.0, 25.0)  # degrees about each axis, beside none
LEAST_SIMILARITY = 0.5


def place(path: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Center in MNI space, in mm, and volume in ml of each structure of a label map."""
    image = nibabel.as_closest_canonical(read_image(path))
    numbers = np.asarray(image.dataobj).astype(int)
    tissues = tissue_numbers(numbers)
    brain = np.where(np.isin(tissues, OUTSIDE), 0, np.array(TYPICAL, np.float32)[tissues])
    brain = ndimage.gaussian_filter(brain, 0.6)
    brain += 0.02 * np.random.default_rng(0).normal(size=brain.shape).astype(np.float32) * (brain > 0)
    to_template = np.linalg.inv(register_template(nibabel.Nifti1Image(brain, image.affine))) @ image.affine
    labels = structure_labels(numbers)
    found = {}
    for label, name in enumerate(STRUCTURES, 1):
        voxels = np.argwhere(labels == label)
        center = to_template[:3, :3] @ np.median(voxels, axis=0) + to_template[:3, 3]
        found[name] = center, len(voxels) * abs(np.linalg.det(to_template[:3, :3])) / 1000
    return found


def main(paths: list[Path]) -> None:
    """Print a line for each structure but the fluid, which has no place."""
    heads = [place(path) for path in paths]
    for name in STRUCTURES:
        if name == "cerebrospinal fluid":
            continue
        side, _, rest = name.partition(" ")
        other = {"left": f"right {rest}", "right": f"left {rest}"}.get(side, name)
        center = np.mean([head[name][0] + MIRRORED * head[other][0] for head in heads], axis=0) / 2
        volume = np.mean([head[name][1] + head[other][1] for head in heads]) / 2
        x, y, z = center + 0.0
        sys.stdout.write(f'    "{name}": (({x:.1f}, {y:.1f}, {z:.1f}), {volume:.1f}),\n')


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
            f"{LEAST_SIMILARITY} is needed. Use a label map of a whole head."
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


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Usage: python place_landmarks.py MAP.nii.gz...")
    try:
        main([Path(path) for path in sys.argv[1:]])
    except InputError as error:
        sys.exit(f"Error: {error}")
