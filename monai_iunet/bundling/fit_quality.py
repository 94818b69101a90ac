"""Fitting the model that predicts how good a bundle's segmentations are, and judging it on cases that did not fit it.

1. The true labels of the training cases say how each structure looks: the `references`.
2. The validation cases are segmented as they are and damaged (`damage`), and compared with their true labels, but for
   contours that are left out because their volume is far from that of the others.
3. Every second patient fits the model: least squares of the predicted and the true Dice, by weights that are not
   negative and an offset of each structure, which both sides of it share, because few patients fit it. The bound of
   doubt is where the shares of bad results that pass and of good ones that are doubted come closest to what is wanted,
   `WANTED`.
4. The other patients, damaged alike, judge it.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nibabel.affines import voxel_sizes
from scipy.optimize import least_squares
from tqdm import tqdm

from monai_iunet.bundling.damage import DAMAGES, crop_case, damage_case
from monai_iunet.bundling.evaluation_data import Case, label_values
from monai_iunet.bundling.references import describe_contours, describe_training, unusual_contours
from monai_iunet.errors import InputError
from monai_iunet.inference.mirror import MirrorInferer
from monai_iunet.io.files import (
    SUFFIXES,
    check_folder,
    files_digest,
    files_in,
    image_name,
    write_atomically,
    write_text,
)
from monai_iunet.io.text import csv_text, first_line
from monai_iunet.io.weights import weights_file
from monai_iunet.segmentation.quality import (
    FEATURES,
    QualityModel,
    Reference,
    feature_rows,
    quality_file,
    weights_digest,
    write_quality,
)
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.sides import side_pairs
from monai_iunet.training.cases import image_of, read_case
from monai_iunet.training.dataset import patients_of
from monai_iunet.training.seen_cases import seen_cases

__all__ = ["as_markdown", "draw_quality", "evaluate_quality", "fit_quality"]

logger = logging.getLogger(__name__)

BAD, GOOD = 0.5, 0.8  # true Dice
WANTED = (0.02, 0.05)  # of bad results that pass, of good ones that are doubted
PENALTY = 1e-3  # of large weights
COLUMNS = ("case", "damage", "repetition", "structure", *FEATURES, "dice")

Job = tuple[str, str, int]  # name of a case, damage, repetition


@dataclass(frozen=True)
class Result:
    """Holds what was found of a structure in a case, damaged or not.

    Attributes:
        job: name of the case, damage, repetition.
        fits: whether it fits the model, or judges it.
        structure: name.
        features: values of `FEATURES`.
        dice: true Dice.
    """

    job: Job
    fits: bool
    structure: str
    features: tuple[float, ...]
    dice: float


def evaluate_quality(
    bundle: str | Path,
    cases: Mapping[str, Sequence[Case]],
    device: str | torch.device | None = None,
    damages: int = 6,
    refit: bool = False,
    required: bool = True,
    weights: str = "model",
) -> QualityModel | None:
    """Fit a bundle's quality model: write `models/quality.json` and `docs/quality.png`, predicted beside true Dice.

    Those of second weights, NAME, are `models/NAME_quality.json` and `docs/NAME_quality.png`.

    Nothing is done if the bundle has a model that belongs to its weights. The results of all cases are written to
    `eval/quality_DIGEST_DIGEST.csv` on the way, named after the weights and the cases; what an interrupted run has left
    there is not done again.

    Args:
        bundle: folder.
        cases: "training" and "validation", lists of paths "image" and "label".
        device: of the network; None for the first GPU, or the CPU if there is none.
        damages: damaged copies of each validation case.
        refit: whether to fit again where there is a model.
        required: whether cases that are too few are an error, or a warning.
        weights: name of the weights, of which a bundle may have second ones.

    Returns:
        The model; None if there is none.

    Raises:
        InputError: when the bundle cannot segment; if `required`, when there are too few cases, or some that the
            network was trained on, images of several channels, or label files with other values than 1, 2, ...

    Example:
        >>> from monai_iunet import bundle_folder
        >>> cases = {"training": [], "validation": []}  # none are needed where a model belongs to the weights
        >>> evaluate_quality(bundle_folder("hippocampus"), cases, "cpu").held_out["correlation"] > 0.8
        True
    """
    bundle = Path(bundle)
    try:
        segmenter = BundleSegmenter(bundle, device, weights=weights)
        if segmenter.quality is not None and not refit:
            logger.info("%s: belongs to the weights of the bundle", quality_file(bundle, weights))
            return segmenter.quality
        if segmenter.channels > 1:
            raise InputError(f"{bundle}: takes {segmenter.channels} channels, a quality model is for images of one.")
        if (values := label_values(bundle)) is not None:
            raise InputError(
                f"{bundle}: its label files have the values {values}, a quality model is for 1, 2, ... To have one, "
                "write the labels so and train again."
            )
        if seen := seen_cases(weights_file(bundle, weights), cases["validation"]):
            raise InputError(
                f"{bundle}: was trained on {len(seen)} of the {len(cases['validation'])} validation cases, such as "
                f"{Path(image_of(seen[0])).name}. A quality model is fitted to cases that are new to the network: give "
                "it others, by another fold or data set."
            )
        references, volumes = describe_training(segmenter, cases["training"])
        left_out = [
            unusual_contours(case, describe_contours(segmenter, case), volumes)
            for case in tqdm(cases["validation"], "describing validation cases", leave=False, disable=None)
        ]
        digest = weights_digest(bundle, weights)
        table = check_folder(bundle / "eval") / f"quality_{digest[:8]}_{cases_digest(cases)[:8]}.csv"
        results = damaged_results(segmenter, references, cases["validation"], damages, table, left_out)
        model = fit_quality(results, references, digest)
        judged = [found for found, fits in zip(left_out, _fits(cases["validation"])) if not fits]
        counted = {"contours_left_out": sum(map(len, judged))}
        model = replace(model, held_out={**model.held_out, **counted})
    except InputError as error:
        if required:
            raise
        logger.warning("No quality model was fitted: %s", error)
        return None
    draw_quality(results, model, bundle / "docs" / f"{quality_file(bundle, weights).stem}.png")
    logger.info("%s\n%s", write_quality(model, bundle, weights), as_markdown(model))
    return model


def cases_digest(cases: Mapping[str, Sequence[Case]]) -> str:
    """Return the SHA-256 of the files of cases, so that results are not taken for those of other images or labels.

    Nor for those beside other references, which training cases make.
    """
    digests = []
    for section in ("training", "validation"):
        paths = [Path(case[key]) for case in cases[section] for key in ("image", "label") if case.get(key)]
        digests.append(files_digest([file for path in paths for file in files_in(path) if file.exists()]))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def damaged_results(
    segmenter: BundleSegmenter,
    references: Mapping[str, Reference],
    cases: Sequence[Case],
    damages: int,
    table: Path,
    left_out: Sequence[Collection[str]] | None = None,
) -> list[Result]:
    """Return what is found in each case, as it is and damaged.

    Args:
        segmenter: of the bundle.
        references: how structures look in training cases.
        cases: paths "image" and "label"; those of every second patient fit the model.
        damages: damaged copies of each case.
        table: file that grows case by case; what it holds is not done again.
        left_out: structures of each case whose true contour is no measure of a result; None for none.
    """
    kinds = [kind for kind in DAMAGES if kind != "none"]
    if isinstance(segmenter.windows, MirrorInferer):
        kinds.remove("side")  # to a network that mirrors, a mirror image is as good
    fitting = _fits(cases)
    halves = {half: [part for part, fits in zip(enumerate(cases), fitting) if fits is half] for half in (True, False)}
    jobs = [(case, fits, "none", 0) for fits, half in halves.items() for case in half]
    for repeat in range(damages):
        for fits, half in halves.items():
            for place, case in enumerate(half):
                jobs.append((case, fits, kinds[(3 * place + 5 * repeat) % len(kinds)], repeat))
    done = _read_table(table)
    results: list[Result] = []
    for (number, case), fits, kind, repeat in tqdm(jobs, "segmenting damaged cases", leave=False, disable=None):
        job = (image_name(case["image"], SUFFIXES), kind, repeat)
        known = [replace(result, fits=fits) for result in done.get(job, [])]
        found = known or _segment_damaged(segmenter, references, case, job, fits)
        results += [result for result in found if left_out is None or result.structure not in left_out[number]]
        if not known:
            _write_table(table, results)
    return results


def _fits(cases: Sequence[Case]) -> list[bool]:
    """Return whether each case fits the model: those of every second patient, who has no part in judging it."""
    names = [image_name(case["image"], SUFFIXES) for case in cases]
    patients = patients_of(names, least=2) if names else []
    fitting = list(dict.fromkeys(patients))[0::2]
    return [patient in fitting for patient in patients]


def _segment_damaged(
    segmenter: BundleSegmenter, references: Mapping[str, Reference], case: Case, job: Job, fits: bool
) -> list[Result]:
    """Return the structures that are found in a damaged case, as far as they were contoured.

    Damaged images are cropped to about a window of the inferer, lest the fit of large images take days.
    """
    image, truth = read_case(case, [0, *segmenter.labels])
    labels = np.asarray(truth.dataobj).astype(np.uint8)
    random = np.random.RandomState(zlib.crc32(" ".join(map(str, job)).encode()))
    if job[1] != "none":
        sizes = voxel_sizes(np.asarray(segmenter.prepare(image)[1].affine))
        window = np.broadcast_to(getattr(segmenter.windows, "roi_size", None) or image.shape, 3)
        image, labels = crop_case(image, labels, window * sizes, random)
    contoured = set(np.unique(labels))
    image, labels = damage_case(image, labels, job[1], random)
    found, _, described = segmenter.describe_crop(image)
    rows = feature_rows(described, references)
    results = []
    for value, name in segmenter.labels.items():
        if value in contoured and name in rows:
            first, second = found == value, labels == value
            dice = 2 * float((first & second).sum()) / float(first.sum() + second.sum())
            # Rounded as in the table, so that an interruption changes nothing.
            features = tuple(np.round(rows[name], 6).tolist())
            results.append(Result(job, fits, name, features, round(dice, 6)))
    return results


def _write_table(path: Path, results: Sequence[Result]) -> None:
    rows = [
        [*result.job, result.structure, *(f"{value:.6f}" for value in (*result.features, result.dice))]
        for result in results
    ]
    write_text(path, csv_text([COLUMNS, *rows]))


def _read_table(path: Path) -> dict[Job, list[Result]]:
    """Return the results of a table by their jobs; none if there is no such table."""
    done: dict[Job, list[Result]] = {}
    if not path.is_file():
        return done
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                job = (row["case"], row["damage"], int(row["repetition"]))
                features = tuple(float(row[name]) for name in FEATURES)
                result = Result(job, True, row["structure"], features, float(row["dice"]))
                done.setdefault(job, []).append(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a table of results ({first_line(error)}). Remove it.") from error
    return done


def fit_quality(results: Sequence[Result], references: Mapping[str, Reference], digest: str) -> QualityModel:
    """Fit a quality model to those results that are to fit it, and judge it by the others.

    Args:
        results: of all cases.
        references: how structures look in training cases.
        digest: of the network's weights.
    """
    structures = list(references)
    _check_results(results, structures)
    fitting, judging = ([result for result in results if result.fits is fits] for fits in (True, False))
    features = np.array([result.features for result in fitting])
    dice = np.array([result.dice for result in fitting])
    numbers = dict(zip(structures, _shared_offsets(structures)))
    place = np.array([numbers[result.structure] for result in fitting])

    def residuals(values: np.ndarray) -> np.ndarray:
        weights, offsets = np.split(values, [len(FEATURES)])
        predicted = 1 / (1 + np.exp(np.clip(features @ weights - offsets[place], -50, 50)))
        return np.concatenate([predicted - dice, np.sqrt(PENALTY) * values])

    start = np.ones(len(FEATURES) + len(set(numbers.values())))
    lower = np.where(np.arange(len(start)) < len(FEATURES), 0, -np.inf)
    solution = np.round(least_squares(residuals, start, bounds=(lower, np.inf)).x, 5)
    weights, offsets = np.split(solution, [len(FEATURES)])
    model = QualityModel(
        weights=dict(zip(FEATURES, weights.tolist())),
        offsets={name: float(offsets[number]) for name, number in numbers.items()},
        references=dict(references),
        warn_below=0.0,
        digest=digest,
        held_out={},
    )
    model = replace(model, warn_below=_bound(predicted_dice(model, fitting), dice))
    return replace(model, held_out=judge_quality(model, judging))


def _shared_offsets(structures: Sequence[str]) -> list[int]:
    """Return the number of the offset of each structure, which those on the left share with those on the right."""
    first = list(range(len(structures)))
    for one, other in side_pairs(structures)[0]:
        first[other - 1] = one - 1
    return [sorted(set(first)).index(number) for number in first]


def _check_results(results: Sequence[Result], structures: Sequence[str]) -> None:
    """Check that each structure was found in at least two cases, one that fits and one that judges."""
    for fits in (True, False):
        missing = set(structures) - {result.structure for result in results if result.fits is fits}
        if missing:
            raise InputError(
                f"{', '.join(sorted(missing))}: found in too few validation cases to fit and to judge a quality model. "
                "More cases are needed, or a longer training."
            )


def predicted_dice(model: QualityModel, results: Sequence[Result]) -> np.ndarray:
    """Return the predicted Dice of results."""
    return np.array([model.rate(result.structure, np.array(result.features)) for result in results])


def _bound(predicted: np.ndarray, dice: np.ndarray) -> float:
    """Return the predicted Dice below which a result is doubtful, the middle of the best ones in hundredths."""
    bounds = np.arange(0.3, 0.91, 0.01)
    worst = np.array([max(np.divide(_wrong(predicted, dice, bound), WANTED)) for bound in bounds])
    return float(np.round(np.median(bounds[worst <= worst.min() + 1e-9]), 2))


def _wrong(predicted: np.ndarray, dice: np.ndarray, bound: float) -> tuple[float, float]:
    """Return which fractions of bad results pass, and of good ones are doubted; 0 where there are none."""
    bad, good = predicted[dice < BAD], predicted[dice > GOOD]
    return float((bad >= bound).sum() / max(len(bad), 1)), float((good < bound).sum() / max(len(good), 1))


def judge_quality(model: QualityModel, results: Sequence[Result]) -> dict[str, float]:
    """Return how well a model predicts results that did not fit it; there is no correlation where all are alike."""
    predicted, dice = predicted_dice(model, results), np.array([result.dice for result in results])
    passed, doubted = _wrong(predicted, dice, model.warn_below)
    differ = min(np.ptp(predicted), np.ptp(dice)) > 0
    return {
        "cases": len({result.job[0] for result in results}),
        "results": len(results),
        **({"correlation": round(float(np.corrcoef(predicted, dice)[0, 1]), 4)} if differ else {}),
        "mean_absolute_error": round(float(np.abs(predicted - dice).mean()), 4),
        "bad": int((dice < BAD).sum()),
        "bad_that_pass": round(passed, 4),
        "good": int((dice > GOOD).sum()),
        "good_that_are_doubted": round(doubted, 4),
    }


def as_markdown(model: QualityModel) -> str:
    """Return what was measured on cases that did not fit the model, as the table of a README."""
    held_out = model.held_out
    left_out = held_out.get("contours_left_out", 0)
    correlation = f"{held_out['correlation']:.3f}" if "correlation" in held_out else "none: all are alike"
    without = f"; true contours left out for their volume: {left_out:.0f}" if left_out else ""
    rows = {
        f"structures found{without}": f"{held_out['results']:.0f}",
        "correlation of predicted and true Dice": correlation,
        "mean absolute error": f"{held_out['mean_absolute_error']:.3f}",
        f"doubted below a predicted Dice of {model.warn_below:.2f}: of {held_out['good']:.0f} whose true Dice is above "
        f"{GOOD}": f"{held_out['good_that_are_doubted']:.1%}",
        f"not doubted, of {held_out['bad']:.0f} whose true Dice is below {BAD}": f"{held_out['bad_that_pass']:.1%}",
    }
    head = f"| in {held_out['cases']:.0f} images that judge, as they are and damaged | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def draw_quality(results: Sequence[Result], model: QualityModel, path: Path) -> None:
    """Plot predicted and true Dice of the results that did not fit the model.

    Args:
        results: of all cases.
        model: fitted to the other results.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    judging = [result for result in results if not result.fits]
    predicted, dice = predicted_dice(model, judging), np.array([result.dice for result in judging])
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    damaged = np.array([result.job[1] != "none" for result in judging])
    for chosen, color, name in ((damaged, "tab:blue", "damaged"), (~damaged, "tab:orange", "as they are")):
        axes.scatter(predicted[chosen], dice[chosen], s=12, color=color, alpha=0.6, linewidths=0, label=name)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axes.axvline(model.warn_below, color="tab:red", linewidth=1, label=f"doubtful below {model.warn_below:.2f}")
    for value in (BAD, GOOD):
        axes.axhline(value, color="gray", linewidth=0.6, linestyle="dotted")
    title = f"{model.held_out['results']:.0f} structures in {model.held_out['cases']:.0f} images that judge"
    axes.set(xlabel="predicted Dice", ylabel="true Dice", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=title)
    axes.legend(loc="upper left")
    check_folder(path.parent)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
