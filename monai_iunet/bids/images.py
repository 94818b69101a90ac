"""Images to segment in a BIDS data set, and the sessions that have none."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_iunet.errors import InputError
from monai_iunet.io.text import first_line

__all__ = ["BidsImage", "MissingImage", "find_images", "participants"]

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii", ".nii.gz")


@dataclass(frozen=True)
class BidsImage:
    """Describes an image of a data set: its file, the path from the data set's folder, and its entities.

    Attributes:
        path: the file.
        source: path from the folder of the data set, with "/".
        entities: as pybids names them, such as `{"subject": "01", "session": "pre", "suffix": "T1w"}`.
    """

    path: Path
    source: str
    entities: Mapping[str, str]

    @property
    def stem(self) -> str:
        """Name without suffix and extension, such as "sub-01_ses-pre_acq-mprage"."""
        return self.path.name.rpartition("_")[0]


@dataclass(frozen=True)
class MissingImage:
    """A participant, or a session of one, without an image that could be segmented."""

    subject: str
    session: str | None

    def __str__(self) -> str:
        return f"sub-{self.subject}" + (f" ses-{self.session}" if self.session else "")


def find_images(
    bids_dir: Path,
    suffixes: Sequence[str],
    subjects: Sequence[str] = (),
    sessions: Sequence[str] = (),
    filters: Path | None = None,
) -> tuple[list[BidsImage], list[MissingImage]]:
    """Find the images of the participants, by pybids; a warning names files whose names it does not understand.

    Args:
        bids_dir: folder of the data set.
        suffixes: contrasts, such as "T1w".
        subjects: labels of participants, with or without "sub-"; none for all.
        sessions: labels of sessions, with or without "ses-"; none for all.
        filters: JSON file with entities for each contrast, as other BIDS apps take it:
            `{"t1w": {"acquisition": "mprage"}}`.

    Returns:
        The images, and the sessions (participants, where there are no sessions) that have none.

    Raises:
        InputError: when the folder is no BIDS data set, there is no such participant or session, or the filters cannot
            be used.
    """
    layout = _layout(bids_dir)
    chosen = _chosen([label.removeprefix("sub-") for label in subjects], _subjects(layout), "participant", bids_dir)
    wanted = [label.removeprefix("ses-") for label in sessions]
    if wanted:
        _chosen(wanted, layout.get_sessions(subject=chosen), "session", bids_dir)
    query = _read_filters(filters, suffixes)
    _warn_of_misnamed(layout, chosen, suffixes)
    images, missing = [], []
    for subject in chosen:
        found = _images_of(layout, bids_dir, subject, suffixes, query)
        images += [image for image in found if not wanted or image.entities.get("session") in wanted]
        with_image = {image.entities.get("session") for image in found}
        sessions_of = {*layout.get_sessions(subject=subject), *_folders(bids_dir / f"sub-{subject}", "ses-")}
        expected = [label for label in sorted(sessions_of) if not wanted or label in wanted] or sorted(set(wanted))
        if expected:
            missing += [MissingImage(subject, label) for label in expected if label not in with_image]
        elif not found:
            missing.append(MissingImage(subject, None))
    return images, missing


def participants(bids_dir: Path) -> list[str]:
    """Return the labels of all participants of a data set, without "sub-".

    Raises:
        InputError: when the folder is no BIDS data set.
    """
    return _subjects(_layout(bids_dir))


def _subjects(layout: Any) -> list[str]:
    """Return the labels of the participants, with those of whom pybids finds no file."""
    return sorted({*layout.get_subjects(), *_folders(Path(layout.root), "sub-")})


def _folders(folder: Path, prefix: str) -> list[str]:
    return [path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir()]


def _layout(bids_dir: Path) -> Any:
    """Return the index of a data set; side-cars are not read."""
    try:
        from bids.layout import BIDSLayout, BIDSLayoutIndexer
    except ImportError as error:
        raise InputError("pybids is needed for BIDS. Install it: pip install pybids.") from error

    if not bids_dir.is_dir():
        raise InputError(f"{bids_dir}: no such folder. Name the folder of a BIDS data set.")
    if not (bids_dir / "dataset_description.json").is_file():
        raise InputError(f"{bids_dir}: has no dataset_description.json. Name the folder of a BIDS data set.")
    try:
        # Where the folder is a link, the paths of the images are those behind it.
        return BIDSLayout(
            bids_dir.resolve(), validate=False, indexer=BIDSLayoutIndexer(validate=False, index_metadata=False)
        )
    except Exception as error:  # whatever a damaged data set brings about
        raise InputError(f"{bids_dir}: not a BIDS data set that pybids can read ({first_line(error)}).") from error


def _chosen(labels: Sequence[str], existing: Sequence[str], kind: str, bids_dir: Path) -> list[str]:
    unknown = [label for label in labels if label not in existing]
    if unknown or not existing:
        there = ", ".join(sorted(existing)[:10]) + (", ..." if len(existing) > 10 else "")
        raise InputError(f"{bids_dir}: has no {kind} {', '.join(unknown)}. There is {there or 'none'}.")
    return sorted(set(labels)) or sorted(existing)


def _images_of(
    layout: Any, bids_dir: Path, subject: str, suffixes: Sequence[str], filters: Mapping[str, Mapping[str, Any]]
) -> list[BidsImage]:
    found = {}
    for suffix in suffixes:
        query = {"suffix": suffix, "extension": [*EXTENSIONS], **filters.get(suffix.lower(), {})}
        try:
            files = layout.get(**{**query, "subject": subject})
        except Exception as error:  # whatever pybids thinks of the user's filters
            raise InputError(f"--bids-filter-file, {suffix.lower()}: {first_line(error)}.") from error
        for file in files:
            entities = {name: str(value) for name, value in file.get_entities().items()}
            if entities.get("part", "mag") == "mag":  # neither phase nor a part of complex numbers
                path = Path(file.path)
                source = path.relative_to(bids_dir.resolve())
                _check_name(source)
                found[path] = BidsImage(path, source.as_posix(), entities)
    return [found[path] for path in sorted(found)]


def _warn_of_misnamed(layout: Any, subjects: Sequence[str], suffixes: Sequence[str]) -> None:
    """Say which files seem to be images, but have names that pybids does not take for such: `acq-0.8mm`, `.NII.GZ`."""
    ends = tuple(f"_{suffix}{extension}".lower() for suffix in suffixes for extension in EXTENSIONS)
    misnamed = []
    for path, file in layout.get_files().items():
        if not path.lower().endswith(ends) or Path(path).name.startswith("."):
            continue
        entities = file.get_entities()
        known = entities.get("suffix") in suffixes and entities.get("extension") in EXTENSIONS
        if entities.get("subject") in subjects and not known:
            misnamed.append(path)
    if misnamed:
        logger.warning(
            "%d files, such as %s, are left out: in BIDS, labels have letters and digits alone, and names end as in %s"
            ". Rename them.",
            *(len(misnamed), min(misnamed), f"_{suffixes[0]}.nii.gz"),
        )


def _check_name(source: Path) -> None:
    """Refuse a file that is named after another participant or session than its folders: nobody knows whose it is."""
    named = dict(part.split("-", 1) for part in source.name.split("_") if "-" in part)
    for folder in source.parts[:-1]:
        key, _, label = folder.partition("-")
        if key in ("sub", "ses") and named.get(key, label) != label:
            raise InputError(f"{source}: is named after {key}-{named[key]}, but lies in {folder}. Rename or move it.")


def _read_filters(path: Path | None, suffixes: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    if path is None:
        return {}
    try:
        filters = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON file that can be read ({first_line(error)}).") from error
    if not isinstance(filters, dict) or not all(isinstance(query, dict) for query in filters.values()):
        raise InputError(
            f'{path}: entities for each contrast are needed, such as {{"t1w": {{"acquisition": "mprage"}}}}.'
        )
    filters = {name.lower(): query for name, query in filters.items()}
    names = [suffix.lower() for suffix in suffixes]
    if not filters.keys() & set(names):
        raise InputError(f"{path}: has no entry {' or '.join(names)}, so it would not filter. Add one or omit it.")
    return filters
