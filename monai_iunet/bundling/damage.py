"""Damaged copies of an image whose labels are known: cases in which a segmentation fails to a known degree.

Each kind of damage has a strength drawn at random, from what does little harm to what leaves nothing to find. What
turns or moves the image does the same to the labels. Voxels of the least intensity, such as the air around a
skull-stripped head, keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nibabel
import numpy as np
import torch
from monai.transforms import (
    GaussianSmooth,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandGibbsNoise,
    RandHistogramShift,
    RandSimulateLowResolution,
)
from nibabel.affines import voxel_sizes

__all__ = ["DAMAGES", "crop_case", "damage_case"]

Random = np.random.RandomState  # MONAI's transforms take no newer generator
LARGE = 1.5  # times the extent of a crop: longer axes are cropped
Pair = tuple[np.ndarray, np.ndarray]  # image with intensities 0 to 1, labels


def damage_case(
    image: nibabel.Nifti1Image, labels: np.ndarray, kind: str, random: Random
) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """Damage an image, and move its labels along.

    Args:
        image: 3D volume.
        labels: true labels of the same shape.
        kind: key of `DAMAGES`.
        random: source of the strength.

    Returns:
        The damaged image, and its true labels. Of an image with a half missing they are those of the whole.

    Example:
        >>> image = nibabel.Nifti1Image(np.random.rand(8, 9, 10).astype(np.float32), np.eye(4))
        >>> noisy, labels = damage_case(image, np.ones((8, 9, 10), np.uint8), "noise", np.random.RandomState(0))
        >>> noisy.shape, bool(labels.all())
        ((8, 9, 10), True)
    """
    data = image.get_fdata(dtype=np.float32)
    low, high = np.percentile(data, (0.5, 99.5))
    scale = float(max(high - low, 1e-6))
    empty = data == data.min()
    changed, labels = DAMAGES[kind](((data - low) / scale, labels), random)
    changed = changed * scale + low
    if kind in INTENSITY:
        changed = np.where(empty, data, changed)
    affine = image.affine
    if kind == "zoom":  # a header that names a wrong size of the voxels
        affine = affine.copy()
        affine[:3, :3] *= np.exp(random.uniform(-0.8, 0.8))
    return nibabel.Nifti1Image(changed.astype(np.float32), affine), labels


def crop_case(
    image: nibabel.Nifti1Image, labels: np.ndarray, extent: np.ndarray, random: Random
) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """Crop a large image around a labeled voxel at random: a smaller field of view, which takes less time to segment.

    Args:
        image: 3D volume.
        labels: true labels of the same shape.
        extent: of the crop along left-right, back-front, bottom-top, in mm. Axes that are not much longer stay, and all
            where it is not positive.
        random: source of the place.
    """
    order = nibabel.io_orientation(image.affine)[:, 0].astype(int)
    voxels = np.ceil(np.asarray(extent)[order] / voxel_sizes(image.affine)).astype(int)
    shape = np.array(image.shape)
    voxels = np.where((voxels > 0) & (shape > LARGE * voxels), voxels, shape)
    if (voxels == shape).all():
        return image, labels
    places = np.argwhere(labels > 0)
    start = np.clip(places[random.randint(len(places))] - voxels // 2, 0, shape - voxels)
    box = tuple(map(slice, start, start + voxels))
    return image.slicer[box], labels[box]


def _by_monai(transform: Any) -> Callable[[Pair, Random], Pair]:
    """Return a damage by one of MONAI's random transforms."""

    def apply(pair: Pair, random: Random) -> Pair:
        transform.set_random_state(state=random)
        return np.asarray(transform(torch.from_numpy(pair[0][None])))[0], pair[1]

    return apply


def _noise(pair: Pair, random: Random) -> Pair:
    return _by_monai(RandGaussianNoise(1.0, std=random.uniform(0, 0.5), sample_std=False))(pair, random)


def _blur(pair: Pair, random: Random) -> Pair:
    smooth = GaussianSmooth([sigma * random.randint(0, 2) for sigma in random.uniform(0.5, 4, 3)])
    return np.asarray(smooth(torch.from_numpy(pair[0][None])))[0], pair[1]


def _inverted(pair: Pair, random: Random) -> Pair:
    """Turn the contrast round, or bend it so that two tissues look alike."""
    image = np.clip(pair[0], 0, 1)
    turning = random.choice([0.0, random.uniform(0.2, 0.8)])  # the intensity that becomes the brightest
    return (1 - np.abs(image - turning) / max(turning, 1 - turning)).astype(np.float32), pair[1]


def _half(pair: Pair, random: Random) -> Pair:
    """Blank what lies beyond a plane somewhere in the middle third."""
    image = pair[0].copy()
    axis, place = random.randint(3), random.uniform(1 / 3, 2 / 3)
    blank: list[Any] = [slice(None)] * 3
    cut = int(place * image.shape[axis])
    blank[axis] = slice(cut, None) if random.randint(2) else slice(None, cut)
    image[tuple(blank)] = image.min()
    return image, pair[1]


def _region(pair: Pair, random: Random) -> Pair:
    """Shift the region that is seen by a quarter to a half along one to three axes; what leaves comes in opposite."""
    axes = random.permutation(3)[: random.randint(1, 4)]
    shifts = [int(pair[0].shape[axis] * random.uniform(0.25, 0.5) * random.choice([-1, 1])) for axis in axes]
    image, labels = (np.roll(volume, shifts, axes) for volume in pair)
    return image, labels


def _side(pair: Pair, random: Random) -> Pair:
    return pair[0][::-1].copy(), pair[1][::-1].copy()


def _orientation(pair: Pair, random: Random) -> Pair:
    """Turn by 90 or 180 degrees about an axis: a header that names wrong directions."""
    axes = [(0, 1), (0, 2), (1, 2)][random.randint(3)]
    turns = random.randint(1, 4)
    image, labels = (np.ascontiguousarray(np.rot90(volume, turns, axes)) for volume in pair)
    return image, labels


def _scrambled(pair: Pair, random: Random) -> Pair:
    """Keep the power of each spatial frequency, not its phase: texture without anatomy."""
    noise = np.fft.rfftn(random.standard_normal(pair[0].shape))
    phases = noise / np.maximum(np.abs(noise), 1e-9)
    image = np.fft.irfftn(np.abs(np.fft.rfftn(pair[0])) * phases, pair[0].shape, axes=(0, 1, 2))
    return image.astype(np.float32), pair[1]


def _unchanged(pair: Pair, random: Random) -> Pair:
    return pair


DAMAGES: dict[str, Callable[[Pair, Random], Pair]] = {
    "none": _unchanged,
    "noise": _noise,
    "blur": _blur,
    "contrast": _by_monai(RandAdjustContrast(1.0, (0.4, 4.0))),
    "inverted": _inverted,
    "half": _half,
    "region": _region,
    "zoom": _unchanged,
    "orientation": _orientation,
    "scrambled": _scrambled,
    "resolution": _by_monai(RandSimulateLowResolution(1.0, downsample_mode="area", zoom_range=(0.15, 0.6))),
    "histogram": _by_monai(RandHistogramShift((4, 8), 1.0)),
    "bias": _by_monai(RandBiasField(coeff_range=(0.1, 0.7), prob=1.0)),
    "ringing": _by_monai(RandGibbsNoise(1.0, (0.3, 0.9))),
    "side": _side,
}
INTENSITY = frozenset({"noise", "blur", "contrast", "inverted", "resolution", "histogram", "bias", "ringing"})
