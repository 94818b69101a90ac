"""Data sets as people have them: of the Medical Segmentation Decathlon, of nnU-Net, or two folders of files.

What a data set consists of is found here; whether its files can be learned from is found in `cases.py`.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel

from monai_iunet.errors import InputError
from monai_iunet.io.channels import channel_files
from monai_iunet.io.files import SUFFIXES, image_name
from monai_iunet.training.cases import image_of

__all__ = ["FOLDS", "LabeledData", "list_cases", "patients_of", "read_labeled_data", "split_cases"]

logger = logging.getLogger(__name__)

Case = dict[str, Any]
FOLDS = 5
# Names of the two folders, where no file describes a data set.
FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
LAYOUTS = (
    "a dataset.json of the Medical Segmentation Decathlon or of nnU-Net, or folders images and labels with files of "
    "the same names"
)


@dataclass(frozen=True)
class LabeledData:
    """A data set: its cases, channels and labels.

    Attributes:
        folder: of the data set.
        training: cases with "image", a path or one per channel, and "label"; a path of several channels is 4D.
        validation: its own validation cases; None if it has none.
        channels: names of the channels of an image.
        labels: value of each structure in the label files, by its name; None if nothing names them.
        parts: names of labels that are parts of larger regions, as text; empty if there are none.
        problems: what is wrong, a line each.
        ignored: label of voxels that nnU-Net leaves out of the loss; None if there is none.

    Example:
        >>> LabeledData(Path("data"), [], None, ("CT",), {"liver": 1}).labels
        {'liver': 1}
    """

    folder: Path
    training: list[Case]
    validation: list[Case] | None
    channels: tuple[str, ...]
    labels: dict[str, int] | None
    parts: str = ""
    problems: tuple[str, ...] = ()
    ignored: int | None = None


def read_labeled_data(folder: str | Path) -> LabeledData:
    """Find the cases of a data set; of the first image the header is read, of the others nothing.

    Args:
        folder: with `dataset.json`, as the Medical Segmentation Decathlon or nnU-Net has it, or with `images` and
            `labels`, files of the same names; channels are files NAME_0000, NAME_0001, ... or the last axis of a file.

    Raises:
        InputError: when nothing of that kind is there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     (folder / name).touch()
        >>> data = read_labeled_data(folder)
        >>> len(data.training), [problem.replace(str(folder), "") for problem in data.problems]
        (1, ['/images/b.nii.gz: has no label, /labels has no file of the name b.'])
    """
    folder = Path(str(folder))  # the command line of MONAI makes a number of a folder that is named 2024
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Name that of a data set: {LAYOUTS}.")
    description = _description(folder / "dataset.json")
    for section in ("training", "validation"):
        if not isinstance(description.get(section) or [], list):
            raise InputError(
                f'{folder / "dataset.json"}: "{section}" must be a list of cases, such as '
                f'{{"image": "a.nii.gz", "label": "b.nii.gz"}}, not {str(description[section])[:80]}. Mend it.'
            )
    labels, parts, ignored = _labels(description, folder / "dataset.json")
    entries = _training_entries(description)
    if entries is not None:
        training, problems = _listed(folder, entries)
        validation = None
        if description.get("validation"):
            validation, more = _listed(folder, description["validation"])
            problems += more
    else:
        training, problems = _paired(folder)
        validation = None
    problems += _take_out_repeated(training, validation or [])
    counts = {len(case["image"]) if isinstance(case["image"], list) else 1 for case in training}
    count = counts.pop() if len(counts) == 1 else None
    count = _stored_channels(training[0]["image"]) if count == 1 else count
    channels = _channels(description, count, folder / "dataset.json")
    return LabeledData(folder, training, validation, channels, labels, parts, tuple(problems), ignored)


def list_cases(
    dataset_dir: str | Path,
    section: str | None = None,
    fold: int | None = None,
    folds: int = FOLDS,
    skip_bad: bool = False,
    without: Sequence[str] = (),
    judges: Sequence[str] = (),
) -> list[Case]:
    """Return cases of a data set: all of them, those to train on, to validate on, or to judge by.

    Args:
        dataset_dir: see `read_labeled_data`.
        section: "training", "validation", "judges", or None for all that are labeled.
        fold: which part of the training cases is for validation; None for the data set's own validation cases, and
            the first part if it has none.
        folds: number of parts.
        skip_bad: leave out images without labels, labels without images and the like, saying so, instead of stopping.
        without: file names of images that are left out.
        judges: file names of images that are neither trained nor validated on, but are the section "judges".

    Raises:
        InputError: when there are none, and naming each bad entry in a line, unless `skip_bad`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> cases = [{"image": f"{number}.nii.gz", "label": f"{number}_seg.nii.gz"} for number in range(10)]
        >>> _ = (folder / "dataset.json").write_text(json.dumps({"training": cases}))
        >>> [Path(case["image"]).name for case in list_cases(folder, "validation")]
        ['0.nii.gz', '5.nii.gz']
    """
    data = read_labeled_data(dataset_dir)
    listed = "\n".join(data.problems)
    if data.problems and not skip_bad:
        raise InputError(
            f"{len(data.problems)} files of {data.folder} cannot be used:\n{listed}\nMend them, or leave them out with "
            "--skip_bad_cases True."
        )
    if data.problems:
        logger.warning("%d files of %s are left out:\n%s", len(data.problems), data.folder, listed)
    cases, own_validation = _without(data.training, without), _without(data.validation or [], without)
    if section is None:
        return [*cases, *own_validation]
    if section == "judges":
        return [case for case in cases if Path(image_of(case)).name in judges]
    cases = _without(cases, judges)
    if fold is None and data.validation is not None:
        return cases if section == "training" else own_validation
    training, validation = split_cases(cases, fold or 0, folds)
    if fold is None and section == "validation":
        logger.info(
            "%s has no validation cases of its own: of its %d cases, %d are for validation, every %dth patient by name",
            data.folder,
            len(cases),
            len(validation),
            folds,
        )
    return training if section == "training" else validation


def _without(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the cases but those whose image, or its first channel, has one of the names."""
    return [case for case in cases if Path(image_of(case)).name not in names]


def split_cases(cases: Sequence[Case], fold: int, folds: int = FOLDS) -> tuple[list[Case], list[Case]]:
    """Split cases into those to train on and those to validate on: every so many, by the names of their labels.

    Cases of one patient stay together, see `patients_of`.

    Raises:
        InputError: when there are fewer cases than parts, or no such part.

    Example:
        >>> training, validation = split_cases([{"image": name, "label": name} for name in "abcdef"], fold=1, folds=3)
        >>> [case["image"] for case in validation]
        ['b', 'e']
    """
    if not 0 <= fold < folds:
        raise InputError(f"fold {fold}: of {folds} folds, one from 0 to {folds - 1} is needed.")
    if folds < 2 or len(cases) < folds:
        raise InputError(f"{len(cases)} cases cannot be split into {folds} folds. Use more cases, or 2 folds or more.")
    ordered = sorted(cases, key=lambda case: str(case["label"]))
    patients = patients_of([_stem(str(case["label"])) for case in ordered], folds)
    validated = set(list(dict.fromkeys(patients))[fold::folds])
    return (
        [case for case, patient in zip(ordered, patients) if patient not in validated],
        [case for case, patient in zip(ordered, patients) if patient in validated],
    )


def patients_of(names: Sequence[str], least: int = FOLDS) -> list[str]:
    """Return the patient of each case: what names begin with up to a number, as far as it tells cases apart.

    Args:
        names: of the cases.
        least: patients; where names show fewer, or one with more than half of the cases, each case is a patient of its
            own, and a warning says so.

    Example:
        >>> patients_of(["patient01_scan1", "patient01_scan2", "patient02_scan1", "patient02_scan2"], least=2)
        ['01', '01', '02', '02']
        >>> patients_of(["liver_1", "liver_2"], least=2)
        ['liver_1', 'liver_2']
    """
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names)))
    common = "".join(first for first, _ in pairs).rstrip("0123456789")  # such as BraTS20_Training_
    numbers = [re.match(r".*?[0-9]+(?=[_.-])", name[len(common) :]) for name in names]
    patients = [name if number is None else number[0] for name, number in zip(names, numbers)]
    counts = Counter(patients)
    if len(counts) == len(names) or (len(counts) >= least and 2 * max(counts.values()) <= len(names)):
        return patients
    if len(counts) > 1:
        _say_doubt(f"{common}{counts.most_common(1)[0][0]}", least)
    return list(names)


@functools.cache  # said once
def _say_doubt(patient: str, least: int) -> None:
    logger.warning(
        "%s may be a patient with several cases, but names show fewer than %d patients, or one with most cases. So "
        "each case stands alone in a split. To validate on other patients, list all cases of some in the section "
        '"validation" of dataset.json.',
        patient,
        least,
    )


def _description(path: Path) -> Mapping[str, Any]:
    """Return what a `dataset.json` says; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}). Mend it, or copy it again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{path}: must hold a dictionary, as dataset.json of the Decathlon does.")
    return description


def _channels(description: Mapping[str, Any], count: int | None, path: Path) -> tuple[str, ...]:
    """Return the names of channels in the order of their numbers, which need not be that of the file.

    Args:
        description: of the data set.
        count: of the channels of its images; None if they differ.
        path: of the description, for errors.

    Raises:
        InputError: when it names more channels than images have, or fewer.
    """
    names = description.get("channel_names", description.get("modality", {}))
    if isinstance(names, str):  # of all channels
        names = [names] if count in (None, 1) else [f"{names} {number}" for number in range(count)]
    elif isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=lambda key: int(key) if key.isdecimal() else 0)]
    named = tuple(map(str, names if isinstance(names, list) else ()))
    if not named:
        return ("image",) if count in (None, 1) else tuple(f"channel {number}" for number in range(count))
    if count not in (None, len(named)):
        raise InputError(
            f"{path}: names {len(named)} channels, {', '.join(named)}, but images have {count}. Look whether files "
            "NAME_0000, NAME_0001, ... are missing; else name the channels that there are."
        )
    return named


def _stored_channels(path: str) -> int:
    """Return how many channels a file holds, the last axis of a 4D image; 1 if it cannot be read."""
    try:
        shape = nibabel.load(path).shape  # type: ignore[attr-defined] # of every spatial image
    except Exception as error:
        logger.debug("%s: %s", path, error)
        return 1
    return int(shape[3]) if len(shape) == 4 else 1


def _labels(description: Mapping[str, Any], path: Path) -> tuple[dict[str, int] | None, str, int | None]:
    """Return the values of structures by their names, what regions they are parts of, and the value to be ignored.

    The Decathlon writes `{"1": "liver"}`, nnU-Net `{"liver": 1}` and `{"whole tumor": [1, 2]}` for a region.
    """
    entries = description.get("labels")
    if not entries:
        return None, "", None
    try:
        by_name = {
            str(value if str(name).isdigit() else name): name if str(name).isdigit() else value
            for name, value in entries.items()
        }
        regions = {name: [_whole(part) for part in value] for name, value in by_name.items() if isinstance(value, list)}
        values = {name: _whole(value) for name, value in by_name.items() if name not in regions}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'{path}: "labels" must give each structure a number, such as {{"liver": 1}}, whole and not negative.'
        ) from error
    ignored = values.pop("ignore", None)
    if len(by_name) < len(entries):
        raise InputError(f'{path}: "labels" gives several numbers the same name. Give each its own.')
    parts = ""
    if regions:
        # A label map holds each voxel once: what is learned is each value, named after the smallest region with it.
        by_size = sorted(regions, key=lambda name: len(regions[name]))
        for value in sorted({value for region in regions.values() for value in region} - set(values.values())):
            name = next(name for name in by_size if value in regions[name])
            values[name if name not in values else f"{name} {value}"] = value
        parts = "; ".join(f"{name}: labels {', '.join(map(str, region))}" for name, region in regions.items())
    ordered = sorted(values.items(), key=lambda item: item[1])
    if len({value for _, value in ordered}) < len(ordered):
        raise InputError(f'{path}: "labels" gives several structures the same number. Give each its own.')
    return {name: value for name, value in ordered if value > 0}, parts, ignored


def _whole(value: Any) -> int:
    """Return the number of a label; `{"liver": 1.5}`, true and negative ones would be those of another structure."""
    number = int(value)
    if isinstance(value, bool) or number != float(value) or number < 0:
        raise ValueError(value)
    return number


def _training_entries(description: Mapping[str, Any]) -> list[Any] | None:
    """Return the training cases that a description lists; None if it leaves them to two folders.

    The Decathlon and nnU-Net v1 list them as "training". In nnU-Net v2, "dataset" may hold them by their names.
    """
    entries, by_name = description.get("training"), description.get("dataset")
    if isinstance(entries, list) or not isinstance(by_name, Mapping):
        return entries
    cases = [case if isinstance(case, Mapping) else {} for case in by_name.values()]
    return [{"image": case.get("images"), "label": case.get("label")} for case in cases]


def _listed(folder: Path, entries: Sequence[Any]) -> tuple[list[Case], list[str]]:
    """Return the cases of a list, with paths, and what is wrong with entries."""
    cases, problems = [], []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not entry.get("image"):
            problems.append(f"{folder / 'dataset.json'}: entry {number} names no image: {str(entry)[:80]}.")
            continue
        image = entry["image"]
        names = [folder / str(part) for part in (image if isinstance(image, list) else [image])]
        paths = [str(path) for path in (channel_files(names[0]) if len(names) == 1 else names)]
        if not entry.get("label"):
            problems.append(f"{paths[0]}: has no label.")
            continue
        case = {"image": paths if len(paths) > 1 else paths[0], "label": str(folder / str(entry["label"]))}
        cases.append(case)
    return cases, problems


def _paired(folder: Path) -> tuple[list[Case], list[str]]:
    """Return the cases of two folders, by the names of files, and what has no counterpart."""
    found = next(
        ((folder / a, folder / b) for a, b in FOLDERS if (folder / a).is_dir() and (folder / b).is_dir()), None
    )
    if found is None:
        raise InputError(f"{folder}: not a data set. It must have {LAYOUTS}.")
    problems: list[str] = []
    images, labels = (_files(part, problems) for part in found)
    for part, files in zip(found, (images, labels)):
        if not files:
            raise InputError(f"{part}: no images in this folder. Files of {', '.join(SUFFIXES)} must lie in it.")
    of_case: dict[str, dict[int, Path]] = {}
    channels = {name: re.fullmatch(r"(.+)_(\d{4})", name) for name in images}
    # Names that end in four digits are channels where the labels are named without them.
    for name, path in images.items():
        match = channels[name]
        case, number = name, 0
        if match and (name not in labels or match[1] in labels):
            case, number = match[1], int(match[2])
        first = of_case.setdefault(case, {}).setdefault(number, path)
        if first != path:
            problems.append(f"{path}: is there as {first.name} too. Leave one of them in the folder.")
    counts = [len(parts) for parts in of_case.values()]
    usual = max(set(counts), key=counts.count) if counts else 1
    cases = []
    for name, parts in sorted(of_case.items()):
        paths = [str(parts[number]) for number in sorted(parts)]
        if name not in labels:
            problems.append(f"{paths[0]}: has no label, {found[1]} has no file of the name {name}.")
        elif sorted(parts) != list(range(usual)):
            problems.append(f"{paths[0]}: has the channels {sorted(parts)}, other images have {list(range(usual))}.")
        else:
            cases.append({"image": paths if usual > 1 else paths[0], "label": str(labels[name])})
    problems += [
        f"{path}: has no image, {found[0]} has no file of the name {name}."
        for name, path in labels.items()
        if name not in of_case
    ]
    return cases, problems


def _files(folder: Path, problems: list[str]) -> dict[str, Path]:
    """Return the image files of a folder by their names without suffix; a name that is there twice is a problem."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Files that begin with a dot are not images: macOS adds `._scan.nii.gz` to a copied `scan.nii.gz`.
        if path.name[0] == "." or not path.name.lower().endswith(SUFFIXES):
            continue
        first = files.setdefault(image_name(path, SUFFIXES), path)
        if first != path:
            problems.append(f"{path}: is there as {first.name} too. Leave one of them in the folder.")
    return files


def _take_out_repeated(*sections: list[Case]) -> list[str]:
    """Take cases out whose image or label has the file name of an earlier one's, and return a problem for each.

    Cases are told apart by these names: results would overwrite each other, and a case that is listed twice would be
    trained and validated on.
    """
    first: dict[tuple[str, str], str] = {}
    problems = []
    for cases in sections:
        kept = []
        for case in cases:
            files = {"image": image_of(case), "label": case["label"]}
            names = {(kind, _stem(file)): file for kind, file in files.items()}
            taken = next((key for key in names if key in first), None)
            if taken is None:
                first |= names
                kept.append(case)
            else:
                problems.append(
                    f"{files['image']}: its {' has the name '.join(taken)}, as that of an earlier case, "
                    f"{first[taken]}. List each case once, and give each file a name of its own."
                )
        cases[:] = kept
    return problems


def _stem(file: str) -> str:
    name = Path(file).name
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)
