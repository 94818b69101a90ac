"""The average of a network's weights in training, whichever program runs the trainer."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import version

__all__ = ["WeightAverage"]

logger = logging.getLogger(__name__)

EARLY = 4  # as a fraction of the steps so far, one over what the average spans at the beginning


class WeightAverage(EMAHandler):
    """Averages the weights of a network over the steps of a training, exponentially.

    At first it spans about a quarter of the steps so far, so that the weights that a training begins with are soon
    forgotten, in a short one too; later the last `1 / momentum` steps.

    It is ignite's `EMAHandler`, that begins with the weights of the network when a training starts, and again whenever
    somebody has replaced them between two runs of the trainer, as a federated server does. A training that is resumed
    goes on with the average that was loaded, before the trainer starts or by a handler when it does; if none was, with
    the weights of the network. Steps are iterations of the trainer; an average that is attached to every n-th, because
    gradients are accumulated, spans as many.

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
        # The average that nobody has loaded anything over, None once the training runs.
        self._untouched: dict[str, Tensor] | None = _copied(self.ema_model)
        self._has_run = False
        self._step = 0  # up to which the weights are in the average
        self._earlier = 0  # steps of runs before this one, where the trainer counts anew
        # Weights of the network when the trainer last completed, and how often they had changed by the last step.
        self._left_behind: dict[str, Tensor] | None = None
        self._versions: list[int] = []

    def attach(self, engine: Engine, *arguments: Any, **options: Any) -> None:
        """Attach to a trainer; once, however often it is asked to."""
        if engine.has_event_handler(self._begin, Events.STARTED):
            return
        super().attach(engine, *arguments, **options)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        step = self._earlier + engine.state.iteration
        steps = range(self._step + 1, step + 1)
        kept = math.prod(1 - max(self.momentum, EARLY / (EARLY + number - 1)) for number in steps)
        setattr(engine.state, name, 1 - kept)
        super()._update_ema_model(engine, name)
        self._step, self._versions = step, self._versions_now()

    def _begin(self, engine: Engine) -> None:
        if not self._goes_on(engine):
            self.ema_model.load_state_dict(self.model.state_dict())
            self._untouched = _copied(self.ema_model)
            self._step, self._earlier = engine.state.iteration, 0
        elif self._has_run:
            # A trainer that has completed and is run again counts from zero.
            self._earlier = max(self._earlier, self._step - engine.state.iteration)
        else:
            self._untouched, self._step = None, engine.state.iteration
        self._has_run, self._left_behind = True, None

    def _begin_epoch(self, engine: Engine) -> None:
        """Begin with weights that another handler has loaded since the trainer started."""
        if self._untouched is not None:
            if _is_same(self.ema_model, self._untouched):
                self.ema_model.load_state_dict(self.model.state_dict())
                if engine.state.epoch > 1 and not self._versions:
                    logger.warning(
                        "The training goes on with epoch %d without an average of its weights, which begins anew. Load "
                        "that of the epochs before, too, if it was saved.",
                        engine.state.epoch,
                    )
            self._untouched, self._step = None, engine.state.iteration

    def _goes_on(self, engine: Engine) -> bool:
        """Return whether the average is that of the training that starts."""
        if not self._has_run:
            return engine.state.iteration > 0 and not (self._untouched and _is_same(self.ema_model, self._untouched))
        if self._left_behind is not None:
            return _is_same(self.model, self._left_behind)
        return self._versions == self._versions_now()  # an error, or somebody, has ended the run

    def _versions_now(self) -> list[int]:
        return [version(parameter) for parameter in self.model.parameters()]

    def _end(self, _: Engine) -> None:
        self._left_behind = _copied(self.model)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights of a network."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def _is_same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Return whether a network has these weights."""
    return all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())
