"""A page to look through: one HTML file with a viewer, the table of volumes, warnings and versions.

The viewer is niivue (niivue.com). Its program comes from the installed package `ipyniivue`, whose script carries the
whole of it as a text, and is written into the page, so that the page opens without a network.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nibabel
import numpy as np
from matplotlib.colors import to_rgb

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.io.text import first_line
from monai_iunet.visualization.palette import label_colors
from monai_iunet.visualization.plane import intensity_range

__all__ = ["image_view", "viewer_program", "write_page"]

# Longer axes are thinned out for the page; the files keep all voxels.
LARGEST_AXIS = 256
# Images with a viewer in one page, and characters that they may take; further ones are in the table.
MOST_VIEWS = 50
MOST_CHARACTERS = 200_000_000


def viewer_program() -> tuple[str, str, str]:
    """Return the program of the viewer as a JavaScript module, the version of ipyniivue and its license.

    Raises:
        InputError: when ipyniivue is not installed, or its version carries no such program.
    """
    try:
        package = distribution("ipyniivue")
    except PackageNotFoundError as error:
        raise InputError("ipyniivue is needed for the page. Install it: pip install ipyniivue.") from error
    script = Path(str(package.locate_file("ipyniivue/static/widget.js"))).read_text(encoding="utf-8")
    # What niivue writes into pages of its own is a quoted text, percent-encoded, by far the longest of the script.
    texts = re.findall(r'"([\w.!~*\'()%-]{100000,})"', script, re.ASCII)
    program = unquote(max(texts, key=len, default=""))
    if "Niivue" not in program.rpartition("export{")[2] or "</script" in program.lower():
        raise InputError(f"ipyniivue {package.version} carries no program for pages. Install another: ipyniivue>=2.4.")
    license_text = next((str(file.read_text()) for file in package.files or [] if file.name == "LICENSE"), "BSD-2")
    return program, package.version, license_text.replace("--", "- -")


def image_view(
    name: str,
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: Mapping[int, str],
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return what the page shows of an image: gray values in 8 bits, and labels, on a grid that fits a page.

    Args:
        name: of the image.
        image: 3D volume.
        labels: on the grid of the image.
        names: of the labels but the background.
        window: intensities that become black and white; by default the 0.5 and 99.5 percentiles.

    Returns:
        Content for `write_page`, which JSON can hold.

    Example:
        >>> image = nibabel.Nifti1Image(np.random.rand(20, 20, 300), np.eye(4))
        >>> image_view("scan", image, np.ones((20, 20, 300), np.uint8), {1: "liver"})["note"]
        'shown with every 2nd voxel along the third axis'
    """
    steps = [-(-length // LARGEST_AXIS) for length in image.shape]
    thinned = tuple(slice(None, None, step) for step in steps)
    affine = image.affine @ np.diag([*steps, 1])
    data = np.asarray(image.dataobj[thinned], dtype=np.float32)
    low, high = intensity_range(data, window)
    share = np.nan_to_num(np.clip((data - low) / max(high - low, 1e-12), 0, 1), nan=0.0)
    gray = (255 * share).round().astype(np.uint8)
    shown = np.ascontiguousarray(labels[thinned])
    voxels = np.argwhere(shown == np.bincount(shown.ravel(), minlength=2)[1:].argmax() + 1)  # of the largest structure
    center = voxels.mean(0) if len(voxels) else (np.array(shown.shape) - 1) / 2
    colors = label_colors(names)
    axes = ("first", "second", "third")
    notes = [f"every {_ordinal(step)} voxel along the {axis} axis" for axis, step in zip(axes, steps) if step > 1]
    return {
        "name": name,
        "note": f"shown with {', '.join(notes)}" if notes else "",
        "image": _encoded(gray, affine),
        "labels": _encoded(shown.astype(np.uint8), affine),
        "center": nibabel.affines.apply_affine(affine, center).round(2).tolist(),
        "legend": [[structure, colors[value]] for value, structure in names.items()],
        "colors": _lookup_table(names, colors),
    }


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def _encoded(data: np.ndarray, affine: np.ndarray) -> str:
    """Return a volume as NIfTI, compressed, in base 64."""
    image = nibabel.Nifti1Image(data, affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode("ascii")


def _lookup_table(names: Mapping[int, str], colors: Mapping[int, str]) -> dict[str, list[Any]]:
    """Return colors and names of all values as niivue takes them; the background is transparent."""
    rows = {0: ("", (0.0, 0.0, 0.0), 0), **{value: (names[value], to_rgb(colors[value]), 255) for value in names}}
    rows = dict(sorted(rows.items()))
    table: dict[str, list[Any]] = {"I": list(rows), "labels": [name for name, _, _ in rows.values()]}
    for channel, letter in enumerate("RGB"):
        table[letter] = [round(255 * color[channel]) for _, color, _ in rows.values()]
    table["A"] = [opacity for _, _, opacity in rows.values()]
    return table


def write_page(
    path: Path,
    title: str,
    measures: Mapping[str, Mapping[str, float | str | None]],
    views: Mapping[str, Path],
    warnings: Sequence[str] = (),
    doubtful: Sequence[str] = (),
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: file to write; an old one is replaced.
        title: heading.
        measures: row of each image, by the titles of the columns; columns that an image has not are empty.
        views: JSON files with the `image_view` of images; of more than 50, or 200 MB, the first are shown.
        warnings: lines at the top.
        doubtful: images whose row is red.
        command: the command that was run.
        versions: name and value of each version.

    Raises:
        InputError: see `viewer_program`; when a view cannot be read.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    program, version, license_text = viewer_program()
    shown: list[str] = []
    room = MOST_CHARACTERS
    for name in [name for name in measures if name in views][:MOST_VIEWS]:
        room -= views[name].stat().st_size
        shown += [name] if room >= 0 else []
    left_out = sum(name in views for name in measures) - len(shown)
    summary = f"{len(measures)} {'image' if len(measures) == 1 else 'images'}."
    summary += f" The first {len(shown)} can be looked at here, the table has all." if left_out else ""
    titles = list(dict.fromkeys(name for row in measures.values() for name in row))
    rows = [
        {
            "name": name,
            "view": shown.index(name) if name in shown else None,
            "doubtful": name in doubtful,
            "cells": ["" if row.get(column) is None else row[column] for column in titles],
        }
        for name, row in measures.items()
    ]
    environment = Environment(
        loader=PackageLoader("monai_iunet", "visualization"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=title,
        summary=summary,
        warnings=warnings,
        columns=["image", *titles],
        rows=rows,
        command=command,
        versions=versions or {},
        views=[_read_view(views[name]) for name in shown],
        program=program if shown else "",
        ipyniivue=version,
        license=license_text,
    )
    write_text(path, page)


def _read_view(path: Path) -> dict[str, Any]:
    """Read the `image_view` of an image."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not what the page shows of an image ({first_line(error)}). Remove it; to see the image, segment "
            "it again with --report and --overwrite."
        ) from error
