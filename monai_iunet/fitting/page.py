"""The page and the metadata of a bundle that was made by `fit`: what was chosen and why, and how good it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_iunet.bundling.new_bundle import COMMANDS
from monai_iunet.bundling.task import Task
from monai_iunet.fitting.ensemble import Comparison
from monai_iunet.fitting.fingerprint import Fingerprint
from monai_iunet.fitting.plan import FitPlan
from monai_iunet.io.files import write_text
from monai_iunet.io.text import times

__all__ = ["Evaluated", "write_page", "write_results"]


def write_results(folder: Path, task: Task, channels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what a bundle takes and reaches into its `configs/metadata.json`.

    Args:
        folder: of the bundle.
        task: of the bundle.
        channels: names of the channels.
        rows: of the cross-validation, see `summarize`.
    """
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    dice = {f"dice_{_key(row['structure'])}": float(row["dice"]) for row in rows if row["structure"] != "mean"}
    dice["mean_dice"] = float(rows[-1]["dice"])
    # Of a structure that no case shows there is none, and JSON has no NaN.
    metadata["eval_metrics"] = {name: round(value, 4) for name, value in dice.items() if math.isfinite(value)}
    image = metadata["network_data_format"]["inputs"]["image"]
    image["num_channels"] = task.in_channels
    image["channel_def"] = {str(number): name for number, name in enumerate(channels)}
    write_text(path, json.dumps(metadata, indent=4) + "\n")


def _key(structure: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in structure)


@dataclass(frozen=True)
class Evaluated:
    """What is known of the networks of a fit.

    Attributes:
        rows: of the cross-validation, see `summarize`.
        members: mean Dice of each fold's network on the cases that it was not trained on.
        best: name of the best of these networks.
        comparison: of it and the ensemble; None if there is none to compare.
        cleaned: structures of which the largest component alone is kept.
        quality: what judges the prediction of quality, as a table in Markdown; empty if there is none.
        all_cases: whether the bundle has a network that was trained on all cases.
    """

    rows: Sequence[Mapping[str, Any]]
    members: Mapping[str, float]
    best: str
    comparison: Comparison | None
    cleaned: Sequence[str]
    quality: str
    all_cases: bool


def write_page(folder: Path, task: Task, plan: FitPlan, fingerprint: Fingerprint, evaluated: Evaluated) -> None:
    """Write `docs/README.md`.

    Args:
        folder: of the bundle.
        task: of the bundle.
        plan: with the reasons of the choices.
        fingerprint: of the data set.
        evaluated: what is known of the networks.
    """
    names = ", ".join(f"{value} {name}" for value, name in enumerate(("background", *task.classes)))
    values = (
        ""
        if task.label_values is None
        else " In the label files of the data set they have the values "
        f"{', '.join(map(str, task.label_values))}, in this order."
    )
    values += f" {fingerprint.of_regions}" if fingerprint.parts else ""
    shape, spacing = (
        np.median([getattr(case, name) for case in fingerprint.cases], axis=0) for name in ("shape", "spacing")
    )
    choices = "\n".join(f"| {choice.name} | {choice.value} | {choice.reason} |" for choice in plan.choices)
    others = (task.members - 1) * plan.step.parameters
    training, inference = (held / 2**20 for held in (plan.step.training_peak, plan.step.inference_peak + others))
    performance = _performance(task, evaluated, (folder / "docs" / "cases.png").is_file())
    page = f"""# {task.name}

Segments {", ".join(task.classes)} in {task.modality} with an invertible U-Net, whose training rebuilds its
activations instead of storing them. Made by `monai-iunet fit`: everything below was chosen and measured by it.

Authors: whoever trained it.

Tags: segmentation, {task.modality}, {", ".join(task.classes)}, invertible U-Net.

## Data

{task.dataset}: {len(fingerprint.cases)} labeled cases, of {times(shape)} voxels of {times(spacing)} mm at the
median. The whole fingerprint is `fingerprint.json`.

![Fingerprint of the data set](fingerprint.png)

## Input and output

### Input

{"One channel" if task.in_channels == 1 else f"{task.in_channels} channels"}: {", ".join(fingerprint.channels)}; in any
orientation and spacing.

### Output

{task.num_classes} channels of logits, turned into a label map on the grid of the image: {names}.{values}

## Plan

| choice | value | because |
|---|---|---|
{choices}

## System configuration

A training step holds {training:.0f} MiB, an inference pass {inference:.0f} MiB; `monai-iunet plan --bundle .` says it
part by part.

## Preprocessing

Images are brought to RAS and voxels of {times(task.spacing)} mm, and their intensities are normalized. What the
training was given is in `models/training.json`, and is what evaluation, inference and `segment` use.

{performance}
## Commands

Install the package `monai-iunet`. In this folder:

```bash
monai-iunet segment IMAGE --bundle .

{COMMANDS}
```

## Limitations

For research. Not a medical device, not for diagnosis or treatment. It knows images like those that it was trained on.

## Citation

Cite the paper that introduced the architecture, and the data set.

## References

1. Etmann, Ke, Schönlieb, iUNets, 2020, arXiv:2005.05220.
2. Isensee et al., nnU-Net, Nature Methods, 2021, whose rules the plan begins with.

## License

Configs: Apache-2.0. For the data see `data_license.txt`.
"""
    write_text(folder / "docs" / "README.md", page)


def _performance(task: Task, evaluated: Evaluated, has_cases: bool) -> str:
    """Return the section on how good the networks are.

    Args:
        task: of the bundle.
        evaluated: what is known of the networks.
        has_cases: whether there is a picture of cases.
    """
    table = "\n".join(
        f"| {row['structure']} | {row['cases']} | {row['dice']:.3f} | {row['dice_low']:.3f} to {row['dice_high']:.3f} "
        f"| {row['hausdorff95_mm']:.2f} | {row['surface_distance_mm']:.2f} |"
        for row in evaluated.rows
    )
    cleaned = (
        f"Of {', '.join(evaluated.cleaned)} the largest component alone is kept: this made them better in validation."
        if evaluated.cleaned
        else "Keeping the largest component of a structure alone made none better in the validation: all are kept."
    )
    members = "\n".join(f"| {name} | {dice:.3f} |" for name, dice in evaluated.members.items())
    cases = "\n![Best, median and worst case](cases.png)\n" if has_cases else ""
    return f"""## Performance

Each network was evaluated on the cases that it was not trained on. The best of its validations was kept, so the figures
are somewhat too good; the intervals are those of the mean over such cases.

| structure | cases | Dice | 95 % interval | HD95, mm | surface, mm |
|---|---|---|---|---|---|
{table}

{cleaned}

| network | mean Dice |
|---|---|
{members}

{_of_the_network(task, evaluated)}

![Training](training.png)
{cases}{_of_quality(evaluated)}"""


def _of_the_network(task: Task, evaluated: Evaluated) -> str:
    """Say which network the bundle has, and why."""
    if evaluated.all_cases:
        return (
            "The bundle has none of these networks, but one that was trained on all cases after them, in the same\n"
            "way. No case is left that could judge it: the figures are those of the networks of the folds, the\n"
            f"pictures those of {evaluated.best}."
        )
    if evaluated.comparison is None:
        return f"The bundle has the network of {evaluated.best}."
    kept = "all networks, as an ensemble" if task.members > 1 else f"the network of {evaluated.best}"
    return f"### Best network and ensemble\n\nThe bundle has {kept}. {evaluated.comparison.as_markdown()}"


def _of_quality(evaluated: Evaluated) -> str:
    """Return the section on the prediction of quality; empty if there is none."""
    if not evaluated.quality:
        return ""
    return f"""
### Quality of a segmentation

`monai-iunet segment` predicts the Dice of each structure. The prediction was fitted to half of the validation cases of
{f"the network of {evaluated.best}" if evaluated.all_cases else "the network"}, as they are and damaged; the others
judge it:

{evaluated.quality}

![Predicted beside true Dice](quality.png)
"""
