"""Small data sets of every kind that people have, made by the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from monai_iunet.fitting.fingerprint import CaseFacts, Fingerprint

IN_A_ROW = 5
GRID = np.array([2, 5, 3])


def _row(value: int, classes: int, shape: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    width = max(2, shape[1] // (classes + 2))
    low = (value - 1) * width + 1 + int(rng.integers(0, 2))
    return (
        slice(shape[0] * 5 // 8, shape[0] * 7 // 8),
        slice(low, low + width),
        slice(shape[2] // 4, shape[2] * 3 // 4),
    )


def _grid(value: int, shape: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    cell = np.array(shape) // GRID
    low = np.array(np.unravel_index(value - 1, GRID)) * cell + 1 + rng.integers(0, 2, 3)
    return tuple(slice(start, start + length) for start, length in zip(low, cell - 3))


def make_set(
    folder: Path,
    count: int = 6,
    shape: Sequence[int] = (24, 24, 24),
    spacing: Sequence[float] = (1, 1, 1),
    classes: int = 1,
    channels: int = 1,
    modality: str = "MRI",
    seed: int = 0,
    in_one_file: bool = False,
) -> Path:
    """A Decathlon folder: bright boxes in noise, the first to the right and the others in a row behind it.

    More than five fill a grid of two by five by three instead.

    Several channels are a file each, or `in_one_file` of four axes, as the Decathlon has them.
    """
    rng = np.random.default_rng(seed)
    affine = np.diag([*spacing, 1.0])
    entries = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        labels = np.zeros(shape, np.uint8)
        for value in range(1, classes + 1):
            labels[_row(value, classes, shape, rng) if classes <= IN_A_ROW else _grid(value, shape, rng)] = value
        name = f"case_{number:02}"
        images = []
        for channel in range(channels):
            image = 100 * (rng.normal(0, 0.2, shape) + (labels > 0) * (0.5 + labels / classes) * (1 + channel)).astype(
                np.float32
            )
            if modality == "CT":
                image = np.clip(image - 50, -1000, 3000)
                image[:, :, 0] = -1000
            images.append(image)
        if channels == 1 or in_one_file:
            paths = [f"imagesTr/{name}.nii.gz"]
            images = [np.stack(images, -1) if in_one_file else images[0]]
        else:
            paths = [f"imagesTr/{name}_{channel:04}.nii.gz" for channel in range(channels)]
        for path, image in zip(paths, images):
            nibabel.save(nibabel.Nifti1Image(image, affine), folder / path)
        nibabel.save(nibabel.Nifti1Image(labels, affine), folder / f"labelsTr/{name}.nii.gz")
        entries.append({"image": paths if len(paths) > 1 else paths[0], "label": f"labelsTr/{name}.nii.gz"})
    names = {str(value): f"structure {value}" for value in range(1, classes + 1)}
    channel_names = {str(channel): f"{modality} {channel}" for channel in range(channels)}
    description = {"modality": channel_names, "labels": {"0": "background", **names}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def number_labels(
    folder: Path, values: Mapping[int, int], cases: Iterable[int] | None = None, erase: bool = False
) -> None:
    """Give structures of a made set other values; with `erase` take them out of the images as well, into the noise."""
    paths = sorted((folder / "labelsTr").iterdir())
    for number in range(len(paths)) if cases is None else cases:
        label = nibabel.load(paths[number])
        labels = np.asarray(label.dataobj)
        numbers = np.arange(256, dtype=np.uint8)
        numbers[list(values)] = list(values.values())
        nibabel.save(nibabel.Nifti1Image(numbers[labels], label.affine), paths[number])
        if erase:
            path = folder / "imagesTr" / paths[number].name
            data = np.array(nibabel.load(path).dataobj)
            gone = np.isin(labels, list(values))
            data[gone] = np.random.default_rng(number).choice(data[labels == 0], gone.sum())
            nibabel.save(nibabel.Nifti1Image(data, label.affine), path)


def facts(
    shape: Sequence[int] = (100, 100, 100), spacing: Sequence[float] = (1, 1, 1), classes: int = 1, **changes: Any
) -> CaseFacts:
    """What is known of a case that is not there."""
    values: dict[str, Any] = {
        "name": "case.nii.gz",
        "shape": tuple(shape),
        "spacing": tuple(float(size) for size in spacing),
        "lowest": 0.0,
        "intensities": (-50.0, 0.0, 150.0),
        "volumes": (0.02 * float(np.prod(np.array(shape) * spacing)),) * classes,
        "centers": (0.0,) * classes,
        "contrast": (1.0,) * classes,
        "mirrored_contrast": (0.0,) * classes,
    }
    return CaseFacts(**{**values, **changes})


def fingerprint(
    count: int = 20, structures: Sequence[str] = ("organ",), channels: Sequence[str] = ("MRI",), **options: Any
) -> Fingerprint:
    """The fingerprint of a data set of equal cases."""
    modality = "CT" if "CT" in channels else "MR"
    case = facts(classes=len(structures), **options)
    values = tuple(range(1, len(structures) + 1))
    return Fingerprint(tuple(channels), tuple(structures), values, modality, (case,) * count)
