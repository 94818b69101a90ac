"""The average of a network's weights, in trainings that end, go on and are loaded in all ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_iunet import WeightAverage


class Training:
    """A training whose only weight grows by one in each step."""

    def __init__(self, **attached: Any) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.average = WeightAverage(self.network)
        self.trainer = Engine(self.step)
        self.average.attach(self.trainer, **attached)

    def step(self, *_: Any) -> None:
        with torch.no_grad():
            self.network.weight.add_(1)

    def run(self, steps: int, epochs: int = 1) -> float:
        self.trainer.run([0] * steps, max_epochs=epochs)
        return self.average.ema_model.weight.item()


def test_it_spans_a_quarter_of_the_steps_of_all_runs() -> None:
    whole, parts = Training(), Training()
    expected = whole.run(200)
    parts.run(100)
    assert parts.run(100) == pytest.approx(expected)  # whose trainer counts from zero again
    assert parts.network.weight.item() == 200


def test_weights_that_somebody_has_replaced_are_begun_with() -> None:
    training = Training()
    training.run(100)
    nn.init.constant_(training.network.weight, -1000)
    assert training.run(100) == pytest.approx(Training().run(100) - 1000)


def test_a_trainer_that_ends_before_its_time_costs_no_average(caplog: pytest.LogCaptureFixture) -> None:
    whole, stopped = Training(), Training()
    expected = whole.run(50, epochs=4)

    @stopped.trainer.on(Events.EPOCH_COMPLETED(once=2))
    def stop() -> None:
        stopped.trainer.terminate(skip_completed=True)

    stopped.run(50, epochs=4)
    assert stopped.trainer.state.iteration == 100
    assert stopped.run(50, epochs=4) == pytest.approx(expected)
    assert "begins anew" not in caplog.text


def test_of_accumulated_gradients_it_spans_as_many_steps() -> None:
    assert Training(event=Events.ITERATION_COMPLETED(every=4)).run(400) == pytest.approx(Training().run(400), abs=4)


def test_attached_twice_it_counts_each_step_once() -> None:
    training = Training()
    training.average.attach(training.trainer)
    assert training.run(100) == Training().run(100)


@pytest.mark.parametrize("with_average", [True, False])
@pytest.mark.parametrize("when", ["before", "first", "last"])
def test_what_is_loaded_counts_whenever_it_is(when: str, with_average: bool, caplog: pytest.LogCaptureFixture) -> None:
    whole = Training()
    half = whole.run(100)
    expected = whole.run(100, epochs=2)

    def load() -> None:
        resumed.trainer.state.epoch, resumed.trainer.state.iteration = 1, 100
        resumed.network.load_state_dict({"weight": torch.tensor([[100.0]])})
        if with_average:
            resumed.average.ema_model.load_state_dict({"weight": torch.tensor([[half]])})

    resumed = Training()
    if when == "first":
        handlers = resumed.trainer._event_handlers[Events.STARTED]
        resumed.trainer.add_event_handler(Events.STARTED, load)
        handlers.insert(0, handlers.pop())
    elif when == "last":
        resumed.trainer.add_event_handler(Events.STARTED, load)
    resumed.trainer.state.max_epochs, resumed.trainer.state.epoch_length = 2, 100
    if when == "before":
        load()
    found = resumed.run(100, epochs=2)
    if with_average:
        assert found == pytest.approx(expected)
    else:
        assert found > expected  # begins with 100, and was less
        assert found < 200
    assert ("without an average" in caplog.text) != with_average
