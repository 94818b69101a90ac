"""Records of segmented images: measures and origin of each, as a small file beside its labels.

A batch may be killed, go on later, or be shared by several processes. Its table and its page are therefore made of the
records that lie in the folder, not of what one process remembers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.io.text import csv_text
from monai_iunet.segmentation.result import Segmentation

__all__ = [
    "RECORD_SUFFIX",
    "Records",
    "check_records",
    "is_record",
    "is_table",
    "read_records",
    "write_from_records",
    "write_record",
    "write_table",
]

Records = Mapping[str, Mapping[str, Any]]

RECORD_SUFFIX = "_seg.json"
COLUMNS = ("image", "structure", "volume_mm3", "quality")


def write_record(image: Path, origin: Callable[[], dict[str, Any]], segmentation: Segmentation, path: Path) -> None:
    """Write the record of an image.

    Args:
        image: file of the image.
        origin: returns what the result is made of, see `monai_iunet.segmentation.origin`.
        segmentation: of the image.
        path: file to write.
    """
    record = {
        "image": os.fsencode(image).decode("utf-8", "replace"),
        "origin": origin(),
        "monai-iunet": version("monai-iunet"),
        "labels": segmentation.names,
        "volumes_mm3": segmentation.volumes(),
        "quality": segmentation.qualities(),
        "doubts": segmentation.doubts(),
        "weights": segmentation.weights,
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(folder: Path, first: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read the records of a folder.

    Args:
        folder: with results.
        first: names of images whose records come first, in this order; the others follow by name.

    Returns:
        Record of each image, by its name.

    Raises:
        InputError: when a record cannot be read.
    """
    paths = {path.name.removesuffix(RECORD_SUFFIX): path for path in sorted(folder.glob(f"*{RECORD_SUFFIX}"))}
    order = [name for name in first if name in paths]
    return {name: _read(paths[name]) for name in dict.fromkeys([*order, *paths])}


def check_records(folder: Path, names: Sequence[str]) -> None:
    """Check, before images are segmented, that a table can be made of what is in a folder.

    Args:
        folder: with results.
        names: of images whose records will be written.

    Raises:
        InputError: when the record of another image cannot be read.
    """
    for path in sorted(folder.glob(f"*{RECORD_SUFFIX}")):
        if path.name.removesuffix(RECORD_SUFFIX) not in names:
            _read(path)


def is_record(path: Path) -> bool:
    """Return whether a file is there and the record of an image."""
    try:
        return bool(_read(path))
    except InputError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if dict(record["volumes_mm3"]).keys() != dict(record["quality"]).keys():
            raise ValueError("each structure has a volume and a quality")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a segmented image. Name another --output.") from error
    return record


def write_from_records(folder: Path, first: Sequence[str], write: Callable[[Records], object]) -> int:
    """Write something of all records in a folder, again while other processes add records.

    So whichever process writes last has seen all records, and nothing need be locked.

    Args:
        folder: see `read_records`.
        first: see `read_records`.
        write: writes a file of the records.

    Returns:
        Number of the records.
    """
    written: set[str] = set()
    while True:
        records = read_records(folder, first)
        if set(records) == written:
            return len(records)
        write(records)
        written = set(records)


def write_table(folder: Path, first: Sequence[str], path: Path) -> int:
    """Write volumes and predicted Dice of all records as a table: `.csv` with a row per structure, or `.json`.

    A Dice that is unknown is an empty field, or null.

    Args:
        folder: see `read_records`.
        first: see `read_records`.
        path: file to write.

    Returns:
        Number of the images in the table.
    """
    return write_from_records(folder, first, lambda records: write_text(path, _as_table(records, path.suffix)))


def is_table(path: Path) -> bool:
    """Return whether a file is a table as `write_table` writes it, and not somebody's own of the same name."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = [row for structures in json.loads(text).values() for row in structures.values()]
            return bool(rows) and all(tuple(row) == COLUMNS[2:] for row in rows)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return text.startswith(csv_text([COLUMNS]))


def _as_table(records: Records, suffix: str) -> str:
    rows = [
        (name, structure, volume, record["quality"][structure])
        for name, record in records.items()
        for structure, volume in record["volumes_mm3"].items()
    ]
    if suffix == ".json":
        table: dict[str, dict[str, Any]] = {name: {} for name in records}
        for name, structure, volume, quality in rows:
            table[name][structure] = dict(zip(COLUMNS[2:], (volume, quality)))
        return json.dumps(table, indent=2) + "\n"
    return csv_text([COLUMNS, *rows])
