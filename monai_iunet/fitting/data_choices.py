"""Choices of a plan that follow from the data alone: intensities, mirroring, missing labels, field of view.

Each function returns what it chooses, and the `Choice` that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from monai_iunet.fitting.fingerprint import Fingerprint
from monai_iunet.fitting.plan import Choice
from monai_iunet.segmentation.sides import side_pairs

__all__ = ["choose_field_of_view", "choose_mirroring", "choose_missing_labels", "choose_window"]

ORGAN = 0.6  # deviation of its volume over its mean, at most; lesions differ more
FEWEST_OF_SIDE = 5  # cases of a structure that show that it keeps to one side
LONGER = 1.5  # times the longest axis of the images that a network has learned from


def choose_window(data: Fingerprint) -> tuple[tuple[float, float], Choice]:
    """Choose the normalization; for CT the window, in the images' units."""
    if data.modality == "MR":
        reason = "an MR image has no unit: percentiles 0.5 and 99.5, then mean 0 and deviation 1 per image"
        return (-160.0, 240.0), Choice("intensities", "per image", reason, "mean 0 and deviation 1 per image")
    low, high = data.percentiles(0.5, 99.5)
    # To tens, or to less where that would be more than the range, as of a CT that was scaled to 0 and 1.
    extent = high - low
    digits = 1 - math.floor(math.log10(extent)) if 0 < extent < 10 else -1
    step = 10.0**-digits
    low, high = round(math.floor(low / step) * step, digits), round(math.ceil(high / step) * step, digits)
    reason = "Hounsfield units: percentiles 0.5 and 99.5 inside the structures become -1 and 1"
    peer = f"clipped to {low:g} to {high:g} HU, then by mean and deviation"
    return (low, high), Choice("intensities", f"{low:g} to {high:g} HU", reason, peer)


def choose_mirroring(data: Fingerprint) -> tuple[tuple[tuple[int, int], ...] | None, Choice]:
    """Choose whether images are mirrored: where labels come in pairs, or each structure lies on either side.

    Returns:
        The pairs of labels that are exchanged, or None where images are not mirrored.
    """

    def choice(value: str, reason: str) -> Choice:
        return Choice("mirroring", value, reason, "all axes")

    pairs, alone = side_pairs(data.structures)
    if alone:
        return None, choice("no", f"{', '.join(alone)}: one side only")
    if pairs:
        return tuple(pairs), choice("left and right, labels swap", "structures come in pairs")
    # Each structure by itself: two that lie on the two sides may be a pair whose names do not say so.
    sides = [_sides(centers) for centers in zip(*(case.centers for case in data.cases))]
    if "either" in sides and "one" not in sides:
        return (), choice("left and right", "structures lie on either side")
    return None, choice("no", "structures keep to one side or to the middle, so sides may matter")


def _sides(centers: Sequence[float | None]) -> str:
    """Return whether a structure lies on "either" side, keeps to "one", or to "neither", as far as its cases tell."""
    known = [center for center in centers if center is not None]
    least, most = sorted((sum(center < -0.1 for center in known), sum(center > 0.1 for center in known)))
    if most > 0 and least >= 0.2 * len(known):
        return "either"
    return "one" if len(known) >= FEWEST_OF_SIDE and most >= 0.2 * len(known) else "neither"


def choose_missing_labels(data: Fingerprint) -> tuple[bool, Choice | None]:
    """Choose whether a structure without voxels was not contoured, or is absent as a tumor may be.

    Returns:
        Whether such a structure is no part of the loss; no `Choice` where nothing was to be chosen.
    """
    organs = []
    for number, name in enumerate(data.structures):
        volumes = [case.volumes[number] for case in data.cases if case.volumes[number] > 0]
        if 2 < len(volumes) < len(data.cases) and np.std(volumes) < ORGAN * np.mean(volumes):
            organs.append(f"{name} ({len(data.cases) - len(volumes)} cases)")
    if not organs:
        return False, None
    reason = (
        f"{', '.join(organs)}: of like size where labeled, so elsewhere not labeled rather than absent; "
        "otherwise ask for --missing-labels background"
    )
    return True, Choice("missing labels", "no part of the loss", reason, "background")


def choose_field_of_view(data: Fingerprint) -> tuple[float, Choice]:
    """Choose how long an axis of an image may be that is segmented, in mm."""
    longest = max(max(case.extent) for case in data.cases)
    largest = float(math.ceil(LONGER * longest / 10) * 10)
    reason = f"the longest axis of an image is {longest:.0f} mm; much more was never seen, and must be cropped first"
    return largest, Choice("largest image", f"{largest:.0f} mm", reason, "any")
