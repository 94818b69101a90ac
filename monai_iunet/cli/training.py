"""The commands that plan, train, compare and judge networks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from monai_iunet.cli.application import Device, app, check_left_out, device_of, input_errors, numbers

__all__: list[str] = []


class MissingLabels(str, Enum):
    """What a structure is in a case whose label has no voxel of it."""

    background = "background"
    unlabeled = "unlabeled"


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
    with input_errors("train"), _progress_on_terminal():
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
            spacing=None if spacing is None else numbers(spacing, float, "--spacing"),
            roi_size=roi_size if roi_size in (None, "whole") else numbers(roi_size, int, "--roi-size"),
            growing=growing,
            missing_labels=None if missing_labels is None else missing_labels.value,
            all_cases=all_cases,
            device=None if device == "auto" else str(device_of(device)),
            skip_bad_cases=skip_bad_cases,
            plan_only=plan_only,
            console=Console(markup=False),  # names of structures may have brackets
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
    with input_errors("memory"):
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
            check_left_out(of_segmentation, "of a segmentation, not of a training. Pass --image too, or leave it out.")
        else:
            check_left_out(of_training, "of a training, not of a segmentation. Leave it out, or --image.")
        console = Console()
        if image is not None:
            size, millimeters = numbers(image, int, "--image"), numbers(spacing, float, "--spacing")
            with console.status("counting the bytes of a segmentation"):
                table = inference_table(bundle_folder(bundle), size, millimeters, measure)
            console.print(table)
            return
        patch_size = None if patch is None else numbers(patch, int, "--patch")
        budget = None if gpu_memory is None else read_budget(gpu_memory)
        training = BundleTraining(bundle_folder(bundle), read_dtype(dtype), patch_size, batch_size)
        with console.status("counting the bytes of a step"):
            table = training.parts()
        console.print(table)
        if budget is not None:
            with console.status("looking for the largest patch and the most couplings"):
                table = training.fitting(budget)
            console.print(table)


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
    with input_errors("train"):
        from monai_iunet.bundling.evaluation_data import bundle_cases
        from monai_iunet.bundling.fit_quality import as_markdown, evaluate_quality
        from monai_iunet.io.bundles import bundle_folder

        folder = bundle_folder(bundle)
        place = None if device == "auto" else device_of(device)
        model = evaluate_quality(folder, bundle_cases(folder, dataset_dir), place, damages, refit, weights=weights)
        if model is not None:
            typer.echo(as_markdown(model))


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
    with input_errors("train"):
        from monai_iunet.benchmark.arms import ARMS, arms_as_markdown, compare_arms
        from monai_iunet.benchmark.arms_figure import save_arms
        from monai_iunet.benchmark.comparison import NETWORKS, as_markdown, compare_networks
        from monai_iunet.errors import InputError
        from monai_iunet.io.bundles import bundle_folder

        if minutes is not None and max_epochs is None:
            check_left_out({"--networks": networks is not None}, "of a comparison by --max-epochs.")
            arms = "patch,whole,growing,DynUNet,SegResNet" if arms is None else arms
            chosen = [name.strip() for name in arms.split(",")]
            if not set(chosen) <= set(ARMS):
                raise InputError(f"--arms {arms}: one or several of {','.join(ARMS)} are needed.")
            of_test, of_seed = 16 if tests is None else tests, seed or 0
            found = compare_arms(bundle_folder(bundle), dataset_dir, output, minutes, chosen, of_test, of_seed)
            typer.echo(arms_as_markdown(found))
            typer.echo(f"{save_arms(found, output / 'comparison.png')}")
        elif max_epochs is not None and minutes is None:
            of_minutes = {"--arms": arms is not None, "--tests": tests is not None, "--seed": seed is not None}
            check_left_out(of_minutes, "of a comparison by --minutes.")
            networks = "DynUNet,SegResNet" if networks is None else networks
            names = [name.strip() for name in networks.split(",")]
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
    with input_errors("train"):
        from monai_iunet.bundling.report import write_report
        from monai_iunet.io.bundles import bundle_folder

        written = write_report(bundle_folder(bundle), dataset_dir)
        typer.echo("\n".join(map(str, written)))
