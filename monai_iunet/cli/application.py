"""The application, options that several commands have, and how errors are told."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "app", "check_left_out", "device_of", "input_errors", "numbers", "own_device"]

Number = TypeVar("Number", int, float)

app = typer.Typer(
    help="Invertible U-Nets for MONAI.",
    epilog="Example: monai-iunet segment --example --output example",
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", ...')]

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
def input_errors(guide: str = "index") -> Iterator[None]:
    """Print errors in a line that names the guide, and exit with 2 for what a user handed in, 1 for a full disk."""
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


def check_left_out(given: Mapping[str, bool], reason: str) -> None:
    """Refuse options that were given and that nothing would be done with."""
    from monai_iunet.errors import InputError

    if wrong := [option for option, is_given in given.items() if is_given]:
        raise InputError(f"{', '.join(wrong)}: {reason}")


def numbers(text: str, kind: Callable[[str], Number], option: str) -> tuple[Number, Number, Number]:
    """Return the three numbers of an option, such as 1,1,1.5."""
    from monai_iunet.errors import InputError

    try:
        first, second, third = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: three numbers with commas are needed, such as 1,1,1.") from error
    return first, second, third


def own_device() -> torch.device | None:
    """Return the GPU of this process, where torchrun or SLURM started several; None for the first, or for none."""
    import torch

    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    gpus = torch.cuda.device_count()
    return torch.device("cuda", int(local) % gpus) if local is not None and gpus else None


def device_of(name: str) -> torch.device:
    """Return the device that `--device` names."""
    from monai_iunet.system import usable_device

    return usable_device(name, "--device")
