"""The commands that segment images: `segment` and `bids`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monai_iunet.cli.application import Device, app, check_left_out, device_of, input_errors, own_device

if TYPE_CHECKING:
    from monai_iunet.segmentation.files import Failure, WrittenSegmentation

__all__: list[str] = []


class TableFormat(str, Enum):
    """Formats of a table of volumes."""

    csv = "csv"
    json = "json"


class AnalysisLevel(str, Enum):
    """Levels of a BIDS app."""

    participant = "participant"
    group = "group"


class ProbabilityType(str, Enum):
    """Types of probabilities."""

    float32 = "float32"
    float16 = "float16"


class LabelFormat(str, Enum):
    """Formats of labels."""

    nifti = "nifti"
    input = "input"


# Options that both have.
FailFast = Annotated[
    bool, typer.Option("--fail-fast", help="Stop at the first image that cannot be segmented; else go on.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there; else they are an error.")]
SkipDone = Annotated[bool, typer.Option("--skip-done", help="Leave out images that have labels in the output folder.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Take a doubtful segmentation for an error, and write nothing of it.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image, for programs.")]


@app.command(epilog="Example: monai-iunet segment scans/*.nii.gz --output labels --volumes csv --report")
def segment(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Images: NIfTI, NRRD, MetaImage, or a folder with a DICOM series. Channels are NAME_0000, NAME_0001, "
            "... or the last axis of a 4D NIfTI file.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("segmentations"),
    bundle: Annotated[
        str, typer.Option(help='Bundle: a folder, or a name from "monai-iunet bundles", such as headneck.')
    ] = "hippocampus",
    example: Annotated[bool, typer.Option("--example", help="Segment both hippocampi of the MNI152 template.")] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Segment the left-right mirror image: for crops of the other side.")
    ] = False,
    series: Annotated[
        str | None, typer.Option(help="DICOM series, by its UID or the beginning or end of it.", show_default=False)
    ] = None,
    overlay: Annotated[bool, typer.Option(help="Write a picture of the contours, NAME_seg.png.")] = True,
    volumes: Annotated[
        TableFormat | None,
        typer.Option(help="Write volumes and predicted Dice of all images as a table, too.", show_default=False),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of each class too, NAME_prob.nii.gz.")
    ] = False,
    probabilities_dtype: Annotated[
        ProbabilityType, typer.Option(help="Type of the probabilities; float16 is written as uint16 with a slope.")
    ] = ProbabilityType.float32,
    format: Annotated[
        LabelFormat, typer.Option(help="Format of the labels: NIfTI, or the input's own; DICOM SEG for a series.")
    ] = LabelFormat.nifti,
    device: Device = "auto",
    fail_fast: FailFast = False,
    overwrite: Overwrite = False,
    skip_done: SkipDone = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page to look through all results, report.html.")
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(help="Part of the images: K/N, or auto under torchrun and SLURM.", show_default=False),
    ] = None,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Segment images: writes NAME_seg.nii.gz and the picture NAME_seg.png, prints volumes and predicted Dice."""
    if example == bool(images):
        raise typer.BadParameter("name images, or --example, and not both.")
    with input_errors("segment"):
        from monai_iunet.io.bundles import bundle_folder
        from monai_iunet.io.channels import group_channels
        from monai_iunet.segmentation.files import EXAMPLE_IMAGE, Settings, image_names, segment_example, segment_files
        from monai_iunet.segmentation.records import RECORD_SUFFIX, check_records, is_table, write_table
        from monai_iunet.segmentation.report import is_report, write_report
        from monai_iunet.segmentation.segmenter import BundleSegmenter
        from monai_iunet.segmentation.share import Share
        from monai_iunet.visualization.page import viewer_program

        check_left_out(
            {"--probabilities-dtype": probabilities_dtype is not ProbabilityType.float32 and not probabilities},
            "of probabilities, which are not written. Pass --probabilities too, or leave it out.",
        )
        check_left_out(
            {"--series": series is not None and all(path.is_file() for path in images or ())},
            "of a folder with DICOM files, and none is named. Name the folder, or leave it out.",
        )
        check_left_out(
            {"--mirror": example and mirror, "--share": example and share is not None},
            "of images of your own; the example is one head, of which both sides are segmented. Leave it out.",
        )
        part = Share.parse(share)
        place = own_device() if device == "auto" else device_of(device)
        segmenter = BundleSegmenter(
            bundle_folder(bundle), place, probabilities, sys.stderr.isatty(), probabilities_dtype.value
        )
        table = None if volumes is None else output / f"volumes.{volumes.value}"
        page = output / "report.html" if report else None
        if page is not None:
            viewer_program()
        goes_on = skip_done or part.count > 1
        _check_free(table, overwrite, is_table if goes_on else None)
        _check_free(page, overwrite, is_report if goes_on else None)
        settings = Settings(
            *(mirror, overlay, format.value, series, fail_fast, overwrite, skip_done),
            record=bool(table or page or skip_done),
            view=page is not None,
            share=part,
            strict=strict,
        )
        if images:
            outcomes = segment_files(images, segmenter, output, settings)
            paths = [files[0] for files in group_channels(images, segmenter.channels)]
            own = len(paths[part.index :: part.count])
        else:
            outcomes, paths, own = segment_example(segmenter, output, settings), [EXAMPLE_IMAGE], 1
        names = image_names(paths, segmenter.channels)
        if table is not None or page is not None:
            check_records(output, names)
        say = _ignore if quiet or as_json else typer.echo
        with _said(outcomes, quiet, as_json) as (done, failures):
            left_out = own - done - len(failures)
            if left_out:
                say(f"Left out: {left_out} of {own} images, whose results are there.")
            if table is not None and write_table(output, names, table):
                say(table)
            failed = {failure.path for failure in failures}
            recorded = [name for name, path in zip(names, paths) if path not in failed]
            absent = [name for name in recorded if not (output / f"{name}{RECORD_SUFFIX}").exists()]
            if absent and (table or page):
                say(
                    f"Not in the table: {len(absent)} of {len(names)} images without a record, such as {absent[0]}: "
                    "not done yet, or done without --volumes and --report."
                )
            reasons = [failure.reason for failure in failures]
            if page is not None and write_report(output, output, page, names, reasons, _command()):
                say(page)


class _LabelsInARow(typer.core.TyperCommand):
    """A command whose options for labels take several in a row, as those of BIDS apps do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further label, once the three arguments were there."""
        switches = {name for option in self.params if getattr(option, "is_flag", False) for name in option.opts}
        words, option, arguments, previous = [], None, 0, ""
        for word in args:
            if word.startswith("-"):
                name, sign, value = word.partition("=")
                word = name.replace("_label", "-label") + sign + value  # as BIDS apps write it, too
                option = word if word.endswith("-label") else None
            elif not previous.startswith("-") or previous in switches:
                arguments += 1
                if option and arguments > 3:
                    words.append(option)
            words.append(word)
            previous = word
        return super().parse_args(ctx, words)


@app.command(
    cls=_LabelsInARow,
    epilog="Example: monai-iunet bids DATA DATA/derivatives/iunet participant",
)
def bids(
    bids_dir: Annotated[Path, typer.Argument(help="Folder of the BIDS data set.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder of the derivatives; created if need be.")],
    level: Annotated[
        AnalysisLevel, typer.Argument(help="participant: segment; group: one table of the volumes of all.")
    ],
    participant_label: Annotated[
        list[str] | None,
        typer.Option("--participant-label", help="Participants, one or several; all by default.", show_default=False),
    ] = None,
    session_label: Annotated[
        list[str] | None,
        typer.Option("--session-label", help="Sessions, one or several; all by default.", show_default=False),
    ] = None,
    bids_filter_file: Annotated[
        Path | None,
        typer.Option(help='JSON file: {"t1w": {"acquisition": "mprage"}}.', show_default=False),
    ] = None,
    bundle: Annotated[
        str, typer.Option(help='Bundle: a folder, or a name from "monai-iunet bundles".')
    ] = "hippocampus",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write probabilities too, probseg.nii.gz.")
    ] = False,
    device: Device = "auto",
    fail_fast: FailFast = False,
    overwrite: Overwrite = False,
    skip_done: SkipDone = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page to look through the results, report.html.")
    ] = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Segment a BIDS data set into BIDS derivatives: labels, side-cars, tables of names and volumes."""
    with input_errors("bids"):
        from monai_iunet.bids.group import segment_participants, write_group_table
        from monai_iunet.io.bundles import bundle_folder
        from monai_iunet.segmentation.files import Settings
        from monai_iunet.segmentation.report import VIEWS, is_report, write_report
        from monai_iunet.segmentation.segmenter import BundleSegmenter
        from monai_iunet.visualization.page import viewer_program

        if level is AnalysisLevel.group:
            of_participants = {
                "--participant-label": bool(participant_label),
                "--session-label": bool(session_label),
                "--bids-filter-file": bids_filter_file is not None,
                "--probabilities": probabilities,
                "--report": report,
                "--strict": strict,
            }
            check_left_out(of_participants, "of the level participant; that of the group has all. Leave it out.")
        place = own_device() if device == "auto" else device_of(device)
        segmenter = BundleSegmenter(bundle_folder(bundle), place, probabilities, progress=sys.stderr.isatty())
        if level is AnalysisLevel.group:
            table, without = write_group_table(bids_dir, output_dir, segmenter)
            typer.echo(f"{table}")
            for subject in without:
                typer.echo(f"Error: sub-{subject}: has no result.", err=True)
            if without:
                raise typer.Exit(2)
            return
        page = output_dir / "report.html" if report else None
        if page is not None:
            viewer_program()
        _check_free(page, overwrite, is_report if skip_done else None)
        settings = Settings(fail_fast=fail_fast, overwrite=overwrite, skip_done=skip_done, view=report, strict=strict)
        outcomes = segment_participants(
            *(bids_dir, output_dir, segmenter, settings),
            *(participant_label or (), session_label or (), bids_filter_file),
        )
        say = _ignore if quiet or as_json else typer.echo
        with _said(outcomes, quiet, as_json) as (_, failures):
            reasons = [failure.reason for failure in failures]
            views = output_dir / VIEWS
            if page is not None and write_report(views, output_dir, page, [], reasons, _command()):
                say(page)


def _check_free(path: Path | None, overwrite: bool, is_ours: Callable[[Path], bool] | None) -> None:
    """Check that a file that sums a batch up is not there, unless it may be replaced.

    Args:
        path: the file.
        overwrite: whether any may be replaced.
        is_ours: whether an earlier run, which this one goes on with, wrote it; None for a run that begins anew.
    """
    from monai_iunet.errors import InputError

    if path is not None and path.exists() and not overwrite and not (is_ours and is_ours(path)):
        raise InputError(f"{path}: exists. Pass --overwrite to replace it, or name another --output.")


def _command() -> str:
    """Return the command that is running, as it is typed."""
    return shlex.join(["monai-iunet", *sys.argv[1:]])


def _ignore(_: object) -> None:
    """Print nothing, in the place of `typer.echo`."""


@contextlib.contextmanager
def _said(
    outcomes: Iterator[WrittenSegmentation | Failure], quiet: bool, as_json: bool
) -> Iterator[tuple[int, list[Failure]]]:
    """Print each result when it comes, and what went wrong at the end, also when a full disk ends the batch.

    Yields:
        How many images were segmented, and the others.
    """
    from monai_iunet.segmentation.files import Failure

    done = 0
    failures: list[Failure] = []
    try:
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                failures.append(outcome)
                if as_json:
                    typer.echo(json.dumps({"image": str(outcome.path), "error": outcome.reason}))
                continue
            done += 1
            if as_json or not quiet:
                typer.echo(_result_as_json(outcome) if as_json else _result_as_text(outcome))
            if outcome.doubts:
                typer.echo(f"Warning: {outcome.written}: {outcome.doubts}", err=True)
        yield done, failures
    finally:
        for failure in failures:
            typer.echo(f"Error: {failure.reason}", err=True)
    if failures:
        raise typer.Exit(2)


def _result_as_json(result: WrittenSegmentation) -> str:
    facts = {"image": result.name, "labels": str(result.written), "volumes_mm3": result.volumes}
    return json.dumps({**facts, "quality": result.quality, "doubts": result.doubts, "weights": result.weights})


def _result_as_text(result: WrittenSegmentation) -> str:
    """Return the file of a result, and a line for each structure: volume, quality, and weights if they are others."""
    lines = [f"{result.written}"]
    width = max(map(len, result.volumes))
    for structure, volume in result.volumes.items():
        quality = result.quality[structure]
        text = "quality unknown" if quality is None else f"predicted Dice {quality:.2f}"
        weights = (result.weights or {}).get(structure, "model")
        text += "" if weights == "model" else f", weights {weights}"
        lines.append(f"  {structure:<{width}}  {volume:8.0f} mm³  {text}")
    return "\n".join(lines)
