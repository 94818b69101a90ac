"""The command `monai-iunet`. What a command needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    import nibabel
    import numpy as np
    import torch

__all__ = ["main"]

Number = TypeVar("Number", int, float)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Invertible U-Nets for MONAI.", pretty_exceptions_enable=False
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monai-iunet {package_version('monai-iunet')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def segment(
    images: Annotated[list[Path] | None, typer.Argument(help="NIfTI images, .nii or .nii.gz.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("segmentations"),
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. Default: the hippocampus bundle.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Segment both hippocampi of the MNI152 template.")] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Segment the left-right mirror image: for crops of the other side.")
    ] = False,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", ...')] = "auto",
) -> None:
    """Segment images: writes NAME_seg.nii.gz and the picture NAME_seg.png, prints the volume of each structure."""
    from monai_iunet.images import InputError

    if example == bool(images):
        raise typer.BadParameter("name images, or --example, and not both.")
    try:
        _segment(images or [], output, bundle, mirror, device)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def _segment(images: list[Path], output: Path, bundle: Path | None, mirror: bool, device: str) -> None:
    import numpy as np

    from monai_iunet.images import InputError, check_folder, image_name, read_image

    names = [image_name(path) for path in images]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"Several images have the name {', '.join(twice)}: results would overwrite each other. Rename."
        )
    # Everything that can be wrong is found before the first result is written.
    for path in images:
        read_image(path)

    from monai_iunet.inference import BundleSegmenter, default_bundle
    from monai_iunet.whole_head import hippocampus_labels, load_template, register_template, segment_whole_head

    segmenter = BundleSegmenter(bundle or default_bundle(), None if device == "auto" else _device(device))
    regions = {}
    for path in images:
        image = read_image(path)
        if segmenter.finds_region(image, str(path)):
            try:
                regions[path] = register_template(image)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
    check_folder(output)
    both_sides = hippocampus_labels(segmenter.labels)
    if not images:
        template = load_template()
        _report(template, segment_whole_head(template, segmenter, np.eye(4)), both_sides, "mni152", output)
    for path, name in zip(images, names):
        image = read_image(path)
        if path in regions:
            _report(image, segment_whole_head(image, segmenter, regions[path]), both_sides, name, output)
        else:
            labels = segmenter(image, mirrored=mirror)
            _report(image, labels, segmenter.labels, name, output, segmenter.window)


def _report(
    image: nibabel.Nifti1Image,
    labels: np.ndarray,
    names: dict[int, str],
    name: str,
    output: Path,
    window: tuple[float, float] | None = None,
) -> None:
    import nibabel

    from monai_iunet.images import write_labels
    from monai_iunet.overlay import save_overlay

    voxel = nibabel.affines.voxel_sizes(image.affine).prod()
    volumes = {value: int((labels == value).sum()) * voxel for value in names}
    written = output / f"{name}_seg.nii.gz"
    write_labels(labels, image, written)
    save_overlay(image, labels, names, output / f"{name}_seg.png", title=name, window=window)
    typer.echo(f"{written}")
    width = max(map(len, names.values()))
    for value, structure in names.items():
        typer.echo(f"  {structure:<{width}}  {volumes[value]:8.0f} mm³")
    for side in ("left", "right"):
        parts = [volumes[value] for value, structure in names.items() if structure.startswith(f"{side} ")]
        if len(parts) > 1:
            typer.echo(f"  {f'{side}, whole':<{width}}  {sum(parts):8.0f} mm³")


@app.command()
def benchmark(
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", ...')] = "cpu",
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure other packages too, as far as they are installed.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("benchmark"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small networks, few rounds: whether everything runs, in a minute.")
    ] = False,
) -> None:
    """Measure memory and speed: ours, and others side by side; writes benchmark.json and benchmark.png."""
    from monai_iunet.images import InputError, check_folder

    try:
        place = _device(device)
        check_folder(output)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error

    from rich.console import Console

    from monai_iunet.benchmark import run

    console = Console()
    console.width = max(console.width, 150)  # the tables are wide; better cut by the terminal than wrapped
    run.run_benchmark(place, peers, run.QUICK if quick else run.FULL, output, console)
    typer.echo(f"{output / 'benchmark.json'}\n{output / 'benchmark.png'}")


@app.command()
def plan(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    gpu_memory: Annotated[
        str | None, typer.Option(help='Show the largest patch and the most couplings too that this takes: "24 GiB".')
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 under autocast.")] = "float32",
    patch: Annotated[str | None, typer.Option(help="Patch in voxels, such as 96,96,96. Default: the bundle's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Patches per step. Default: the bundle's.")] = None,
) -> None:
    """Say what a bundle's training will hold, part by part, and what fits a given memory; nothing is allocated."""
    from monai_iunet.images import InputError

    try:
        from rich.console import Console

        from monai_iunet.bundle_plan import BundleTraining, read_dtype

        size = _numbers(patch, int, "--patch") if patch else None
        training = BundleTraining(bundle, read_dtype(dtype), size, batch_size)
        console = Console()
        console.print(training.parts())
        if gpu_memory is not None:
            console.print(training.fitting(gpu_memory))
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def compare(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder with dataset.json.")],
    max_epochs: Annotated[int, typer.Option(min=1, help="Epochs that each network is trained.")],
    output: Annotated[Path, typer.Option(help="Folder for the results; created if need be.")] = Path("comparison"),
) -> None:
    """Train DynUNet and SegResNet as a bundle trains its own network; print what each reaches and costs."""
    from monai_iunet.comparison import as_markdown, compare_networks
    from monai_iunet.images import InputError

    try:
        result = compare_networks(bundle, dataset_dir, output, max_epochs)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(as_markdown(result))


@app.command()
def report(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle that was trained and evaluated in it.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder with dataset.json.")],
) -> None:
    """Draw a bundle's training, and its best, median and worst case: pictures for its README."""
    from monai_iunet.bundle_report import write_report
    from monai_iunet.images import InputError

    try:
        written = write_report(bundle, dataset_dir)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("\n".join(map(str, written)))


@app.command("init-bundle")
def new_bundle(
    name: Annotated[
        str, typer.Option(help="Name of the bundle and of its folder, such as iunet_liver_ct_segmentation.")
    ],
    modality: Annotated[str, typer.Option(help="MR or CT.")],
    classes: Annotated[str, typer.Option(help="Structures in the order of their labels, such as liver,tumor.")],
    spacing: Annotated[str, typer.Option(help="Voxels that the network sees, in mm.")] = "1,1,1",
    roi_size: Annotated[str, typer.Option(help="Patch, in voxels; multiples of 8.")] = "96,96,96",
    output: Annotated[Path, typer.Option(help="Folder in which the bundle's folder is made.")] = Path("."),
) -> None:
    """Write a bundle for a task of one's own: configs to train, evaluate and segment, ready to run."""
    from monai_iunet.images import InputError

    try:
        from monai_iunet import bundle_template

        task = bundle_template.Task(
            name=name,
            modality=modality,  # type: ignore[arg-type] # it checks
            classes=tuple(part.strip() for part in classes.split(",")),
            dataset=name,
            spacing=_numbers(spacing, float, "--spacing"),
            roi_size=_numbers(roi_size, int, "--roi-size"),
        )
        typer.echo(bundle_template.write_bundle(task, output / name))
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> tuple[Number, Number, Number]:
    from monai_iunet.images import InputError

    try:
        first, second, third = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: three numbers with commas are needed, such as 1,1,1.") from error
    return first, second, third


def _device(name: str) -> torch.device:
    """A device by its name, of which it is known that tensors can be made on it."""
    import torch

    from monai_iunet.images import InputError

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here. Use cpu.") from error


def main() -> None:
    """Run the command line."""
    app()
