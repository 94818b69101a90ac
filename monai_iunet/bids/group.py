"""The two levels of the BIDS app: each participant's images, and the table of the group."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from monai_iunet.bids.derivatives import as_tsv, bids_case, contrasts, description_label, start_derivatives
from monai_iunet.bids.images import MissingImage, find_images, participants
from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.segmentation.files import Failure, Settings, WrittenSegmentation, check_outputs, segment_cases
from monai_iunet.segmentation.segmenter import BundleSegmenter

__all__ = ["segment_participants", "write_group_table"]


def segment_participants(
    bids_dir: Path,
    output: Path,
    segmenter: BundleSegmenter,
    settings: Settings,
    subjects: Sequence[str] = (),
    sessions: Sequence[str] = (),
    filters: Path | None = None,
) -> Iterator[WrittenSegmentation | Failure]:
    """Segment the images of participants into a data set of derivatives.

    Args:
        bids_dir: folder of the data set.
        output: folder of the derivatives; created if need be.
        segmenter: of a bundle whose metadata name contrasts in `bids_suffixes`.
        settings: see there; pictures are always written, and labels are NIfTI.
        subjects: see `find_images`.
        sessions: see `find_images`.
        filters: see `find_images`.

    Yields:
        What was written, or why it could not be: the image is missing, or cannot be segmented.

    Raises:
        InputError: before the first image is read, see `find_images`, `start_derivatives` and `check_outputs`.
    """
    suffixes = contrasts(segmenter)
    images, missing = find_images(bids_dir, suffixes, subjects, sessions, filters)
    cases = [bids_case(image, segmenter, output, settings) for image in images]
    check_outputs(cases, settings)
    start_derivatives(output, bids_dir, segmenter)
    for absent in missing:
        failure = _missing(absent, bids_dir, suffixes, filters is not None)
        if settings.fail_fast:
            raise InputError(failure.reason)
        yield failure
    yield from segment_cases(cases, segmenter, settings)


def _missing(absent: MissingImage, bids_dir: Path, suffixes: Sequence[str], is_filtered: bool) -> Failure:
    labels = [label for label in (absent.subject, absent.session) if label is not None]
    known = all(label.isascii() and label.isalnum() for label in labels)
    advice = "" if known else " Labels of BIDS are letters and digits: rename folders and files."
    image = f"{' or '.join(suffixes)} image{' that fits --bids-filter-file' if is_filtered else ''}"
    return Failure(bids_dir, f"{absent}: has no {image}.{advice}")


def write_group_table(bids_dir: Path, output: Path, segmenter: BundleSegmenter) -> tuple[Path, list[str]]:
    """Write the volumes of all participants as one table, `group_LABEL.tsv`, with a row for each image.

    Args:
        bids_dir: folder of the data set.
        output: folder of the derivatives of `segment_participants`.
        segmenter: of the bundle.

    Returns:
        The table, and the participants who have no result; their row has no volumes.

    Raises:
        InputError: when there is no result at all, or a table of structures is damaged.
    """
    label = description_label(segmenter)
    rows, without = [], []
    for subject in participants(bids_dir):
        tables = sorted((output / f"sub-{subject}").rglob(f"*_desc-{label}_dseg.tsv"))
        done = [path for path in tables if path.with_suffix("").with_suffix(".nii.gz").exists()]
        rows += [_row(path) for path in done]
        if not done:
            without.append(subject)
            rows.append({"participant_id": f"sub-{subject}"})
    if len(without) == len(rows):
        raise InputError(f"{output}: has no results of {label}. Run the level participant first.")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    keys = [name for name in ("participant_id", "session_id", "image") if name in columns]
    columns = keys + [name for name in columns if name not in keys]
    described = {
        "image": {"Description": "Image that was segmented, without contrast and extension."},
        **{
            name: {"Description": f"Volume of {name.removesuffix('_mm3').replace('_', ' ')}.", "Units": "mm^3"}
            for name in columns
            if name.endswith("_mm3")
        },
        **{
            name: {"Description": f"Predicted Dice of {name.removesuffix('_quality').replace('_', ' ')}."}
            for name in columns
            if name.endswith("_quality")
        },
    }
    write_text(output / f"group_{label}.json", json.dumps(described, indent=2) + "\n")
    table = output / f"group_{label}.tsv"
    write_text(table, as_tsv([columns, *([row.get(name) for name in columns] for row in rows)]))
    return table, without


def _row(path: Path) -> dict[str, str]:
    """Read the volumes of an image from its table of structures."""
    stem = path.name.rpartition("_desc-")[0]
    entities = dict(part.split("-", 1) for part in stem.split("_") if "-" in part)
    try:
        row = {"participant_id": f"sub-{entities['sub']}"}
        if "ses" in entities:
            row["session_id"] = f"ses-{entities['ses']}"
        row["image"] = stem
        with path.open(encoding="utf-8", newline="") as file:
            for structure in csv.DictReader(file, delimiter="\t"):
                name = structure["name"].replace(" ", "_")
                row[f"{name}_mm3"] = structure["volume_mm3"]
                row[f"{name}_quality"] = structure["quality"]
    except (KeyError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table of structures as the level participant writes it. Run that with --overwrite."
        ) from error
    return row
