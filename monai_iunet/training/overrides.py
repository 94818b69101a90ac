"""Options of `python -m monai.bundle run`: MONAI adds those that no config has, and nobody reads them."""

from __future__ import annotations

import inspect
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS, ID_SEP_KEY

from monai_iunet.errors import InputError

__all__ = ["check_overrides"]


def check_overrides() -> None:
    """Check that the options of `python -m monai.bundle run`, if that is what runs, are in its configs.

    With `--max_epoch 3` a training would be as long as `max_epochs` says, and with `--checkpont mine.pt` other weights
    would be evaluated. Arguments of a component, such as `--network_def#exact True`, are for the component to check.

    Raises:
        InputError: for an option that the config does not have.

    Example:
        >>> check_overrides()  # nothing to do, for this is another program
    """
    if Path(sys.argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or sys.argv[1:2] != ["run"]:
        return
    given = _options(sys.argv[2:])
    files = given.get("config_file") or ConfigParser.load_config_file(given["args_file"])["config_file"]
    config = ConfigParser.load_config_files(files)
    # What MONAI reads itself.
    known = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters, "workflow_name"}
    if tracking := given.get("tracking"):
        settings: Any = DEFAULT_MLFLOW_SETTINGS if tracking == "mlflow" else ConfigParser.load_config_files(tracking)
        known |= settings.get("configs", {}).keys()
    for option in given.keys() - known:
        entries: Any = config
        for name in option.replace("#", ID_SEP_KEY).split(ID_SEP_KEY):
            if not isinstance(entries, dict) or "_target_" in entries or name == ConfigParser.meta_key:
                break
            if name not in entries:
                near = get_close_matches(name, entries, n=1)
                meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(entries))}."
                raise InputError(f"--{option}: {files} has no {name}, so nothing would read it. {meant}")
            entries = entries[name]


def _options(arguments: list[str]) -> dict[str, Any]:
    """Return the options of a command line as Fire, which MONAI's commands use, understands them."""
    options: dict[str, Any] = {}

    def note(*positional: Any, **given: Any) -> None:
        options.update(zip(inspect.signature(run).parameters, positional), **given)

    fire.Fire(note, command=arguments)
    return options
