"""What a training was given, beside its weights."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.transforms import Identity, Lambdad
from torch import nn
from torch.utils.data import DataLoader

from monai_iunet import Checkpoints, InputError, SegIUNet, check_training, trained_value, training_record
from monai_iunet.training.record import differences, record_file, write_record
from tests.bundles.helpers import BUNDLES

TASKS = ("iunet_hippocampus_mri_segmentation", "iunet_headneck_ct_segmentation")
VALUES = {"roi_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0]}


def config(bundle: str, name: str, **changes: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(BUNDLES / bundle / "configs" / name)
    parser.update({"bundle_root": str(BUNDLES / bundle), **changes})
    return parser


def record_of(parser: ConfigParser, section: str, **values: Any) -> dict[str, Any]:
    return training_record(
        parser.get_parsed_content("network_def"), parser.get_parsed_content(section), **{**VALUES, **values}
    )


def clip(image: Any, highest: float) -> Any:
    return image.clip(max=highest)


class Scale:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, image: Any) -> Any:
        return self.factor * image


def test_functions_without_a_name_are_known_by_what_they_do() -> None:
    def described(highest: float = 1.0, factor: float = 2.0) -> dict[str, Any]:
        transforms = [Lambdad("image", partial(clip, highest=highest)), Lambdad("image", Scale(factor))]
        transforms.append(Lambdad("image", Identity()))
        return training_record(nn.Identity(), transforms)

    first, second = described(), described()  # other objects, as in another process
    assert list(differences(first, second)) == []
    assert "0x" not in json.dumps(first)
    assert list(differences(first, described(highest=3.0)))
    assert list(differences(first, described(factor=3.0)))


@pytest.mark.parametrize("bundle", TASKS)
def test_all_configs_of_a_bundle_agree_with_its_training(bundle: str, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    write_record(record_of(config(bundle, "train.json"), "deterministic_transforms"), weights)
    for name, section in (("evaluate.json", "validate#preprocessing"), ("inference.json", "preprocessing")):
        used = record_of(config(bundle, name), section)
        assert list(differences(json.loads(record_file(weights).read_text()), used)) == []
        check_training(weights, used)


@pytest.mark.parametrize(
    "change",
    [
        {"deterministic_transforms#3#pixdim": [2.0, 2.0, 2.0]},
        {"deterministic_transforms#4#upper": 98.0},
        {"deterministic_transforms#5": {"_target_": "ScaleIntensityd", "keys": "image"}},
        {"network_def#couplings": 1},
        {"network_def#act": "RELU"},
    ],
    ids=str,
)
def test_a_training_that_disagrees_with_the_config_is_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    write_record(record_of(config(TASKS[0], "train.json", **change), "deterministic_transforms"), weights)
    with pytest.raises(InputError, match=r"model.pt: trained with .*Pass what was passed to the training"):
        check_training(weights, record_of(config(TASKS[0], "inference.json"), "preprocessing"))


def test_an_override_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tmp_path / "model.pt"
    write_record(training_record(nn.Identity(), [], **VALUES), weights)
    assert trained_value(weights, "roi_size", [96, 96, 96]) == [16, 16, 16]
    with caplog.at_level(logging.WARNING):
        check_training(weights, training_record(nn.Identity(), [], **VALUES))
        assert caplog.text == ""
        check_training(weights, training_record(nn.Identity(), [], **{**VALUES, "roi_size": [16, 16, 24]}))
    assert "trained with 16 for roi_size[2], used with 24" in caplog.text


def test_a_damaged_record_is_an_error_in_a_line(tmp_path: Path) -> None:
    record_file(tmp_path / "model.pt").write_text("[1")
    with pytest.raises(InputError, match=r"training.json: not what a training was given"):
        trained_value(tmp_path / "model.pt", "roi_size", None)


def test_a_training_does_not_go_on_with_something_else(tmp_path: Path) -> None:
    def checkpoints(resume: bool, **values: Any) -> Checkpoints:
        network = SegIUNet(2, 1, 2, (2, 4), couplings=1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        record = training_record(network, [], **values)
        return Checkpoints(tmp_path, network, {"optimizer": optimizer}, resume=resume, record=record)

    def engines() -> tuple[Engine, Engine]:
        trainer, validator = Engine(lambda *_: None), Engine(lambda *_: None)
        trainer.state.epoch_length, trainer.state.max_epochs, trainer.state.epoch = 1, 5, 1
        trainer.data_loader = DataLoader([0])  # as trainers of MONAI have
        validator.state.best_metric, validator.state.best_metric_epoch = 0.5, 1
        return trainer, validator

    first = checkpoints(False, roi_size=(16, 16))
    trainer, validator = engines()
    first._save(trainer, validator)
    checkpoints(True, roi_size=(16, 16)).attach(*engines())
    with pytest.raises(InputError, match=r"given something else: roi_size\[1\] is 24, was 16"):
        checkpoints(True, roi_size=(16, 24)).attach(*engines())
