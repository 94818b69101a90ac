"""Random curves change the contrast of an image, not where its structures are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_iunet import RandIntensityCurved, Task
from monai_iunet.bundling.preprocessing import random_transforms

RAMP = torch.linspace(-3, 5, 41).reshape(1, 41)


def made(prob_monotone: float, count: int = 40) -> list[np.ndarray]:
    change = RandIntensityCurved("image", prob=1.0, prob_monotone=prob_monotone).set_random_state(0)
    return [change({"image": RAMP})["image"][0].numpy() for _ in range(count)]


def test_intensities_stay_in_their_range_and_equal_ones_stay_equal() -> None:
    change = RandIntensityCurved("image", prob=1.0).set_random_state(0)
    image = torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0, 0.0]])
    for _ in range(20):
        changed = change({"image": image})["image"]
        assert changed.min() >= 0
        assert changed.max() <= 2
        assert torch.equal(changed, changed.flip(1))


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, torch.Tensor.short, torch.Tensor.byte])
def test_images_of_any_type_change_alike(kind: Any) -> None:
    image = torch.arange(40.0).reshape(1, 40)
    expected, found = (
        RandIntensityCurved("image", prob=1.0).set_random_state(0)({"image": given})["image"]
        for given in (image, kind(image))
    )
    torch.testing.assert_close(found, expected)


def test_a_range_beyond_float16_stays_finite() -> None:
    image = torch.tensor([[-60000.0, 0.0, 60000.0]])
    expected, found = (
        RandIntensityCurved("image", prob=1.0).set_random_state(0)({"image": given})["image"]
        for given in (image, image.half())
    )
    torch.testing.assert_close(found, expected.half())


def test_every_curve_leaves_a_contrast() -> None:
    assert min(np.ptp(values) for values in made(0.5)) >= 0.2 * 8 * 0.7


def test_ordered_curves_rise_or_fall() -> None:
    rising = [bool((np.diff(values) >= -1e-5).all()) for values in made(1.0)]
    falling = [bool((np.diff(values) <= 1e-5).all()) for values in made(1.0)]
    assert all(up or down for up, down in zip(rising, falling))
    assert 0 < sum(rising) < len(rising)


def test_free_curves_do_neither() -> None:
    steps = [np.diff(values) for values in made(0.0)]
    assert any(step.min() < -1e-3 and step.max() > 1e-3 for step in steps)


def test_a_constant_image_and_one_that_is_left_alone_stay() -> None:
    constant = torch.full((1, 4), 7.0)
    assert torch.equal(RandIntensityCurved("image", prob=1.0)({"image": constant})["image"], constant)
    assert torch.equal(RandIntensityCurved("image", prob=0.0)({"image": RAMP})["image"], RAMP)


def test_the_geometry_stays_with_the_image() -> None:
    image = MetaTensor(torch.rand(1, 3, 3, 3), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))
    changed = RandIntensityCurved("image", prob=1.0)({"image": image})["image"]
    assert torch.equal(changed.affine, image.affine)


def test_a_curve_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="max_knots"):
        RandIntensityCurved("image", max_knots=1)


def test_a_task_asks_for_it() -> None:
    for asked in (False, True):
        task = Task("name", "MR", ("a",), "data", (1.0, 1.0, 1.0), (16, 16, 16), any_contrast=asked, channels=(4, 8),
                    couplings=(1, 1))  # fmt: skip
        named = [transform["_target_"] for transform in random_transforms(task)]
        assert ("monai_iunet.RandIntensityCurved" in named) == asked


def test_other_contrasts_have_the_scale_that_images_are_brought_to() -> None:
    task = Task("name", "MR", ("a",), "data", (1.0, 1.0, 1.0), (16, 16, 16), any_contrast=True, channels=(4, 8),
                couplings=(1, 1))  # fmt: skip
    contrasts = random_transforms(task)[:3]
    parser = ConfigParser({"change": {"_target_": "Compose", "transforms": contrasts}})
    change = parser.get_parsed_content("change").set_random_state(0)
    image = torch.rand(1, 12, 13, 14) * 3 + 5
    for _ in range(8):
        changed = change({"image": image})["image"]
        assert changed.shape == image.shape
        torch.testing.assert_close(float(changed.mean()), 0.0, atol=1e-4, rtol=0)
        torch.testing.assert_close(float(changed.std(correction=0)), 1.0, atol=1e-3, rtol=0)
