"""What tells a good segmentation from a bad one without true labels, measured on the grid of the network.

Whatever needs probabilities is a sum over voxels, so that an image can be measured slab by slab; the rest needs the
labels, the image, and windows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.utils import ensure_tuple_rep
from scipy import ndimage
from torch import Tensor

from monai_iunet.inference.images import Image
from monai_iunet.inference.streaming import Slab

__all__ = ["INTENSITY", "SHAPE", "Description", "SlabBySlab", "SoftDice", "describe_structures", "second_run"]

MARGIN = 4  # voxels around a structure in the second run
NOISE = 0.1  # of the second run, in standard deviations of the window
PLANES = 16  # whose probabilities are summed up at a time
SHELL = 2  # voxels around a structure whose intensities are compared
PERCENTILES = (10, 50, 90)
SHAPE, INTENSITY = 7, 2 * len(PERCENTILES) + 1  # numbers that describe a structure


class SoftDice:
    """Sums up, slab by slab, the Dice that the network's own probabilities let expect.

    For a structure it is 2 Σ p over its voxels, divided by their number and Σ p over the image.

    Args:
        num_classes: with the background.

    Example:
        >>> total = SoftDice(num_classes=2)
        >>> total.add(torch.tensor([[0.2], [0.8]]), torch.tensor([1]))
        >>> total.add(torch.tensor([[0.6], [0.4]]), torch.tensor([0]))
        >>> {value: round(dice, 3) for value, dice in total.values().items()}
        {1: 0.727}
    """

    def __init__(self, num_classes: int) -> None:
        self.probability = np.zeros(num_classes)
        self.inside = np.zeros(num_classes)
        self.voxels = np.zeros(num_classes)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a slab: probabilities `(classes, *spatial)`, and the most probable class of each voxel, `(*spatial)`."""
        for value in range(1, len(probabilities)):
            inside = labels == value
            self.probability[value] += float(probabilities[value].sum())
            self.inside[value] += float(probabilities[value][inside].sum())
            self.voxels[value] += int(inside.sum())

    def values(self) -> dict[int, float]:
        """Return the expected Dice of each structure that was found."""
        return {
            int(value): float(2 * self.inside[value] / (self.voxels[value] + self.probability[value]))
            for value in np.flatnonzero(self.voxels)
        }


def second_run(
    image: Image,
    labels: np.ndarray,
    window: Sequence[int] | np.ndarray,
    network: Callable[[Tensor], Tensor],
    divisible_by: Sequence[int] | int | None = None,
) -> dict[int, float]:
    """Return the Dice of each structure with that of a second run of the network, near the structure, with some noise.

    It costs one window for all structures if they fit in one, else at most one for each.

    Args:
        image: as the network sees it.
        labels: found in the image, `(*spatial)`.
        window: largest extent of a window.
        network: gives logits `(1, classes, *spatial)` for a window `(1, channels, *spatial)`.
        divisible_by: what the network pads extents to multiples of, at least.
    """
    agreement = {}
    for values, box in _windows(labels, np.asarray(window)):
        part = image.cut(box)
        generator = torch.Generator().manual_seed(0)  # the same image always gets the same estimate
        noise = torch.randn(part.shape, generator=generator).to(part.device)
        noisy = part + NOISE * part.std(correction=0) * noise
        logits = network(_padded(noisy, ensure_tuple_rep(divisible_by or 8, 3))[None])[0]
        found = logits.argmax(0)[tuple(slice(extent) for extent in part.shape[1:])].cpu().numpy()
        for value in values:
            first, second = labels[box] == value, found == value
            agreement[value] = float(2 * (first & second).sum() / (first.sum() + second.sum()))
    return agreement


def _padded(part: Tensor, factors: Sequence[int]) -> Tensor:
    """Continue a window to extents that networks take: multiples of 8, at least 16, and more than one coarse voxel."""
    pad = [(0, max(-extent % 8, 16 - extent)) for extent in reversed(part.shape[1:])]
    if all(extent + more <= factor for extent, (_, more), factor in zip(part.shape[1:], pad[::-1], factors)):
        pad[-1] = (0, 2 * factors[0] - part.shape[1])
    return torch.nn.functional.pad(part[None], [side for sides in pad for side in sides], mode="replicate")[0]


def _windows(labels: np.ndarray, largest: np.ndarray) -> Iterator[tuple[list[int], tuple[slice, ...]]]:
    """Yield windows, and the structures to compare in each."""
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), 1) if box is not None}
    if not boxes:
        return
    low = np.min([[part.start for part in box] for box in boxes.values()], axis=0)
    high = np.max([[part.stop for part in box] for box in boxes.values()], axis=0)
    whole = _grown(tuple(map(slice, low, high)), labels.shape, MARGIN)
    if all(part.stop - part.start <= extent for part, extent in zip(whole, largest)):
        yield list(boxes), whole
        return
    for value, box in boxes.items():
        box = _grown(box, labels.shape, MARGIN)
        low, high = np.array([[part.start, part.stop] for part in box]).T
        extent = np.minimum(high - low, largest)
        places = low + np.argwhere(labels[box] == value)
        middle = np.median(places, axis=0).astype(int)
        start = np.clip(middle - extent // 2, low, high - extent)
        if not ((places >= start) & (places < start + extent)).all(1).any():  # the middle of a ring, or of two blobs
            middle = places[np.abs(places - middle).sum(1).argmin()]
            start = np.clip(middle - extent // 2, low, high - extent)
        yield [value], tuple(map(slice, start, start + extent))


def _grown(box: Sequence[slice], shape: Sequence[int], margin: int) -> tuple[slice, ...]:
    return tuple(
        slice(max(part.start - margin, 0), min(part.stop + margin, extent)) for part, extent in zip(box, shape)
    )


@dataclass(frozen=True)
class Description:
    """Describes a structure that was found. All but the first three are those of its largest component.

    Attributes:
        uncertainty: 1 minus the Dice of `SoftDice`.
        disagreement: 1 minus the Dice of `second_run`.
        fragments: fraction of its voxels outside of the largest component.
        edge: fraction of the voxels that lie on the edge of the image.
        shape: logarithm of the volume in mm³, logarithms of the standard deviations along the axes in mm, and the
            correlations of the axes, by which a structure leans.
        intensity: percentiles 10, 50, 90 inside and in a shell around, and the logarithm of the mean difference of
            neighbors there.
        center: in mm.
    """

    uncertainty: float
    disagreement: float
    fragments: float
    edge: float
    shape: np.ndarray
    intensity: np.ndarray
    center: np.ndarray


def describe_structures(
    image: Image,
    labels: np.ndarray,
    spacing: Sequence[float],
    expected: Mapping[int, float] | None = None,
    agreement: Mapping[int, float] | None = None,
) -> dict[int, Description]:
    """Describe each structure of a label map.

    Args:
        image: as the network sees it; its first channel counts.
        labels: of the same shape, `(*spatial)`.
        spacing: size of a voxel, in mm.
        expected: of `SoftDice`; None for true labels, which are certain.
        agreement: of `second_run`; None for true labels.
    """
    sizes = np.asarray(spacing, float)
    descriptions = {}
    for value, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        outer = _grown(box, labels.shape, SHELL + 1)
        components, _ = ndimage.label(labels[outer] == value)
        voxels = np.bincount(components.ravel())[1:]
        inside = components == 1 + voxels.argmax()
        places = np.argwhere(inside) + [part.start for part in outer]
        on_edge = ((places == 0) | (places == np.array(labels.shape) - 1)).any(1)
        descriptions[value] = Description(
            uncertainty=0.0 if expected is None else 1 - expected[value],
            disagreement=0.0 if agreement is None else 1 - agreement[value],
            fragments=float(1 - len(places) / voxels.sum()),
            edge=float(on_edge.mean()),
            shape=_shape(places * sizes, sizes),
            intensity=_intensity(image.cut(outer)[0].cpu().numpy(), inside, labels[outer]),
            center=places.mean(0) * sizes,
        )
    return descriptions


def _shape(points: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    volume = len(points) * np.prod(sizes)
    # A voxel is a box, with a variance of its own.
    covariance = np.cov(points.T, bias=True) + np.diag(sizes**2 / 12)
    deviations = np.sqrt(np.diag(covariance))
    correlations = (covariance / np.outer(deviations, deviations))[np.triu_indices(3, 1)]
    return np.concatenate([[np.log(volume)], np.log(deviations), correlations])


def _intensity(image: np.ndarray, inside: np.ndarray, labels: np.ndarray) -> np.ndarray:
    around = ndimage.binary_dilation(inside, iterations=SHELL) & (labels == 0)
    around = around if around.any() else inside  # it fills the image
    near = inside | around
    differences = np.concatenate(
        [np.abs(np.diff(image, axis=axis))[np.delete(near, -1, axis)].ravel() for axis in range(3)]
    )
    detail = np.log(differences.mean() + 1e-3) if differences.size else 0.0  # a voxel alone in the last corner
    return np.concatenate(
        [np.percentile(image[inside], PERCENTILES), np.percentile(image[around], PERCENTILES), [detail]]
    )


class SlabBySlab:
    """Watches the logits of an image slab by slab, and then describes the structures that they show.

    Beside the slab it holds a byte per voxel, the labels on the grid of the network.
    """

    def __init__(self) -> None:
        self.labels: list[np.ndarray] = []
        self.axis = 0
        self.soft_dice: SoftDice | None = None

    def add(self, slab: Slab) -> None:
        """Add a slab; slabs follow each other along an axis."""
        if self.soft_dice is None:
            self.soft_dice = SoftDice(len(slab.values))
        self.axis = slab.axis
        for logits in slab.values.split(PLANES, 1 + slab.axis):
            probabilities = logits.float().softmax(0)
            found = probabilities.argmax(0)
            self.soft_dice.add(probabilities, found)
            self.labels.append(found.to(torch.uint8).cpu().numpy())

    @torch.no_grad()
    def describe(
        self,
        image: Image,
        spacing: Sequence[float],
        window: Any,
        network: Callable[[Tensor], Tensor],
        divisible_by: Sequence[int] | int | None = None,
    ) -> dict[int, Description]:
        """Describe the structures.

        Args:
            image: as the network saw it.
            spacing: size of a voxel, in mm.
            window: largest extent of a window of the second run, as inferers of MONAI take their `roi_size`.
            network: gives logits `(1, classes, *spatial)` for `(1, channels, *spatial)`.
            divisible_by: see `second_run`.
        """
        if self.soft_dice is None:
            return {}
        labels = np.concatenate(self.labels, self.axis)
        extents = np.broadcast_to(labels.shape if window is None else window, 3)
        extents = np.where(extents > 0, extents, labels.shape)
        agreement = second_run(image, labels, extents, network, divisible_by)
        return describe_structures(image, labels, spacing, self.soft_dice.values(), agreement)
