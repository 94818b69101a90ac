"""Where a head is: the centers of its structures beside those of the MNI152 template.

The brain bundle names the structures of a head of any contrast. The affine map that takes the centers of the template's
structures nearest to those of the image says where everything else of the template is, as a registration does, from
some twenty points instead of a million voxels. How far off they stay says whether this is a head at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from monai_iunet.errors import InputError

__all__ = ["LANDMARKS", "check_sides", "fit_affine", "locate_head", "structure_centers"]

# Structures of the template: center in mm of MNI space, and volume in ml; measured on two label maps by
# `scripts/place_landmarks.py` of the brain bundle.
LANDMARKS: Mapping[str, tuple[tuple[float, float, float], float]] = {
    "left hippocampus": ((-27.4, -20.8, -15.0), 3.2),
    "left amygdala": ((-25.8, -5.6, -18.9), 1.2),
    "left thalamus": ((-13.4, -18.3, 6.6), 7.8),
    "left caudate": ((-16.8, 11.8, 8.1), 3.8),
    "left putamen": ((-27.4, -0.1, 0.3), 5.7),
    "left pallidum": ((-21.8, -4.9, -1.1), 1.6),
    "left accumbens": ((-11.3, 10.1, -6.8), 0.6),
    "left ventral diencephalon": ((-11.3, -17.3, -7.9), 4.7),
    "left lateral ventricle": ((-14.7, -14.0, 18.0), 28.8),
    "left cerebral cortex": ((-33.9, -18.6, 16.4), 276.0),
    "left cerebral white matter": ((-27.4, -19.6, 22.5), 285.7),
    "left cerebellum": ((-21.3, -60.8, -35.4), 86.3),
    "right hippocampus": ((27.4, -20.8, -15.0), 3.2),
    "right amygdala": ((25.8, -5.6, -18.9), 1.2),
    "right thalamus": ((13.4, -18.3, 6.6), 7.8),
    "right caudate": ((16.8, 11.8, 8.1), 3.8),
    "right putamen": ((27.4, -0.1, 0.3), 5.7),
    "right pallidum": ((21.8, -4.9, -1.1), 1.6),
    "right accumbens": ((11.3, 10.1, -6.8), 0.6),
    "right ventral diencephalon": ((11.3, -17.3, -7.9), 4.7),
    "right lateral ventricle": ((14.7, -14.0, 18.0), 28.8),
    "right cerebral cortex": ((33.9, -18.6, 16.4), 276.0),
    "right cerebral white matter": ((27.4, -19.6, 22.5), 285.7),
    "right cerebellum": ((21.3, -60.8, -35.4), 86.3),
    "brainstem": ((0.0, -31.4, -26.7), 27.7),
    "third ventricle": ((0.0, -7.9, -2.6), 2.3),
    "fourth ventricle": ((0.0, -46.1, -30.7), 2.3),
}

LEAST_VOLUME = 0.2  # of a structure, as a share of the template's, to count as found
LEAST_FOUND = 9
MOST_APART = 6.0  # mm, root mean square over the structures that were found
STRETCH = (0.6, 1.5)  # of each axis beside the template
MOST_TURNED = 50.0  # degrees
OUTLIER = 12.0  # mm
LEAST_SIDE = 0.7  # volume of the smaller side of the brain beside that of the larger


def structure_centers(labels: np.ndarray, affine: np.ndarray, names: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Return the center, in mm, of each landmark that is found.

    Args:
        labels: of the head.
        affine: 4 x 4, from voxels to mm.
        names: of the labels.

    Example:
        >>> labels = np.zeros((20, 20, 20), np.uint8)
        >>> labels[4:9, 4:9, 4:9] = 1
        >>> structure_centers(labels, np.diag([2.0, 2.0, 2.0, 1.0]), {1: "unknown"})
        {}
    """
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000  # ml
    centers = {}
    for label, name in names.items():
        if name in LANDMARKS:
            voxels = np.argwhere(labels == label)
            if len(voxels) * voxel >= LEAST_VOLUME * LANDMARKS[name][1]:
                centers[name] = affine[:3, :3] @ np.median(voxels, axis=0) + affine[:3, 3]
    return centers


def check_sides(labels: np.ndarray, names: Mapping[int, str]) -> None:
    """Check that the structures of one side of the brain are not much smaller than those of the other.

    Args:
        labels: of the head.
        names: of the labels.

    Raises:
        InputError: when they are: half of the head is not in the image, say.

    Example:
        >>> check_sides(np.array([1, 2, 2]), {1: "left putamen", 2: "right putamen"})
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: the left side of the brain is 0.50 times as large as the right one: ...
    """
    counts = np.bincount(labels.ravel(), minlength=max(names) + 1)
    sides = {
        side: sum(int(counts[label]) for label, name in names.items() if name.startswith(side))
        for side in ("left", "right")
    }
    small, large = sorted(sides, key=lambda side: sides[side])
    if sides[small] < LEAST_SIDE * sides[large]:
        share = sides[small] / sides[large]
        raise InputError(
            f"the {small} side of the brain is {share:.2f} times as large as the {large} one: a part of the head is "
            "missing. Use an image that shows both sides, or crop it around a hippocampus."
        )


def fit_affine(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the 4 x 4 matrix that takes points nearest to others, in weighted least squares.

    Args:
        source: points, `(count, 3)`.
        target: where they are to go, `(count, 3)`.
        weights: of the points, `(count,)`.

    Example:
        >>> points = np.random.default_rng(0).normal(size=(8, 3))
        >>> np.round(fit_affine(points, points * [1, 2, 3] + 4, np.ones(8)), 6).diagonal().tolist()
        [1.0, 2.0, 3.0, 1.0]
    """
    rows = np.c_[source, np.ones(len(source))]
    root = np.sqrt(weights)[:, None]
    solution, *_ = np.linalg.lstsq(rows * root, target * root, rcond=None)
    matrix = np.eye(4)
    matrix[:3] = solution.T
    return matrix


def locate_head(centers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the matrix from mm of MNI space to mm of an image, by the centers of the image's structures.

    Raises:
        InputError: when too few structures are found, or they do not lie as those of an upright human head.
    """
    names = list(centers)
    _check_count(names)
    source = np.array([LANDMARKS[name][0] for name in names])
    target = np.array([centers[name] for name in names])
    # What the map is made for counts more.
    weights = np.array([4.0 if "hippocampus" in name else 1.0 for name in names])
    for _ in range(3):  # without those that are far off, one time after another
        matrix = fit_affine(source, target, weights)
        apart = np.linalg.norm(source @ matrix[:3, :3].T + matrix[:3, 3] - target, axis=1)
        far = (apart > OUTLIER) & (apart == apart.max())
        if not far.any():
            break
        names = [name for name, out in zip(names, far) if not out]
        source, target, weights = source[~far], target[~far], weights[~far]
        _check_count(names)
    else:
        raise InputError(f"no head found: a structure lies {apart.max():.0f} mm from where it is in a human head.")
    mean = float(np.sqrt((apart**2).mean()))
    if mean > MOST_APART:
        raise InputError(f"no head found: its structures lie {mean:.0f} mm from where they are in a human head.")
    rotation, stretch, turned = _parts(matrix)
    if np.linalg.det(rotation) < 0 or turned > MOST_TURNED:
        raise InputError(
            f"the head is turned by {turned:.0f} degrees: the orientation in the file is wrong. Correct its header."
        )
    if stretch.min() < STRETCH[0] or stretch.max() > STRETCH[1]:
        raise InputError(
            f"the head is {stretch.min():.2f} to {stretch.max():.2f} times as large as an adult's: the size of the "
            "voxels in the file is wrong, or it is not a human head."
        )
    return matrix


def _check_count(names: list[str]) -> None:
    if len(names) < LEAST_FOUND:
        raise InputError(
            f"no head found: {len(names)} of {len(LANDMARKS)} structures of the brain were seen, {LEAST_FOUND} are "
            "needed. Use an MRI of a whole head, or crop it around a hippocampus."
        )


def _parts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return rotation, stretch along its main axes and angle in degrees of an affine map."""
    left, stretch, right = np.linalg.svd(matrix[:3, :3])
    rotation = left @ right
    angle = np.degrees(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1)))
    return rotation, stretch, float(angle)
