"""Pictures of a training for TensorBoard: contours of the labels that the network finds, and of the true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from monai_iunet.visualization.overlay import draw_overlay

__all__ = ["PictureHandler", "picture"]


class PictureHandler:
    """Writes a picture of the first case to TensorBoard after each validation.

    Args:
        log_dir: folder of the TensorBoard log.

    Example:
        >>> from monai.engines import SupervisedEvaluator
        >>> evaluator = SupervisedEvaluator(torch.device("cpu"), [], torch.nn.Identity())
        >>> PictureHandler("train").attach(evaluator)
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = str(log_dir)
        self._first: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has "image", "pred" and "label", as `picture` takes them."""
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
        case, self._first = self._first, None
        with SummaryWriter(self.log_dir) as writer:
            pixels = picture(case["image"], case["pred"], case["label"])
            writer.add_image("found and true", pixels, engine.state.epoch, dataformats="HWC")


def picture(image: Tensor, prediction: Tensor, truth: Tensor) -> np.ndarray:
    """Draw the contours of predicted and of true labels over three planes of an image.

    Args:
        image: `(1, *spatial)`, 3D; a `MetaTensor` with the size of its voxels, or a tensor.
        prediction: one channel per class, `(classes, *spatial)`, or a label map, `(1, *spatial)`.
        truth: the same.

    Returns:
        RGB, uint8, `(height, width, 3)`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    affine = np.asarray(getattr(image, "affine", np.eye(4)), dtype=float)
    volume = nibabel.Nifti1Image(np.asarray(image[0].float()), affine)
    labels, reference = (
        np.asarray(tensor.argmax(0) if len(tensor) > 1 else tensor[0]).astype(np.uint8)
        for tensor in (prediction, truth)
    )
    classes = max(len(prediction), len(truth), labels.max() + 1, reference.max() + 1)
    names = {label: f"class {label}" for label in range(1, classes)}
    figure = Figure(figsize=(9, 3.6), dpi=80, facecolor="black")
    canvas: Any = FigureCanvasAgg(figure)
    draw_overlay(figure, volume, labels, names, reference=reference)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
