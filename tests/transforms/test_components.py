"""What largest components are not taken of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from monai_iunet import InputError, LargestComponentsd


@pytest.mark.parametrize("labels", [[0, 1], [-1], [1.0], ["liver"]])
def test_numbers_of_no_structure_are_refused(labels: Any) -> None:
    with pytest.raises(InputError, match="must be the numbers of structures"):
        LargestComponentsd("pred", labels)


def test_maps_of_several_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"pred: a label map of one channel is needed, got \(2, 4, 4\)"):
        LargestComponentsd("pred", [1])({"pred": torch.zeros(2, 4, 4, dtype=torch.uint8)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_16_bits_that_are_no_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"pred: a label map of whole numbers is needed, .* got {dtype}"):
        LargestComponentsd("pred", [1])({"pred": torch.ones(1, 2, 2, dtype=dtype)})


def test_an_array_that_must_not_be_written_to_stays() -> None:
    given = np.array([[[1, 0, 1, 1, 2]]])
    given.flags.writeable = False
    found = LargestComponentsd("pred", [1, 2])({"pred": given})["pred"]
    assert found.tolist() == [[[0, 0, 1, 1, 2]]]
    assert given.tolist() == [[[1, 0, 1, 1, 2]]]
