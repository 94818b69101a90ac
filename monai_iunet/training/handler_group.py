"""Handlers that are named elsewhere in a config, attached where MONAI looks for handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine

__all__ = ["HandlerGroup"]


class HandlerGroup:
    """Attaches handlers to an engine, one after another.

    MONAI's checks of a bundle expect components in a list of handlers, not references to them.

    Args:
        handlers: with a method `attach`.

    Example:
        >>> from monai_iunet import WeightAverage
        >>> from torch import nn
        >>> HandlerGroup([WeightAverage(nn.Linear(1, 1))]).attach(Engine(lambda *_: None))
    """

    def __init__(self, handlers: Sequence[Any]) -> None:
        self.handlers = list(handlers)

    def attach(self, engine: Engine) -> None:
        """Attach all handlers."""
        for handler in self.handlers:
            handler.attach(engine)
