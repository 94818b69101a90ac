"""The command `monai-iunet`. What a command needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    import torch

    from monai_iunet.segmentation.files import Failure, WrittenSegmentation

__all__ = ["main"]

Number = TypeVar("Number", int, float)


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


class MissingLabels(str, Enum):
    """What a structure is in a case whose label has no voxel of it."""

    background = "background"
    unlabeled = "unlabeled"


class LabelFormat(str, Enum):
    """Formats of labels."""

    nifti = "nifti"
    input = "input"


app = typer.Typer(
    help="Invertible U-Nets for MONAI.",
    epilog="Example: monai-iunet segment --example --output example",
    pretty_exceptions_enable=False,
)

# Options that several commands have.
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", ...')]
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

EXAMPLES = """\
monai-iunet segments medical images, and trains the networks that do. Three examples:

  monai-iunet segment --example --output example
      both hippocampi in the MNI152 template; labels, a picture, volumes
  monai-iunet segment CT.nii.gz --bundle headneck --report
      organs at risk in a CT of head and neck, and a page to look through
  monai-iunet plan --bundle headneck --gpu-memory "24 GiB"
      what a training would hold, and which patch fits

"monai-iunet --help" lists all commands, "monai-iunet guide" all guides."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monai-iunet {package_version('monai-iunet')}")
        raise typer.Exit


def _show_slicer_module(wanted: bool) -> None:
    if wanted:
        from monai_iunet.interop.slicer import module_description

        typer.echo(module_description(), nl=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    xml: Annotated[
        bool, typer.Option("--xml", callback=_show_slicer_module, is_eager=True, help="Show the module for 3D Slicer.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(EXAMPLES)


@contextlib.contextmanager
def _input_errors(guide: str = "index") -> Iterator[None]:
    """Errors in a line that names the guide: the exit status is 2 for what a user handed in, 1 for a full disk."""
    from monai_iunet.errors import InputError

    try:
        yield
    except BrokenPipeError:  # who reads what is printed has seen enough; click ends without a word
        raise
    except (InputError, OSError) as error:
        typer.echo(f"Error: {_as_sentence(error)} Guide: monai-iunet guide {guide}.", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error


def _as_sentence(error: Exception) -> str:
    """Return what an error says; of one of the system, the file comes first, and what to do where the disk is full."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and "Make room" not in text:
            text += ". Make room there, and call it again"
    return text if text.endswith((".", "!", "?")) else f"{text}."


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
    with _input_errors("segment"):
        from monai_iunet.io.bundles import bundle_folder
        from monai_iunet.io.channels import group_channels
        from monai_iunet.segmentation.files import EXAMPLE_IMAGE, Settings, image_names, segment_example, segment_files
        from monai_iunet.segmentation.records import RECORD_SUFFIX, check_records, is_table, write_table
        from monai_iunet.segmentation.report import is_report, write_report
        from monai_iunet.segmentation.segmenter import BundleSegmenter
        from monai_iunet.segmentation.share import Share
        from monai_iunet.visualization.page import viewer_program

        _check_left_out(
            {"--probabilities-dtype": probabilities_dtype is not ProbabilityType.float32 and not probabilities},
            "of probabilities, which are not written. Pass --probabilities too, or leave it out.",
        )
        _check_left_out(
            {"--series": series is not None and all(path.is_file() for path in images or ())},
            "of a folder with DICOM files, and none is named. Name the folder, or leave it out.",
        )
        part = Share.parse(share)
        place = _own_device() if device == "auto" else _device(device)
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
    with _input_errors("bids"):
        from monai_iunet.bids.group import segment_participants, write_group_table
        from monai_iunet.io.bundles import bundle_folder
        from monai_iunet.segmentation.files import Settings
        from monai_iunet.segmentation.report import VIEWS, is_report, write_report
        from monai_iunet.segmentation.segmenter import BundleSegmenter
        from monai_iunet.visualization.page import viewer_program

        place = _own_device() if device == "auto" else _device(device)
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


@app.command(epilog="Example: monai-iunet bundles")
def bundles() -> None:
    """List the bundles that are installed: task, modality, classes, Dice and memory."""
    with _input_errors("segment"):
        from monai_iunet.io.bundles import bundle_facts, installed_bundles

        for name, folder in installed_bundles().items():
            facts = bundle_facts(folder)
            memory = facts["training_mib"]
            lines = {
                "task": facts["task"],
                "modality": facts["modality"],
                "classes": ", ".join(facts["classes"]),
                "mean Dice": facts["dice"] and f"{facts['dice']:.3f} on its validation cases",
                "training": memory and f"{memory} MiB in a step, beside parameters and gradients",
            }
            typer.echo(name)
            for title, text in lines.items():
                typer.echo(f"  {title:<11}{text or 'not measured'}")


@app.command(epilog="Example: monai-iunet guide segment")
def guide(
    name: Annotated[
        str | None, typer.Argument(help="Name of a guide; all names by default.", show_default=False)
    ] = None,
) -> None:
    """Show a guide; it comes with the package and needs no network."""
    with _input_errors("index"):
        from rich.console import Console
        from rich.markdown import Markdown

        from monai_iunet.guides.read import guide_titles, read_guide

        if name is None:
            titles = guide_titles()
            width = max(map(len, titles))
            for page, title in titles.items():
                typer.echo(f"{page:<{width}}  {title}")
        elif sys.stdout.isatty():
            Console().print(Markdown(read_guide(name)))
        else:
            typer.echo(read_guide(name), nl=False)


@app.command(epilog="Example: monai-iunet info")
def info() -> None:
    """Print versions and devices, for a bug report."""
    from monai_iunet.system import describe_system

    for name, value in describe_system().items():
        typer.echo(f"{name:<17}{value}")


@app.command(epilog="Example: monai-iunet benchmark --quick --output benchmark")
def benchmark(
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", ...')] = "cpu",
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure other packages too, as far as they are installed.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("benchmark"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small images, one round: whether everything runs, in some minutes.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing new after this time. The most telling comes first.", min=0)
    ] = None,
    section: Annotated[
        list[str] | None, typer.Option(help="Measure only this, such as memory; may be repeated.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure again what is in the output folder; else it is kept.")
    ] = False,
) -> None:
    """Measure memory and speed: ours, and others side by side; writes benchmark.json and benchmark.png.

    Results are saved as they come; the same command goes on where it was interrupted.
    """
    with _input_errors("benchmark"):
        from monai_iunet.io.files import check_folder

        place = _device(device)
        check_folder(output)

        from rich.console import Console

        from monai_iunet.benchmark.figure import draw
        from monai_iunet.benchmark.run import run_benchmark

        console = Console()
        console.width = max(console.width, 150)  # the tables are wide; better cut by the terminal than wrapped
        file = output / "benchmark.json"
        failures = run_benchmark(place, file, console, peers, quick, minutes, section or (), overwrite)
        typer.echo(file)
        if draw(file, file.with_suffix(".png")):
            typer.echo(file.with_suffix(".png"))
        for failure in failures:
            typer.echo(f"Error: {failure}", err=True)
        if failures:
            raise typer.Exit(1)


@app.command(epilog='Example: monai-iunet plan --bundle headneck --gpu-memory "24 GiB"')
def plan(
    bundle: Annotated[str, typer.Option(help="Bundle: a folder, or the name of one that is installed.")],
    gpu_memory: Annotated[
        str | None, typer.Option(help='Show the largest patch and the most couplings too that fit a GPU: "24 GiB".')
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 under autocast.")] = "float32",
    patch: Annotated[str | None, typer.Option(help="Patch in voxels, such as 96,96,96. Default: the bundle's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Patches per step. Default: the bundle's.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Plan the segmentation of an image of this size instead, such as 512,512,800.")
    ] = None,
    spacing: Annotated[str, typer.Option(help="Voxel size of the image (--image), in mm.")] = "1,1,1",
    measure: Annotated[bool, typer.Option("--measure", help="Run the network once, to tell the time.")] = False,
) -> None:
    """Say what a bundle's training will hold, part by part, and what fits a memory; or a segmentation (--image)."""
    with _input_errors("memory"):
        from rich.console import Console

        from monai_iunet.bundling.plan import BundleTraining, inference_table, read_budget, read_dtype
        from monai_iunet.io.bundles import bundle_folder

        of_segmentation = {"--spacing": spacing != "1,1,1", "--measure": measure}
        of_training = {
            "--gpu-memory": gpu_memory is not None,
            "--dtype": dtype != "float32",
            "--patch": patch is not None,
            "--batch-size": batch_size is not None,
        }
        if image is None:
            _check_left_out(of_segmentation, "of a segmentation, not of a training. Pass --image too, or leave it out.")
        else:
            _check_left_out(of_training, "of a training, not of a segmentation. Leave it out, or --image.")
        console = Console()
        if image is not None:
            size, millimeters = _numbers(image, int, "--image"), _numbers(spacing, float, "--spacing")
            with console.status("counting the bytes of a segmentation"):
                table = inference_table(bundle_folder(bundle), size, millimeters, measure)
            console.print(table)
            return
        patch_size = _numbers(patch, int, "--patch") if patch else None
        budget = None if gpu_memory is None else read_budget(gpu_memory)
        training = BundleTraining(bundle_folder(bundle), read_dtype(dtype), patch_size, batch_size)
        with console.status("counting the bytes of a step"):
            table = training.parts()
        console.print(table)
        if budget is not None:
            with console.status("looking for the largest patch and the most couplings"):
                table = training.fitting(budget)
            console.print(table)


@app.command(epilog="Example: monai-iunet compare --bundle hippocampus --dataset-dir DATA --max-epochs 10")
def compare(
    bundle: Annotated[str, typer.Option(help="Bundle: a folder, or the name of one that is installed.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder with dataset.json.")],
    max_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs that each network is trained.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Instead, compare ways to train (--arms), each trained for so long."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("comparison"),
    networks: Annotated[
        str | None,
        typer.Option(help="With --max-epochs, networks to compare with. Default: DynUNet,SegResNet."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="With --minutes, ways to train, some of patch, whole, growing, DynUNet, SegResNet, residual, mednext; "
            "the bundle is a plan that fit has made. Default: the first five."
        ),
    ] = None,
    tests: Annotated[
        int | None, typer.Option(min=1, help="With --minutes, cases that are kept to test. Default: 16.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="With --minutes, random seed of the trainings; the test cases stay the same. Default: 0."),
    ] = None,
) -> None:
    """Train other networks as a bundle trains its own, or ways to train side by side; print what each reaches."""
    with _input_errors("train"):
        from monai_iunet.benchmark.arms import ARMS, arms_as_markdown, compare_arms
        from monai_iunet.benchmark.arms_figure import save_arms
        from monai_iunet.benchmark.comparison import NETWORKS, as_markdown, compare_networks
        from monai_iunet.errors import InputError
        from monai_iunet.io.bundles import bundle_folder

        if minutes is not None and max_epochs is None:
            _check_left_out({"--networks": networks is not None}, "of a comparison by --max-epochs.")
            chosen = [name.strip() for name in (arms or "patch,whole,growing,DynUNet,SegResNet").split(",")]
            if not set(chosen) <= set(ARMS):
                raise InputError(f"--arms {arms}: one or several of {','.join(ARMS)} are needed.")
            of_test, of_seed = 16 if tests is None else tests, seed or 0
            found = compare_arms(bundle_folder(bundle), dataset_dir, output, minutes, chosen, of_test, of_seed)
            typer.echo(arms_as_markdown(found))
            typer.echo(f"{save_arms(found, output / 'comparison.png')}")
        elif max_epochs is not None and minutes is None:
            of_minutes = {"--arms": arms is not None, "--tests": tests is not None, "--seed": seed is not None}
            _check_left_out(of_minutes, "of a comparison by --minutes.")
            names = [name.strip() for name in (networks or "DynUNet,SegResNet").split(",")]
            if not set(names) <= set(NETWORKS):
                raise InputError(f"--networks {networks}: one or several of {','.join(NETWORKS)} are needed.")
            found = compare_networks(bundle_folder(bundle), dataset_dir, output, max_epochs, networks=names)
            typer.echo(as_markdown(found))
        else:
            raise InputError("compare: name either --max-epochs, of other networks, or --minutes, of ways to train.")


@app.command(epilog="Example: monai-iunet report --bundle iunet_liver_ct_segmentation --dataset-dir DATA")
def report(
    bundle: Annotated[str, typer.Option(help="Folder of a bundle that was trained and evaluated in it.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder with dataset.json.")],
) -> None:
    """Draw a bundle's training, and its best, median and worst case: pictures for its README."""
    with _input_errors("train"):
        from monai_iunet.bundling.report import write_report
        from monai_iunet.io.bundles import bundle_folder

        written = write_report(bundle_folder(bundle), dataset_dir)
        typer.echo("\n".join(map(str, written)))


@app.command(epilog="Example: monai-iunet fit DATA --output my_bundle --time 12h")
def fit(
    dataset: Annotated[
        Path, typer.Argument(help="Folder of the Decathlon or of nnU-Net, or with images and labels of the same names.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the bundle; called again, the command goes on with it.")],
    gpu_memory: Annotated[
        str | None,
        typer.Option(help='Memory of the GPU: "24 GiB". A step takes at most nine tenths. Default: what is there.'),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit for everything, such as 12h or 90min.")] = None,
    folds: Annotated[
        int | None, typer.Option(min=1, help="Folds that are trained. Default: 5 if the time is enough, else 1.")
    ] = None,
    fold: Annotated[int | None, typer.Option(min=0, help="The only fold to train.")] = None,
    modality: Annotated[
        str | None, typer.Option(help="MR or CT. Default: what the data set says, or looks like.")
    ] = None,
    spacing: Annotated[
        str | None, typer.Option(help="Voxels that the network sees, in mm, such as 1,1,1.5. Default: the plan's.")
    ] = None,
    roi_size: Annotated[
        str | None,
        typer.Option(help='Patch, in voxels, such as 96,96,64; or "whole" to see images whole. Default: the plan\'s.'),
    ] = None,
    growing: Annotated[bool, typer.Option("--growing", help="Begin the training with smaller patches.")] = False,
    missing_labels: Annotated[
        MissingLabels | None,
        typer.Option(
            help="What a structure is in cases without a voxel of it: background, or unlabeled, which is no part of "
            "the loss. Default: the plan's.",
            show_default=False,
        ),
    ] = None,
    all_cases: Annotated[
        bool,
        typer.Option(
            "--all-cases",
            help="At the end train one more network, on all cases, for the bundle. Its figures are those of the folds.",
        ),
    ] = False,
    device: Device = "auto",
    skip_bad_cases: Annotated[
        bool,
        typer.Option("--skip-bad-cases", help="Leave out cases that cannot be learned from; else they are an error."),
    ] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Stop when the plan is made and printed.")] = False,
) -> None:
    """Make a bundle from images and labels: plan, train, evaluate; nothing else need be chosen."""
    with _input_errors("train"), _progress_on_terminal():
        from rich.console import Console

        from monai_iunet.fitting.fit import fit as run

        bundle = run(
            dataset,
            output,
            gpu_memory=gpu_memory,
            time=time,
            folds=folds,
            fold=fold,
            modality=modality,
            spacing=None if spacing is None else _numbers(spacing, float, "--spacing"),
            roi_size=roi_size if roi_size in (None, "whole") else _numbers(roi_size, int, "--roi-size"),
            growing=growing,
            missing_labels=None if missing_labels is None else missing_labels.value,
            all_cases=all_cases,
            device=None if device == "auto" else str(_device(device)),
            skip_bad_cases=skip_bad_cases,
            plan_only=plan_only,
            console=Console(),
        )
        typer.echo(bundle)


@contextlib.contextmanager
def _progress_on_terminal() -> Iterator[None]:
    """Print what the package logs while a command runs."""
    from rich.logging import RichHandler

    log, handler = logging.getLogger("monai_iunet"), RichHandler(show_path=False)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@app.command(epilog="Example: monai-iunet quality --bundle headneck --dataset-dir DATA/OpenKBP_HeadNeck --refit")
def quality(
    bundle: Annotated[str, typer.Option(help="Bundle with weights: a folder, or the name of one that is installed.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder with dataset.json.")],
    damages: Annotated[int, typer.Option(min=1, help="Damaged copies of each validation case.")] = 6,
    refit: Annotated[bool, typer.Option("--refit", help="Fit again, where there is a model of the weights.")] = False,
    weights: Annotated[str, typer.Option(help="Name of the weights: those of models/NAME.pt.")] = "model",
    device: Device = "auto",
) -> None:
    """Fit the model that predicts the Dice of a bundle's segmentations: models/quality.json and docs/quality.png."""
    with _input_errors("train"):
        from monai_iunet.bundling.evaluation_data import bundle_cases
        from monai_iunet.bundling.fit_quality import as_markdown, evaluate_quality
        from monai_iunet.io.bundles import bundle_folder

        folder = bundle_folder(bundle)
        place = None if device == "auto" else _device(device)
        model = evaluate_quality(folder, bundle_cases(folder, dataset_dir), place, damages, refit, weights=weights)
        if model is not None:
            typer.echo(as_markdown(model))


@app.command(
    "init-bundle",
    epilog="Example: monai-iunet init-bundle --name my_liver --modality CT --classes liver,tumor",
)
def new_bundle(
    name: Annotated[
        str, typer.Option(help="Name of the bundle and of its folder, such as iunet_liver_ct_segmentation.")
    ],
    modality: Annotated[str, typer.Option(help="MR or CT.")],
    classes: Annotated[str, typer.Option(help="Structures in the order of their labels, such as liver,tumor.")],
    spacing: Annotated[str, typer.Option(help="Voxels that the network sees, in mm.")] = "1,1,1",
    roi_size: Annotated[
        str, typer.Option(help='Patch, in voxels, multiples of 8; or "whole", for images that are seen whole.')
    ] = "96,96,96",
    any_contrast: Annotated[
        bool,
        typer.Option("--any-contrast", help="Vary contrasts in training, so that MRI of others are segmented too."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder in which the bundle's folder is made.")] = Path("."),
) -> None:
    """Write a bundle for a task of one's own: configs to train, evaluate and segment, ready to run."""
    with _input_errors("train"):
        from monai_iunet.bundling.new_bundle import write_bundle
        from monai_iunet.bundling.task import Task

        task = Task(
            name=name,
            modality=modality,  # type: ignore[arg-type] # it checks
            classes=tuple(part.strip() for part in classes.split(",")),
            dataset=name,
            spacing=_numbers(spacing, float, "--spacing"),
            roi_size="whole" if roi_size == "whole" else _numbers(roi_size, int, "--roi-size"),
            any_contrast=any_contrast,
        )
        typer.echo(write_bundle(task, output / name))


@app.command("verify-bundle", epilog="Example: monai-iunet verify-bundle bundles/iunet_liver_ct_segmentation")
def verify(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> None:
    """Check a bundle as reviewers and other programs do, offline; exits with 1 if something is wrong."""
    with _input_errors("train"):
        from rich.console import Console

        from monai_iunet.bundling.verify import as_table, verify_bundle

        checks = verify_bundle(bundle)
        Console().print(as_table(checks, str(bundle)))
        if any(check.problem for check in checks):
            raise typer.Exit(1)


@app.command("nnunet-plans", epilog="Example: monai-iunet nnunet-plans nnUNetPlans.json")
def nnunet_plans(
    plans: Annotated[Path, typer.Argument(help="Plans file of nnU-Net v2, such as nnUNetPlans.json.")],
    configuration: Annotated[str, typer.Option(help="Configuration whose patch and batch are taken.")] = "3d_fullres",
    couplings: Annotated[int, typer.Option(min=1, help="Couplings per level.")] = 2,
) -> None:
    """Add configurations with an invertible U-Net to nnU-Net's plans: at its patch, and larger in its memory."""
    with _input_errors("nnunet"):
        from monai_iunet.interop.nnunet import add_configurations

        typer.echo("\n".join(add_configurations(plans, configuration, couplings)))


@app.command(epilog="Example: monai-iunet slicer ~/slicer-modules")
def slicer(
    folder: Annotated[Path, typer.Argument(help="Folder to add to the module paths of 3D Slicer.")],
) -> None:
    """Write a module for 3D Slicer: a program that segments in this environment what Slicer hands over."""
    with _input_errors("programs"):
        from monai_iunet.interop.slicer import write_module

        typer.echo(write_module(folder))
        typer.echo(f"Add {folder.resolve()} in Slicer: Edit, Application Settings, Modules, Additional module paths.")


def _check_left_out(given: Mapping[str, bool], reason: str) -> None:
    """Refuse options that were given and that nothing would be done with."""
    from monai_iunet.errors import InputError

    if wrong := [option for option, is_given in given.items() if is_given]:
        raise InputError(f"{', '.join(wrong)}: {reason}")


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> tuple[Number, Number, Number]:
    from monai_iunet.errors import InputError

    try:
        first, second, third = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: three numbers with commas are needed, such as 1,1,1.") from error
    return first, second, third


def _own_device() -> torch.device | None:
    """Return the GPU of this process, where torchrun or SLURM started several; None for the first, or for none."""
    import torch

    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    gpus = torch.cuda.device_count()
    return torch.device("cuda", int(local) % gpus) if local is not None and gpus else None


def _device(name: str) -> torch.device:
    """Return the device that `--device` names."""
    from monai_iunet.system import usable_device

    return usable_device(name, "--device")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every encoding has a "³"
    # Each `LoadImage` of MONAI 1.6 says that a decoder for GPUs is not there, which nothing here uses.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        # The system clears large tensors in pages of 2 MiB instead of 4 KiB, which saves a tenth to a quarter of the
        # CPU time of a network. See pytorch pull request 107697.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app()
