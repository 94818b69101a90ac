"""How good a segmentation is: per case and structure, in mm, on the grid of the image."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from monai.networks import one_hot
from torch import Tensor

from monai_iunet.errors import InputError
from monai_iunet.io.checks import grids_apart
from monai_iunet.io.files import check_folder, write_text
from monai_iunet.io.text import csv_text, first_line
from monai_iunet.losses.class_numbers import check_labels, check_one_channel

__all__ = ["CaseReport", "compare", "mean_dice_of_cases", "read_rows", "write_rows"]

logger = logging.getLogger(__name__)

MEASURES = ("dice", "hausdorff95_mm", "surface_distance_mm")
LEAST_SHARE = 0.99  # of a box, that a voxel has whose axes are as good as at right angles
Row = dict[str, Any]


def compare(
    prediction: Tensor,
    truth: Tensor,
    spacing: Sequence[float],
    structures: Sequence[str],
    voxel: float | None = None,
) -> list[Row]:
    """Compare two label maps.

    Args:
        prediction: labels `(*spatial)`.
        truth: labels `(*spatial)`. A structure without voxels here was not contoured: its measures are NaN.
        spacing: size of a voxel, in mm.
        structures: names of the labels 1, 2, ...
        voxel: volume of a voxel, in mm³; None for axes at right angles, as distances always take them to be.

    Returns:
        A row per structure: "structure"; "dice"; "hausdorff95_mm", the 95th percentile of the distances between the
        surfaces, and "surface_distance_mm", their mean, both symmetric, infinite if nothing was predicted; "volume_mm3"
        of the prediction; "reference_mm3".

    Raises:
        ValueError: when the maps differ in size, or hold something else than the numbers of the structures.
    """
    classes = len(structures) + 1
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction has {tuple(prediction.shape)} voxels, the true labels have {tuple(truth.shape)}: both "
            "must be on the grid of the image."
        )
    check_labels(prediction, classes, "The prediction")
    check_labels(truth, classes, "The true labels")
    voxel, sizes = float(np.prod(spacing)) if voxel is None else voxel, [float(size) for size in spacing]
    along = [axis for axis, extent in enumerate(truth.shape) if extent > 1]
    if len(along) >= 2:  # of a single slice, which has no neighbors, each voxel would be on the surface
        prediction, truth, sizes = prediction.squeeze(), truth.squeeze(), [sizes[axis] for axis in along]
    predicted, true = (one_hot(labels[None, None].long(), classes) for labels in (prediction, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of structures that are empty
        dice = compute_dice(predicted, true, include_background=False)[0]
        hausdorff = compute_hausdorff_distance(predicted, true, percentile=95, spacing=sizes)[0]
        surface = compute_average_surface_distance(predicted, true, symmetric=True, spacing=sizes)[0]
    rows = []
    for number, name in enumerate(structures):
        volumes = [float(labels[0, number + 1].sum()) * voxel for labels in (predicted, true)]
        distances = [float(hausdorff[number]), float(surface[number])]
        if volumes[0] == 0:
            distances = [np.inf, np.inf]
        if volumes[1] == 0:
            distances = [np.nan, np.nan]
        values = (float(dice[number]), *distances)
        rows.append(
            {
                "structure": name,
                **dict(zip(MEASURES, values)),
                "volume_mm3": volumes[0],
                "reference_mm3": volumes[1],
            }
        )
    return rows


def _check_affine(prediction: MetaTensor, labels: MetaTensor) -> None:
    """Check that a prediction lies where the true labels lie; one without an affine of its own is taken as it is.

    Raises:
        ValueError: when the affines are a tenth of a voxel or more apart, as when only one was turned round.
    """
    affine, expected = (np.asarray(tensor.affine) for tensor in (prediction, labels))
    if np.array_equal(affine, np.eye(4)):
        return
    slices = [1] * (len(expected) - labels.ndim)  # a 2D image has the affine of a slice
    apart = grids_apart(affine, expected, (*labels.shape[1:], *slices))
    if apart > 0:
        raise ValueError(
            f"The prediction and the true labels of {labels.meta.get('filename_or_obj', 'a case')} lie up to "
            f"{apart:.3g} mm apart: invert the transforms of the image (Invertd) before they are compared."
        )


class CaseReport:
    """Writes, as a handler of an evaluator, `cases.csv`, a row per case and structure, and `summary.csv`.

    A case has the name of its labels' file, with as many of its folders as tell all cases apart.

    It reads "pred" and "label", label maps `(1, *spatial)` on the grid of the image, and sets the metric
    `val_mean_dice`, the mean over the structures of the mean over the cases.

    Args:
        output_dir: folder of the files; created if need be.
        structures: names of the labels 1, 2, ...
        label_key: key of the true labels.

    Raises:
        ValueError: from the evaluator, for what is no label map of one channel on the grid of the image.

    Example:
        >>> import tempfile
        >>> from monai.engines import SupervisedEvaluator
        >>> evaluator = SupervisedEvaluator(torch.device("cpu"), [], torch.nn.Identity())
        >>> CaseReport(tempfile.mkdtemp(), ["liver", "tumor"]).attach(evaluator)
    """

    def __init__(self, output_dir: str | Path, structures: Sequence[str], label_key: str = "label") -> None:
        self.output_dir = Path(str(output_dir))  # the command line makes a number of a folder that is named 2024
        self.structures = list(structures)
        self.label_key = label_key
        self.rows: list[Row] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        check_folder(self.output_dir)
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _add(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        batch: Any = engine.state.batch
        for number, output in enumerate(outputs):
            # MONAI keeps in the batch what neither the network nor the loss has seen.
            labels = output[self.label_key] if self.label_key in output else batch[number][self.label_key]
            for key, found in (("pred", output["pred"]), (self.label_key, labels)):
                check_one_channel(found, key)
            if not isinstance(labels, MetaTensor):
                raise ValueError(f"{self.label_key}: a MetaTensor is needed, whose affine says how large a voxel is.")
            affine = np.asarray(labels.affine)
            spacing, voxel = nibabel.affines.voxel_sizes(affine), abs(float(np.linalg.det(affine[:-1, :-1])))
            if isinstance(output["pred"], MetaTensor):
                _check_affine(output["pred"], labels)
            prediction, truth = (torch.as_tensor(tensor)[0].cpu() for tensor in (output["pred"], labels))
            file = str(labels.meta.get("filename_or_obj", f"case {len(self.rows)}"))
            if voxel < LEAST_SHARE * np.prod(spacing):
                logger.warning("%s: its axes are sheared. Distances are those of axes at right angles.", file)
            self.rows += [{"case": file, **row} for row in compare(prediction, truth, spacing, self.structures, voxel)]

    def _finish(self, engine: Engine) -> None:
        rows, writes = self.rows, True
        if torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, rows)
            rows, writes = [row for part in parts for row in part], torch.distributed.get_rank() == 0
        names = _told_apart({row["case"] for row in rows})
        rows = [{**row, "case": names[row["case"]]} for row in rows]
        order = {name: number for number, name in enumerate(self.structures)}
        rows.sort(key=lambda row: (row["case"], order[row["structure"]]))
        summary = [self._summary(name, [row for row in rows if row["structure"] == name]) for name in self.structures]
        engine.state.metrics["val_mean_dice"] = float(np.nanmean([row["dice_mean"] for row in summary]))
        if writes:
            for name, table in (("cases", rows), ("summary", summary)):
                write_rows(self.output_dir / f"{name}.csv", table)
            logger.info("Evaluation, %s:\n%s", self.output_dir / "summary.csv", _as_text(summary))

    def _summary(self, name: str, rows: Sequence[Row]) -> Row:
        known = [row for row in rows if row["reference_mm3"] > 0]
        summary: Row = {"structure": name, "cases": len(known)}
        for measure in MEASURES:
            values = np.array([row[measure] for row in known])
            for statistic, function in (("mean", np.mean), ("std", np.std), ("median", np.median)):
                with np.errstate(invalid="ignore"):  # infinite distances have no deviation
                    summary[f"{measure}_{statistic}"] = float(function(values)) if len(values) else np.nan
        return summary


def _told_apart(files: Iterable[str]) -> dict[str, str]:
    """Return the name of each file, with as many of its folders as it takes for no two to have the same."""
    parts = {file: Path(file).parts for file in files}
    count, most = 1, max(map(len, parts.values()), default=1)
    while count < most and len({path[-count:] for path in parts.values()}) < len(parts):
        count += 1
    return {file: Path(*path[-count:]).as_posix() for file, path in parts.items()}


def mean_dice_of_cases(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean Dice of each case over the structures that were contoured in it; other cases are left out.

    Args:
        rows: of `cases.csv`.

    Example:
        >>> rows = [{"case": "a", "dice": 0.9}, {"case": "a", "dice": "nan"}, {"case": "b", "dice": "nan"}]
        >>> mean_dice_of_cases(rows)
        {'a': 0.9}
    """
    dice: dict[str, list[float]] = {}
    for row in rows:
        if not np.isnan(float(row["dice"])):
            dice.setdefault(row["case"], []).append(float(row["dice"]))
    return {case: float(np.mean(values)) for case, values in sorted(dice.items())}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the table `cases.csv` of an evaluation.

    Raises:
        InputError: when the file is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        mean_dice_of_cases(rows)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: not the table of an evaluation ({first_line(error)}). Evaluate again.") from error
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, which have the same columns, as a CSV file; floats with four digits behind the point.

    Small ones, as volumes of voxels of micrometers are in mm³, have four digits that count.
    """
    lines = [[_number(value) if isinstance(value, float) else value for value in row.values()] for row in rows]
    write_text(path, csv_text([rows[0], *lines]))


def _number(value: float) -> str:
    return f"{value:.4g}" if 0 < abs(value) < 0.1 else f"{value:.4f}"


def _as_text(summary: Sequence[Row]) -> str:
    width = max(len(row["structure"]) for row in summary)
    lines = [f"{'':<{width}}  cases   Dice  HD95, mm  surface, mm"]
    for row in summary:
        means = (row[f"{measure}_mean"] for measure in MEASURES)
        lines.append("{:<{}}  {:5d}  {:5.3f}  {:8.2f}  {:11.2f}".format(row["structure"], width, row["cases"], *means))
    return "\n".join(lines)
