"""What a segmentation will hold in memory, before it is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SpatialPadd
from monai.utils import fall_back_tuple
from torch import nn

from monai_iunet.inference.blocks import LARGEST_BLOCK
from monai_iunet.inference.prepare import KEY, steps_around_spacing
from monai_iunet.inference.streaming import StreamingInferer, longest_axis
from monai_iunet.planning.plan import plan_inference_pass

__all__ = ["InferencePlan", "plan_inference"]

FLOAT = 4  # bytes


@dataclass(frozen=True)
class InferencePlan:
    """Counts what a segmentation holds, in bytes.

    Attributes:
        network_size: the image on the grid of the network.
        roi_size: of the windows.
        windows: how often the network is run on a window.
        image: as it was read.
        preprocessed: the image on the grid of the network; 0 if only windows of it are.
        labels: on the grid of the file.
        slab: logits that are stitched.
        blocks: probabilities on the grid of the file.
        network: parameters, and what a batch of windows takes; 0 if it was not counted.
    """

    network_size: tuple[int, ...]
    roi_size: tuple[int, ...]
    windows: int
    image: int
    preprocessed: int
    labels: int
    slab: int
    blocks: int
    network: int

    @property
    def beside_image(self) -> int:
        """The most that is held at once beside the image."""
        return self.preprocessed + self.labels + self.slab + max(self.blocks, self.network)

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(2 * self.image, self.image + self.beside_image)  # turning an image takes it twice


def plan_inference(
    preprocessing: Compose,
    inferer: StreamingInferer,
    classes: int,
    image_size: tuple[int, ...],
    spacing: tuple[float, ...],
    itemsize: int = 2,
    network: nn.Module | None = None,
    channels: int = 1,
) -> InferencePlan:
    """Count what the segmentation of an image holds.

    Args:
        preprocessing: transforms of the image.
        inferer: that stitches the logits.
        classes: with the background.
        image_size: of the file, in voxels.
        spacing: of the file, in mm.
        itemsize: bytes of a voxel as it was read: 2 for most CT, 4 for what is read as float32.
        network: whose memory is counted too.
        channels: of the image.

    Example:
        >>> from monai.transforms import Spacingd
        >>> preprocessing = Compose([Spacingd("image", (2.0, 2.0, 2.0))])
        >>> plan = plan_inference(preprocessing, StreamingInferer((32, 32, 32)), 3, (100, 100, 200), (1.0, 1.0, 1.0))
        >>> plan.network_size, plan.labels, plan.slab < 4 * 6 * 50 * 50 * 32
        ((50, 50, 100), 2000000, True)
    """
    steps = steps_around_spacing(preprocessing)
    spacings = [transform for transform in preprocessing.transforms if hasattr(transform, "spacing_transform")]
    size = image_size
    if spacings:
        empty = MetaTensor(torch.zeros(1).expand(1, *image_size), affine=torch.as_tensor(np.diag([*spacing, 1.0])))
        size = tuple(map(int, spacings[0]({KEY: empty}, lazy=True)[KEY].peek_pending_shape()))
    for transform in preprocessing.transforms:
        if isinstance(transform, SpatialPadd):
            padder: Any = transform.padder
            size = tuple(max(pair) for pair in zip(size, fall_back_tuple(padder.spatial_size, size)))
    windows, axis = inferer.windows(size, network, channels), longest_axis(size)
    plane = math.prod(extent for number, extent in enumerate(size) if number != axis)
    length = windows.size[axis]
    # What is stitched, the sums of the weights twice, and the plane that is kept.
    slab = FLOAT * plane * ((classes + 2) * length + classes)
    # A few blocks at once; each has a row of the image at least.
    row = math.prod(image_size) / max(image_size[0], 1) * length / size[axis]
    blocks = 4 * FLOAT * max(LARGEST_BLOCK, int(classes * row))
    batch = min(inferer.sw_batch_size, max(1, windows.count // len(windows.starts[axis])))
    held = 0
    if network is not None:
        planned = plan_inference_pass(network, (batch, channels, *windows.roi_size))
        outputs = FLOAT * classes * math.prod(windows.roi_size) * batch
        held = planned + outputs * len(inferer.views)
    return InferencePlan(
        network_size=size,
        roi_size=windows.roi_size,
        windows=windows.count * len(inferer.views),
        image=itemsize * channels * math.prod(image_size),
        preprocessed=FLOAT * channels * math.prod(size) if steps is None else 0,
        labels=math.prod(image_size),
        slab=slab,
        blocks=blocks,
        network=held,
    )
