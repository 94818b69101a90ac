"""The state of a fit in the folder of its bundle: what was asked for, and on which files it was planned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iunet.errors import InputError
from monai_iunet.io.files import describe_file, is_as_before, write_text
from monai_iunet.io.text import first_line
from monai_iunet.training.cases import image_of

__all__ = ["FitState"]

STATE = "fit.json"


class FitState:
    """The state of a fit; a fit that is called again must be the same one.

    Args:
        folder: of the bundle.
        dataset: folder of the data set.

    Attributes:
        file: where the state is.
    """

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset
        self.file = folder / STATE

    def write(self, folder: Path, asked: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> None:
        """Write the first state.

        Args:
            folder: in which the bundle is made, before it is moved to its place.
            asked: for what the fit was asked, by name.
            cases: of the data set, with their files.
        """
        files = {name: describe_file(path) for name, path in self._files(cases).items() if path.is_file()}
        write_text(folder / STATE, json.dumps({"asked": asked, "files": files}, indent=1) + "\n")

    def read(self) -> dict[str, Any]:
        """Read the state.

        Raises:
            InputError: when there is something else in its place.
        """
        try:
            state: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
            dict(state["asked"])
            if not all(len(facts) == 3 for facts in dict(state.get("files", {})).values()):
                raise ValueError("files")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.file}: not the state of a fit ({first_line(error)}). Choose another --output to begin anew."
            ) from error
        return state

    def note(self, **changes: Any) -> None:
        """Change entries of the state, or add some."""
        write_text(self.file, json.dumps({**self.read(), **changes}, indent=1) + "\n")

    def check_asked(self, asked: Mapping[str, Any]) -> None:
        """Refuse to go on when the fit was asked for something else."""
        before = self.read()["asked"]
        # A fit of an earlier version does not say which memory it was asked for.
        changed = [name for name, value in asked.items() if before.get(name) != value and name in before]
        if changed:
            raise InputError(
                f"{self.folder}: a fit with another {' and another '.join(changed)} is there. Ask for the same to go "
                "on with it, or name another --output."
            )

    def check_cases(self, planned: Sequence[str], cases: Sequence[Mapping[str, Any]]) -> None:
        """Refuse other cases than those of the plan: folds would be others, and what was trained on be validated on.

        Args:
            planned: names of the images that the fit was planned for.
            cases: of the data set, with their files.
        """
        found = {Path(image_of(case)).name for case in cases}
        if set(planned) != found:
            change = "is new" if found - set(planned) else "is gone"
            name = min(found - set(planned) or set(planned) - found)
            raise InputError(
                f"{self.dataset}: {name} {change} since the fit in {self.folder} was planned. Restore the data set to "
                "go on with it, or name another --output."
            )
        before = self.read().get("files", {})
        files = self._files(cases)
        changed = [name for name, path in files.items() if name in before and not is_as_before(path, before[name])]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise InputError(
                f"{self.dataset}: {changed[0]}{more} changed since the fit in {self.folder} was planned. Restore what "
                "was there to go on with it, or name another --output."
            )

    def _files(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
        """Return the files of cases, and what describes them, by their places in the data set."""
        parts = [part if isinstance(part, list) else [part] for case in cases for part in case.values()]
        files = [str(self.dataset / "dataset.json"), *(file for part in parts for file in part)]
        return {os.path.relpath(file, self.dataset): Path(file) for file in files}
