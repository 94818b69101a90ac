"""How good the networks of the folds are, each on cases that it was not trained on, and what cleans their labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.table import Table

from monai_iunet.errors import InputError

__all__ = [
    "Score",
    "best_fold",
    "choose_clean_up",
    "mean_dice",
    "read_scores",
    "score_table",
    "summarize",
    "summarize_gain",
]

Fold = TypeVar("Fold")

RESAMPLES = 2000
MEASURES = ("dice", "hausdorff95_mm", "surface_distance_mm")


@dataclass(frozen=True)
class Score:
    """How well a structure was found in a case.

    Example:
        >>> Score("a.nii.gz", "liver", {"dice": 0.9}).measures["dice"]
        0.9
    """

    case: str
    structure: str
    measures: dict[str, float]


def read_scores(tables: Sequence[Path]) -> list[Score]:
    """Read the tables `cases.csv` of evaluations; structures that are not labeled in a case are left out.

    Raises:
        InputError: when there is no such table.
    """
    scores = []
    for path in tables:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if float(row["reference_mm3"]) > 0:
                        measures = {name: float(row[name]) for name in MEASURES}
                        scores.append(Score(row["case"], row["structure"], measures))
        except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
            raise InputError(f"{path}: not the table of an evaluation ({error}). Evaluate again.") from error
    return scores


def summarize(scores: Sequence[Score], structures: Sequence[str]) -> list[dict[str, str | float]]:
    """Return a row per structure, and one of their mean: cases, means, and the 95 % interval of the mean Dice.

    The interval is that of the mean over cases like these, by resampling the cases.

    Example:
        >>> scores = [Score(str(number), "liver", dict.fromkeys(MEASURES, 0.9)) for number in range(5)]
        >>> rows = summarize(scores, ["liver"])
        >>> rows[0]["cases"], round(rows[0]["dice"], 2), round(rows[0]["dice_low"], 2)
        (5, 0.9, 0.9)
    """
    rows: list[dict[str, str | float]] = []
    for structure in structures:
        values = [score.measures for score in scores if score.structure == structure]
        dice = [value["dice"] for value in values]
        low, high = _interval(dice)
        means = {name: float(np.mean([value[name] for value in values])) if values else np.nan for name in MEASURES}
        rows.append({"structure": structure, "cases": len(values), **means, "dice_low": low, "dice_high": high})
    if len(structures) > 1:
        low, high = _interval_of_mean(scores, structures)
        means = {name: float(np.nanmean([row[name] for row in rows])) for name in MEASURES}
        cases = len({score.case for score in scores})
        rows.append({"structure": "mean", "cases": cases, **means, "dice_low": low, "dice_high": high})
    return rows


def mean_dice(scores: Sequence[Score], structures: Sequence[str]) -> float:
    """Return the mean over the structures of the mean Dice over the cases."""
    return float(summarize(scores, structures)[-1]["dice"])


def best_fold(scores: Mapping[Fold, Sequence[Score]], structures: Sequence[str]) -> Fold:
    """Return the fold of the highest mean Dice, which is never one whose cases show no structure.

    Example:
        >>> best_fold({0: [], 1: [Score("a", "liver", dict.fromkeys(MEASURES, 0.9))]}, ["liver"])
        1
    """
    return max(scores, key=lambda fold: np.nan_to_num(mean_dice(scores[fold], structures), nan=-1.0))


def summarize_gain(before: Sequence[Score], after: Sequence[Score]) -> tuple[float, float, float]:
    """Return by how much the mean Dice of a case grows, with the 95 % interval of that over cases like these."""
    first, second = _case_means(before), _case_means(after)
    gains = [second[case] - first[case] for case in sorted(first.keys() & second.keys())]
    return float(np.mean(gains)), *_interval(gains)


def choose_clean_up(as_is: Sequence[Score], largest: Sequence[Score], structures: Sequence[str]) -> list[int]:
    """Return the labels of the structures of which keeping the largest component alone helps.

    It helps where the Dice of the same cases grows in the mean, its interval has nothing below zero, and the distance
    of the surfaces does not grow.

    Args:
        as_is: scores without it.
        largest: scores with it.
        structures: names of the labels 1, 2, ...

    Example:
        >>> before, after = ([Score("a", "liver", dict.fromkeys(MEASURES, dice))] * 5 for dice in (0.8, 0.8))
        >>> choose_clean_up(before, after, ["liver"])
        []
    """
    kept = []
    for number, structure in enumerate(structures, 1):
        before, after = (
            {score.case: score.measures for score in scores if score.structure == structure}
            for scores in (as_is, largest)
        )
        cases = sorted(before.keys() & after.keys())
        gains = [after[case]["dice"] - before[case]["dice"] for case in cases]
        apart = [after[case]["hausdorff95_mm"] - before[case]["hausdorff95_mm"] for case in cases]
        apart = [difference for difference in apart if np.isfinite(difference)]
        if gains and np.mean(gains) > 0 and _interval(gains)[0] >= 0 and (not apart or np.mean(apart) <= 0):
            kept.append(number)
    return kept


def score_table(rows: Sequence[dict[str, str | float]]) -> Table:
    """Return a summary as a table to print."""
    table = Table("", "cases", "Dice", "95 % interval", "HD95, mm", "surface, mm", title="Cross-validation")
    for row in rows:
        table.add_row(
            str(row["structure"]),
            str(row["cases"]),
            f"{row['dice']:.3f}",
            f"{row['dice_low']:.3f} to {row['dice_high']:.3f}",
            f"{row['hausdorff95_mm']:.2f}",
            f"{row['surface_distance_mm']:.2f}",
        )
    return table


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by resampling."""
    if not values:
        return np.nan, np.nan
    numbers = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[numbers].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _interval_of_mean(scores: Sequence[Score], structures: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over the structures of the mean Dice over the cases that show each."""
    cases = sorted({score.case for score in scores})
    if not cases:
        return np.nan, np.nan
    dice = np.full((len(cases), len(structures)), np.nan)
    for score in scores:
        dice[cases.index(score.case), structures.index(score.structure)] = score.measures["dice"]
    numbers = np.random.default_rng(0).integers(0, len(cases), (RESAMPLES, len(cases)))
    times = np.array([np.bincount(chosen, minlength=len(cases)) for chosen in numbers])  # that each case is drawn
    with np.errstate(invalid="ignore"):  # a structure that no drawn case shows has no mean
        means = times @ np.nan_to_num(dice) / (times @ np.isfinite(dice))
    low, high = np.percentile(np.nanmean(means, 1), [2.5, 97.5])
    return float(low), float(high)


def _case_means(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean Dice over the structures of each case."""
    found: dict[str, list[float]] = {}
    for score in scores:
        found.setdefault(score.case, []).append(score.measures["dice"])
    return {case: float(np.mean(values)) for case, values in found.items()}
