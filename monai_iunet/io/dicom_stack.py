"""Whether DICOM frames make up a volume, and in which order.

Slices make up a volume if they share size, orientation and spacing, and their positions, sorted along the normal,
follow each other in equal steps. What departs from that is named instead of being averaged away: a wrong volume looks
right. If the steps are equal but not along the normal, a gantry was tilted; such a volume is resampled to a grid of
right angles.

Source: DICOM PS3.3, C.7.6.2 Image Plane Module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.dicom_frames import CONTRAST, Frame
from monai_iunet.io.geometry import RAS_TO_LPS

__all__ = ["Stack", "stack_frames", "straightened"]

STEP_TOLERANCE = 0.1  # of a step, by which steps may differ: positions are rounded when they are written
TILT_TOLERANCE = 1.0  # degrees, as long as the last slice is not shifted by more than a voxel
DIRECTION_TOLERANCE = 1e-3  # of cosines
SPACING_TOLERANCE = 1e-3  # relative
CONTRAST_TOLERANCE = 0.02  # relative: some scanners write what a slice really had


@dataclass(frozen=True)
class Stack:
    """Frames in the order of their positions, and their grid.

    Attributes:
        frames: in order.
        affine: 4 x 4, from voxels (column, row, frame) to millimeters in RAS; sheared if the gantry was tilted.
        tilt: of the gantry, in degrees; 0 if it is within the tolerance.
    """

    frames: tuple[Frame, ...]
    affine: np.ndarray
    tilt: float


def stack_frames(frames: Sequence[Frame], name: str) -> Stack:
    """Sort frames by their positions, and check that they make up a volume.

    Args:
        frames: in any order.
        name: what errors call them.

    Raises:
        InputError: when they do not make up a volume; it names the frame and the attribute.
    """
    if len(frames) == 1:
        raise InputError(f"{name} has a single slice, a 3D volume is needed. Name the whole series, or its folder.")
    first = frames[0]
    _check_contrast(frames, name)
    _check_constant(frames, name)
    directions = first.orientation
    if np.abs(directions @ directions.T - np.eye(2)).max() > 10 * DIRECTION_TOLERANCE:
        raise InputError(
            f"{first.name}: Image Orientation (Patient) {directions.ravel().tolist()} is not made of two directions at "
            "right angles. Export the series again."
        )
    normal = np.cross(directions[0], directions[1])
    heights = np.array([frame.position @ normal for frame in frames])
    order = np.argsort(heights, kind="stable")
    frames, heights = [frames[index] for index in order], heights[order]
    _check_steps(heights, name)
    positions = np.array([frame.position for frame in frames])
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    off = np.linalg.norm(positions - positions[0] - np.arange(len(frames))[:, None] * step, axis=1)
    if off.max() > max(STEP_TOLERANCE * np.linalg.norm(step), SPACING_TOLERANCE):
        raise InputError(
            f"{frames[int(off.argmax())].name}: Image Position (Patient) lies {off.max():.2f} mm beside the line of "
            "the others, so the slices are shifted against each other. Resample the series first."
        )
    along_normal = normal * (heights[-1] - heights[0]) / (len(frames) - 1)
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    between_rows, between_columns = first.spacing
    shift = np.linalg.norm(step - along_normal) * (len(frames) - 1)  # of many slices it is large at a small tilt
    tilt = tilt if tilt > TILT_TOLERANCE or shift > min(first.spacing) else 0.0
    columns = [directions[0] * between_columns, directions[1] * between_rows, step if tilt else along_normal]
    affine = RAS_TO_LPS @ nibabel.affines.from_matvec(np.stack(columns, axis=1), positions[0])
    return Stack(tuple(frames), affine, tilt)


def _check_contrast(frames: Sequence[Frame], name: str) -> None:
    """Check that frames have one contrast; echoes and the like may alternate from slice to slice."""
    for attribute in CONTRAST:
        values = sorted({frame.contrast[attribute] for frame in frames if attribute in frame.contrast})
        if values and values[-1] - values[0] > CONTRAST_TOLERANCE * abs(values[-1]):
            listed = ", ".join(f"{value:g}" for value in values[:10])
            raise InputError(
                f"{name}: the slices have the {attribute} {listed}, so they show several contrasts. Leave those of one "
                "in the folder."
            )


def _check_constant(frames: Sequence[Frame], name: str) -> None:
    """Check that frames share what may not vary in a volume."""
    first = frames[0]
    for frame in frames[1:]:
        if np.abs(frame.orientation - first.orientation).max() > DIRECTION_TOLERANCE:
            raise InputError(
                f"{name}: the slices have several orientations, as localizers do: Image Orientation (Patient) is "
                f"{first.orientation.ravel().tolist()} in {first.name}, {frame.orientation.ravel().tolist()} in "
                f"{frame.name}. Name a series of parallel slices."
            )
        differing = {
            "size (Rows, Columns)": (first.size, frame.size),
            "Pixel Spacing": (first.spacing, frame.spacing)
            if not np.allclose(first.spacing, frame.spacing, rtol=SPACING_TOLERANCE)
            else (0, 0),
            "Rescale Slope and Intercept": (
                "given" if first.rescale else "missing",
                "given" if frame.rescale else "missing",
            ),
            **{key: (value, frame.constant[key]) for key, value in first.constant.items()},
        }
        for attribute, (expected, value) in differing.items():
            if expected != value:
                raise InputError(
                    f"{name}: the slices differ in {attribute}, {expected} in {first.name}, {value} in {frame.name}. "
                    "Name a uniform series."
                )


def _check_steps(heights: np.ndarray, name: str) -> None:
    """Check that sorted positions along the normal follow each other in equal steps."""
    steps = np.diff(heights)
    step = float(np.median(steps))
    repeated = int((steps <= STEP_TOLERANCE * steps.max()).sum()) if steps.max() > 0 else len(steps)
    if repeated:
        raise InputError(
            f"{name}: {repeated} slices lie where another one lies, as in several phases or a copy. Leave one volume "
            "in the folder."
        )
    for (low, high), size in zip(pairwise(heights), steps):
        if abs(size - step) > STEP_TOLERANCE * step:
            raise InputError(
                f"{name}: slices are {step:.2f} mm apart, but {size:.2f} mm between {low:.1f} and {high:.1f} mm: "
                "slices are missing or uneven. Copy the whole series, or resample it."
            )


def straightened(data: np.ndarray, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Resample a volume of a tilted gantry to a grid of right angles that holds all of it.

    Slices stay where they are along the normal and are shifted within their plane, by linear interpolation; what was
    not scanned gets the least value.

    Args:
        data: values on the sheared grid.
        stack: the sheared grid.

    Returns:
        The values, and their affine in RAS.
    """
    from scipy import ndimage  # here, as every file is tried in a process of its own, which seldom needs it

    across, up, step = stack.affine[:3, :3].T
    normal = np.cross(across, up)
    normal /= np.linalg.norm(normal)
    straight = stack.affine.copy()
    straight[:3, 2] = normal * (step @ normal)
    # By how many voxels the last slice is shifted along columns and rows.
    shift = np.linalg.solve(straight[:3, :3], step * (data.shape[2] - 1))[:2]
    low, high = np.floor(np.minimum(shift, 0)).astype(int), np.ceil(np.maximum(shift, 0)).astype(int)
    straight[:3, 3] += straight[:3, :2] @ low
    to_sheared = np.linalg.inv(stack.affine) @ straight
    shape = (*(np.array(data.shape[:2]) + high - low), data.shape[2])
    values = ndimage.affine_transform(data, to_sheared, output_shape=shape, order=1, cval=float(data.min()))
    return values, straight
