"""Pictures of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_iunet.training.pictures import PictureHandler, picture


def case() -> dict[str, torch.Tensor]:
    labels = torch.zeros(10, 12, 14, dtype=torch.long)
    labels[2:8, 3:9, 4:10] = 1
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 0).float()
    return {"image": torch.rand(1, 10, 12, 14), "pred": one_hot.roll(2, 3), "label": one_hot}


def test_found_is_above_true_and_in_color_where_labels_are() -> None:
    shown = picture(**{name: case()[key] for name, key in (("image", "image"), ("found", "pred"), ("truth", "label"))})
    height = 14
    assert shown.shape == (3, 2 * height, (12 + 2) + (10 + 2) + (10 + 2))
    assert 0 <= shown.min() < shown.max() <= 1
    colored = np.ptp(shown, axis=0) > 1e-3
    above, below = colored[:height, :12], colored[height:, :12]
    assert above.sum() == below.sum() == 36
    # Shifted by two voxels along the axis that is drawn upwards.
    assert np.argwhere(above)[:, 0].min() == np.argwhere(below)[:, 0].min() - 2


def test_each_validation_adds_a_picture(tmp_path: Path) -> None:
    validator = Engine(lambda engine, batch: [batch])
    PictureHandler(tmp_path).attach(validator)
    for epoch in (1, 2):
        validator.run([case(), case()], max_epochs=epoch)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert len(log.Images("found and true")) == 2
