"""What a result was made of, so that `--skip-done` knows a result of the same image and bundle from any other.

A result is found by its name, and another patient's image, or another bundle, may lead to the same name. Beside each
result lies a JSON file with its origin: digests of the image's files and of the weights, and the options that matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iunet.errors import InputError
from monai_iunet.io.files import files_digest, files_in
from monai_iunet.segmentation.segmenter import BundleSegmenter

__all__ = ["check_origin", "origin_of"]

WORDS = {"image": "another image", "bundle": "another bundle", "weights": "other weights"}


def origin_of(
    files: Sequence[Path], segmenter: BundleSegmenter, mirror: bool = False, series: str | None = None
) -> dict[str, Any]:
    """Describe what the result of an image is made of.

    Args:
        files: of the image; a folder stands for a DICOM series.
        segmenter: of the bundle.
        mirror: whether the mirror image is segmented.
        series: DICOM series, if a folder holds several.

    Returns:
        What can be written as JSON: "image", the SHA-256 of its files; "bundle", its name and version; "weights", the
        SHA-256 of each, and of those that find regions; "options".
    """
    return {
        "image": files_digest([file for path in files for file in files_in(path) if file.exists()]),
        "bundle": segmenter.title,
        "weights": segmenter.digests,
        "options": {"mirror": mirror, "series": series},
    }


def check_origin(labels: Path, described_in: Path, origin: Mapping[str, Any]) -> bool:
    """Check that a result that is there has the origin that it would have now.

    Args:
        labels: file of the result.
        described_in: JSON file with its origin under "origin".
        origin: see `origin_of`.

    Returns:
        Whether its origin is known.

    Raises:
        InputError: when it was made of something else.
    """
    try:
        found = dict(json.loads(described_in.read_text(encoding="utf-8"))["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    different = [name for name in origin if found.get(name) != origin[name]]
    if different:
        made_of = ", ".join(WORDS.get(name, "other options") for name in different)
        raise InputError(
            f"{labels}: was made of {made_of} ({described_in.name}). Pass --overwrite alone to replace it, or name "
            "another output folder."
        )
    return True
