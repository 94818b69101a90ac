"""Whether the labels of a data set are the structures that a bundle finds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from monai_iunet.errors import InputError
from monai_iunet.training.dataset import read_labeled_data

__all__ = ["check_structures"]


def check_structures(
    dataset_dir: str | Path, structures: Sequence[str], label_values: Sequence[int] | None = None
) -> None:
    """Check that what a data set calls its labels is what a bundle calls them; where nothing names them, any are taken.

    A name may be longer or shorter, such as "Anterior" for "anterior hippocampus", if it can be no other structure. A
    number is no name.

    Args:
        dataset_dir: see `list_cases`.
        structures: of the bundle, in the order of its classes.
        label_values: their values in the label files, where they are not 1, 2, ...

    Raises:
        InputError: when a label is none of the structures, or another one.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "dataset.json").write_text(json.dumps({"labels": {"2": "Liver"}, "training": []}))
        >>> check_structures(folder, ["spleen", "liver"])
        >>> check_structures(folder, ["liver", "spleen"])
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: ...: names label 2 'Liver', the bundle finds 'spleen' there. ...
    """
    names = dict(zip(label_values or range(1, len(structures) + 1), structures))
    known = {_plain(name) for name in structures}
    for name, value in (read_labeled_data(dataset_dir).labels or {}).items():
        ours, theirs = _plain(names.get(value, "")), _plain(name)
        alike = {other for other in known if other in theirs or theirs in other}
        if not theirs.isdecimal() and ours != theirs and alike != {ours}:
            found = f"{names[value]!r}" if value in names else "nothing"
            listed = ", ".join(f"{number} {structure}" for number, structure in names.items())
            raise InputError(
                f"{Path(str(dataset_dir), 'dataset.json')}: names label {value} {name!r}, the bundle finds {found} "
                f"there. Use a data set with its labels, {listed}; if that is the same by another name, use this name."
            )


def _plain(name: str) -> str:
    """Return letters and digits of a name, so that "LeftParotid" is "left parotid"."""
    return re.sub(r"[\W_]+", "", name.casefold())
