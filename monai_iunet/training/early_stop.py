"""Stopping a training that makes no progress, also after it was killed and resumed."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping

__all__ = ["EarlyStop"]


class EarlyStop(EarlyStopping):
    """Stops a trainer when a metric of its validator has not grown for a number of validations.

    A metric that is no number has not grown. It is ignite's `EarlyStopping`, whose state can be saved and loaded, with
    an `attach` as MONAI's handlers have.

    Args:
        patience: validations without a better metric after which the training stops.
        metric: name of the metric in `validator.state.metrics`.
        trainer: the engine that is stopped; None if `set_trainer` names it later.

    Example:
        >>> EarlyStop(patience=3, metric="val_mean_dice").state_dict()["counter"]
        0
    """

    def __init__(self, patience: int, metric: str, trainer: Engine | None = None) -> None:
        self.metric = metric
        super().__init__(patience, self._score, trainer or Engine(_nothing))
        self._has_trainer = trainer is not None

    def attach(self, validator: Engine) -> None:  # type: ignore[override]
        """Attach to the evaluator that validates; once, however often it is asked to."""
        if not validator.has_event_handler(self, Events.EPOCH_COMPLETED):
            validator.add_event_handler(Events.EPOCH_COMPLETED, self)

    @property
    def has_stopped(self) -> bool:
        """Whether the validations without a better metric are enough to stop."""
        return self.counter >= self.patience

    def set_trainer(self, trainer: Engine) -> None:
        """Name the engine that is stopped."""
        self.trainer = trainer
        self._has_trainer = True

    def __call__(self, engine: Engine) -> None:
        """Count a validation.

        Raises:
            RuntimeError: when there is no trainer to stop, or no such metric.
        """
        if not self._has_trainer:
            raise RuntimeError("EarlyStop has no trainer to stop. Call `set_trainer` before the training.")
        super().__call__(engine)

    def _score(self, engine: Engine) -> float:
        metrics = engine.state.metrics
        if self.metric not in metrics:
            raise RuntimeError(
                f"EarlyStop: the validator has no metric {self.metric!r} when it ends an epoch. Name one of "
                f"{', '.join(map(str, metrics)) or 'its key_val_metric'}."
            )
        score = float(metrics[self.metric])
        return -math.inf if math.isnan(score) else score


def _nothing(engine: Engine, batch: Any) -> None:
    """Take the place of a trainer's step."""
