"""What `monai-iunet segment` does: images in, label volumes, pictures, volumes of the structures out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import nibabel
import numpy as np
import SimpleITK
from tqdm import tqdm

from monai_iunet.dicom import series_files
from monai_iunet.geometry import to_simpleitk
from monai_iunet.images import (
    NIFTI,
    SUFFIXES,
    InputError,
    check_folder,
    check_names,
    image_name,
    label_image,
    read_image,
    write_atomically,
)
from monai_iunet.inference import BundleSegmenter, Segmentation
from monai_iunet.overlay import save_overlay
from monai_iunet.whole_head import load_template

__all__ = ["FileSegmentation", "Settings", "segment_files", "write_volumes"]

# What a volume is written as, where its own format keeps header and data in two files.
IN_ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}


Item = TypeVar("Item")
Write = Callable[[Segmentation, Path], object]


@dataclass(frozen=True)
class Settings:
    """How images are segmented and what is written.

    Attributes:
        mirror: segment the mirror image, for crops of the other side.
        overlay: write a picture of the contours.
        format: "nifti", or "input" for the format that the image came in; DICOM SEG for a DICOM series.
        series: DICOM series, where a folder holds several.
    """

    mirror: bool = False
    overlay: bool = True
    format: Literal["nifti", "input"] = "nifti"
    series: str | None = None


@dataclass(frozen=True)
class FileSegmentation:
    """What was found in a file, and where it was written."""

    name: str
    written: Path
    volumes: dict[str, float]


def segment_files(
    images: Sequence[Path], segmenter: BundleSegmenter, output: Path, settings: Settings
) -> Iterator[FileSegmentation]:
    """Segment image files one after another; what can be wrong with one is found before the first result is written.

    Args:
        images: files, or folders with a DICOM series; none for the MNI152 template.
        segmenter: of a bundle.
        output: folder of the results; created if need be.
        settings: see there.

    Yields:
        What was found, after it was written: `NAME_seg.nii.gz` in the geometry of the image, `NAME_seg.png`, and
        `NAME_prob.nii.gz` if the segmenter gives probabilities.

    Raises:
        InputError: when an image cannot be segmented, or results would overwrite each other.
    """
    if not images and segmenter.metadata.get("region_finder") != "whole_head":
        raise InputError(f"{segmenter.folder.name}: the example is a head, which it does not segment. Name images.")
    names = [_name(path) for path in images] if images else ["mni152"]
    check_names(names)
    regions = [_region(path, segmenter, settings) for path in _bar(images, "looking at the images")] or [np.eye(4)]
    formats = [_format(path, settings) for path in images] or [NIFTI_FORMAT]
    check_folder(output)
    for number, name in enumerate(_bar(names, "segmenting")):
        image = read_image(images[number], settings.series, read_before=True) if images else load_template()
        found = segmenter.segment(image, regions[number], settings.mirror)
        suffix, write = formats[number]
        written = output / f"{name}_seg{suffix}"
        write_atomically(written, partial(write, found))
        if found.probabilities is not None:
            write_atomically(output / f"{name}_prob.nii.gz", partial(_write_probabilities, found))
        if settings.overlay:
            picture = output / f"{name}_seg.png"
            save_overlay(image, found.labels, found.names, picture, title=name, window=segmenter.window)
        yield FileSegmentation(name, written, found.volumes())


def write_volumes(results: Sequence[FileSegmentation], path: Path) -> None:
    """Write the volumes in mm³ of all images as a table: `.csv` with a row per structure, or `.json`."""
    if path.suffix == ".json":
        text = json.dumps({result.name: result.volumes for result in results}, indent=2) + "\n"
    else:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["image", "structure", "volume_mm3"])
        writer.writerows((result.name, *row) for result in results for row in result.volumes.items())
        text = table.getvalue()
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))


def _write_nifti(found: Segmentation, path: Path) -> None:
    nibabel.save(label_image(found.labels, found.image), path)


def _write_simpleitk(found: Segmentation, path: Path) -> None:
    try:
        SimpleITK.WriteImage(to_simpleitk(found.image, found.labels), path, useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path} could not be written") from error


def _write_probabilities(found: Segmentation, path: Path) -> None:
    if found.probabilities is not None:
        image = nibabel.Nifti1Image(np.moveaxis(found.probabilities, 0, -1), found.image.affine)
        image.set_sform(found.image.affine, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)


NIFTI_FORMAT: tuple[str, Write] = (".nii.gz", _write_nifti)


def _format(path: Path, settings: Settings) -> tuple[str, Write]:
    """Suffix of the labels' file, and how it is written."""
    if settings.format == "nifti":
        return NIFTI_FORMAT
    if path.is_dir():
        from monai_iunet.dicom_seg import write_dicom_seg

        return ".dcm", partial(write_dicom_seg, series_files(path, settings.series))
    suffix = path.name.lower()[len(image_name(path, SUFFIXES)) :]
    if suffix == ".dcm":
        raise InputError(f"{path}: labels of a single DICOM file are written as NIfTI only. Leave --format out.")
    return (suffix, _write_nifti) if suffix in NIFTI else (IN_ONE_FILE.get(suffix, suffix), _write_simpleitk)


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else image_name(path, SUFFIXES)


def _region(path: Path, segmenter: BundleSegmenter, settings: Settings) -> np.ndarray | None:
    return segmenter.locate(read_image(path, settings.series), str(path))


def _bar(items: Sequence[Item], what: str) -> Iterable[Item]:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=what, unit="image", leave=False, disable=None)
