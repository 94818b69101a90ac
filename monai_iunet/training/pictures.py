"""Pictures of a training for TensorBoard: what the network finds, over the image, beside what is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.visualize import blend_images
from torch import Tensor

__all__ = ["PictureHandler", "picture"]


class PictureHandler:
    """Handler of a validator: after each validation, writes a picture of its first case to TensorBoard.

    Args:
        log_dir: folder of the TensorBoard log.

    Example:
        >>> from monai.engines import SupervisedEvaluator
        >>> evaluator = SupervisedEvaluator(torch.device("cpu"), [], torch.nn.Identity())
        >>> PictureHandler("train").attach(evaluator)
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = str(log_dir)
        self._first: dict[str, Tensor] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has "image", "pred" and "label", the latter two one channel per class."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _keep(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        if self._first is None:
            self._first = {key: torch.as_tensor(outputs[0][key]).detach().cpu() for key in ("image", "pred", "label")}

    def _write(self, engine: Engine) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._first is None:
            return
        shown, self._first = self._first, None
        with SummaryWriter(self.log_dir) as writer:
            array = picture(shown["image"], shown["pred"], shown["label"])
            writer.add_image("found and true", array, engine.state.epoch)


def picture(image: Tensor, found: Tensor, truth: Tensor) -> np.ndarray:
    """Three planes of an image with labels over them: found above, true below.

    Args:
        image: `(1, *spatial)`, 3D.
        found: one channel per class `(classes, *spatial)`.
        truth: the same; the planes are those with the most of it.

    Returns:
        RGB values in [0, 1], `(3, height, width)`.
    """
    labels = [tensor.argmax(0, keepdim=True) for tensor in (found, truth)]
    # blend_images spreads the colors over the labels that are there; a voxel of the last class makes them the same.
    for label in labels:
        label[(0,) * label.ndim] = len(truth) - 1
    blended = [np.asarray(blend_images(image, label, alpha=0.4)) for label in labels]
    rows = []
    for volume in blended:
        planes = []
        for axis in range(3):
            amount = (labels[1][0] > 0).sum(dim=[other for other in range(3) if other != axis])
            plane = np.take(volume, int(amount.argmax()), axis=axis + 1)
            planes.append(np.flip(plane.transpose(0, 2, 1), 1))
        height = max(plane.shape[1] for plane in planes)
        rows.append(
            np.concatenate([np.pad(plane, ((0, 0), (0, height - plane.shape[1]), (0, 2))) for plane in planes], 2)
        )
    return np.concatenate(rows, 1).clip(0, 1)
