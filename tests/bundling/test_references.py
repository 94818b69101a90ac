"""References: what true contours look like, and which of them are none."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from monai_iunet.bundling.references import Contours, make_references, unusual_contours, usual_volumes
from monai_iunet.errors import InputError
from monai_iunet.segmentation.quality_features import INTENSITY, SHAPE, Description

CASE = {"image": "folder/pt_1.nii.gz", "label": "folder/pt_1_label.nii.gz"}


def contours(**milliliters: float) -> Contours:
    """Structures of a case, of which nothing but the volume counts."""
    return {
        name: Description(
            0, 0, 0, 0, np.array([np.log(1000 * volume), *[0] * (SHAPE - 1)]), np.zeros(INTENSITY), np.zeros(3)
        )
        for name, volume in milliliters.items()
    }


def drawn(middle: float, deviation: float, count: int) -> list[Contours]:
    volumes = middle * np.exp(np.random.default_rng(0).normal(0, deviation, count))
    return [contours(organ=volume) for volume in volumes]


@pytest.mark.parametrize("deviation", [0.0, 0.2, 0.5, 1.5])
def test_contours_of_one_kind_are_usual_however_they_vary(deviation: float) -> None:
    cases = drawn(20, deviation, 100)
    volumes = usual_volumes(cases, ["organ"])
    assert not any(unusual_contours(CASE, case, volumes) for case in cases)


def test_contours_of_something_else_are_unusual_and_each_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cases = [*drawn(16, 0.3, 40), contours(organ=494), contours(organ=531), contours(organ=1.4)]
    with caplog.at_level(logging.WARNING):
        volumes = usual_volumes(cases, ["organ"])
        found = [unusual_contours(CASE, case, volumes) for case in cases]
    assert found == [set()] * 40 + [{"organ"}] * 3
    assert len(caplog.messages) == 3
    assert caplog.messages[0].startswith("pt_1: the largest component of organ has 494 ml, where ")
    # What is wrong in a tenth of the cases moves the bounds by little.
    least, largest = usual_volumes(drawn(16, 0.3, 40), ["organ"])["organ"]
    np.testing.assert_allclose(volumes["organ"], (least, largest), rtol=0.3)


def test_of_few_cases_none_is_unusual() -> None:
    cases = [*drawn(16, 0.01, 6), contours(organ=500)]
    volumes = usual_volumes(cases, ["organ", "never"])
    assert not any(unusual_contours(CASE, case, volumes) for case in cases)
    assert volumes["never"] == volumes["organ"] == (0, np.inf)


def test_structures_of_few_cases_have_no_reference() -> None:
    cases = [contours(organ=1, other=2), contours(organ=1), contours(organ=2)]
    assert list(make_references(cases, ["organ"])) == ["organ"]
    with pytest.raises(InputError, match="other: in 1 training cases, at least 3 are needed"):
        make_references(cases, ["organ", "other"])
