"""Processes of one training end, and validate, together, although their clocks differ."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import LrScheduleHandler
from torch import distributed, multiprocessing

from monai_iunet import TimedDecay

PROCESSES = 2


def train(rank: int, folder: Path) -> None:
    options = {"rank": rank, "world_size": PROCESSES, "init_method": f"file://{folder / 'meeting'}"}
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **options)
    clock = [0.0]
    events: list[str] = []

    class Schedule(TimedDecay):
        def _now(self) -> float:
            return clock[0]

    class Validator:
        def run(self, epoch: int) -> None:
            distributed.all_reduce(torch.zeros(1))  # as metrics do
            clock[0] += 10 * (1 + rank)
            events.append(f"validated in {epoch}")

    def step(*_: Any) -> None:
        distributed.all_reduce(torch.ones(1))  # as gradients are
        clock[0] += 1 + rank

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Schedule(optimizer, 300, validator=Validator())
    trainer = Engine(step)
    schedule.attach(trainer)
    trainer.run([0] * 7, max_epochs=1000)
    events.append(f"ended in {trainer.state.epoch} after {trainer.state.iteration}")
    (folder / f"{rank}.txt").write_text(", ".join(events))
    distributed.barrier()
    distributed.destroy_process_group()


def test_the_second_process_goes_by_what_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iunet.training.time_limit.idist.get_world_size", lambda: PROCESSES)
    monkeypatch.setattr("monai_iunet.training.time_limit.idist.broadcast", lambda seconds: 30.0)
    schedule = TimedDecay(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 100)
    schedule._now = iter(range(0, 10_000, 99)).__next__  # type: ignore[method-assign] # a clock that runs too fast
    trainer = Engine(lambda *_: None)
    schedule.attach(trainer)
    trainer.run([0] * 7, max_epochs=1000)
    assert (trainer.state.epoch, trainer.state.iteration) == (4, 28)


@pytest.mark.slow
def test_processes_of_a_training_go_by_the_clock_of_the_first(tmp_path: Path) -> None:
    multiprocessing.spawn(train, (tmp_path,), nprocs=PROCESSES)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(PROCESSES))
    assert first == second == "validated in 1, validated in 16, validated in 31, validated in 39, ended in 39 after 273"


@pytest.mark.parametrize("stepped", [True, False])
def test_a_learning_rate_that_nothing_lowers_is_said(stepped: bool, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = TimedDecay(optimizer, 3600)
    trainer = Engine(lambda *_: optimizer.step())
    schedule.attach(trainer)
    if stepped:  # also behind it
        LrScheduleHandler(schedule, print_lr=False).attach(trainer)
    trainer.run([0], max_epochs=4)
    assert caplog.text.count("Nothing lowers the learning rate") == (0 if stepped else 1)


def test_the_last_epoch_is_validated_where_epochs_end_before_the_time() -> None:
    validated = []

    class Validator:
        def run(self, epoch: int) -> None:
            validated.append(epoch)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    trainer = Engine(lambda *_: optimizer.step())
    TimedDecay(optimizer, 3600, validator=Validator(), val_interval=4).attach(trainer)  # type: ignore[arg-type]
    trainer.run([0], max_epochs=6)
    assert validated == [4, 6]
