"""A training that lasts for a given time, however often it is interrupted, on whichever machine."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from ignite import distributed as idist
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["TimedDecay"]

SAY_EVERY = 60.0  # seconds
VALIDATION = 0.1  # of the time since the last validation: what the next one may take, if it takes as long
NOT_STATE = ("max_seconds", "clock", "val_interval")  # but arguments, of which those of the training that goes on count

logger = logging.getLogger(__name__)


class TimedDecay(LRScheduler):
    """Lowers the learning rate as the time of a training passes, and ends the training when it has passed.

    At a share `t` of the time the learning rate is `(1 - t) ** power` times that of the beginning. The time that a
    training was interrupted does not count: the state holds the seconds that were used, and is saved with the training.

    It validates the network, too: at the end, and before as often as that takes about a tenth of the time.

    The processes of a distributed training go by the clock of the first one, and end when an epoch does.

    Args:
        optimizer: whose learning rate is lowered, once per epoch.
        max_seconds: of the training with its validations.
        power: of the decay.
        validator: the evaluator that validates the network.
        val_interval: epochs from one validation to the next, at least.
        clock: "wall", or "processor" to count what the process gets of the processor's time, all threads together, so
            that a training among other programs is not the shorter for them.

    Raises:
        ValueError: when there is no such clock, or no time, or validations are not at least one epoch apart.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = TimedDecay(optimizer, max_seconds=3600)
        >>> schedule.used = 1800.0
        >>> optimizer.step()
        >>> schedule.step()
        >>> round(optimizer.param_groups[0]["lr"], 2)
        0.54
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_seconds: float,
        power: float = 0.9,
        validator: Evaluator | None = None,
        val_interval: int = 1,
        clock: str = "wall",
    ) -> None:
        if clock not in ("wall", "processor"):
            raise ValueError(f'clock {clock!r}: must be "wall" or "processor".')
        if not 0 < max_seconds < math.inf:
            raise ValueError(f"max_seconds {max_seconds}: must be a positive number of seconds.")
        if val_interval < 1:
            raise ValueError(f"val_interval {val_interval}: must be at least 1 epoch.")
        self.clock = clock
        self.max_seconds = max_seconds
        self.power = power
        self.used = 0.0
        self.val_interval = val_interval
        self.validated = {"epoch": 0, "used": 0.0, "seconds": 0.0}  # the last one, and how long it took
        self._validator = validator
        self._since: float | None = None  # when seconds were last added
        self._said = -SAY_EVERY  # when the time left was last said
        self._epochs = 0  # that have ended
        super().__init__(optimizer)

    @property
    def share(self) -> float:
        """Share of the time that has passed, from 0 to 1."""
        return min(self.used / self.max_seconds, 1.0)

    def get_lr(self) -> list[float | Any]:
        """Return the learning rate of each group of parameters."""
        return [rate * (1 - self.share) ** self.power for rate in self.base_lrs]

    def attach(self, trainer: Engine) -> None:
        """Attach to a trainer, after what steps this schedule."""
        trainer.add_event_handler(Events.STARTED, self._begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._end_in_time)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the seconds that were used among it."""
        state = super().state_dict()
        kept_out = *NOT_STATE, "_validator", "_since", "_said", "_epochs"
        return {name: value for name, value in state.items() if name not in kept_out}

    def _now(self) -> float:
        return time.process_time() if self.clock == "processor" else time.monotonic()

    def _begin(self, _: Engine) -> None:
        self._since = self._now()

    def _end_in_time(self, trainer: Engine) -> None:
        """End the last epoch when the time has passed: an epoch of large images may be long."""
        if idist.get_world_size() > 1:  # where the others would wait for this process's gradients
            return
        if self._since is not None and self.used + self._now() - self._since >= self.max_seconds:
            trainer.terminate_epoch()

    def _end_epoch(self, trainer: Engine) -> None:
        epoch = trainer.state.epoch
        self._check_steps()
        self._count()
        if self._validator is not None and self._is_to_validate(epoch, trainer.state.max_epochs):
            before = self.used
            self._validator.run(epoch)
            self._count()
            self.validated = {"epoch": epoch, "used": self.used, "seconds": self.used - before}
        if self.share == 1:
            trainer.terminate()
        now = self._now()
        if now - self._said < SAY_EVERY and self.share < 1:
            return
        self._said = now
        left = max(self.max_seconds - self.used, 0) / 60
        logger.info("Epoch %d, %.0f %% of the time, %.0f minutes left", epoch, 100 * self.share, left)

    def _check_steps(self) -> None:
        """Say so where nobody steps the schedule."""
        self._epochs += 1
        if self._epochs == 2 and self.last_epoch == 0:
            logger.warning(
                "Nothing lowers the learning rate: call the `step` of TimedDecay once per epoch, or attach "
                "monai.handlers.LrScheduleHandler(schedule) to the trainer before it."
            )

    def _count(self) -> None:
        """Add the seconds since they were last added."""
        now = self._now()
        seconds = now - (self._since if self._since is not None else now)
        if idist.get_world_size() > 1:
            seconds = float(idist.broadcast(seconds))  # type: ignore[arg-type] # a number, as it went in
        self.used += seconds
        self._since = now

    def _is_to_validate(self, epoch: int, max_epochs: int | None) -> bool:
        if self.share == 1 or epoch == max_epochs:
            return True
        seconds = self.validated["seconds"]
        return (
            epoch - self.validated["epoch"] >= self.val_interval
            and seconds <= VALIDATION * (self.used - self.validated["used"])
            and self.used + seconds < self.max_seconds  # the one at the end is near
        )
