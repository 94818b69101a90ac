"""What nnU-Net would plan for a data set, by its published rules, to be shown beside our plan.

Sources: Isensee et al., nnU-Net, Nature Methods 2021, supplementary note 2; the experiment planner and the network
topology of nnU-Net v2 (MIC-DKFZ/nnUNet, 2024), for its plain U-Net and its reference of 8 GB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NnunetPlan", "factors_of", "plan_like_nnunet", "target_spacing"]

# Values of feature maps of a network whose training takes 8 GB with 2 patches.
REFERENCE = 560_000_000
REFERENCE_BATCH = 2
SMALLEST_MAP = 4  # voxels along an axis of the coarsest level
ANISOTROPIC = 3
LARGEST_SHARE = 0.05  # of the voxels of the data set in a batch


@dataclass(frozen=True)
class NnunetPlan:
    """A plan of nnU-Net's configuration 3d_fullres.

    Attributes:
        spacing: of the voxels, in mm.
        patch: in voxels.
        batch_size: patches per step.
        strides: per downsampling, the factor of each axis.

    Example:
        >>> NnunetPlan((1, 1, 1), (40, 56, 40), 9, ((2, 2, 2),)).batch_size
        9
    """

    spacing: tuple[float, ...]
    patch: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]


def target_spacing(spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Return the median spacing; of thick slices the 10th percentile of the images' thickness.

    Example:
        >>> target_spacing([(1, 1, 1), (1, 1, 2), (1, 1, 3)], [(64, 64, 64)] * 3)
        (1.0, 1.0, 2.0)
    """
    target = np.median(spacings, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    sizes = np.median(shapes, axis=0)
    if target[worst] > ANISOTROPIC * target[others].max() and sizes[worst] * ANISOTROPIC < sizes[others].min():
        tenth = float(np.percentile([spacing[worst] for spacing in spacings], 10))
        target[worst] = max(tenth, target[others].max() + 1e-5)
    return tuple(float(size) for size in target)


def plan_like_nnunet(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], num_classes: int
) -> NnunetPlan:
    """Return the plan of nnU-Net v2 for images of given spacings and sizes, all axes in the order of the images.

    Example:
        >>> plan_like_nnunet([(1, 1, 1)] * 208, [(35, 51, 36)] * 208, num_classes=3).patch
        (40, 56, 40)
    """
    spacing = target_spacing(spacings, shapes)
    at_target = [np.round(np.array(shape) * size / spacing) for shape, size in zip(shapes, spacings)]
    median = np.median(at_target, axis=0)
    cube = 1 / np.array(spacing)
    start = [round(part) for part in cube * (256**3 / cube.prod()) ** (1 / 3)]
    patch, strides = _topology(spacing, [min(first, second) for first, second in zip(start, median)])
    while _feature_maps(patch, strides, num_classes) > REFERENCE:
        axis = int(np.argmax(np.array(patch) / median))
        # The patch shrinks by what its axis must divide by after it has shrunk.
        smaller = list(patch)
        smaller[axis] -= factors_of(strides)[axis]
        _, fewer = _topology(spacing, smaller)
        smaller = list(patch)
        smaller[axis] -= factors_of(fewer)[axis]
        patch, strides = _topology(spacing, smaller)
    batch = round(REFERENCE / _feature_maps(patch, strides, num_classes) * REFERENCE_BATCH)
    most = round(median.prod() * len(shapes) * LARGEST_SHARE / math.prod(patch))
    return NnunetPlan(spacing, tuple(patch), max(min(batch, most), 2), strides)


def _topology(spacing: Sequence[float], patch: Sequence[float]) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Return the patch, padded to what the strides divide, and the strides."""
    sizes, voxels = [float(size) for size in patch], list(spacing)
    strides = []
    while True:
        possible = [axis for axis in range(3) if sizes[axis] >= 2 * SMALLEST_MAP]
        if not possible:
            break
        finest = min(voxels[axis] for axis in possible)
        axes = [axis for axis in possible if voxels[axis] / finest < 2]
        if len(axes) == 1 and sizes[axes[0]] < 3 * SMALLEST_MAP:
            break
        strides.append(tuple(2 if axis in axes else 1 for axis in range(3)))
        for axis in axes:
            voxels[axis] *= 2
            sizes[axis] = math.ceil(sizes[axis] / 2)
    padded = [math.ceil(size / factor) * factor for size, factor in zip(patch, factors_of(strides))]
    return padded, tuple(strides)


def factors_of(strides: Sequence[Sequence[int]]) -> list[int]:
    """Return by what a network with such strides downsamples each axis."""
    return [math.prod(stride[axis] for stride in strides) for axis in range(3)]


def _feature_maps(patch: Sequence[int], strides: Sequence[Sequence[int]], num_classes: int) -> int:
    """Count the values of the feature maps of the plain U-Net: two convolutions per stage, here and in the decoder."""
    voxels, features = [math.prod(patch)], [32]
    for stride in strides:
        voxels.append(voxels[-1] // math.prod(stride))
        features.append(min(2 * features[-1], 320))
    encoder = sum(2 * count * width for count, width in zip(voxels, features))
    # A transposed and two further convolutions per stage; the logits of the finest.
    decoder = sum(3 * count * width for count, width in zip(voxels[:-1], features[:-1])) + voxels[0] * num_classes
    return encoder + decoder
