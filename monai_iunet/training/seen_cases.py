"""The cases that weights were trained on: noticed where they are to judge them.

A training notes beside its weights the SHA-256 of each image that it is given, not its name, so that images are known
wherever they lie and no name of a patient leaves with the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iunet.io.files import files_digest, files_in
from monai_iunet.training.cases import image_of
from monai_iunet.training.record import trained_value

__all__ = ["TRAINED_ON", "check_unseen", "image_digests", "seen_cases"]

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on"  # in the record beside weights
DIGITS = 16  # of each SHA-256: 64 bits, in which two of a million images agree in one of 37 million data sets


def image_digests(cases: Iterable[Any]) -> list[str]:
    """Return the first digits of the SHA-256 of each case's image, sorted; cases that are no files are left out.

    Args:
        cases: dictionaries with "image", a path or one per channel.
    """
    digests = map(_image_digest, cases)
    return sorted({digest for digest in digests if digest is not None})


def _image_digest(case: Any) -> str | None:
    image = case.get("image") if isinstance(case, Mapping) else None
    parts = image if isinstance(image, (list, tuple)) else [image]
    paths = [Path(part) for part in parts if isinstance(part, (str, Path))]
    files = [file for path in paths for file in files_in(path)]
    is_known = len(paths) == len(parts) and files and all(file.is_file() for file in files)
    return files_digest(files)[:DIGITS] if is_known else None


def seen_cases(checkpoint: str | Path, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those cases whose images weights were trained on; none where nothing is known of the training.

    Args:
        checkpoint: file of the weights.
        cases: dictionaries with "image", a path or one per channel.
    """
    trained_on = set(trained_value(checkpoint, TRAINED_ON, None) or ())
    return [case for case in cases if _image_digest(case) in trained_on] if trained_on else []


def check_unseen(checkpoint: str | Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Say in a warning which cases of an evaluation the weights were trained on.

    Args:
        checkpoint: file of the weights.
        cases: dictionaries with "image", a path or one per channel.

    Example:
        >>> check_unseen("model_of_somebody.pt", [{"image": "a.nii.gz"}])
    """
    if seen := seen_cases(checkpoint, cases):
        logger.warning(
            "%s was trained on %d of these %d cases, such as %s. Their figures say how well they were learned, not how "
            "good results in new images are. Evaluate on other cases: another fold, or another data set.",
            checkpoint,
            len(seen),
            len(cases),
            Path(image_of(seen[0])).name,
        )
