"""A training begins with the weights of another one, as far as they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from monai_iunet import SegIUNet
from monai_iunet.errors import InputError
from monai_iunet.training.fine_tuning import StartFrom, start_from
from tests.training.test_checkpoints import training, weights


def test_starting_from_weights_takes_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    one, other, average = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, classes)) for classes in (4, 5, 5))
    torch.save(one.state_dict(), tmp_path / "model.pt")
    before = other[1].weight.clone()
    start_from(tmp_path / "model.pt", other, average)
    for network in (other, average):
        assert torch.equal(network[0].weight, one[0].weight)
    assert torch.equal(other[1].weight, before)
    assert "new are: 1.bias, 1.weight" in caplog.text


@pytest.mark.parametrize(
    ("saved", "message"), [({"a": torch.zeros(1)}, "nothing in it fits. It holds a"), ([1], "not the weights")]
)
def test_weights_of_something_else_are_refused(saved: object, message: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(InputError, match=message):
        start_from(tmp_path / "model.pt", nn.Linear(2, 3))


def test_weights_must_fit_each_of_the_networks(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match="nothing in it fits"):
        start_from(tmp_path / "model.pt", nn.Linear(5, 7), nn.Linear(2, 3))


def test_weights_of_another_orthogonal_map_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "channels": (4, 8)}
    one, other, wider = (
        SegIUNet(out_channels=classes, orthogonal_map=kind, **options)
        for classes, kind in ((2, "cayley"), (2, "matrix_exp"), (3, "cayley"))
    )
    torch.save(one.state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: weights of another network: .* orthogonal_map='cayley'"):
        start_from(tmp_path / "model.pt", other)
    start_from(tmp_path / "model.pt", wider)
    assert torch.equal(weights(wider.iunet), weights(one.iunet))


def test_a_training_that_goes_on_is_not_started_from_other_weights(tmp_path: Path) -> None:
    trainer, network = training(tmp_path, max_epochs=1)
    trainer.run()
    resumed, network = training(tmp_path, resume=True)
    with pytest.raises(InputError, match=r"a training that goes on after epoch 1\. Attach StartFrom before"):
        StartFrom(tmp_path / "model_final.pt", [network]).attach(resumed)
