"""A plan that `fit` has made: the task of the bundle, and the reason of each choice; as a table, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from monai_iunet.bundling.task import Task
from monai_iunet.errors import InputError
from monai_iunet.fitting.fingerprint import as_tuples
from monai_iunet.io.text import first_line
from monai_iunet.planning.plan import TrainingPlan

__all__ = ["Choice", "FitPlan", "plan_table", "read_plan"]


@dataclass(frozen=True)
class Choice:
    """A choice of a plan, with its reason.

    Example:
        >>> Choice("patch", "112 x 96 x 64", "the whole image at the median size fits").nnunet
        ''
    """

    name: str
    value: str
    reason: str
    nnunet: str = ""


@dataclass(frozen=True)
class FitPlan:
    """A plan: the task that bundles are made from, which folds are trained, and the reasons.

    Attributes:
        task: of the bundle.
        folds: that are trained.
        choices: the reasons.
        step: bytes of a training step.
    """

    task: Task
    folds: tuple[int | None, ...]
    choices: tuple[Choice, ...]
    step: TrainingPlan

    def as_json(self) -> dict[str, Any]:
        """Return the plan in what JSON knows."""
        return {
            "task": asdict(self.task),
            "folds": list(self.folds),
            "choices": [asdict(choice) for choice in self.choices],
            "step": asdict(self.step),
        }


def plan_table(plan: FitPlan) -> Table:
    """Return a plan as a table to print, beside what nnU-Net would plan."""
    table = Table("", "plan", "nnU-Net's rules", "because", title=f"Plan for {plan.task.dataset}")
    for choice in plan.choices:
        table.add_row(choice.name, choice.value, choice.nnunet, choice.reason)
    return table


def read_plan(path: Path) -> FitPlan:
    """Read a plan that was written as JSON.

    Raises:
        InputError: when the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        task = Task(**{name: as_tuples(value) for name, value in content["task"].items()})
        choices = tuple(Choice(**choice) for choice in content["choices"])
        step = TrainingPlan(**{name: as_tuples(value) for name, value in content["step"].items()})
        return FitPlan(task, tuple(content["folds"]), choices, step)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a plan ({first_line(error)}). Choose another --output to begin anew.") from error
