"""The commands that list, write and check bundles, and nnU-Net's plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monai_iunet.cli.application import app, input_errors, numbers

__all__: list[str] = []


@app.command(epilog="Example: monai-iunet bundles")
def bundles() -> None:
    """List the bundles that are installed: task, modality, classes, Dice and memory."""
    with input_errors("segment"):
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
    with input_errors("train"):
        from monai_iunet.bundling.new_bundle import write_bundle
        from monai_iunet.bundling.task import Task

        task = Task(
            name=name,
            modality=modality,  # type: ignore[arg-type] # it checks
            classes=tuple(part.strip() for part in classes.split(",")),
            dataset=name,
            spacing=numbers(spacing, float, "--spacing"),
            roi_size="whole" if roi_size == "whole" else numbers(roi_size, int, "--roi-size"),
            any_contrast=any_contrast,
        )
        typer.echo(write_bundle(task, output / name))


@app.command("verify-bundle", epilog="Example: monai-iunet verify-bundle bundles/iunet_liver_ct_segmentation")
def verify(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> None:
    """Check a bundle as reviewers and other programs do, offline; exits with 1 if something is wrong."""
    with input_errors("train"):
        from rich.console import Console

        from monai_iunet.bundling.verify import as_table, verify_bundle

        checks = verify_bundle(bundle)
        Console(markup=False).print(as_table(checks, str(bundle)))  # brackets in names and errors are what they are
        if any(check.problem for check in checks):
            raise typer.Exit(1)


@app.command("nnunet-plans", epilog="Example: monai-iunet nnunet-plans nnUNetPlans.json")
def nnunet_plans(
    plans: Annotated[Path, typer.Argument(help="Plans file of nnU-Net v2, such as nnUNetPlans.json.")],
    configuration: Annotated[str, typer.Option(help="Configuration whose patch and batch are taken.")] = "3d_fullres",
    couplings: Annotated[int, typer.Option(min=1, help="Couplings per level.")] = 2,
) -> None:
    """Add configurations with an invertible U-Net to nnU-Net's plans: at its patch, and larger in its memory."""
    with input_errors("nnunet"):
        from monai_iunet.interop.nnunet import add_configurations

        typer.echo("\n".join(add_configurations(plans, configuration, couplings)))
