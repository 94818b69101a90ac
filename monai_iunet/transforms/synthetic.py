"""Images of any contrast made from a label map: what a network learns from that shall not care how an image was taken.

From a map of tissues, and the labels to learn on the same grid, each call draws

1. a pose: rotation, scale, shear, shift, a smooth displacement, left and right swapped or not, and a field of view;
2. an intensity for each tissue: of its own, or along a random curve over the intensities that tissues have in a
   typical image, so that alike tissues stay alike. Each voxel gets a value around that of its tissue;
3. what scanners do: a bias field, blur, thick slices, gamma and noise; and, at times, what programs do: everything
   outside the brain is taken out.

All volumes are made on the grid of the result, so that a head at 2 mm costs a fraction of one at 1 mm.

Source: Billot et al., SynthSeg: Segmentation of brain MRI scans of any contrast and resolution without retraining,
Medical Image Analysis, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import MapTransform, Randomizable
from monai.transforms.utils import create_rotate, create_scale, create_shear
from torch import Tensor
from torch.nn.functional import interpolate

from monai_iunet.errors import InputError
from monai_iunet.losses.class_numbers import check_labels, check_one_channel
from monai_iunet.transforms.mirror import read_swap
from monai_iunet.transforms.patches import check_one_place

__all__ = ["RandSyntheticImaged"]

KNOTS = (4, 8)  # of a displacement along each axis of the field of view
BIAS_KNOTS = (2, 5)
SHORTEST = 0.5  # of a field of view that is cut, as a share of the whole
LEAST = 0.01  # of a field of view, to be left of it: normalization turns gradients of an empty image into infinite ones


class RandSyntheticImaged(Randomizable, MapTransform):
    """Make an image of random pose, contrast and quality from a map of tissues, and deform the labels alike.

    Args:
        keys: the map of tissues, a single key: `(1, *spatial)`, whole numbers from 0, turned to RAS as by
            `Orientationd`; the image takes its place, `(1, *spatial_size)`, float32, from 0 to 1.
        label_key: labels on the same grid, whole numbers from 0.
        pixdim: voxels of the result, in mm.
        spatial_size: largest field of view, in voxels, around the center of what is labeled.
        swap: pairs of labels that change places when left and right do.
        typical: intensity of each tissue in a typical image, from 0 to 1, by the tissue's number.
        outside: tissues that a program takes out which leaves the brain alone.
        fluid: tissues that such a program takes out as often as not.
        divisor: fields of view have multiples of so many voxels.
        prob_crop: probability of a smaller field of view.
        prob_typical: probability of intensities along a random curve over `typical`.
        prob_strip: probability that `outside` is taken out, unless hardly anything would be left.
        max_rotation: about each axis, in radians.
        max_scale: of each axis, beside 1.
        max_shear: between each two axes.
        max_shift: along each axis, in mm.
        max_displacement: standard deviation of a smooth displacement, in voxels of the maps.

    Example:
        >>> tissues = torch.zeros(1, 32, 32, 32)
        >>> tissues[:, 8:24, 8:24, 8:24] = 1
        >>> make = RandSyntheticImaged("image", pixdim=2.0, spatial_size=(16, 16, 16), typical=[0.0, 0.8], prob_crop=0)
        >>> made = make.set_random_state(0)({"image": tissues, "label": tissues})
        >>> made["image"].shape, made["label"].unique().tolist()
        (torch.Size([1, 16, 16, 16]), [0.0, 1.0])
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        *,
        pixdim: float,
        spatial_size: Sequence[int],
        typical: Sequence[float],
        swap: Sequence[Sequence[int]] = (),
        outside: Sequence[int] = (),
        fluid: Sequence[int] = (),
        divisor: int = 16,
        prob_crop: float = 0.5,
        prob_typical: float = 0.5,
        prob_strip: float = 0.4,
        max_rotation: float = 0.35,
        max_scale: float = 0.15,
        max_shear: float = 0.1,
        max_shift: float = 20.0,
        max_displacement: float = 4.0,
    ) -> None:
        if not 0 < pixdim < math.inf:
            raise InputError(f"pixdim {pixdim}: must be a positive number of millimeters.")
        if not all(0 <= prob <= 1 for prob in (prob_crop, prob_typical, prob_strip)):
            raise InputError(
                f"prob_crop, prob_typical, prob_strip: must be 0 to 1, got {prob_crop, prob_typical, prob_strip}."
            )
        if others := [tissue for tissue in (*outside, *fluid) if not 0 <= tissue < len(typical)]:
            raise InputError(f"outside, fluid: {others} are no tissues, which are 0 to {len(typical) - 1}.")
        MapTransform.__init__(self, keys)
        if len(self.keys) != 1 or label_key in self.keys:  # the labels would be deformed once more for each
            raise InputError(
                f"keys {list(self.keys)}: must be the map of tissues alone, beside the labels {label_key!r}. Make a "
                "transform for each map, with labels of its own."
            )
        self.label_key = label_key
        self.pixdim = pixdim
        self.spatial_size = tuple(spatial_size)
        self.typical = torch.tensor(typical)
        self.outside, self.fluid = list(outside), list(fluid)
        self.divisor = divisor
        self.prob_crop, self.prob_typical, self.prob_strip = prob_crop, prob_typical, prob_strip
        self.max_rotation, self.max_scale, self.max_shear = max_rotation, max_scale, max_shear
        self.max_shift, self.max_displacement = max_shift, max_displacement
        self.swap = read_swap(swap)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key], item[self.label_key] = self.make(item[key], item[self.label_key])
        return item

    def make(self, tissues: Tensor, labels: Tensor) -> tuple[MetaTensor, MetaTensor]:
        """Return an image and its labels.

        Raises:
            ValueError: when both are not on one grid, or not turned to RAS, or have several channels, a tissue has no
                number of `typical`, or a label is no whole number from 0.
        """
        tissues, labels = torch.as_tensor(tissues), torch.as_tensor(labels)
        if tissues.shape != labels.shape:
            raise ValueError(
                f"The map of tissues is {tuple(tissues.shape)}, that of the labels {tuple(labels.shape)}: both "
                "must be on one grid."
            )
        check_one_channel(tissues, "The map of tissues")  # and labels have the same shape
        for volume in (tissues, labels):
            axes = nibabel.aff2axcodes(np.asarray(volume.affine)) if isinstance(volume, MetaTensor) else tuple("RAS")
            if axes != tuple("RAS"):
                raise ValueError(
                    f"The map of tissues or of labels is turned {''.join(map(str, axes))}, must be RAS, as the image "
                    "will be. Turn it by MONAI's Orientationd."
                )
        check_one_place({"The map of tissues": tissues, "that of the labels": labels})
        random = torch.Generator(tissues.device).manual_seed(int(self.R.randint(2**31)))
        source = [
            volume.as_tensor()[0] if isinstance(volume, MetaTensor) else volume[0] for volume in (tissues, labels)
        ]
        zooms = tissues.pixdim.tolist() if isinstance(tissues, MetaTensor) else [1.0] * 3
        mirrored = self.R.rand() < 0.5
        positions = self._positions(source[1], zooms, mirrored, random)
        deformed = _nearest(source[1], positions)
        check_labels(deformed, None, "The map of labels")
        if mirrored:
            deformed = self._swapped(deformed)
        # Two samples a voxel, to either side of its center: a little of what a voxel on a border sees.
        aside = torch.tensor([self.R.choice((-0.25, 0.25)) for _ in range(3)], device=positions.device) * self.pixdim
        aside = (aside / torch.tensor(zooms, device=positions.device)).view(3, 1, 1, 1).float()
        samples = [_nearest(source[0], positions + offset) for offset in (-aside, aside)]
        check_labels(torch.stack(samples), len(self.typical), "The map of tissues")
        samples = [sample.long() for sample in samples]
        means, deviations = self._intensities(samples[0].device)
        grain = torch.randn(samples[0].shape, generator=random, device=samples[0].device)
        image = torch.stack([means[sample] + deviations[sample] * grain for sample in samples]).mean(0)
        image = self._scanned(image.clamp(0, 1), random)
        if self.outside and self.R.rand() < self.prob_strip:
            inside = self._inside(_nearest(source[0], positions).long())
            if inside.mean() > LEAST:
                image, deformed = image * inside, deformed * inside
        affine = torch.diag(torch.tensor([self.pixdim] * 3 + [1.0]))
        return MetaTensor(image[None], affine=affine), MetaTensor(deformed[None].float(), affine=affine)

    def _positions(self, labels: Tensor, zooms: Sequence[float], mirrored: bool, random: torch.Generator) -> Tensor:
        """Return where each voxel of the result comes from, in voxels of the maps, `(3, *field of view)`."""
        coarse = labels[::4, ::4, ::4].nonzero().float() * 4
        center = coarse.mean(0).cpu().numpy() if len(coarse) else (np.array(labels.shape) - 1) / 2
        size, start = self._field_of_view()
        uniform = self.R.uniform
        to_center = (np.array(self.spatial_size) - 1) / 2 - start  # of the whole field of view, from that of the part
        matrix = create_rotate(3, (uniform(-1, 1, 3) * self.max_rotation).tolist())
        matrix = matrix @ create_shear(3, (uniform(-1, 1, 6) * self.max_shear).tolist())
        matrix = matrix @ create_scale(3, (1 + uniform(-1, 1, 3) * self.max_scale).tolist())
        matrix = np.asarray(matrix)[:3, :3] * self.pixdim
        if mirrored:
            matrix = matrix * [[-1], [1], [1]]
        shift = uniform(-1, 1, 3) * self.max_shift
        matrix, shift = matrix / np.array(zooms)[:, None], shift / zooms
        origin = center + shift - matrix @ to_center
        device = labels.device
        axes = [torch.arange(extent, device=device, dtype=torch.float32) for extent in size]
        columns = torch.tensor(matrix, device=device, dtype=torch.float32)
        positions = torch.stack(
            [
                (row[0] * axes[0])[:, None, None] + (row[1] * axes[1])[:, None] + row[2] * axes[2] + float(offset)
                for row, offset in zip(columns, origin)
            ]
        )
        knots = [int(self.R.randint(*KNOTS)) for _ in range(3)]
        amplitude = uniform(0, self.max_displacement)
        displacement = torch.randn(1, 3, *knots, generator=random, device=device) * amplitude
        return positions + interpolate(displacement, size, mode="trilinear", align_corners=True)[0]

    def _field_of_view(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Return size and first voxel of a field of view within the whole one."""
        size = np.array(self.spatial_size)
        if self.R.rand() < self.prob_crop:
            shares = self.R.uniform(SHORTEST, 1, 3)
            size = np.maximum(np.round(size * shares / self.divisor), 1).astype(int) * self.divisor
            size = np.minimum(size, self.spatial_size)
        start = self.R.uniform(0, 1, 3) * (np.array(self.spatial_size) - size)
        return tuple(int(extent) for extent in size), start

    def _swapped(self, labels: Tensor) -> Tensor:
        table = torch.arange(int(labels.max()) + 1 + max((max(pair) for pair in self.swap), default=0))
        for first, second in self.swap:
            table[first], table[second] = second, first
        return table.to(labels.device)[labels.long()]

    def _intensities(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the intensities of each tissue."""
        count = len(self.typical)
        if self.R.rand() < self.prob_typical:
            ends = np.linspace(0, 1, int(self.R.randint(3, 7)))
            if self.R.rand() < 0.6:  # as they are, or turned round, with another gamma
                curve = ends ** np.exp(self.R.normal(0, 0.3))
                curve = 1 - curve if self.R.rand() < 0.4 else curve
            else:
                curve = self.R.uniform(0, 1, len(ends))
            means = np.interp(self.typical.numpy() + self.R.normal(0, 0.04, count), ends, curve)
        else:
            means = self.R.uniform(0, 1, count)
        if self.R.rand() < 0.7:
            means[0] = self.R.uniform(0, 0.1)  # what is around a head is air
        deviations = self.R.uniform(0, 0.1, count) * self.R.choice((0.5, 1.0))
        return (torch.tensor(values, dtype=torch.float32, device=device) for values in (means, deviations))  # type: ignore[return-value]

    def _scanned(self, image: Tensor, random: torch.Generator) -> Tensor:
        """Return an image with the marks of a scanner."""
        shape, device = tuple(image.shape), image.device
        if self.R.rand() < 0.8:
            knots = [int(self.R.randint(*BIAS_KNOTS)) for _ in range(3)]
            field = torch.randn(1, 1, *knots, generator=random, device=device) * self.R.uniform(0, 0.4)
            image = image * interpolate(field, shape, mode="trilinear", align_corners=True)[0, 0].exp()
        if self.R.rand() < 0.8:
            sigma = self.R.uniform(0.2, 1.0) * self.R.uniform(0.7, 1.3, 3)
            image = GaussianFilter(3, sigma.tolist(), truncated=2.5).to(device)(image[None, None])[0, 0]
        if self.R.rand() < 0.3:
            image = self._thick_slices(image)
        low, high = image.min(), image.max()
        image = (image - low) / (high - low).clamp_min(1e-6)
        image = image ** math.exp(self.R.normal(0, 0.25))
        noise = torch.randn(shape, generator=random, device=device) * (self.R.uniform(0, 0.08) * self.R.rand())
        return (image + noise).clamp(0, 1)

    def _thick_slices(self, image: Tensor) -> Tensor:
        """Return an image averaged over thick slices along one axis, and interpolated."""
        axis, factor = int(self.R.randint(3)), self.R.uniform(1.5, 4)
        size = list(image.shape)
        size[axis] = max(round(size[axis] / factor), 2)
        thick = interpolate(image[None, None], size, mode="area")
        return interpolate(thick, image.shape, mode="trilinear", align_corners=False)[0, 0]

    def _inside(self, tissues: Tensor) -> Tensor:
        """Return 1 where a tissue is left, 0 elsewhere."""
        inside = torch.ones(len(self.typical), device=tissues.device)
        inside[self.outside] = 0
        if self.R.rand() < 0.5:
            inside[self.fluid] = 0
        return inside[tissues]


def _nearest(volume: Tensor, positions: Tensor) -> Tensor:
    """Return the nearest voxel of each position, 0 outside the volume."""
    index = positions.round().long()
    inside = torch.ones_like(index[0], dtype=torch.bool)
    flat = torch.zeros_like(index[0])
    for axis, extent in enumerate(volume.shape):
        inside &= (index[axis] >= 0) & (index[axis] < extent)
        flat = flat * extent + index[axis].clamp(0, extent - 1)
    return torch.where(inside, volume.reshape(-1)[flat], torch.zeros((), dtype=volume.dtype, device=volume.device))
