"""How structures look in cases whose true labels are known: the references of a quality model.

A contour whose volume is far from that of the others seldom is one of that structure: a spinal cord of 500 ml, or a
brainstem of which one slice was drawn. As a reference it would make anything look usual, and beside it a right result
would be a bad one. So a contour is left out, in training cases and in those that fit and judge a model, if the
logarithm of its volume is more than `FAR` standard deviations from the median, and the volume more than `NEAR` times as
large or as small. The deviation is taken from the median deviation, which a few wrong contours do not move. Each is
said.

Source: Leys et al., Detecting outliers: do not use standard deviation around the mean, use absolute deviation around
the median, Journal of Experimental Social Psychology 49, 2013.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from nibabel.affines import voxel_sizes
from scipy.stats import median_abs_deviation
from tqdm import tqdm

from monai_iunet.bundling.evaluation_data import Case
from monai_iunet.errors import InputError
from monai_iunet.io.files import SUFFIXES, image_name
from monai_iunet.segmentation.quality import Normal, Reference
from monai_iunet.segmentation.quality_features import Description, describe_structures
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.training.cases import read_case

__all__ = ["describe_contours", "describe_training", "unusual_contours"]

logger = logging.getLogger(__name__)

LEAST_DEVIATION = 0.05  # of logarithms, correlations and normalized intensities: few cases may agree by chance
LEAST_DISTANCE = 2.0  # mm, the same for places
LEAST_CASES = 3  # with a structure, to describe it
FAR = 4  # standard deviations of the logarithm of volumes
NEAR = 4  # times the median volume
MANY_CASES = 8  # with a structure, to tell which volume is unusual

Contours = dict[str, Description]  # by structures
Volumes = dict[str, tuple[float, float]]  # least and largest usual one of each structure, in mm³


def describe_training(segmenter: BundleSegmenter, cases: Sequence[Case]) -> tuple[dict[str, Reference], Volumes]:
    """Return how each structure looks in training cases, and which volumes of it are usual.

    Args:
        segmenter: of the bundle.
        cases: paths "image" and "label".

    Raises:
        InputError: when labels are not those of the bundle, or a structure is in too few cases.
    """
    structures = list(segmenter.labels.values())
    found = [
        describe_contours(segmenter, case)
        for case in tqdm(cases, "describing training cases", leave=False, disable=None)
    ]
    volumes = usual_volumes(found, structures)
    usual = []
    for case, contours in zip(cases, found):
        left_out = unusual_contours(case, contours, volumes)
        usual.append({name: description for name, description in contours.items() if name not in left_out})
    return make_references(usual, structures), volumes


def describe_contours(segmenter: BundleSegmenter, case: Case) -> Contours:
    """Return how each structure of a case looks by its true labels, on the grid of the network."""
    image, labels = read_case(case, [0, *segmenter.labels])
    prepared, meta = segmenter.prepare(image)
    truth = MetaTensor(torch.from_numpy(labels.get_fdata(dtype=np.float32))[None], affine=labels.affine)
    resampled = ResampleToMatch(mode="nearest", padding_mode="zeros")(truth, meta)
    sizes = voxel_sizes(np.asarray(meta.affine))
    found = describe_structures(prepared, resampled[0].numpy().astype(np.uint8), sizes)
    return {segmenter.labels[value]: description for value, description in found.items()}


def usual_volumes(cases: Sequence[Contours], structures: Sequence[str]) -> Volumes:
    """Return the volumes that are not far from the median; all volumes, if a structure is in few cases."""
    volumes = {}
    for name in structures:
        logarithms = [contours[name].shape[0] for contours in cases if name in contours]
        if len(logarithms) < MANY_CASES:
            volumes[name] = (0.0, np.inf)
            continue
        reach = max(FAR * float(median_abs_deviation(logarithms, scale="normal")), np.log(NEAR))
        middle = float(np.median(logarithms))
        volumes[name] = (float(np.exp(middle - reach)), float(np.exp(middle + reach)))
    return volumes


def unusual_contours(case: Case, contours: Contours, volumes: Volumes) -> set[str]:
    """Return the structures of a case whose volume is not among the usual ones; each is logged."""
    unusual = set()
    for name, description in contours.items():
        volume, (least, largest) = float(np.exp(description.shape[0])), volumes[name]
        if not least <= volume <= largest:
            unusual.add(name)
            logger.warning(
                "%s: the largest component of %s has %.3g ml, where %.3g to %.3g ml are usual, so its contour is left "
                "out of the quality model. Look at it.",
                image_name(case["image"], SUFFIXES),
                name,
                *(value / 1000 for value in (volume, least, largest)),
            )
    return unusual


def make_references(cases: Sequence[Contours], structures: Sequence[str]) -> dict[str, Reference]:
    """Return the distributions of what describes each structure."""
    references = {}
    for name in structures:
        having = [contours for contours in cases if name in contours]
        if len(having) < LEAST_CASES:
            raise InputError(
                f"{name}: in {len(having)} training cases, at least {LEAST_CASES} are needed to fit a quality model."
            )
        places = {}
        for other in structures:
            apart = np.array([case[name].center - case[other].center for case in having if other in case])
            if other != name and len(apart) >= LEAST_CASES:
                places[other] = Normal.of(apart, LEAST_DISTANCE)
        shapes, intensities = (
            np.array([getattr(case[name], part) for case in having]) for part in ("shape", "intensity")
        )
        references[name] = Reference(
            Normal.of(shapes, LEAST_DEVIATION), Normal.of(intensities, LEAST_DEVIATION), places
        )
    return references
