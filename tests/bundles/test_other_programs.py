"""Bundles driven by other programs: whoever runs the trainer or the evaluator has all that belongs to it."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

from monai_iunet import SegIUNet
from tests.bundles.made_data import HEADNECK, HIPPOCAMPUS, make_headneck_data, make_hippocampus_data

SMALL = {
    "network_def#channels": [4, 8],
    "network_def#couplings": 1,
    "roi_size": [16, 16, 16],
    "cache_rate": 0.0,
    "val_interval": 1,
    "device": "cpu",
    "learning_rate": 0.01,
}
BUNDLES = pytest.mark.parametrize(
    ("source", "make_data"),
    [(HIPPOCAMPUS, make_hippocampus_data), (HEADNECK, make_headneck_data)],
    ids=["hippocampus", "headneck"],
)
Weights = dict[str, Any]
GUIDE = Path(__file__).parents[2] / "monai_iunet" / "guides" / "train.md"


def copied(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns("eval", "train", "*.png"))


def client(bundle: Path, data: Path, **options: Any) -> MonaiAlgo:
    settings = {"bundle_root": str(bundle), "dataset_dir": str(data), **SMALL}
    evaluation = {key: settings[key] for key in settings if key not in ("cache_rate", "val_interval", "learning_rate")}
    algo = MonaiAlgo(
        str(bundle), train_kwargs=dict(settings), eval_kwargs=evaluation, send_weight_diff=False, **options
    )
    algo.initialize({ExtraItems.CLIENT_NAME: bundle.name})
    return algo


def equal(state: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def as_arrays(weights: Weights) -> ExchangeObject:
    return ExchangeObject(weights={name: np.asarray(tensor) for name, tensor in weights.items()})


@BUNDLES
def test_a_federated_client_trains_validates_saves_and_evaluates(source: Path, make_data: Any, tmp_path: Path) -> None:
    bundle = copied(source, tmp_path / "bundle")
    algo = client(bundle, make_data(tmp_path / "data"))
    committed = (bundle / "models" / "model.pt").read_bytes()
    start = copy.deepcopy(algo.trainer.network.state_dict())
    average = algo.train_workflow.parser.get_parsed_content("average").ema_model
    begun: list[bool] = []
    algo.trainer.add_event_handler(Events.STARTED, lambda: begun.append(equal(average.state_dict(), start)))
    for number in (1, 2):
        algo.train(as_arrays(start))
        assert algo.trainer.state.epoch == number
        assert begun == [True] * number  # the average begins anew with the weights that were sent
        moved = algo.get_weights().weights
        assert any(not torch.equal(torch.as_tensor(moved[name]), tensor) for name, tensor in start.items())
        assert any(not torch.equal(tensor, start[name]) for name, tensor in average.state_dict().items())
    assert (bundle / "models" / "model.pt").read_bytes() != committed
    for kind in (ModelType.BEST_MODEL, ModelType.FINAL_MODEL):
        saved = algo.get_weights({ExtraItems.MODEL_TYPE: kind}).weights
        assert saved.keys() == start.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.state_dict().items())

    background = {
        name: np.zeros_like(tensor) if "head" in name else np.asarray(tensor) for name, tensor in start.items()
    }
    metrics = algo.evaluate(ExchangeObject(weights=background)).metrics
    assert metrics["val_mean_dice"] == 0.0
    assert not algo.evaluator.network.state_dict()["head.weight"].any()


@pytest.mark.parametrize(
    "options",
    [
        {"config_evaluate_filename": "configs/evaluate.json", "eval_workflow_name": "infer"},
        {"config_evaluate_filename": None},
    ],
    ids=["evaluate.json alone", "no evaluation"],
)
def test_other_clients_can_be_made(options: dict[str, Any], tmp_path: Path) -> None:
    algo = client(copied(HIPPOCAMPUS, tmp_path / "bundle"), make_hippocampus_data(tmp_path / "data"), **options)
    if options["config_evaluate_filename"] is not None:
        weights = {name: np.zeros_like(tensor) for name, tensor in algo.evaluator.network.state_dict().items()}
        assert algo.evaluate(ExchangeObject(weights=weights)).metrics["val_mean_dice"] == 0.0


def test_an_early_stop_ends_rounds_and_not_the_client(tmp_path: Path) -> None:
    bundle, data = copied(HIPPOCAMPUS, tmp_path / "bundle"), make_hippocampus_data(tmp_path / "data")
    settings = {"bundle_root": str(bundle), "dataset_dir": str(data), **SMALL, "patience": 1, "learning_rate": 0.0}
    algo = MonaiAlgo(str(bundle), train_kwargs=settings, config_evaluate_filename=None, send_weight_diff=False)
    algo.initialize({ExtraItems.CLIENT_NAME: "a"})
    for _ in range(3):
        algo.train(as_arrays(algo.trainer.network.state_dict()))


def test_statistics_of_a_client_s_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes files there
    bundle = copied(HIPPOCAMPUS, tmp_path / "bundle")
    make_hippocampus_data(bundle / "data" / "Task04_Hippocampus")
    names = (bundle / "configs" / "validation_cases.json").read_text()
    assert names
    stats = MonaiAlgoStats(str(bundle))
    stats.initialize({ExtraItems.CLIENT_NAME: "a"})
    found = stats.get_data_stats(
        {"hist_bins": 10, "hist_range": [-100, 500], "output_path": str(tmp_path / "stats.yaml")}
    )
    assert found.statistics


@pytest.mark.slow
def test_two_clients_and_three_rounds(tmp_path: Path) -> None:
    """Federated averaging by the lines of the guide; gradients of the averaged weights are right."""
    clients = []
    for number in range(2):
        bundle = copied(HIPPOCAMPUS, tmp_path / f"bundle{number}")
        clients.append(
            client(bundle, make_hippocampus_data(tmp_path / f"data{number}", training=2 + number), local_epochs=6)
        )
    weights = {name: tensor.numpy() for name, tensor in clients[0].trainer.network.state_dict().items()}
    losses: list[list[float]] = [[], []]
    for algo, found in zip(clients, losses):
        algo.trainer.add_event_handler(
            Events.COMPLETED, lambda engine, f=found: f.append(engine.state.output[0]["loss"])
        )
    (block,) = re.findall(r"```python\n([^`]*?client\.train.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {"np": np, "clients": clients, "weights": weights}
    exec(block, names)
    weights = names["weights"]
    assert [len(found) for found in losses] == [3, 3]
    assert np.mean([found[-1] for found in losses]) < np.mean([found[0] for found in losses])
    metrics = [algo.evaluate(ExchangeObject(weights=weights)).metrics["val_mean_dice"] for algo in clients]
    assert all(0 <= metric <= 1 for metric in metrics)

    image = torch.rand(1, 1, 16, 16, 16, dtype=torch.double)
    gradients = []
    for activations in ("invert", "store"):
        net = SegIUNet(3, 1, 3, (4, 8), couplings=1, activations=activations)
        net.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
        net.double()(image).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_program_of_one_s_own_runs_the_trainer(tmp_path: Path) -> None:
    """MONAI's hybrid programming: the config makes the components, Python runs them."""
    bundle, data = copied(HIPPOCAMPUS, tmp_path / "bundle"), make_hippocampus_data(tmp_path / "data", training=2)
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=str(bundle / "configs" / "train.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(data),
        max_epochs=2,
        **SMALL,
    )
    workflow.initialize()
    trainer = workflow.trainer
    trainer.run()
    assert trainer.state.epoch == 2
    saved = torch.load(bundle / "models" / "last.pt", weights_only=True)
    assert saved["epoch"] == 2
    assert saved["early_stop"]["best_score"] is not None
    workflow.finalize()


@BUNDLES
def test_evaluate_is_laid_over_train(source: Path, make_data: Any, tmp_path: Path) -> None:
    """As the model zoo, federated clients and MONAI's tutorials evaluate; the result is that of evaluate.json alone."""
    data = make_data(tmp_path / "data", validation=2)
    tables = []
    for number, configs in enumerate((["evaluate.json"], ["train.json", "evaluate.json"])):
        parser = ConfigParser()
        parser.read_config([str(source / "configs" / name) for name in configs])
        for name, value in SMALL.items():
            if name.split("#")[0] in parser.get():
                parser[name] = value
        parser.update({"bundle_root": str(source), "dataset_dir": str(data), "output_dir": str(tmp_path / str(number))})
        parser["validate#handlers"] = [
            handler for handler in parser["validate#handlers"] if handler["_target_"] != "CheckpointLoader"
        ]
        torch.manual_seed(0)
        if "train" in parser.get():
            parser["ckpt_dir"] = str(tmp_path / "models")
            parser["train#dataset#data"] = []
        batch = next(iter(parser.get_parsed_content("validate#dataloader")))
        assert batch["image"].shape == batch["label"].shape
        torch.manual_seed(0)
        parser.get_parsed_content("run")
        tables.append((tmp_path / str(number) / "cases.csv").read_text())
    assert tables[0] == tables[1]
    assert tables[0].count("\n") > 2
