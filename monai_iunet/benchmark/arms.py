"""Ways to train side by side, for one time: patches, whole images, other branches, and others' networks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import nn

from monai_iunet.benchmark.comparison import (
    NETWORKS,
    Config,
    check_asked,
    difference,
    facts_of_cases,
    interval_text,
    run_config,
    run_training,
    scores,
)
from monai_iunet.bundling.new_bundle import bundle_configs, write_bundle
from monai_iunet.bundling.report import mean_parts, read_log
from monai_iunet.bundling.task import Task
from monai_iunet.errors import InputError
from monai_iunet.fitting.fingerprint import read_fingerprint
from monai_iunet.fitting.plan import read_plan
from monai_iunet.fitting.planner import largest_image
from monai_iunet.io.files import SUFFIXES, check_folder, hold_folder, image_name, whole_folder, write_text
from monai_iunet.io.text import first_line
from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.planning.budget import best_activations, largest_patch
from monai_iunet.planning.plan import plan_training
from monai_iunet.training.cases import check_cases
from monai_iunet.training.checkpoints import FINAL
from monai_iunet.training.dataset import list_cases, patients_of
from monai_iunet.training.evaluation import read_rows
from monai_iunet.training.structures import check_structures

__all__ = ["ARMS", "arms_as_markdown", "compare_arms"]

BRANCHES = ("residual", "mednext")  # of the couplings, beside the convolutions of the other arms
ARMS = ("patch", "whole", "growing", *NETWORKS, *BRANCHES)
MEASURES = ("dice", "hausdorff95_mm")
GROWN = 0.5  # of the way from the patch to the whole image, where the growing patch is between them
NEVER = 1_000_000  # epochs
PARTS = 40  # of a training, whose mean losses are kept


@dataclass(frozen=True)
class _Arm:
    """A way to train.

    Attributes:
        task: of its bundle.
        network: in the place of the bundle's own; None for that.
        step: size and number of the images of its largest step.
        step_bytes: that the step holds, as it is planned.
    """

    task: Task
    network: Config | None
    step: tuple[int, tuple[int, ...]]
    step_bytes: int


def compare_arms(
    plan: str | Path,
    dataset_dir: str | Path,
    output_dir: str | Path,
    minutes: float,
    arms: Sequence[str] = ARMS,
    tests: int = 16,
    seed: int = 0,
    device: torch.device | None = None,
) -> Config:
    """Train and evaluate arms, each as a bundle of its own, for the same time, on the same cases.

    "patch" is what was planned, "residual" and "mednext" are the same with such branches, "whole" sees whole images and
    rebuilds all activations, "growing" begins with the patch and ends with whole images; others are networks of MONAI,
    at the largest patch whose step takes no more memory than one of "whole". On a CPU all train in float32, in which
    their memory is counted, whatever was planned. An arm that is done is not trained again, one that was interrupted
    goes on.

    Args:
        plan: folder of a bundle that `fit` made, if only to its plan.
        dataset_dir: folder of the data set.
        output_dir: folder of the arms' bundles and of `comparison.json`. Where it has a `test_cases.json`, a list of
            file names of images, these are the test cases.
        minutes: of each training; of the processor if there is no GPU, so that other programs do not count.
        arms: which of `ARMS`.
        tests: number of test cases, which are drawn if they are not listed, with all others of their patients; always
            the same ones.
        seed: of the trainings.
        device: where; by default the first GPU, or the CPU if there is none.

    Returns:
        What `comparison.json` holds: "minutes" and "clock"; "seed"; "test_cases"; "arms", which has, per arm,
        "roi_size", "growing", "batch_size", "activations", "step_voxels" and "step_bytes" of its largest step, counted
        by the planner, "parameters", "steps", "seconds" and "losses" of the training, means over equal parts of it;
        "dice" and "hausdorff95_mm" per structure, "mean_dice", and in "cases" the means over the structures of each
        test case; and "differences", which has, per pair of arms, for "dice" and "hausdorff95_mm", the "mean"
        difference of the cases' means, "low" and "high" of its 95 % bootstrap interval, which one case does not have,
        and the number of "cases".

    Raises:
        InputError: for folders that are none, when the cases have changed since arms were trained, and when a training
            or an evaluation fails.
    """
    plan, output = Path(plan), check_folder(output_dir)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = read_plan(plan / "docs" / "plan.json").task
    if task.in_channels > 1 or task.roi_size == "whole" or task.growing:
        raise InputError(f"{plan}: must be the plan of a patch, of images of one channel: fit --roi-size 56,56,40.")
    check_structures(dataset_dir, task.classes, task.label_values)
    values = None if task.label_values is None else (0, *task.label_values)
    cases = check_cases(list_cases(dataset_dir, without=task.left_out), task.num_classes, label_values=values)
    with hold_folder(output):
        check_asked(output, {"dataset": str(Path(dataset_dir).resolve()), **facts_of_cases({"labeled": cases})})
        test_cases = _test_cases(dataset_dir, output / "test_cases.json", tests, task.left_out)
        timed: dict[str, Any] = {"max_seconds": 60.0 * minutes, "max_epochs": NEVER - 1}
        task = replace(task, validation_cases=True, judges=(), autocast=False, **timed)
        extents = largest_image(read_fingerprint(plan / "docs" / "fingerprint.json"), task.spacing, task.factors)
        planned = _plan_arms(task, extents, arms)
        clock = "wall" if device.type == "cuda" else "processor"
        figures, rows = {}, {}
        settings: Config = {"dataset_dir": str(Path(dataset_dir).resolve()), "check_data": False}
        settings["device"] = f"$torch.device('{device}')"
        for name, arm in planned.items():
            bundle = output / name
            _write_arm(arm, bundle, test_cases, clock, seed)
            _train_and_evaluate(bundle, settings)
            rows[name] = read_rows(bundle / "eval" / "cases.csv")
            figures[name] = {**_facts(arm, bundle), **scores(rows[name]), "cases": _cases(rows[name])}
        result: Config = {
            "minutes": minutes,
            "clock": clock,
            "seed": seed,
            "test_cases": test_cases,
            "arms": figures,
            "differences": {
                f"{first} - {second}": {
                    measure: _differences(rows[first], rows[second], measure) for measure in MEASURES
                }
                for first, second in itertools.combinations(planned, 2)
            },
        }
        text = json.dumps(result, indent=4) + "\n"
        write_text(output / "comparison.json", text)
    result = json.loads(text)
    return result


def _test_cases(dataset_dir: str | Path, listed: Path, count: int, left_out: Sequence[str] = ()) -> list[str]:
    """Return the file names of the test cases: those that are listed, or some that are drawn and then listed.

    Of the cases that a plan has left out there is none: they are not evaluated.
    """
    cases = sorted(Path(case["image"]).name for case in list_cases(dataset_dir, without=left_out))
    if listed.is_file():
        try:
            names = json.loads(listed.read_text(encoding="utf-8"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("no list of texts")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{listed}: must list file names of images, such as {json.dumps(cases[:1])}; {first_line(error)}."
            ) from error
        if missing := set(names) - set(cases):
            raise InputError(
                f"{listed}: {dataset_dir} has no image {', '.join(sorted(missing))}, or the plan leaves it out."
            )
        if not 0 < len(set(names)) < len(cases):
            raise InputError(
                f"{listed}: lists {len(set(names))} of {len(cases)} cases, some are needed to train and some to test."
            )
    else:
        names = _drawn(cases, count) if 0 < count < len(cases) else []
        if not 0 < len(names) < len(cases):
            raise InputError(f"--tests {count}: of {len(cases)} cases, some are needed to train and some to test.")
        write_text(listed, json.dumps(names, indent=1) + "\n")
    return list(names)


def _drawn(cases: Sequence[str], count: int) -> list[str]:
    """Return so many cases, always the same ones; or more, where others are of the same patients."""
    patients = patients_of([image_name(case, SUFFIXES) for case in cases], least=2)
    drawn: set[str] = set()
    for number in np.random.default_rng(0).permutation(len(cases)):
        if sum(patient in drawn for patient in patients) < count:
            drawn.add(patients[number])
    return [case for case, patient in zip(cases, patients) if patient in drawn]


def _plan_arms(task: Task, extents: Sequence[int], names: Sequence[str]) -> dict[str, _Arm]:
    """Return the arms of the names."""
    patch = tuple(int(extent) for extent in task.roi_size)
    whole = _arm(replace(task, roi_size="whole", batch_size=1, activations="invert"), None, 1, extents)
    middle = [
        max(small, round((small + GROWN * (large - small)) / factor) * factor)
        for small, large, factor in zip(patch, extents, task.factors)
    ]
    arms = {"whole": whole, "growing": replace(whole, task=replace(whole.task, growing=_sizes(patch, middle)))}
    for name in set(names) & {"patch", *BRANCHES}:
        arms[name] = _patch_arm(task, None if name == "patch" else name, whole.step_bytes)
    for name in set(names) & set(NETWORKS):
        # Sizes are those of three downsamplings by 2, as both have; one image at a time, as whole images are.
        levels: dict[str, Any] = {"channels": (8,) * 4, "couplings": (1,) * 4, "strides": None, "activations": "store"}
        other = replace(task, batch_size=1, roi_size="whole", **levels)
        factors = other.factors
        largest = [math.ceil(extent / factor) * factor for extent, factor in zip(extents, factors)]
        options: dict[str, Any] = {"largest": largest, "loss": _LOSS}
        try:
            fitting = largest_patch(_network(other, NETWORKS[name]), whole.step_bytes, largest, factors, **options)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        (roi_size,) = _sizes(fitting.spatial_size)
        arms[name] = _arm(replace(other, roi_size=roi_size), NETWORKS[name], 1, roi_size)
    return {name: arms[name] for name in names}


def _patch_arm(task: Task, branch: str | None, step_bytes: int) -> _Arm:
    """Return the arm of the planned patch that is the fastest of those whose step takes no more than some bytes.

    What memory is left goes into activations that are stored. Where rebuilding all of them takes more already, all are.
    """
    patch = tuple(int(extent) for extent in task.roi_size)

    def arm(activations: Any) -> _Arm:
        changed = replace(task, activations=activations)
        own = bundle_configs(changed)["inference.json"]["network_def"]
        return _arm(changed, None if branch is None else {**own, "branch": branch}, task.batch_size, patch)

    least = arm("invert")
    network: Any = _network(least.task, least.network)
    beside = plan_training(network, patch, batch_size=task.batch_size, loss=_LOSS)
    budget = max(step_bytes - beside.optimizer_state - beside.loss, 1)
    fastest = arm(best_activations(network, budget, (task.batch_size, 1, *patch)))
    return fastest if fastest.step_bytes <= step_bytes else least


_LOSS = ChunkedDiceCELoss(to_onehot_y=True, softmax=True)


def _sizes(*sizes: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return sizes without those that come again."""
    return tuple(dict.fromkeys((int(first), int(second), int(third)) for first, second, third in sizes))


def _arm(task: Task, definition: Config | None, batch: int, size: Sequence[int]) -> _Arm:
    try:
        step = plan_training(_network(task, definition), size, batch_size=batch, loss=_LOSS)
    except ValueError as error:  # as of more values than convolutions take
        raise InputError(f"{error} Compare larger voxels: plan the bundle with another --spacing.") from error
    return _Arm(task, definition, (batch, tuple(size)), step.training_peak)


def _network(task: Task, definition: Config | None) -> nn.Module:
    parser = ConfigParser(bundle_configs(replace(task, validation_cases=False))["inference.json"])
    if definition is not None:
        parser["network_def"] = definition
    network: nn.Module = parser.get_parsed_content("network_def")
    return network


def _write_arm(arm: _Arm, bundle: Path, test_cases: Sequence[str], clock: str, seed: int) -> None:
    """Write the bundle of an arm; where there is one, check that it is that of the same arm."""
    configs = bundle_configs(arm.task)
    for config in configs.values():
        if arm.network is not None:
            config["network_def"] = arm.network
        if "lr_scheduler" in config:
            config["lr_scheduler"]["clock"] = clock
            if config["loss"]["_target_"] == "DiceCELoss":  # the same for all
                config["loss"]["_target_"] = "monai_iunet.ChunkedDiceCELoss"
            config["seed"] = seed
    files: dict[str, Any] = {**configs, "validation_cases.json": list(test_cases)}
    if not bundle.exists():
        with whole_folder(bundle) as made:
            write_bundle(arm.task, made)
            for name, content in files.items():
                write_text(made / "configs" / name, json.dumps(content, indent=4) + "\n")
    for name, content in files.items():
        path = bundle / "configs" / name
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(content)):
            raise InputError(
                f"{path}: that of another comparison, such as of other minutes, another seed or another version of "
                "monai_iunet. Ask for the same to go on with it, or name another --output."
            )


def _train_and_evaluate(bundle: Path, settings: Config) -> None:
    place = {"bundle_root": str(bundle.resolve())}
    final = bundle / "models" / FINAL
    if not final.is_file():
        # Validated at the end only, so that there is no epoch to choose.
        options = {"resume": True, "val_interval": NEVER, "patience": NEVER}
        run_training(bundle, {**place, **settings, **options}, final)
    if not (bundle / "eval" / "summary.csv").is_file():
        run_config(bundle, "evaluate.json", {**place, **settings, "fit_quality": False})


def _facts(arm: _Arm, bundle: Path) -> Config:
    """Return what an arm was, and what its training took."""
    state = torch.load(bundle / "models" / "last.pt", map_location="cpu", weights_only=True)
    weights = torch.load(bundle / "models" / FINAL, map_location="cpu", weights_only=True)
    batch, size = arm.step
    return {
        "roi_size": arm.task.roi_size,
        "growing": arm.task.growing,
        "batch_size": batch,
        "activations": arm.task.activations,
        "step_voxels": size,
        "step_bytes": arm.step_bytes,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "steps": max(int(parameter["step"]) for parameter in state["optimizer"]["state"].values()),
        "seconds": round(float(state["lr_scheduler"]["used"]), 1),
        "losses": [round(loss, 4) for loss in mean_parts(read_log(bundle / "train", "train_loss"), PARTS).values()],
    }


def _cases(rows: list[dict[str, str]]) -> Config:
    """Return the means over the structures of each case; None where no structure has a distance."""
    means: Config = {}
    for case in sorted({row["case"] for row in rows}):
        of_case = [[float(row[measure]) for row in rows if row["case"] == case] for measure in MEASURES]
        known = [[value for value in values if math.isfinite(value)] for values in of_case]
        means[case] = {
            measure: round(float(np.mean(values)), 4) if values else None for measure, values in zip(MEASURES, known)
        }
    return means


def _differences(first: list[dict[str, str]], second: list[dict[str, str]], measure: str) -> Config:
    """Compare two arms case by case; cases in which one of them found nothing have no distance, and are left out."""
    cases = sorted({row["case"] for row in first})
    means = np.array(
        [
            [np.nanmean([float(row[measure]) for row in rows if row["case"] == case]) for case in cases]
            for rows in (first, second)
        ]
    )
    known = np.isfinite(means).all(0)
    if not known.any():
        return {"mean": None, "low": None, "high": None, "cases": 0}
    return {**difference(*means[:, known]), "cases": int(known.sum())}


def arms_as_markdown(result: Mapping[str, Any]) -> str:
    """Return the tables: arms with what they reach and take, and the differences between them."""
    lines = ["| arm | Dice | HD95, mm | step, MiB | largest step | parameters | steps |", "|---|" + "---|" * 6]
    for name, arm in result["arms"].items():
        distances = [distance for distance in arm["hausdorff95_mm"].values() if distance is not None]
        distance = f"{np.mean(distances):.2f}" if len(distances) == len(arm["hausdorff95_mm"]) else "none"
        size = " x ".join(map(str, (arm["batch_size"], *arm["step_voxels"])))
        lines.append(
            f"| {name} | {arm['mean_dice']:.4f} | {distance} | {arm['step_bytes'] / 2**20:.0f} | {size} "
            f"| {arm['parameters'] / 1e6:.1f} M | {arm['steps']} |"
        )
    lines += ["", "| difference | Dice | 95 % interval | HD95, mm | 95 % interval |", "|---|---|---|---|---|"]
    for name, measures in result["differences"].items():
        cells = [
            "none | " if found["mean"] is None else f"{found['mean']:+.4f} | {interval_text(found)}"
            for found in measures.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
