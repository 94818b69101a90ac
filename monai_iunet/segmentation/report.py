"""The page of a folder of results, see `monai_iunet.visualization.page`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from monai_iunet.segmentation.records import Records, write_from_records
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.system import describe_system
from monai_iunet.visualization.page import image_view, write_page

__all__ = ["VIEWS", "is_report", "write_report", "write_view"]

VIEWS = "report_files"  # folder of what the page shows of each image
TITLE = "Segmentations"
BEGINNING = 1000  # characters of a page, its title among them


def write_view(name: str, window: tuple[float, float] | None, segmentation: Segmentation, path: Path) -> None:
    """Write what the page shows of an image.

    Args:
        name: of the image.
        window: see `image_view`.
        segmentation: of the image.
        path: file to write, in the folder `VIEWS`.
    """
    view = image_view(name, segmentation.image, segmentation.labels, segmentation.names, window)
    path.write_text(json.dumps(view), encoding="utf-8")


def write_report(
    folder: Path, output: Path, path: Path, first: Sequence[str], warnings: Sequence[str], command: str
) -> int:
    """Write the page of all images that have a record.

    Args:
        folder: with the records.
        output: folder of the results, with the folder `VIEWS`.
        path: file to write.
        first: see `read_records`.
        warnings: lines at the top.
        command: the command that was run.

    Returns:
        Number of the images in the page.

    Raises:
        InputError: when a record cannot be read, or the viewer is not installed.
    """
    return write_from_records(folder, first, lambda records: _write_page(records, output, path, warnings, command))


def is_report(path: Path) -> bool:
    """Return whether a file is a page as `write_report` writes it, and not that of another program."""
    try:
        with path.open(encoding="utf-8") as file:
            return f"<title>{TITLE}</title>" in file.read(BEGINNING)
    except (OSError, ValueError):
        return False


def _write_page(records: Records, output: Path, path: Path, warnings: Sequence[str], command: str) -> None:
    measures = {}
    for name, record in records.items():
        known = [quality for quality in record["quality"].values() if quality is not None]
        volumes = {f"{structure}, mm³": f"{volume:.0f}" for structure, volume in record["volumes_mm3"].items()}
        measures[name] = {"predicted Dice, least": min(known, default="unknown"), **volumes}
    doubts = {name: record["doubts"] for name, record in records.items() if record.get("doubts")}
    warnings = [*warnings, *(f"{name}: {text}" for name, text in doubts.items())]
    views = {name: file for name in records if (file := output / VIEWS / f"{name}.json").exists()}
    used = sorted({str(record["origin"]["bundle"]) for record in records.values()})
    versions = {"bundle": ", ".join(used), **describe_system()}
    write_page(path, TITLE, measures, views, warnings, [*doubts], command, versions)
