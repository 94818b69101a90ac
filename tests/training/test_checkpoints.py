"""A training that was killed and goes on ends as if it had not been."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, MeanDice, MeanIoUHandler, ValidationHandler, from_engine
from monai.transforms import AsDiscreted, Compose, RandGaussianNoised, RandSpatialCropd
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, PolynomialLR, SequentialLR, StepLR
from torch.utils.data import ConcatDataset, Subset

from monai_iunet import SegIUNet
from monai_iunet.errors import InputError
from monai_iunet.training.checkpoints import Checkpoints
from monai_iunet.training.early_stop import EarlyStop
from monai_iunet.training.time_limit import TimedDecay

EPOCHS = 4


class Killed(Exception):
    pass


def training(
    folder: Path,
    resume: bool = False,
    max_epochs: int = EPOCHS,
    network: nn.Module | None = None,
    wrap: Callable[[Any], Any] = lambda data: data,
    epoch_length: int | None = None,
    interval: int = 1,
    rate: float = 0.05,
    schedule: Callable[[Any], Any] = lambda optimizer: PolynomialLR(optimizer, EPOCHS, 0.9),
    decollate: bool = True,
    **of_loader: Any,
) -> tuple[SupervisedTrainer, nn.Module]:
    """A small training with all that is random: initialization, order, crops, noise and dropout."""
    torch.manual_seed(3)
    network = network or nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    rng = np.random.default_rng(0)
    images = [torch.as_tensor(rng.normal(size=(1, 12, 12)), dtype=torch.float32) for _ in range(5)]
    cases = [{"image": image, "label": (image > 0).float()} for image in images]
    crop = RandSpatialCropd(["image", "label"], [8, 8], random_size=False)
    train = wrap(Dataset(cases, Compose([crop, RandGaussianNoised("image", prob=0.5)])))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = schedule(optimizer)
    validator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases), batch_size=1),
        network=network,
        postprocessing=Compose([AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2)]),
        key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        epoch_length=epoch_length,
        train_data_loader=DataLoader(train, batch_size=2, shuffle=True, **of_loader),
        network=network,
        optimizer=optimizer,
        loss_function=lambda logits, label: nn.functional.cross_entropy(logits, label[:, 0].long()),
        train_handlers=[ValidationHandler(interval, validator), LrScheduleHandler(scheduler)],
        decollate=decollate,
    )
    state = {"optimizer": optimizer, "scheduler": scheduler}
    checkpoints = Checkpoints(folder, network, state, seed=7, resume=resume)
    checkpoints.attach(trainer, validator)
    return trainer, network


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def stop_in(trainer: SupervisedTrainer, epoch: int) -> None:
    """As if it was killed: in the middle of an epoch, without a chance to clean up."""

    def stop() -> None:
        if trainer.state.epoch == epoch and trainer.state.iteration % 3 == 2:
            raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_killed_and_resumed_equals_never_killed(epoch: int, tmp_path: Path) -> None:
    whole, expected = training(tmp_path / "whole")
    whole.run()
    first, _ = training(tmp_path / "killed")
    stop_in(first, epoch)
    with pytest.raises(Killed):
        first.run()
    torch.manual_seed(99)
    np.random.seed(99)
    second, resumed = training(tmp_path / "killed", resume=True)
    second.run()
    assert second.state.epoch == EPOCHS
    assert torch.equal(weights(resumed), weights(expected))
    best = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


WRAPS: dict[str, Callable[[Any], Any]] = {
    "subset": lambda data: Subset(data, range(4)),
    "concatenated": lambda data: ConcatDataset([data, Subset(data, [1])]),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_data_sets_in_others_are_seeded_too(wrap: str, tmp_path: Path) -> None:
    whole, expected = training(tmp_path / "whole", wrap=WRAPS[wrap])
    whole.run()
    training(tmp_path / "killed", max_epochs=2, wrap=WRAPS[wrap])[0].run()
    np.random.seed(99)
    second, resumed = training(tmp_path / "killed", resume=True, wrap=WRAPS[wrap])
    second.run()
    assert torch.equal(weights(resumed), weights(expected))


def test_what_will_not_end_as_if_it_had_not_been_interrupted_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training(tmp_path, max_epochs=1)[0].run()
    training(tmp_path, resume=True)
    assert "had not been interrupted" not in caplog.text
    training(tmp_path, resume=True, generator=torch.Generator())
    assert "a random generator of its own" in caplog.text
    training(tmp_path, resume=True, num_workers=1)
    assert "persistent_workers" not in caplog.text
    training(tmp_path, resume=True, num_workers=1, persistent_workers=True)
    assert "keep random numbers from epoch to epoch (set persistent_workers to False)" in caplog.text
    training(tmp_path, resume=True, epoch_length=2)
    assert "end within a pass over the data (give no epoch_length, or a multiple of 3)" in caplog.text


def test_a_list_of_batches_is_trained_on_and_goes_on(tmp_path: Path) -> None:
    batches = [{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)}] * 3
    network = nn.Conv2d(1, 2, 1)
    for epochs in (1, 2):
        trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=epochs,
            train_data_loader=batches,
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_function=lambda logits, _: logits.mean(),
        )
        validator = SupervisedEvaluator(device="cpu", val_data_loader=batches, network=network)
        Checkpoints(tmp_path, network, {}, resume=True).attach(trainer, validator)
        trainer.run()
    assert trainer.state.iteration == 6


LONGER: dict[str, tuple[Callable[[Any, int], Any], Callable[[int], float]]] = {
    "polynomial": (lambda optimizer, epochs: PolynomialLR(optimizer, epochs, 0.9), lambda done: (1 - done / 6) ** 0.9),
    "timed": (lambda optimizer, _: TimedDecay(optimizer, 1000), lambda _: 1.0),  # of which no time passes
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_training_goes_on_with_the_learning_rate_and_the_length_that_it_is_given(kind: str, tmp_path: Path) -> None:
    make, share = LONGER[kind]
    training(tmp_path, max_epochs=2, schedule=lambda optimizer: make(optimizer, 2))[0].run()
    options: dict[str, Any] = {"max_epochs": 6, "rate": 0.01, "schedule": lambda optimizer: make(optimizer, 6)}
    trainer, _ = training(tmp_path, resume=True, **options)
    rates: list[float] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run()
    assert rates == pytest.approx([0.01 * share(done) for done in range(2, 6)])


def test_a_schedule_that_cannot_be_changed_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"schedule": lambda optimizer: ExponentialLR(optimizer, 0.9), "resume": True}
    training(tmp_path, max_epochs=1, **options)[0].run()
    training(tmp_path, **options)
    assert "goes on as it was saved" not in caplog.text
    training(tmp_path, rate=0.01, **options)
    assert "ExponentialLR: base_lrs is [0.01], was [0.05]. It goes on as it was saved" in caplog.text


def cosine_after_warmup(optimizer: Any, epochs: int) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1), CosineAnnealingLR(optimizer, epochs)], [1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (CosineAnnealingLR, "CosineAnnealingLR: T_max is 6, was 2. It goes on as it was saved"),
        (StepLR, "StepLR: step_size is 6, was 2."),
        (cosine_after_warmup, "SequentialLR: schedules is "),
    ],
)
def test_another_length_of_a_schedule_that_cannot_be_changed_is_said(
    make: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else its rate would rise again, as that of a cosine, or stay too low, with nothing said."""
    training(tmp_path, max_epochs=2, schedule=lambda optimizer: make(optimizer, 2))[0].run()
    training(tmp_path, max_epochs=6, resume=True, schedule=lambda optimizer: make(optimizer, 2))
    assert "goes on as it was saved" not in caplog.text
    training(tmp_path, max_epochs=6, resume=True, schedule=lambda optimizer: make(optimizer, 6))
    assert said in caplog.text


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_training_does_not_go_on_with_another_optimizer_or_schedule(kind: Any, tmp_path: Path) -> None:
    training(tmp_path, max_epochs=1)[0].run()
    with pytest.raises(InputError, match="something else: scheduler is CosineAnnealingLR, was PolynomialLR"):
        training(tmp_path, resume=True, schedule=lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS))
    trainer, network = training(tmp_path / "other")
    checkpoints = Checkpoints(tmp_path, network, {"optimizer": kind(network.parameters(), lr=0.1)}, resume=True)
    with pytest.raises(InputError, match=f"optimizer is {kind.__name__}, was Adam. Give it the same, or start without"):
        checkpoints.attach(trainer, trainer)


def test_the_best_of_one_metric_is_not_compared_with_another(tmp_path: Path) -> None:
    training(tmp_path, max_epochs=1)[0].run()
    trainer, network = training(tmp_path / "other")
    metric = MeanIoUHandler(output_transform=from_engine(["pred", "label"]))
    validator = SupervisedEvaluator("cpu", [], network, key_val_metric={"iou": metric})
    with pytest.raises(InputError, match="something else: key metric is iou, was dice"):
        Checkpoints(tmp_path, network, {}, resume=True).attach(trainer, validator)


def test_a_trainer_may_leave_its_output_as_a_batch(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path, decollate=False)
    trainer.run()
    assert trainer.state.epoch == EPOCHS
    assert "loss" in trainer.state.output


def test_a_learning_rate_of_numpy_is_gone_on_with(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rate": np.geomspace(0.001, 0.1, 5)[2]}
    whole, expected = training(tmp_path / "whole", **options)
    whole.run()
    training(tmp_path / "parts", max_epochs=2, **options)[0].run()
    second, resumed = training(tmp_path / "parts", resume=True, **options)
    second.run()
    assert torch.equal(weights(resumed), weights(expected))


def test_a_state_that_could_not_be_read_again_is_refused_before_the_training(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"path": tmp_path, "of": Odd}

    trainer, network = training(tmp_path / "other")
    with pytest.raises(ValueError, match=r"state: odd could not be read again from last\.pt"):
        Checkpoints(tmp_path, network, {"odd": Odd()}).attach(trainer, trainer)


@pytest.mark.parametrize("lowered", [False, True])
def test_an_optimizer_without_a_schedule_goes_on_with_what_it_is_given(
    lowered: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = []
    for rate in (0.1, 0.01):
        trainer, network = training(tmp_path / "other", max_epochs=1 if rate == 0.1 else 2)
        trainer.optimizer = torch.optim.SGD(network.parameters(), lr=rate, weight_decay=rate / 10)
        Checkpoints(tmp_path, network, {"optimizer": trainer.optimizer}, resume=True).attach(
            trainer, SupervisedEvaluator(device="cpu", val_data_loader=[], network=network)
        )
        group = trainer.optimizer.param_groups[0]
        found.append((group["lr"], group["weight_decay"]))
        if lowered:  # by somebody else
            group["lr"] /= 2
        trainer.run()
    assert found == [(0.1, 0.01), (0.05 if lowered else 0.01, 0.001)]
    assert f"lr is 0.01, was 0.1. It goes on as it {'was saved' if lowered else 'is given now'}" in caplog.text


def test_a_training_that_diverges_stops_and_keeps_its_last_state(tmp_path: Path) -> None:
    trainer, network = training(tmp_path)

    @trainer.on(Events.ITERATION_STARTED)
    def ruin() -> None:
        if trainer.state.epoch == 2:
            with torch.no_grad():
                next(network.parameters()).fill_(torch.nan)

    with pytest.raises(FloatingPointError, match=r"Epoch 2, iteration 4: the loss is nan.*last.pt"):
        trainer.run()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize("interval", [1, 100])
@pytest.mark.parametrize("epoch", [2, EPOCHS])
def test_weights_that_the_last_step_of_an_epoch_has_ruined_are_not_saved(
    epoch: int, interval: int, tmp_path: Path
) -> None:
    trainer, network = training(tmp_path, interval=interval)
    last = epoch * trainer.state.epoch_length
    state = trainer.state
    next(network.parameters()).register_hook(
        lambda gradient: gradient * torch.nan if state.iteration == last else gradient
    )
    with pytest.raises(FloatingPointError, match=f"Epoch {epoch}: weights are NaN or infinite.*last.pt"):
        trainer.run()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["epoch"] == epoch - 1
    assert not (tmp_path / "model_final.pt").exists()
    trainer, network = training(tmp_path, resume=True)
    trainer.run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_what_a_kill_has_left_half_written_goes_when_it_goes_on(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path, max_epochs=1)
    trainer.run()
    half = tmp_path / ".last.pt.abc123.pt"
    half.write_bytes(b"half")
    training(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt", "model_final.pt"]


def test_the_best_network_is_not_replaced_by_a_worse_one_after_resuming(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path, max_epochs=1)
    trainer.run()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["best"] = [2.0, 1]  # better than anything
    torch.save(saved, tmp_path / "last.pt")
    before = (tmp_path / "model.pt").read_bytes()
    again, _ = training(tmp_path, resume=True)
    again.run()
    assert (tmp_path / "model.pt").read_bytes() == before


def test_where_the_best_network_is_lost_there_is_another_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = training(tmp_path, max_epochs=2)
    trainer.run()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["best"] = [2.0, 1]  # better than anything
    torch.save(saved, tmp_path / "last.pt")
    (tmp_path / "model.pt").unlink()  # as where last.pt alone was copied to go on
    again, _ = training(tmp_path, resume=True)
    again.run()
    assert "the best network so far, of epoch 1, is lost" in caplog.text
    assert (tmp_path / "model.pt").is_file()


class Scores(Metric):
    """A metric that is what it is given, validation by validation."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)
        super().__init__()

    def reset(self) -> None: ...

    def update(self, output: object) -> None: ...

    def compute(self) -> float:
        return next(self.scores)


def scored(folder: Path, scores: list[float]) -> tuple[SupervisedTrainer, list[tuple[int, str]]]:
    """A training with such validations, and the epochs in which it saves weights."""
    trainer, network = training(folder / "network")
    validator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)}],
        network=network,
        key_val_metric={"dice": Scores(scores)},
    )
    ValidationHandler(1, validator).attach(trainer)
    saved: list[tuple[int, str]] = []

    class Noted(Checkpoints):
        def _save_weights(self, path: Path) -> None:
            saved.append((trainer.state.epoch, path.name))

    Noted(folder, network, {}).attach(trainer, validator)
    return trainer, saved


def test_a_trainer_that_is_run_again_replaces_the_best_network_by_a_better_one_alone(tmp_path: Path) -> None:
    trainer, saved = scored(tmp_path, [0.1, 0.5, 0.3, 0.2, 0.1, 0.4, 0.6, 0.2])
    for _ in range(2):
        trainer.run()
    assert [epoch for epoch, name in saved if name == "model.pt"] == [1, 2, 3]


@pytest.mark.parametrize(("scores", "epochs"), [([math.nan, 0.3, 0.5, 0.4], [2, 3]), ([math.nan] * 4, [4])], ids=str)
def test_a_metric_that_is_no_number_is_not_the_best(scores: list[float], epochs: list[int], tmp_path: Path) -> None:
    trainer, saved = scored(tmp_path, scores)
    trainer.run()
    assert [epoch for epoch, name in saved if name == "model.pt"] == epochs


@pytest.mark.parametrize("killed", [True, False])
def test_without_a_validation_weights_of_another_training_do_not_stay(
    killed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.pt").write_bytes(b"of another training, which was given something else")
    trainer, network = training(tmp_path, max_epochs=2, interval=3)
    trainer.run()
    if killed:  # before it had written this
        (tmp_path / "model.pt").write_bytes(b"of another training, which was given something else")
        with pytest.raises(InputError, match="finished its 2 epochs"):
            training(tmp_path, resume=True, max_epochs=2, interval=3)
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, found[name]) for name, tensor in network.state_dict().items())
    assert "No validation has found a network" in caplog.text


def test_resuming_without_a_state_begins_at_the_beginning(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path / "new", resume=True)
    trainer.run()
    assert trainer.state.iteration == 3 * EPOCHS
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"last.pt", "model.pt", "model_final.pt"}


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path)
    trainer.run()
    with pytest.raises(InputError, match="finished its 4 epochs"):
        training(tmp_path, resume=True)
    with pytest.raises(InputError, match=r"last\.pt: not a state of this training"):
        training(tmp_path, resume=True, network=nn.Conv2d(1, 2, 1))
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"last\.pt: not a state of this training"):
        training(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([0, 1, 3], "case_2.nii.gz was one of them"),
        ([0, 1, 2, 3], "case_3.nii.gz was not one of them"),
        ([2, 1, 0], ""),
    ],
    ids=str,
)
def test_a_training_goes_on_with_the_cases_that_it_has_learned(others: list[int], message: str, tmp_path: Path) -> None:
    def with_files(numbers: list[int], resume: bool = False) -> SupervisedTrainer:
        trainer, network = training(tmp_path / "other", max_epochs=2)
        validator = Engine(lambda *_: None)
        validator.state.best_metric, validator.state.best_metric_epoch = 0.5, 1  # type: ignore[attr-defined]
        trainer.data_loader = DataLoader(Dataset([{"image": f"/data/case_{n}.nii.gz"} for n in numbers]))
        checkpoints = Checkpoints(tmp_path, network, {}, resume=resume)
        if not resume:
            checkpoints._save(trainer, validator)
        checkpoints.attach(trainer, validator)
        return trainer

    with_files([0, 1, 2])
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        with_files(others, resume=True)


class Constant(Metric):
    """A metric that is always the same."""

    def reset(self) -> None: ...

    def update(self, output: object) -> None: ...

    def compute(self) -> float:
        return 0.5


def stopping(folder: Path, resume: bool = False, killed_in: int | None = None) -> int:
    """Epochs of a training whose validation stays the same, stopped after three without progress."""
    trainer, network = training(folder / "network", resume, max_epochs=20)
    validator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)}],
        network=network,
        key_val_metric={"dice": Constant()},
    )
    early_stop = EarlyStop(patience=3, metric="dice", trainer=trainer)
    early_stop.attach(validator)
    ValidationHandler(1, validator).attach(trainer)
    state = {"early_stop": early_stop}
    Checkpoints(folder, network, state, seed=7, resume=resume).attach(trainer, validator)
    if killed_in is not None:
        stop_in(trainer, killed_in)
    try:
        trainer.run()
    except Killed:
        return -1
    return trainer.state.epoch


@pytest.mark.parametrize("killed_in", [2, 3, 4])
def test_an_early_stop_comes_as_early_after_a_kill(killed_in: int, tmp_path: Path) -> None:
    whole = stopping(tmp_path / "whole")
    assert whole == 4
    assert stopping(tmp_path / "killed", killed_in=killed_in) == -1
    assert stopping(tmp_path / "killed", resume=True) == whole


@pytest.mark.parametrize("scores", [[math.nan] * 4, [0.5, math.nan, 0.4, 0.6], [math.nan, 0.5, math.nan, 0.4]], ids=str)
def test_an_early_stop_counts_metrics_that_are_no_number(scores: list[float]) -> None:
    trainer, validator = Engine(lambda *_: None), Engine(lambda *_: None)
    EarlyStop(patience=2, metric="dice", trainer=trainer).attach(validator)
    stops = []
    for score in scores:
        validator.state.metrics = {"dice": score}
        validator.fire_event(Events.EPOCH_COMPLETED)
        stops.append(trainer.should_terminate)
    assert stops.index(True) == (3 if scores[1] == 0.5 else 2)


def test_an_early_stop_by_a_metric_that_is_none_says_so() -> None:
    validator = Engine(lambda *_: None)
    EarlyStop(patience=1, metric="dcie", trainer=Engine(lambda *_: None)).attach(validator)
    validator.state.metrics = {"dice": 0.5}
    with pytest.raises(RuntimeError, match=r"the validator has no metric 'dcie' .* Name one of dice\."):
        validator.fire_event(Events.EPOCH_COMPLETED)


@pytest.mark.parametrize("name", ["model", "epoch", "given"])
def test_a_state_of_a_name_that_checkpoints_use_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"state: the name {name} is taken"):
        Checkpoints(tmp_path, nn.Linear(1, 1), {name: nn.Linear(1, 1)})


def test_an_early_stop_without_a_trainer_says_so() -> None:
    validator = Engine(lambda *_: None)
    validator.state.metrics = {"dice": 0.5}
    EarlyStop(patience=1, metric="dice").attach(validator)
    with pytest.raises(RuntimeError, match="no trainer to stop"):
        validator.run([0])


@pytest.mark.parametrize("killed", [True, False])
def test_a_training_that_was_stopped_early_does_not_go_on(killed: bool, tmp_path: Path) -> None:
    assert stopping(tmp_path) == 4
    if killed:  # before it had written this
        (tmp_path / "model_final.pt").unlink()
    with pytest.raises(
        InputError, match=r"was stopped early, after epoch 4\. Raise its patience of 3 validations to go on"
    ):
        stopping(tmp_path, resume=True)
    assert (tmp_path / "model_final.pt").is_file()


def test_a_training_that_has_used_its_time_does_not_go_on(tmp_path: Path) -> None:
    trainer, network = training(tmp_path / "other")
    schedule = TimedDecay(torch.optim.SGD(network.parameters(), lr=1.0), max_seconds=60)
    schedule.used = 61.0
    checkpoints = Checkpoints(tmp_path, network, {"schedule": schedule}, resume=True)
    validator = Engine(lambda *_: None)
    validator.state.best_metric, validator.state.best_metric_epoch = 0.5, 1  # type: ignore[attr-defined]
    checkpoints._save(trainer, validator)
    with pytest.raises(InputError, match=r"has used its time, 61 seconds, in 0 epochs\. Raise max_seconds to go on"):
        checkpoints.attach(trainer, validator)


def test_a_validation_that_was_attached_later_is_in_what_is_saved(tmp_path: Path) -> None:
    trainer, network = training(tmp_path / "other", max_epochs=1)
    validator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)}],
        network=network,
        key_val_metric={"dice": Constant()},
    )
    Checkpoints(tmp_path, network, {}).attach(trainer, validator)
    ValidationHandler(1, validator).attach(trainer)
    trainer.run()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["best"] == [0.5, 1]


def test_an_early_stop_that_is_attached_twice_counts_a_validation_once() -> None:
    validator = Engine(lambda *_: None)
    early_stop = EarlyStop(patience=3, metric="dice", trainer=Engine(lambda *_: None))
    for _ in range(2):
        early_stop.attach(validator)
    validator.state.metrics = {"dice": 0.5}
    validator.run([0], max_epochs=3)
    assert early_stop.counter == 2


def test_weights_of_a_training_know_their_orthogonal_map(tmp_path: Path) -> None:
    options: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (4, 8)}
    trainer, _ = training(tmp_path, max_epochs=1, network=SegIUNet(orthogonal_map="cayley", **options))
    trainer.run()
    for name in ("model.pt", "model_final.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        SegIUNet(orthogonal_map="cayley", **options).load_state_dict(saved)
        with pytest.raises(RuntimeError, match="was saved with orthogonal_map='cayley'"):
            SegIUNet(orthogonal_map="matrix_exp", **options).load_state_dict(saved)
