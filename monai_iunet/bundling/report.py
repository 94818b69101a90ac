"""The pictures of a bundle's README: how the training went, and its best, median and worst case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from monai.transforms import MapLabelValue
from tqdm import tqdm

from monai_iunet.bundling.evaluation_data import bundle_cases, label_values
from monai_iunet.errors import InputError
from monai_iunet.io.channels import first_channel
from monai_iunet.io.files import check_folder, write_atomically
from monai_iunet.io.read import read_image
from monai_iunet.io.text import first_line
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.training.evaluation import mean_dice_of_cases, read_rows
from monai_iunet.visualization.overlay import draw_overlay

__all__ = ["draw_cases", "draw_training", "mean_parts", "read_log", "write_report"]


def write_report(bundle: str | Path, dataset_dir: str | Path) -> list[Path]:
    """Write `docs/training.png` and `docs/cases.png` of a bundle that was trained and evaluated in its folder.

    Args:
        bundle: folder of the bundle, with the logs in `train` and the tables in `eval`, or where `fit` keeps them.
        dataset_dir: folder with `dataset.json`.

    Returns:
        The files; without `cases.png` where a fit trained the network on all cases, so that none shows how good it is.

    Raises:
        InputError: when the training log or the evaluation is missing.
    """
    bundle = Path(bundle)
    log = bundle / "train"
    cases: Path | None = bundle / "eval" / "cases.csv"
    if (bundle / "fit.json").is_file():
        kept = _kept_by_fit(bundle)
        log = log if any(log.glob("events.*")) else kept["log"]
        cases = cases if cases is not None and cases.is_file() else kept.get("cases")
    docs = check_folder(bundle / "docs")
    pictures = [docs / "training.png"]
    draw_training(log, pictures[0])
    if cases is not None:
        pictures.append(docs / "cases.png")
        draw_cases(bundle, dataset_dir, cases, pictures[1])
    return pictures


def _kept_by_fit(bundle: Path) -> dict[str, Path]:
    """Return where a fit keeps the log and the table of the network that it chose."""
    state = bundle / "fit.json"
    try:
        drawn = dict(json.loads(state.read_text(encoding="utf-8"))).get("drawn")
        kept = None if drawn is None else {name: bundle / drawn[name] for name in ("log", *drawn)}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{state}: not the state of a fit ({first_line(error)}). Remove it, or fit again.") from error
    if kept is None:
        raise InputError(
            f"{bundle}: its fit is not finished. Call `monai-iunet fit` as before to go on; it draws both pictures."
        )
    return kept


def draw_training(log_dir: str | Path, path: Path) -> None:
    """Plot the loss of each epoch and the validation Dice of a TensorBoard log.

    Args:
        log_dir: folder of the log that `train.json` writes.
        path: PNG file to write.

    Raises:
        InputError: when there is no such log.
    """
    import matplotlib.pyplot as plt

    loss, dice = (read_log(log_dir, name) for name in ("train_loss", "val_mean_dice"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    try:
        # The loss of single steps jumps; shown is its mean over a hundredth of them.
        means = mean_parts(loss, 100)
        axes[0].plot(list(means), list(means.values()))
        axes[0].set(xlabel="training step", ylabel="loss")
        axes[1].plot(list(dice), list(dice.values()), marker=".")
        axes[1].set(xlabel="epoch", ylabel="mean Dice in validation")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        for axis in axes:
            axis.grid(alpha=0.3)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    finally:
        plt.close(figure)


def read_log(log_dir: str | Path, name: str) -> dict[int, float]:
    """Return the values of the last training in a TensorBoard log by their steps; of steps done again, the last.

    One that begins at an earlier step than the one before has ended goes on from there, or is another: what the one
    before had from that step on is no part of it.

    Args:
        log_dir: folder of the log that `train.json` writes.
        name: of the values: `train_loss` or `val_mean_dice`.

    Raises:
        InputError: when there is no such log, or TensorBoard is not installed.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    if Path(log_dir).is_dir():
        log.Reload()
    try:
        events = log.Scalars(name)
    except KeyError as error:
        raise InputError(f"{log_dir}: no log of a training with {name}. Train the bundle first.") from error
    values: dict[int, float] = {}
    for event in events:  # in the order in which they were written
        while values and next(reversed(values)) >= event.step:
            values.popitem()
        values[event.step] = event.value
    return values


def mean_parts(values: Mapping[int, float], most: int) -> dict[int, float]:
    """Return the means of equal parts of values, by the last step of each part.

    Example:
        >>> mean_parts({1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0}, most=2)
        {2: 3.0, 4: 1.0}
    """
    parts = np.array_split(np.array(sorted(values)), min(most, len(values)))
    return {int(part[-1]): float(np.mean([values[step] for step in part])) for part in parts}


def draw_cases(bundle: str | Path, dataset_dir: str | Path, cases: Path, path: Path) -> None:
    """Draw what a bundle finds in the best, the median and the worst case of an evaluation, and what is true.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder with `dataset.json`.
        cases: table of the cases that `evaluate.json` writes.
        path: PNG file to write.

    Raises:
        InputError: when there is no such table, or when its cases are not those of the data set.
    """
    import matplotlib.pyplot as plt

    if not cases.is_file():
        raise InputError(f"{cases}: no such file. Evaluate the bundle first.")
    means = mean_dice_of_cases(read_rows(cases))
    if not means:
        raise InputError(f"{cases}: no structure was contoured in any case. Evaluate the bundle on cases with labels.")
    ranked = sorted(means, key=lambda case: means[case])
    known = {Path(case["label"]).name: case for case in bundle_cases(Path(bundle), dataset_dir)["validation"]}
    unknown = sorted(set(ranked) - set(known))
    if unknown:
        raise InputError(
            f"{cases}: of other cases than {dataset_dir}, such as {unknown[0]}. Evaluate the bundle again."
        )
    segmenter = BundleSegmenter(bundle)
    values = label_values(Path(bundle))
    number_labels = None if values is None else MapLabelValue(values, [*segmenter.labels], dtype=np.uint8)
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    figure = plt.figure(figsize=(12, 4.6 * len(chosen)), dpi=80, facecolor="black")
    try:
        height = 1 / len(chosen)
        bar = tqdm(chosen.items(), "drawing cases", leave=False, disable=None)
        for number, (rank, case) in enumerate(bar, 1):
            image = read_image(known[case]["image"], channels=segmenter.channels)
            truth = np.asarray(read_image(known[case]["label"]).dataobj)
            draw_overlay(
                figure,
                first_channel(image),
                segmenter.segment(image).labels,
                segmenter.labels,
                title=f"{rank}: {case}, mean Dice {means[case]:.3f}",
                reference=truth if number_labels is None else number_labels(truth),
                window=segmenter.window,
                bottom=1 - number * height,
                height=height,
            )
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, facecolor="black", format="png"))
    finally:
        plt.close(figure)
