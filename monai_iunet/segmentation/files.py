"""What `monai-iunet segment` does: images are read, checked, segmented and written."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import nibabel
import SimpleITK
import torch
from tqdm import tqdm

from monai_iunet.errors import InputError
from monai_iunet.io.channels import group_channels, result_name
from monai_iunet.io.dicom_series import series_files
from monai_iunet.io.files import NIFTI, SUFFIXES, check_folder, check_names, files_in, image_name, write_atomically
from monai_iunet.io.geometry import to_simpleitk
from monai_iunet.io.labels import label_image, write_probability_image
from monai_iunet.io.read import read_image
from monai_iunet.io.text import first_line
from monai_iunet.segmentation.at_once import SegmenterPool, images_at_once, run_in_order
from monai_iunet.segmentation.dicom_seg import write_dicom_seg
from monai_iunet.segmentation.origin import check_origin, origin_of
from monai_iunet.segmentation.records import RECORD_SUFFIX, is_record, write_record
from monai_iunet.segmentation.report import VIEWS, write_view
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.share import Share
from monai_iunet.visualization.overlay import save_overlay

__all__ = [
    "EXAMPLE_IMAGE",
    "Case",
    "Failure",
    "Settings",
    "Write",
    "WrittenSegmentation",
    "check_outputs",
    "image_names",
    "segment_cases",
    "segment_example",
    "segment_files",
    "write_nifti",
    "write_picture",
    "write_probabilities",
    "write_simpleitk",
]

logger = logging.getLogger(__name__)

# The disk is full, the quota or the limit of a file is used up, the disk is read-only, or it fails.
ERRORS_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
SMALL = 64 * 2**20  # bytes of an image's files, up to which several images are in memory at once
# What a volume is written as whose own format keeps header and data in two files.
IN_ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}

Write = Callable[[Segmentation, Path], object]
Origin = Callable[[], dict[str, Any]]
ALL = Share()
EXAMPLE_IMAGE = Path("mni152.nii.gz")  # after which the results of the example are named


@dataclass(frozen=True)
class Settings:
    """Describes how images are segmented and what is written.

    Attributes:
        mirror: segment the mirror image, for crops of the other side.
        overlay: write a picture of the contours.
        format: "nifti", or "input" for the format that the image came in; DICOM SEG for a DICOM series.
        series: DICOM series, if a folder holds several.
        fail_fast: raise what is wrong with an image instead of going on with the next; then images are segmented one
            after another.
        overwrite: replace files that are there.
        skip_done: leave out images whose labels are there, if they were made of the same image by the same bundle.
        record: write the record of each image, `NAME_seg.json`.
        view: write what the page shows of each image.
        share: part of the images that this process does.
        strict: take a doubtful segmentation for a failure, and write nothing of it.
        overlap: work on several images at once, if their files are small.
    """

    mirror: bool = False
    overlay: bool = True
    format: Literal["nifti", "input"] = "nifti"
    series: str | None = None
    fail_fast: bool = False
    overwrite: bool = False
    skip_done: bool = False
    record: bool = False
    view: bool = False
    share: Share = ALL
    strict: bool = False
    overlap: bool = True


@dataclass(frozen=True)
class Case:
    """Names an image to segment, and the files that its results go to.

    Attributes:
        image: file, or folder with a DICOM series; that of the first channel, if there is one for each.
        name: name of the image in tables and pictures.
        labels: file of the labels; it is written last, so an image that has one is done.
        described_in: JSON file that tells the origin of the labels, if it is one of those beside them.
        origin: returns what the result is made of, see `origin_of`.
        write: writes the labels.
        beside: what is written beside the labels, by file: the picture, probabilities, side-cars.
        channels: files of the channels, if there is one for each.
        others: what other runs may have written beside the labels, and this one does not.
    """

    image: Path
    name: str
    labels: Path
    described_in: Path
    origin: Origin
    write: Write
    beside: Mapping[Path, Write] = field(default_factory=dict)
    channels: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """What the image is read from."""
        return self.channels or (self.image,)

    @property
    def is_there(self) -> bool:
        """Whether the image exists; if it does not, no result can be said to be its own."""
        return all(path.exists() for path in self.files)

    @property
    def outputs(self) -> list[Path]:
        """All files that are written."""
        return [self.labels, *self.beside]

    @property
    def is_done(self) -> bool:
        """Whether the labels are there, and are not old ones that a kill has left among what was to replace them."""
        return self.labels.exists() and not self.started.exists()

    @property
    def started(self) -> Path:
        """File that is there while results are written, so that what a kill leaves is not taken for somebody's own."""
        return self.labels.with_name(f".{self.labels.name}.started")


@dataclass(frozen=True)
class WrittenSegmentation:
    """Describes a segmentation that was written.

    Attributes:
        name: of the image.
        written: file of the labels.
        volumes: of each structure, in mm³.
        quality: predicted Dice of each structure; None where it is unknown.
        doubts: which structures are doubtful, in a line; None if none are.
        weights: name of the bundle's weights that found each structure.
    """

    name: str
    written: Path
    volumes: dict[str, float]
    quality: dict[str, float | None]
    doubts: str | None
    weights: dict[str, str] | None


@dataclass(frozen=True)
class Failure:
    """An image that was not segmented, and the reason in one line."""

    path: Path
    reason: str


def segment_files(
    images: Sequence[Path], segmenter: BundleSegmenter, output: Path, settings: Settings
) -> Iterator[WrittenSegmentation | Failure]:
    """Segment image files; several at once if they are small, but what is yielded is in their order.

    Args:
        images: files, or folders with a DICOM series. Where the bundle takes several channels, files NAME_0000,
            NAME_0001, ... are those of one image.
        segmenter: of a bundle.
        output: folder of the results; created if need be.
        settings: see there.

    Yields:
        What was written: `NAME_seg.nii.gz` in the geometry of the image, `NAME_seg.png`, and `NAME_prob.nii.gz` if the
        segmenter gives probabilities; or why an image could not be segmented.

    Raises:
        InputError: before the first image is read, when a result would replace an image, another result or, without
            `overwrite`, a file that is there, or cannot be written, or, with `strict`, when the bundle has no quality
            model, or, with `mirror`, when it tells left structures from right ones; with `fail_fast` when an image
            cannot be segmented.
    """
    groups = group_channels(images, segmenter.channels)
    check_names(image_names([files[0] for files in groups], segmenter.channels))
    cases = [
        _case(files, segmenter, output, settings) for files in groups[settings.share.index :: settings.share.count]
    ]
    check_outputs([case for case in cases if case.is_there], settings, images)
    check_folder(output)
    yield from segment_cases(cases, segmenter, settings)


def segment_cases(
    cases: Sequence[Case], segmenter: BundleSegmenter, settings: Settings
) -> Iterator[WrittenSegmentation | Failure]:
    """Segment cases, see `segment_files`; their files were checked by `check_outputs`.

    Of images whose files are small, several are in memory at once, see `images_at_once`.
    """
    _check_settings(segmenter, settings)
    left = [case for case in cases if not (settings.skip_done and case.is_done and case.is_there)]
    # A bar on a terminal, nothing elsewhere. No variable holds what is iterated: an error ends its threads at once.
    for case, result in tqdm(
        _segment_all(left, segmenter, settings), "segmenting", len(left), leave=False, unit="image", disable=None
    ):
        yield _outcome(case, result, settings)


def _segment_all(
    cases: Sequence[Case], segmenter: BundleSegmenter, settings: Settings
) -> Iterator[tuple[Case, Future[WrittenSegmentation]]]:
    """Yield each case and what was written of it."""
    writing = Lock()
    for small, alike in groupby(cases, _is_small):
        group = list(alike)
        overlaps = settings.overlap and small and not settings.fail_fast  # what follows a failure is not begun
        at_once = images_at_once(segmenter, len(group)) if overlaps else 1
        work = partial(_segment_case, SegmenterPool(segmenter, at_once), segmenter.channels, settings, writing)
        workers = min(at_once + 2, len(group)) if overlaps else 1  # one reads meanwhile, and one writes
        yield from run_in_order(work, group, workers, torch.get_num_threads() // at_once)


def _segment_case(
    segmenters: SegmenterPool, channels: int, settings: Settings, writing: Lock, case: Case
) -> WrittenSegmentation:
    """Read an image, segment it as soon as a segmenter is free, and write the result when no other is written."""
    image = read_image(case.files, settings.series, channels)
    with segmenters.borrow() as segmenter:
        segmentation = segmenter.segment(image, str(case.image), settings.mirror)
    del image
    with writing:  # matplotlib, which draws the pictures, is not made for threads
        _check_still_absent(case, settings)
        return _write(segmentation, case, settings.strict)


def _is_small(case: Case) -> bool:
    """Return whether the files of an image are so small that several such images fit the memory."""
    try:
        return sum(file.stat().st_size for path in case.files for file in files_in(path)) <= SMALL
    except OSError:
        return False


def _outcome(case: Case, result: Future[WrittenSegmentation], settings: Settings) -> WrittenSegmentation | Failure:
    """Wait until a result is written, and say what went wrong otherwise."""
    try:
        return result.result()
    except Exception as error:
        if _meets_every_image(error):
            raise
        logger.debug("%s", case.image, exc_info=True)
        reason = _reason(case, error)
        if settings.fail_fast:
            raise InputError(reason) from error
        return Failure(case.image, reason)


def _reason(case: Case, error: Exception) -> str:
    """Return what went wrong with an image in a line that names it."""
    if not isinstance(error, InputError):
        return f"{case.image}: {type(error).__name__}: {first_line(error)}"
    is_named = any(str(path) in str(error) for path in (case.image, *case.files))
    return str(error) if is_named else f"{case.image}: {error}"


def _meets_every_image(error: Exception) -> bool:
    """Return whether an error is one of the machine, such as a full disk, that the next image would meet too."""
    return isinstance(error, OSError) and error.errno in (None, *ERRORS_OF_THE_MACHINE)


def segment_example(
    segmenter: BundleSegmenter, output: Path, settings: Settings
) -> Iterator[WrittenSegmentation | Failure]:
    """Segment the image that comes with the package.

    Yields:
        What was written; nothing where that is there and `skip_done` is set.

    Raises:
        InputError: when the bundle does not segment it, or a file is there and `overwrite` is not set.
    """
    _check_settings(segmenter, settings)
    image, region = segmenter.example()
    case = _case((EXAMPLE_IMAGE,), segmenter, output, settings)
    check_outputs([case], settings)
    check_folder(output)
    if settings.skip_done and case.is_done:
        return
    segmentation = segmenter.segment(image, region=region)
    _check_still_absent(case, settings)
    yield _write(segmentation, case, settings.strict)


def _check_settings(segmenter: BundleSegmenter, settings: Settings) -> None:
    """Check before the first image is read that a bundle can do what is asked for."""
    if settings.mirror:
        segmenter.check_mirror()
    if settings.strict and segmenter.quality is None:
        raise InputError(
            f"{segmenter.folder}: has no quality model of its weights, which --strict needs. Fit one with `monai-iunet "
            "quality`, or leave --strict out."
        )


def _case(files: tuple[Path, ...], segmenter: BundleSegmenter, output: Path, settings: Settings) -> Case:
    image = files[0]
    name, (suffix, write) = _name(image, segmenter.channels), _format(image, settings)
    record, view = output / f"{name}{RECORD_SUFFIX}", output / VIEWS / f"{name}.json"
    picture, probabilities = output / f"{name}_seg.png", output / f"{name}_prob.nii.gz"
    origin = partial(origin_of, files, segmenter, settings.mirror, settings.series)
    beside: dict[Path, Write] = {}
    if segmenter.gives_probabilities:
        beside[probabilities] = write_probabilities
    if settings.overlay:
        beside[picture] = partial(write_picture, name, segmenter.window)
    # What later runs read must be of these labels.
    if settings.record or is_record(record):
        beside[record] = partial(write_record, image, origin)
    if settings.view or view.exists():
        beside[view] = partial(write_view, name, segmenter.window)
    others = tuple(path for path in (picture, probabilities) if path not in beside)
    return Case(image, name, output / f"{name}_seg{suffix}", record, origin, write, beside, files, others)


def check_outputs(cases: Sequence[Case], settings: Settings, batch: Sequence[Path] = ()) -> None:
    """Check that no result replaces an image, another result, or a file that is there unless that is asked for.

    Args:
        cases: that this process segments.
        settings: see there.
        batch: images that are not to be replaced either, as those that other processes segment.

    Raises:
        InputError: when one would, or a result that is to be left out was made of something else.
    """
    first: dict[Path, Path] = {}
    for case in cases:
        for path in case.outputs:
            other = first.setdefault(path, case.image)
            if other != case.image:
                raise InputError(
                    f"{other} and {case.image}: both results would be {path}. Rename one of them, or choose one, in a "
                    "BIDS data set by --bids-filter-file."
                )
    images = {*batch, *(path for case in cases for path in case.files)}
    inputs = {file for path in images if path.exists() for file in files_in(path)}
    places = set(map(_place_of_file, inputs))
    for case in cases:
        existing = [path for path in case.outputs if path.exists()]
        for path in existing:
            if _place_of_file(path) in places:
                raise InputError(f"{path}: the result of {case.image} would replace this image. Name another --output.")
            goes_on = settings.skip_done and (case.labels in existing or case.started.exists())
            if not settings.overwrite and not goes_on:
                raise InputError(
                    f"{path}: exists. Pass --overwrite to replace it, or --skip-done to leave out images with a result."
                )
    _check_done([case for case in cases if settings.skip_done and case.is_done])
    replaced = [case for case in cases if settings.overwrite and not settings.skip_done and case.labels.exists()]
    _warn_of_others([path for case in replaced for path in case.others if path.exists() and path not in inputs])


def _place_of_file(path: Path) -> tuple[int, int]:
    """Return device and inode of a file, the same by whatever name or link it is reached."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _check_done(cases: Sequence[Case]) -> None:
    """Check the origin of results that are left out, and say where it is unknown, and which files are missing."""
    unknown = [case.labels for case in cases if not check_origin(case.labels, case.described_in, case.origin())]
    if unknown:
        logger.warning(
            "%d results, such as %s, are left out, but no record tells which image and bundle they are of.",
            *(len(unknown), unknown[0]),
        )
    missing = [path for case in cases for path in case.beside if path != case.described_in and not path.exists()]
    if missing:
        logger.warning(
            "%d files, such as %s, are not there, though their labels are. Pass --overwrite alone to have them.",
            *(len(missing), missing[0]),
        )


def _warn_of_others(others: Sequence[Path]) -> None:
    """Say which files beside labels that are replaced will still be of the old ones."""
    if others:
        logger.warning(
            "%d files, such as %s, are of labels that are replaced, and are not written again. Remove them, or ask "
            "for them again.",
            *(len(others), others[0]),
        )


def _check_still_absent(case: Case, settings: Settings) -> None:
    """Check that no other run has written labels since `check_outputs` looked for them."""
    if not settings.overwrite and case.is_done:
        raise InputError(
            f"{case.labels}: another run has written it while {case.image} was segmented, and it is kept. Name another "
            "--output for one of them, or divide the images by --share."
        )


def _write(segmentation: Segmentation, case: Case, strict: bool) -> WrittenSegmentation:
    """Write what goes beside the labels, then the labels; nothing if that is asked for and the result is doubtful."""
    doubts = segmentation.doubts()
    if strict and doubts:
        raise InputError(f"{case.image}: {doubts}. Nothing was written; without --strict it is, with a warning.")
    measures = (segmentation.volumes(), segmentation.qualities(), doubts, segmentation.weights)  # or refused
    for path in case.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    case.started.touch()
    try:
        for path, write in {**case.beside, case.labels: case.write}.items():
            write_atomically(path, partial(write, segmentation))
    except BaseException:
        if not any(path.exists() for path in case.outputs):
            case.started.unlink(missing_ok=True)
        raise
    case.started.unlink(missing_ok=True)
    return WrittenSegmentation(case.name, case.labels, *measures)


def write_picture(title: str, window: tuple[float, float] | None, segmentation: Segmentation, path: Path) -> None:
    """Write the picture of the contours as PNG."""
    image, labels, names = segmentation.image, segmentation.labels, segmentation.names
    save_overlay(image, labels, names, path, title, window, segmentation.doubts())


def write_nifti(segmentation: Segmentation, path: Path) -> None:
    """Write the labels as NIfTI, in the geometry of the image."""
    nibabel.save(label_image(segmentation.labels, segmentation.image), path)


def write_simpleitk(segmentation: Segmentation, path: Path) -> None:
    """Write the labels as NRRD or MetaImage, compressed, in the geometry of the image."""
    try:
        SimpleITK.WriteImage(to_simpleitk(segmentation.image, segmentation.labels), path, useCompression=True)
    except RuntimeError as error:  # which does not say why
        raise OSError(errno.EIO, "cannot be written by SimpleITK, as on a full disk", str(path)) from error


def _write_series(source: Path, series: str | None, segmentation: Segmentation, path: Path) -> None:
    files = series_files(source, series) if source.is_dir() else [str(source)]
    write_dicom_seg(files, segmentation, path)


def write_probabilities(segmentation: Segmentation, path: Path) -> None:
    """Write the probabilities of a segmentation, the classes last, if it has any."""
    if segmentation.probabilities is not None:
        image = segmentation.image
        write_probability_image(segmentation.probabilities, image.affine, path, image)


def _format(path: Path, settings: Settings) -> tuple[str, Write]:
    """Return the suffix of the labels' file, and what writes it."""
    if settings.format == "nifti":
        return ".nii.gz", write_nifti
    if path.is_dir() or path.suffix.lower() == ".dcm":
        return ".dcm", partial(_write_series, path, settings.series)
    suffix = path.name.lower()[len(image_name(path, SUFFIXES)) :]
    return (suffix, write_nifti) if suffix in NIFTI else (IN_ONE_FILE.get(suffix, suffix), write_simpleitk)


def image_names(images: Sequence[Path], channels: int = 1) -> list[str]:
    """Return the names of images, or of their first channels' files, after which results are named.

    Raises:
        InputError: when a file has none of the suffixes of images, or a name is not UTF-8.
    """
    return [_name(path, channels) for path in images]


def _name(path: Path, channels: int) -> str:
    if path.is_dir():  # of a link its own name, as of a link to a file
        name = path.resolve().name if path.name in ("", "..") else path.name
    else:
        name = result_name(path, channels)
    if os.fsencode(name).decode("utf-8", "replace") != name:
        raise InputError(
            f"{path}: its name is not UTF-8, so neither pictures nor tables can bear it. Rename it, for example with "
            "convmv."
        )
    return name
