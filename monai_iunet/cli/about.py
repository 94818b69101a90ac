"""The commands that tell of the package and measure it, and write its module for 3D Slicer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from monai_iunet.cli.application import app, device_of, input_errors

__all__: list[str] = []


@app.command(epilog="Example: monai-iunet guide segment")
def guide(
    name: Annotated[
        str | None, typer.Argument(help="Name of a guide; all names by default.", show_default=False)
    ] = None,
) -> None:
    """Show a guide; it comes with the package and needs no network."""
    with input_errors("index"):
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
    with input_errors("benchmark"):
        from monai_iunet.io.files import check_folder, hold_folder

        place = device_of(device)
        check_folder(output)

        from rich.console import Console

        from monai_iunet.benchmark.figure import draw
        from monai_iunet.benchmark.run import run_benchmark

        console = Console()
        console.width = max(console.width, 150)  # the tables are wide; better cut by the terminal than wrapped
        file = output / "benchmark.json"
        with hold_folder(output):
            failures = run_benchmark(place, file, console, peers, quick, minutes, section or (), overwrite)
        typer.echo(file)
        if draw(file, file.with_suffix(".png")):
            typer.echo(file.with_suffix(".png"))
        for failure in failures:
            typer.echo(f"Error: {failure}", err=True)
        if failures:
            raise typer.Exit(1)


@app.command(epilog="Example: monai-iunet slicer ~/slicer-modules")
def slicer(
    folder: Annotated[Path, typer.Argument(help="Folder to add to the module paths of 3D Slicer.")],
) -> None:
    """Write a module for 3D Slicer: a program that segments in this environment what Slicer hands over."""
    with input_errors("programs"):
        from monai_iunet.interop.slicer import write_module

        typer.echo(write_module(folder))
        typer.echo(f"Add {folder.resolve()} in Slicer: Edit, Application Settings, Modules, Additional module paths.")
