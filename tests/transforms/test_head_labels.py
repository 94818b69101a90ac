"""The tables of structures and tissues name each number once, and pair left with right."""

from __future__ import annotations

import numpy as np

from monai_iunet.transforms.head_labels import (
    FLUID,
    OUTSIDE,
    STRUCTURES,
    SWAP,
    TYPICAL,
    structure_labels,
    tissue_numbers,
)


def test_no_number_is_of_two_structures() -> None:
    numbers = [number for group in STRUCTURES.values() for number in group]
    assert len(numbers) == len(set(numbers))


def test_pairs_are_of_the_same_name() -> None:
    names = ["background", *STRUCTURES]
    assert {(names[left], names[right]) for left, right in SWAP} == {
        (name, name.replace("left", "right")) for name in names if name.startswith("left")
    }


def test_every_structure_is_of_tissues_inside_the_head() -> None:
    for name, numbers in STRUCTURES.items():
        tissues = tissue_numbers(np.array(numbers))
        assert tissues.min() > 0, name
        assert not set(tissues) & set(OUTSIDE), name


def test_left_and_right_are_of_one_tissue() -> None:
    for left, right in SWAP:
        groups = list(STRUCTURES.values())
        assert set(tissue_numbers(np.array(groups[left - 1]))) == set(tissue_numbers(np.array(groups[right - 1])))


def test_skull_and_scalp_are_outside_and_no_structure() -> None:
    outer = np.array([502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530])
    assert not structure_labels(outer).any()
    assert set(tissue_numbers(outer)) | {0} == set(OUTSIDE)
    assert max(OUTSIDE) < len(TYPICAL)
    assert list(FLUID) == tissue_numbers(np.array([24])).tolist()
