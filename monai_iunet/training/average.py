"""The average of a network's weights in training, whichever program runs the trainer."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import Tensor, nn

__all__ = ["WeightAverage"]

EARLY = 4  # as a fraction of the steps so far, one over what the average spans at the beginning


class WeightAverage(EMAHandler):
    """Averages the weights of a network over the steps of a training, exponentially.

    At first it spans about a quarter of the steps so far, so that the weights that a training begins with are soon
    forgotten, in a short one too; later the last `1 / momentum` steps.

    It is ignite's `EMAHandler`, that begins with the weights of the network when a training starts, and again whenever
    somebody has replaced them between two runs of the trainer, as a federated server does. A training that is resumed
    goes on with the average that was loaded.

    Args:
        model: the network that is trained; for `DistributedDataParallel` the network inside is averaged.
        momentum: weight of each step in the average, but for the first `4 / momentum`, which weigh more.

    Attributes:
        ema_model: the average, a network in evaluation mode.

    Example:
        >>> network = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(network, momentum=0.5)
        >>> trainer = Engine(lambda *_: network.weight.data.add_(1))
        >>> average.attach(trainer)
        >>> _ = network.weight.data.zero_()
        >>> _ = trainer.run([0, 0])
        >>> network.weight.item(), round(average.ema_model.weight.item(), 2)
        (2.0, 1.8)
    """

    def __init__(self, model: nn.Module, momentum: float = 0.003) -> None:
        super().__init__(model, momentum)
        self._has_run = False
        self._left_behind: dict[str, Tensor] | None = None  # weights of the network when the trainer last ended

    def attach(self, engine: Engine, *arguments: Any, **options: Any) -> None:
        """Attach to a trainer."""
        super().attach(engine, *arguments, **options)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, max(self.momentum, EARLY / (EARLY + engine.state.iteration - 1)))
        super()._update_ema_model(engine, name)

    def _begin(self, engine: Engine) -> None:
        state = self.model.state_dict()
        resumed = not self._has_run and engine.state.iteration > 0
        if not resumed and not self._is_left_behind(state):
            self.ema_model.load_state_dict(state)
        self._has_run, self._left_behind = True, None

    def _is_left_behind(self, state: dict[str, Tensor]) -> bool:
        """Return whether weights are those of the end of the last run."""
        return self._left_behind is not None and all(
            torch.equal(tensor, self._left_behind[name]) for name, tensor in state.items()
        )

    def _end(self, engine: Engine) -> None:
        self._left_behind = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
