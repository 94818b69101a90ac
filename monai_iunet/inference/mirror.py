"""The mean over an image and its mirror image: what is on the left there is on the right here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

from monai_iunet.errors import InputError
from monai_iunet.inference.streaming import StreamingInferer, View
from monai_iunet.transforms.mirror import check_sides, read_swap

__all__ = ["MirrorInferer"]


class MirrorInferer(StreamingInferer):
    """Averages the logits of an image and of its mirror image, mirrored back, both by sliding windows.

    Args:
        swap: pairs of classes that change places in the mirror.
        spatial_axis: axis that runs from left to right.
        enabled: if False, the mirror image is left out.
        options: of `StreamingInferer`, such as `roi_size` and `overlap`.

    Raises:
        InputError: when `swap` does not consist of pairs, or `spatial_axis` is not an axis.

    Example:
        >>> import torch
        >>> inferer = MirrorInferer(swap=[], roi_size=[2])
        >>> inferer(torch.tensor([[[1.0, 3.0]]]), lambda image: image * torch.tensor([2.0, 0.0])).tolist()
        [[[1.0, 3.0]]]
    """

    def __init__(
        self, swap: Sequence[Sequence[int]], spatial_axis: int = 0, enabled: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        if spatial_axis < 0:
            raise InputError(f"spatial_axis {spatial_axis}: must be the number of an axis, counted from 0.")
        self.mirrored = View((spatial_axis,), read_swap(swap))
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the stitched mean, see `StreamingInferer`.

        Raises:
            InputError: when classes change places although the axis does not run between left and right, as far as a
                `MetaTensor` says.
        """
        image: Any
        for image in inputs if isinstance(inputs, MetaTensor) else ():
            self.check_axis(image)
        return super().__call__(inputs, network, *args, **kwargs)

    def check_axis(self, image: MetaTensor) -> None:
        """Check that classes change places along an axis that runs between left and right.

        Args:
            image: `(channels, *spatial)`, whose meta data say how it is turned.

        Raises:
            InputError: when the axis runs in another direction.
        """
        axis = self.mirrored.flipped[0]
        if self.enabled and self.mirrored.swap and axis < image.ndim - 1:  # one too many is refused in other words
            check_sides(image, axis, "image")

    @property
    def views(self) -> tuple[View, ...]:
        """The image and, if enabled, its mirror image."""
        return (View(), self.mirrored) if self.enabled else (View(),)
