"""Pictures of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_iunet.training.pictures import PictureHandler, picture
from monai_iunet.visualization.palette import label_colors


def case() -> dict[str, torch.Tensor]:
    labels = torch.zeros(10, 12, 14, dtype=torch.long)
    labels[2:8, 3:9, 4:10] = 1
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 0).float()
    return {"image": torch.rand(1, 10, 12, 14), "pred": one_hot.roll(2, 3), "label": one_hot}


def colored(pixels: np.ndarray, color: str) -> int:
    """Number of pixels of a color of the palette, as drawn with antialiasing."""
    rgb = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - rgb).max(-1) < 40).sum())


def test_contours_of_predicted_and_true_labels_are_drawn_in_their_color() -> None:
    item = case()
    blue, orange = label_colors([1, 2]).values()
    both = picture(item["image"], item["pred"], item["label"])
    assert both.dtype == np.uint8
    assert both.ndim == 3
    nothing = torch.zeros_like(item["pred"])
    nothing[0] = 1
    without = picture(item["image"], nothing, item["label"])
    # The legend has both colors; contours only that of the structure.
    assert colored(both, blue) > colored(without, blue) > colored(picture(item["image"], nothing, nothing), blue)
    assert colored(both, orange) == colored(without, orange)


def test_label_maps_are_drawn_as_one_channel_per_class_is() -> None:
    """As MONAI's metrics take them with `num_classes`; of one channel the largest is the first, the background."""
    item = case()
    maps = [item[key].argmax(0, keepdim=True) for key in ("pred", "label")]
    blue = label_colors([1])[1]
    expected = picture(item["image"], item["pred"][:2], item["label"][:2])
    assert colored(expected, blue) > 0
    for found in ([*maps], [item["pred"][:2], maps[1]], [maps[0], item["label"][:2]]):
        np.testing.assert_array_equal(picture(item["image"], *found), expected)


def test_each_validation_adds_a_picture(tmp_path: Path) -> None:
    validator = Engine(lambda engine, batch: [batch])
    PictureHandler(tmp_path).attach(validator)
    for epoch in (1, 2):
        validator.run([case(), case()], max_epochs=epoch)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert len(log.Images("found and true")) == 2
