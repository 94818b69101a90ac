"""Switches of a config: the command line makes text of `--skip_done false`, and text counts as true."""

from __future__ import annotations

from monai_iunet.errors import InputError

__all__ = ["check_switches"]


def check_switches(**switches: object) -> None:
    """Check that switches of a config are no text.

    Args:
        switches: by their names in the config; what else they may be, such as a list of labels, is not looked at.

    Raises:
        InputError: when one is text.

    Example:
        >>> check_switches(skip_done=False, largest_component=[1, 2])
    """
    for name, value in switches.items():
        if isinstance(value, str):
            raise InputError(f"--{name} {value}: is text, which would count as true. Write True or False, capitalized.")
