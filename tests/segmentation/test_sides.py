"""Left and right structures are told by their names."""

from __future__ import annotations

import pytest

from monai_iunet.segmentation.sides import side_pairs


@pytest.mark.parametrize(
    ("names", "pairs", "alone"),
    [
        (["RightParotid", "LeftParotid", "Mandible"], [(1, 2)], []),
        (["kidney_left", "liver", "kidney_right"], [(1, 3)], []),
        (["left atrium"], [], ["left atrium"]),
        (["L lung", "R lung"], [(1, 2)], []),
        (["Lt Parotid", "Rt_Parotid", "ctx-lh-insula", "ctx-rh-insula"], [(1, 2), (3, 4)], []),
        (["LtKidney", "spleen", "RtKidney"], [(1, 3)], []),
        (["Cleft", "Bright spot"], [], []),
    ],
)
def test_sides_are_found_by_the_names(names: list[str], pairs: list[tuple[int, int]], alone: list[str]) -> None:
    assert side_pairs(names) == (pairs, alone)
