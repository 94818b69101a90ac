"""Which structures and which tissues a label map of a whole head holds, by FreeSurfer's numbers.

The numbers are those of FreeSurfer's table `FreeSurferColorLUT.txt`. What those from 500 stand for, tissues outside the
brain, is told by where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["FLUID", "OUTSIDE", "STRUCTURES", "SWAP", "TYPICAL", "structure_labels", "tissue_numbers"]

# Structures, in the order of the labels: FreeSurfer's numbers on the left and on the right, or in the middle.
_PAIRED = {
    "hippocampus": ([17], [53]),
    "amygdala": ([18], [54]),
    "thalamus": ([10], [49]),
    "caudate": ([11], [50]),
    "putamen": ([12], [51]),
    "pallidum": ([13], [52]),
    "accumbens": ([26], [58]),
    "ventral diencephalon": ([28], [60]),
    # with the choroid plexus and the temporal horn
    "lateral ventricle": ([4, 5, 136, 137], [43, 44, 163, 164]),
    "cerebral cortex": ([3], [42]),
    # with lesions and vessels
    "cerebral white matter": ([2, 25, 30], [41, 57, 62]),
    "cerebellum": ([7, 8], [46, 47]),
}
_MIDDLE = {
    "brainstem": [16],
    "third ventricle": [14],
    "fourth ventricle": [15],
    # with the fifth ventricle and the optic chiasm, which lies in the fluid
    "cerebrospinal fluid": [24, 72, 85],
}

# Tissues: FreeSurfer's numbers, and the intensity in a T1-weighted image, white matter being 0.8. Left and right are
# of one tissue.
_TISSUES = (
    ([0], 0.0),  # air
    ([2, 41], 0.8),  # cerebral white matter
    ([3, 42], 0.55),  # cerebral cortex
    ([4, 43, 5, 44, 14, 15, 72], 0.15),  # ventricles
    ([7, 46], 0.78),  # cerebellar white matter
    ([8, 47], 0.53),  # cerebellar cortex
    ([10, 49], 0.68),  # thalamus
    ([11, 50], 0.57),  # caudate
    ([12, 51], 0.62),  # putamen
    ([13, 52], 0.74),  # pallidum
    ([16], 0.74),  # brainstem
    ([17, 53], 0.54),  # hippocampus
    ([18, 54], 0.54),  # amygdala
    ([24], 0.17),  # cerebrospinal fluid
    ([25, 57], 0.6),  # lesions of the white matter
    ([26, 58], 0.55),  # accumbens
    ([28, 60], 0.73),  # ventral diencephalon
    ([30, 62], 0.45),  # vessels
    ([85], 0.7),  # optic chiasm
    ([136, 163, 137, 164], 0.35),  # choroid plexus
    ([502], 0.4),
    ([506], 0.4),
    ([507], 0.6),  # muscles and other soft tissue
    ([508], 0.3),
    ([509], 0.1),
    ([511], 0.9),  # skin and fat
    ([512], 0.4),
    ([514], 0.35),
    ([515], 0.15),  # skull
    ([516], 0.5),  # marrow
    ([530], 0.4),
)
TYPICAL = tuple(intensity for _, intensity in _TISSUES)

# What a program takes out that leaves the brain alone; of the fluid around the brain some leave a layer.
OUTSIDE = (0, *(number for number, (labels, _) in enumerate(_TISSUES) if labels[0] > 500))
FLUID = (next(number for number, (labels, _) in enumerate(_TISSUES) if 24 in labels),)

# Name and numbers of each structure, in the order of the labels 1, 2, ...: left, right, middle.
STRUCTURES: dict[str, list[int]] = {
    **{f"left {name}": left for name, (left, _) in _PAIRED.items()},
    **{f"right {name}": right for name, (_, right) in _PAIRED.items()},
    **_MIDDLE,
}
SWAP = tuple((label, label + len(_PAIRED)) for label in range(1, len(_PAIRED) + 1))


def structure_labels(freesurfer: np.ndarray) -> np.ndarray:
    """Return the labels 1, 2, ... of `STRUCTURES`, uint8, of a map of FreeSurfer's numbers; 0 elsewhere.

    Example:
        >>> structure_labels(np.array([0, 17, 53, 507])).tolist()
        [0, 1, 13, 0]
    """
    return _renumbered(freesurfer, STRUCTURES.values(), first=1)


def tissue_numbers(freesurfer: np.ndarray) -> np.ndarray:
    """Return the tissues 0, 1, ..., uint8, of a map of FreeSurfer's numbers; numbers that are unknown count as air.

    Example:
        >>> tissue_numbers(np.array([0, 2, 41, 3])).tolist()
        [0, 1, 1, 2]
    """
    return _renumbered(freesurfer, (numbers for numbers, _ in _TISSUES), first=0)


def _renumbered(freesurfer: np.ndarray, groups: Iterable[Sequence[int]], first: int) -> np.ndarray:
    table = np.zeros(max(int(freesurfer.max()), 1000) + 1, np.uint8)
    for number, group in enumerate(groups, first):
        table[group] = number
    return table[freesurfer]
