"""How good a segmentation probably is: a predicted Dice per structure, from what needs no true labels.

Eight features of a structure, each 0 where nothing is wrong (`quality_features`): how uncertain the network is; how
much a second run on a window around the structure, with some noise, disagrees; which fraction is fragments beside the
largest component; of that component, how far shape, intensities and place beside the other structures are from those
of the training cases, and which fraction lies on the edge of the image; and how far the other structures of the image
are, because what fails an image, as wrong directions in its header do, seldom spares a structure. The three distances d
are root mean squares in standard deviations, correlations allowed for (Mahalanobis), and enter as log(1 + d); of the
others enters the median of their means.

The predicted Dice is 1 / (1 + exp(Σ wᵢ fᵢ - b)). No weight w is negative, so what looks worse is never rated better,
and what is far from all training cases is rated near 0. A structure that was not found is rated 0.

Weights are fitted on images that were damaged on purpose (`monai_iunet.bundling.fit_quality`). They lie beside those of
the network, as plain numbers, in `models/quality.json`, with the bound below which a structure is called doubtful.
Second weights of a bundle, NAME, have their own in `models/NAME_quality.json`.

Sources: Robinson et al., Real-time prediction of segmentation quality, 2018, arXiv 1806.06244; Jungo, Balsiger, Reyes,
Analyzing the quality and challenges of uncertainty estimations for brain tumor segmentation, 2020.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.io.text import first_line
from monai_iunet.io.weights import weights_file
from monai_iunet.segmentation.quality_features import INTENSITY, SHAPE, Description

__all__ = [
    "FEATURES",
    "Normal",
    "QualityModel",
    "Reference",
    "feature_rows",
    "quality_file",
    "read_quality",
    "weights_digest",
    "write_quality",
]

logger = logging.getLogger(__name__)

FEATURES = ("uncertainty", "disagreement", "shape", "intensity", "place", "fragments", "edge", "others")


@dataclass(frozen=True)
class Normal:
    """Holds how a few numbers are distributed: their mean, and a matrix that makes them independent, of deviation 1.

    Example:
        >>> normal = Normal.of(np.random.default_rng(0).normal(5, 2, (1000, 3)), least_deviation=0.1)
        >>> bool(normal.distance(np.full(3, 5.0)) < 0.1), bool(1.8 < normal.distance(np.full(3, 9.0)) < 2.2)
        (True, True)
    """

    mean: np.ndarray
    whitening: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, least_deviation: float) -> Normal:
        """Return the distribution of rows; a tenth of the correlations is left out, as few cases show false ones."""
        covariance = np.cov(rows.T, bias=True)
        covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance)) + least_deviation**2 * np.eye(rows.shape[1])
        return cls(rows.mean(0), np.linalg.inv(np.linalg.cholesky(covariance)))

    def distance(self, row: np.ndarray) -> float:
        """Return how far a row is from the mean: the root mean square over its numbers, in standard deviations."""
        return float(np.sqrt(np.mean((self.whitening @ (row - self.mean)) ** 2)))


@dataclass(frozen=True)
class Reference:
    """Holds how a structure looks in training cases: shape, intensities, place beside each other structure."""

    shape: Normal
    intensity: Normal
    place: dict[str, Normal]


@dataclass(frozen=True)
class QualityModel:
    """Predicts the Dice of structures.

    Attributes:
        weights: of each of `FEATURES`, not negative.
        offsets: b of each structure.
        references: of each structure.
        warn_below: predicted Dice below which a structure is doubtful.
        digest: of the network's weights that it belongs to, see `weights_digest`.
        held_out: what was measured on cases that did not fit it.
    """

    weights: dict[str, float]
    offsets: dict[str, float]
    references: dict[str, Reference]
    warn_below: float
    digest: str
    held_out: dict[str, float]

    def predict(self, found: Mapping[str, Description]) -> dict[str, float]:
        """Return the predicted Dice of each structure; 0 for those that were not found."""
        predicted = dict.fromkeys(self.offsets, 0.0)
        for name, features in feature_rows(found, self.references).items():
            predicted[name] = self.rate(name, features)
        return predicted

    def rate(self, structure: str, features: np.ndarray) -> float:
        """Return the predicted Dice of a structure by the values of `FEATURES`; 0 if one of them is no number."""
        weighted = features @ np.array([self.weights[name] for name in FEATURES])
        if np.isnan(weighted):  # which is below no bound
            return 0.0
        return round(float(1 / (1 + np.exp(np.clip(weighted - self.offsets[structure], -50, 50)))), 3)


def feature_rows(found: Mapping[str, Description], references: Mapping[str, Reference]) -> dict[str, np.ndarray]:
    """Return the values of `FEATURES` of each structure that was found."""
    distances = {}
    for name, description in found.items():
        reference = references[name]
        apart = [
            place.distance(description.center - found[other].center)
            for other, place in reference.place.items()
            if other in found
        ]
        far = (
            reference.shape.distance(description.shape),
            reference.intensity.distance(description.intensity),
            float(np.median(apart)) if apart else 0.0,
        )
        distances[name] = np.log1p(far)
    rows = {}
    for name, description in found.items():
        others = [distance.mean() for other, distance in distances.items() if other != name]
        rows[name] = np.array(
            [
                description.uncertainty,
                description.disagreement,
                *distances[name],
                description.fragments,
                description.edge,
                np.median(others) if others else 0.0,
            ]
        )
    return rows


def quality_file(bundle: str | Path, weights: str = "model") -> Path:
    """Return the file with the quality model of a bundle's weights of that name."""
    return Path(bundle) / "models" / ("quality.json" if weights == "model" else f"{weights}_quality.json")


def weights_digest(bundle: str | Path, weights: str = "model") -> str:
    """Return the SHA-256 of the file with a bundle's weights: a model of the quality belongs to one network."""
    return hashlib.sha256(weights_file(bundle, weights).read_bytes()).hexdigest()


def write_quality(model: QualityModel, bundle: str | Path, weights: str = "model") -> Path:
    """Write the quality model of a bundle's weights beside them."""

    def normal(values: Normal) -> dict[str, Any]:
        # Five digits: a hundredth of a percent of a deviation.
        return {name: np.round(getattr(values, name), 5).tolist() for name in ("mean", "whitening")}

    content = {
        "weights": model.weights,
        "offsets": model.offsets,
        "warn_below": model.warn_below,
        "digest": model.digest,
        "held_out": model.held_out,
        "references": {
            name: {
                "shape": normal(reference.shape),
                "intensity": normal(reference.intensity),
                "place": {other: normal(place) for other, place in reference.place.items()},
            }
            for name, reference in model.references.items()
        },
    }
    path = quality_file(bundle, weights)
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def read_quality(bundle: str | Path, structures: Sequence[str], weights: str = "model") -> QualityModel | None:
    """Read the quality model of a bundle.

    Args:
        bundle: folder.
        structures: that the bundle segments.
        weights: name of the weights that it belongs to.

    Returns:
        None if there is none, or, with a warning, if it was fitted to other weights: the quality is then unknown.

    Raises:
        InputError: when the file is damaged.
    """
    path = quality_file(bundle, weights)
    if not path.is_file():
        return None
    try:
        model = _model(json.loads(path.read_text(encoding="utf-8")), structures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a quality model of this bundle ({type(error).__name__}: {first_line(error)}). Remove it, and "
            "fit one with `monai-iunet quality` if you want one."
        ) from error
    if model.digest != weights_digest(bundle, weights):
        logger.warning("%s: fitted to other weights, so the quality is unknown. Run `monai-iunet quality`.", path)
        return None
    return model


def _model(content: dict[str, Any], structures: Sequence[str]) -> QualityModel:
    """Return the model that a file holds, after checking that all its numbers are there and finite."""

    def numbers(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
        return {name: _number(values[name]) for name in names}

    def normal(values: Mapping[str, Any], size: int) -> Normal:
        mean, whitening = (np.asarray(values[name], dtype=float) for name in ("mean", "whitening"))
        if mean.shape != (size,) or whitening.shape != (size, size):
            raise ValueError(f"{size} numbers are needed, there are {mean.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(whitening).all()):
            raise ValueError("numbers must be finite")
        return Normal(mean, whitening)

    weights = numbers(content["weights"], FEATURES)
    if min(weights.values()) < 0:
        raise ValueError("weights must not be negative")
    references = {
        name: Reference(
            normal(values["shape"], SHAPE),
            normal(values["intensity"], INTENSITY),
            {other: normal(values["place"][other], 3) for other in values["place"]},
        )
        for name, values in ((name, content["references"][name]) for name in structures)
    }
    return QualityModel(
        weights=weights,
        offsets=numbers(content["offsets"], structures),
        references=references,
        warn_below=_number(content["warn_below"]),
        digest=str(content["digest"]),
        held_out={name: _number(value) for name, value in content["held_out"].items()},
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
