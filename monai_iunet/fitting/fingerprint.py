"""The fingerprint of a data set: what a plan for it follows from, and what is wrong with its cases.

MONAI's `DataAnalyzer` counts the like. It is not used, because it ends at the first case that it cannot read, reads
what `segment` refuses, and does not know on which side of an image a structure lies. Here every file is read once, and
all problems are listed together.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from rich.console import Group
from rich.table import Table
from tqdm import tqdm

from monai_iunet.errors import InputError
from monai_iunet.io.channels import first_channel
from monai_iunet.io.checks import raw_voxels
from monai_iunet.io.files import write_atomically, write_text
from monai_iunet.io.read import read_image
from monai_iunet.io.text import first_line, times
from monai_iunet.training.cases import image_of, read_case
from monai_iunet.training.dataset import LabeledData

__all__ = [
    "CaseFacts",
    "Fingerprint",
    "as_tuples",
    "draw_fingerprint",
    "fingerprint_tables",
    "read_fingerprint",
    "round_size",
    "take_fingerprint",
    "write_fingerprint",
]

logger = logging.getLogger(__name__)

SAMPLES = 2000  # voxels per case from which intensities of the data set are estimated
NOT_CT = {"mr", "mri", "t1", "t2", "flair", "adc", "t1w", "t2w", "t1ce", "t1gd", "pet"}  # in names of channels
AIR = -900.0  # HU; below there is only air, and no MR image has such values
# A contrast so many times as far from the others' as theirs are from each other, in the median, is no chance.
FAR = 8.0
NEAR = 4.0


@dataclass(frozen=True)
class CaseFacts:
    """What is known of a case; axes run to the right, to the front and up.

    Attributes:
        name: file of the image, or of its first channel.
        shape: voxels along each axis.
        spacing: size of a voxel, in mm.
        lowest: least intensity of the channel in which it is greatest: in CT alone there is air in all of them.
        intensities: a sample of the first channel's intensities inside the structures.
        volumes: mm³ of each structure, in the order of the labels.
        centers: center of each structure from left to right, from -1 to 1; None where it is not labeled.
        contrast: per structure, how much brighter than the image it is, in standard deviations of the image.
        mirrored_contrast: the same of the labels' mirror image.

    Example:
        >>> facts = CaseFacts("a.nii.gz", (10, 10, 10), (1.0, 1.0, 2.0), 0.0, (1.0,), (8.0,), (0.1,), (2.0,), (0.0,))
        >>> facts.extent
        (10.0, 10.0, 20.0)
    """

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    lowest: float
    intensities: tuple[float, ...]
    volumes: tuple[float, ...]
    centers: tuple[float | None, ...]
    contrast: tuple[float | None, ...]
    mirrored_contrast: tuple[float | None, ...]

    @property
    def extent(self) -> tuple[float, float, float]:
        """Size of the image, in mm."""
        first, second, third = (count * size for count, size in zip(self.shape, self.spacing))
        return first, second, third


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a data set.

    Attributes:
        channels: names of the channels.
        structures: names of the structures.
        label_values: their values in the label files.
        modality: "MR" or "CT".
        cases: that can be learned from.
        left_out: file names of the images of the others.
        parts: which labels the regions of the data set are made of, as text; empty if it has none.

    Example:
        >>> Fingerprint(("CT",), ("liver",), (1,), "CT", ()).structures
        ('liver',)
    """

    channels: tuple[str, ...]
    structures: tuple[str, ...]
    label_values: tuple[int, ...]
    modality: str
    cases: tuple[CaseFacts, ...]
    left_out: tuple[str, ...] = ()
    parts: str = ""

    @property
    def of_regions(self) -> str:
        """Say what became of the regions of the data set, whose names labels have; empty if it has none."""
        if not self.parts:
            return ""
        return (
            "Regions are not learned as such, but each label by itself, under the name of the smallest region that has "
            f"it. To have a region, add its labels up, by their numbers in the data set: {self.parts}."
        )

    @property
    def labeled(self) -> tuple[int, ...]:
        """Number of cases in which each structure is labeled."""
        return tuple(sum(case.volumes[number] > 0 for case in self.cases) for number in range(len(self.structures)))

    def percentiles(self, *percents: float) -> list[float]:
        """Return percentiles of the intensities inside the structures."""
        values = [value for case in self.cases for value in case.intensities]
        return [float(value) for value in np.percentile(values, percents)]


def take_fingerprint(data: LabeledData, modality: str | None = None, skip_bad: bool = False) -> Fingerprint:
    """Read all cases of a data set, check them, and count what a plan follows from.

    Args:
        data: the data set.
        modality: "MR" or "CT"; by default that of the channels' names, else what the intensities look like.
        skip_bad: leave bad cases out, saying so, instead of stopping.

    Raises:
        InputError: for another modality; naming each case that cannot be learned from in a line, unless `skip_bad`; or
            if too few are left, or a structure is in no label.
    """
    if modality not in (None, "MR", "CT"):
        raise InputError(f"modality {modality!r}: must be MR or CT.")
    values = _label_values(data)
    problems = list(data.problems)
    cases = []
    left_out = []
    for case in tqdm([*data.training, *(data.validation or [])], "reading cases", leave=False, disable=None):
        try:
            cases.append(_case_facts(case, values, len(data.channels)))
        except InputError as error:
            problems.append(str(error))
            left_out.append(image_of(case))
    chosen = modality or _named_modality(data.channels)
    problems_of_pairs = _other_modality(cases, chosen) | _mirrored(cases) | _copies(cases)
    problems += problems_of_pairs.values()
    left_out += problems_of_pairs
    good = tuple(case for case in cases if case.name not in problems_of_pairs)
    if problems and data.ignored is not None:
        problems.append(
            f'{data.folder / "dataset.json"}: calls label {data.ignored} "ignore". Each voxel of a label is learned '
            "from, so labels that have it cannot be used, and as background these voxels would be wrong."
        )
    if problems:
        listed = "\n".join(problems)
        if not skip_bad:
            raise InputError(
                f"{_count(problems)} in {data.folder}:\n{listed}\nMend them, or leave these cases out with "
                "--skip-bad-cases."
            )
        logger.warning("%s in %s, these cases are left out:\n%s", _count(problems), data.folder, listed)
    if not good:
        raise InputError(f"{data.folder}: no case is left to learn from. Check the data set.")
    left = {case.name for case in good}
    for section, listed_cases in (("training", data.training), ("validation", data.validation)):
        if listed_cases is not None and left.isdisjoint(map(image_of, listed_cases)):
            raise InputError(
                f'{data.folder}: of "{section}" in dataset.json no case is left. Mend or list some; without '
                '"validation" the cases of "training" are split.'
            )
    absent = [name for number, (name, _) in enumerate(values) if not any(case.volumes[number] for case in good)]
    if absent:
        raise InputError(
            f"{data.folder}: no label shows {', '.join(absent)}, so nothing can be learned of it. Take it out of "
            '"labels" in dataset.json.'
        )
    kind = chosen or ("CT" if _is_ct(good[0]) else "MR")
    structures = tuple(name for name, _ in values)
    names = tuple(sorted(Path(name).name for name in left_out))
    numbers = tuple(value for _, value in values)
    return Fingerprint(data.channels, structures, numbers, kind, good, names, data.parts)


def _count(problems: Sequence[str]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"


def _label_values(data: LabeledData) -> list[tuple[str, int]]:
    """Return names and values of the structures; values that nothing names are looked up in the labels."""
    if data.labels:
        return list(data.labels.items())
    found: set[int] = set()
    for case in data.training:
        try:
            # Cases that cannot be read are reported later, together with what else is wrong.
            labels = np.unique(np.asarray(read_image(case["label"]).dataobj))
            found |= set(labels.astype(int).tolist())
        except InputError as error:
            logger.debug("%s: %s", case["label"], error)
    return [(f"label {value}", value) for value in sorted(found) if value > 0]


def _case_facts(case: dict[str, Any], values: Sequence[tuple[str, int]], channels: int) -> CaseFacts:
    """Read a case and count what is known of it; of several channels the first one counts, but for `lowest`."""
    if case["label"] in (case["image"] if isinstance(case["image"], list) else [case["image"]]):
        raise InputError(f"{case['label']}: is image and label of one case. Name the image in dataset.json.")
    read, label = read_case(case, [0, *(value for _, value in values)], channels)
    name = image_of(case)
    image = nibabel.as_closest_canonical(first_channel(read))
    labels = np.asarray(nibabel.as_closest_canonical(label).dataobj).astype(np.int32)
    data = image.get_fdata(dtype=np.float32)
    spacing, voxel = nibabel.affines.voxel_sizes(image.affine), abs(float(np.linalg.det(image.affine[:3, :3])))
    # In float64: squares of tiny values are nothing in float32, those of huge ones infinite.
    mean, deviation = float(data.mean()), float(data.std(dtype=np.float64))
    volumes: list[float] = []
    centers: list[float | None] = []
    contrast: list[float | None] = []
    mirrored: list[float | None] = []
    from_left = np.linspace(-1, 1, data.shape[0])
    for _, value in values:
        mask = labels == value
        count = int(mask.sum())
        volumes.append(count * voxel)
        if count == 0:
            centers.append(None)
            contrast.append(None)
            mirrored.append(None)
            continue
        centers.append(float(mask.sum((1, 2)) @ from_left) / count)
        contrast.append((float(data[mask].mean()) - mean) / deviation)
        mirrored.append((float(data[mask[::-1]].mean()) - mean) / deviation)
    inside = data[labels > 0]
    sample = inside[np.random.default_rng(0).integers(0, len(inside), min(SAMPLES, len(inside)))]
    return CaseFacts(
        name=name,
        shape=tuple(image.shape),
        spacing=tuple(round_size(float(size), 4) for size in spacing),  # type: ignore[arg-type]
        lowest=float(raw_voxels(read).min(axis=(0, 1, 2)).max()),
        intensities=tuple(round(float(value), 4) for value in sample),
        volumes=tuple(volumes),
        centers=tuple(centers),
        contrast=tuple(contrast),
        mirrored_contrast=tuple(mirrored),
    )


def round_size(size: float, digits: int) -> float:
    """Return the size of a voxel with so many digits behind the point, or more where that would be fewer than three.

    Example:
        >>> round_size(0.9765625, 3), round_size(0.0026, 3)
        (0.977, 0.0026)
    """
    return round(size, max(digits, 2 - math.floor(math.log10(size))))


def _named_modality(channels: Sequence[str]) -> str | None:
    """Return the modality that the names of channels mean; None if they mean none.

    CT is only what consists of CT, since all channels get one window of Hounsfield units.
    """
    of_channels = [set(re.split(r"[^a-z0-9]+", name.lower())) for name in channels]
    if set().union(*of_channels) & NOT_CT:
        return "MR"
    return "CT" if all("ct" in words for words in of_channels) else None


def _is_ct(case: CaseFacts) -> bool:
    """Return whether the intensities of a case, in all its channels, look like Hounsfield units: there is air."""
    return case.lowest <= AIR


def _other_modality(cases: Sequence[CaseFacts], modality: str | None) -> dict[str, str]:
    """Return a problem for each case whose intensities are of another modality than those of most."""
    like_ct = {case.name: _is_ct(case) for case in cases}
    if len(set(like_ct.values())) < 2:
        return {}
    usual, count = Counter(like_ct.values()).most_common(1)[0]
    expected = modality == "CT" if modality in ("CT", "MR") else usual
    if modality == "CT" and count < len(cases) and not usual:
        expected = True
    return {
        name: f"{name}: its intensities are {'' if is_ct else 'not '}those of a CT, most others' are"
        f"{' not' if is_ct else ''}. Keep one modality per data set."
        for name, is_ct in like_ct.items()
        if is_ct != expected and is_ct != usual
    }


def _copies(cases: Sequence[CaseFacts]) -> dict[str, str]:
    """Return a problem for each case of which all is as in an earlier one: it would be trained and validated on."""
    first: dict[CaseFacts, str] = {}
    originals = {case.name: first.setdefault(replace(case, name=""), case.name) for case in cases}
    return {
        name: f"{name}: is a copy of {original} by another name. Keep one of them."
        for name, original in originals.items()
        if original != name
    }


def _mirrored(cases: Sequence[CaseFacts]) -> dict[str, str]:
    """Return a problem for each case whose image looks mirrored against its labels.

    Where the structures are in it, the image is as bright as in no other case, and where their mirror image is, as in
    all others. The distance of a case is the mean over the structures of how far its contrast is from the median, in
    median distances.
    """
    if len(cases) < 5:
        return {}
    contrast, mirrored = (
        np.array([getattr(case, kind) for case in cases], dtype=float) for kind in ("contrast", "mirrored_contrast")
    )
    known = np.isfinite(contrast).sum(0) >= 5
    if not known.any():
        return {}
    contrast, mirrored = contrast[:, known], mirrored[:, known]
    median = np.nanmedian(contrast, 0)
    usual = np.maximum(np.nanmedian(abs(contrast - median), 0), 0.05)
    as_is, flipped = (
        np.array([np.nanmean(row) if np.isfinite(row).any() else 0.0 for row in abs(values - median) / usual])
        for values in (contrast, mirrored)
    )
    return {
        case.name: f"{case.name}: its image seems mirrored against its labels: mirrored, they fit it as those of other "
        "cases fit theirs. Look at it."
        for case, far, near in zip(cases, as_is, flipped)
        if far > FAR and near < NEAR
    }


def write_fingerprint(fingerprint: Fingerprint, path: Path) -> None:
    """Write a fingerprint as JSON."""
    write_text(path, json.dumps(asdict(fingerprint)) + "\n")


def read_fingerprint(path: Path) -> Fingerprint:
    """Read a fingerprint.

    Raises:
        InputError: when the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(
            CaseFacts(**{name: as_tuples(value) for name, value in case.items()}) for case in content["cases"]
        )
        return Fingerprint(
            **{name: as_tuples(value) for name, value in content.items() if name != "cases"}, cases=cases
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a fingerprint ({first_line(error)}). Choose another --output to begin anew."
        ) from error


def as_tuples(value: Any) -> Any:
    """Return lists, of which JSON makes all sequences, as the tuples that they were."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def fingerprint_tables(fingerprint: Fingerprint) -> Group:
    """Return a fingerprint as tables to print."""
    images = Table("", "least", "median", "greatest", title=f"{len(fingerprint.cases)} cases, {fingerprint.modality}")
    rows: dict[str, np.ndarray] = {
        "voxels": np.array([case.shape for case in fingerprint.cases]),
        "spacing, mm": np.array([case.spacing for case in fingerprint.cases]),
        "field of view, mm": np.array([case.extent for case in fingerprint.cases]),
    }
    for name, triples in rows.items():
        statistics = (function(triples, axis=0) for function in (np.min, np.median, np.max))
        images.add_row(name, *map(times, statistics))
    low, middle, high = fingerprint.percentiles(0.5, 50, 99.5)
    images.add_row("intensities in structures", f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}")
    table = Table("label", "structure", "cases", "volume, ml", "part of the images", title="Structures")
    table.caption = fingerprint.of_regions or None
    for number, (value, name) in enumerate(zip(fingerprint.label_values, fingerprint.structures)):
        labeled = [case for case in fingerprint.cases if case.volumes[number] > 0]
        volume = np.median([case.volumes[number] for case in labeled]) if labeled else 0.0
        part = np.median([case.volumes[number] / np.prod(case.extent) for case in labeled]) if labeled else 0.0
        table.add_row(str(value), name, str(len(labeled)), f"{volume / 1000:.3g}", f"{part:.2%}")
    return Group(images, table)


def draw_fingerprint(fingerprint: Fingerprint, path: Path) -> None:
    """Draw a fingerprint: fields of view, spacings, intensities and volumes.

    Args:
        fingerprint: to draw.
        path: PNG file to write.
    """
    import matplotlib.pyplot as plt

    height = max(3.4, 1 + 0.17 * len(fingerprint.structures))  # so that their names lie below each other
    figure, axes = plt.subplots(1, 4, figsize=(15, height), layout="constrained")
    try:
        sides = ("left-right", "back-front", "down-up")
        for axis, name, triples in (
            (axes[0], "field of view, mm", [case.extent for case in fingerprint.cases]),
            (axes[1], "spacing, mm", [case.spacing for case in fingerprint.cases]),
        ):
            axis.boxplot(np.array(triples), tick_labels=sides)
            axis.set(ylabel=name)
        axes[2].hist([value for case in fingerprint.cases for value in case.intensities], bins=60)
        axes[2].set(xlabel="intensity inside structures", ylabel="voxels of a sample")
        volumes = [
            [case.volumes[number] / 1000 for case in fingerprint.cases if case.volumes[number] > 0] or [np.nan]
            for number in range(len(fingerprint.structures))
        ]
        axes[3].boxplot(volumes, tick_labels=fingerprint.structures, orientation="horizontal")
        axes[3].set(xlabel="volume, ml", xscale="log")
        for label in axes[3].get_yticklabels():
            label.set_parse_math(False)  # names of people, where "$" is no formula
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    finally:
        plt.close(figure)
