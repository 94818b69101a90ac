"""What `monai-iunet segment` does: an image is read, checked, segmented and written, then comes the next."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import SimpleITK
from tqdm import tqdm

from monai_iunet.errors import InputError
from monai_iunet.io.dicom_series import series_files
from monai_iunet.io.files import NIFTI, SUFFIXES, check_folder, check_names, image_name, write_atomically, write_text
from monai_iunet.io.geometry import to_simpleitk
from monai_iunet.io.labels import label_image
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.dicom_seg import write_dicom_seg
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.visualization.overlay import save_overlay

__all__ = ["Failure", "Settings", "WrittenSegmentation", "segment_example", "segment_files", "write_volumes"]

# What a volume is written as whose own format keeps header and data in two files.
IN_ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}

Write = Callable[[Segmentation, Path], object]


@dataclass(frozen=True)
class Settings:
    """Describes how images are segmented and what is written.

    Attributes:
        mirror: segment the mirror image, for crops of the other side.
        overlay: write a picture of the contours.
        format: "nifti", or "input" for the format that the image came in; DICOM SEG for a DICOM series.
        series: DICOM series, if a folder holds several.
        fail_fast: raise what is wrong with an image instead of going on with the next.
    """

    mirror: bool = False
    overlay: bool = True
    format: Literal["nifti", "input"] = "nifti"
    series: str | None = None
    fail_fast: bool = False


@dataclass(frozen=True)
class WrittenSegmentation:
    """A segmentation that was written: name of the image, file of the labels, volume of each structure in mm³."""

    name: str
    written: Path
    volumes: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """An image that was not segmented, and the reason in one line."""

    path: Path
    reason: str


def segment_files(
    images: Sequence[Path], segmenter: BundleSegmenter, output: Path, settings: Settings
) -> Iterator[WrittenSegmentation | Failure]:
    """Segment image files one after another; each result is written before the next image is read.

    Args:
        images: files, or folders with a DICOM series.
        segmenter: of a bundle.
        output: folder of the results; created if need be.
        settings: see there.

    Yields:
        What was written: `NAME_seg.nii.gz` in the geometry of the image, `NAME_seg.png`, and `NAME_prob.nii.gz` if the
        segmenter gives probabilities; or why an image could not be segmented.

    Raises:
        InputError: before the first image is read, when results would overwrite each other or cannot be written; and
            with `fail_fast` when an image cannot be segmented.
    """
    names = [_name(path) for path in images]
    check_names(names)
    formats = [_format(path, settings) for path in images]
    check_folder(output)
    # A bar on a terminal, nothing elsewhere.
    bar = tqdm(zip(images, names, formats), total=len(images), desc="segmenting", leave=False, disable=None)
    for path, name, (suffix, write) in bar:
        try:
            image = read_image(path, settings.series)
            segmentation = segmenter.segment(image, str(path), settings.mirror)
            result = _write(segmentation, output, name, suffix, write, settings.overlay, segmenter.window)
        except InputError as error:
            if settings.fail_fast:
                raise
            yield Failure(path, str(error))
        else:
            yield result


def segment_example(segmenter: BundleSegmenter, output: Path, settings: Settings) -> WrittenSegmentation:
    """Segment the image that comes with the package.

    Raises:
        InputError: when the bundle does not segment it.
    """
    image, region = segmenter.example()
    check_folder(output)
    segmentation = segmenter.segment(image, region=region)
    return _write(segmentation, output, "mni152", ".nii.gz", _write_nifti, settings.overlay, segmenter.window)


def write_volumes(results: Sequence[WrittenSegmentation], path: Path) -> None:
    """Write the volumes in mm³ of all images as a table: `.csv` with a row per structure, or `.json`."""
    if path.suffix == ".json":
        write_text(path, json.dumps({result.name: result.volumes for result in results}, indent=2) + "\n")
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "structure", "volume_mm3"])
    writer.writerows((result.name, *row) for result in results for row in result.volumes.items())
    write_text(path, table.getvalue())


def _write(
    segmentation: Segmentation,
    output: Path,
    name: str,
    suffix: str,
    write: Write,
    overlay: bool,
    window: tuple[float, float] | None,
) -> WrittenSegmentation:
    """Write labels, and probabilities and a picture if they are asked for."""
    labels_file = output / f"{name}_seg{suffix}"
    write_atomically(labels_file, partial(write, segmentation))
    if segmentation.probabilities is not None:
        write_atomically(output / f"{name}_prob.nii.gz", partial(_write_probabilities, segmentation))
    if overlay:
        picture = output / f"{name}_seg.png"
        save_overlay(segmentation.image, segmentation.labels, segmentation.names, picture, title=name, window=window)
    return WrittenSegmentation(name, labels_file, segmentation.volumes())


def _write_nifti(segmentation: Segmentation, path: Path) -> None:
    nibabel.save(label_image(segmentation.labels, segmentation.image), path)


def _write_simpleitk(segmentation: Segmentation, path: Path) -> None:
    try:
        SimpleITK.WriteImage(to_simpleitk(segmentation.image, segmentation.labels), path, useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path} could not be written") from error


def _write_series(folder: Path, series: str | None, segmentation: Segmentation, path: Path) -> None:
    write_dicom_seg(series_files(folder, series), segmentation, path)


def _write_probabilities(segmentation: Segmentation, path: Path) -> None:
    if segmentation.probabilities is not None:
        image = nibabel.Nifti1Image(np.moveaxis(segmentation.probabilities, 0, -1), segmentation.image.affine)
        image.set_sform(segmentation.image.affine, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)


def _format(path: Path, settings: Settings) -> tuple[str, Write]:
    """Return the suffix of the labels' file, and what writes it."""
    if settings.format == "nifti":
        return ".nii.gz", _write_nifti
    if path.is_dir():
        return ".dcm", partial(_write_series, path, settings.series)
    suffix = path.name.lower()[len(image_name(path, SUFFIXES)) :]
    if suffix == ".dcm":
        raise InputError(f"{path}: labels of a single DICOM file are written as NIfTI only. Leave --format out.")
    return (suffix, _write_nifti) if suffix in NIFTI else (IN_ONE_FILE.get(suffix, suffix), _write_simpleitk)


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else image_name(path, SUFFIXES)
