"""Images that are made from label maps agree with the labels that come with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_iunet import InputError, RandSyntheticImaged

STILL: dict[str, Any] = {
    "max_rotation": 0.0, "max_scale": 0.0, "max_shear": 0.0, "max_shift": 0.0, "max_displacement": 0.0,
}  # fmt: skip


def head(zoom: float = 1.0) -> dict[str, MetaTensor]:
    """Tissues and labels of a ball with a left and a right half, in a layer of another tissue."""
    size = round(48 / zoom)
    grid = np.stack(np.meshgrid(*[(np.arange(size) - (size - 1) / 2) * zoom] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    tissues = np.select([radius < 12, radius < 18], [1, 2], 0)
    labels = np.where(tissues == 1, np.where(grid[0] < 0, 1, 2), 0)
    affine = torch.diag(torch.tensor([zoom] * 3 + [1.0]))
    return {
        key: MetaTensor(torch.tensor(volume[None], dtype=torch.uint8), affine=affine)
        for key, volume in (("image", tissues), ("label", labels))
    }


def maker(**options: Any) -> RandSyntheticImaged:
    arguments = {"pixdim": 2.0, "spatial_size": (24, 24, 24), "typical": (0.0, 0.8, 0.4), "swap": [[1, 2]],
                 "divisor": 4, "prob_crop": 0.0, "prob_strip": 0.0}  # fmt: skip
    return RandSyntheticImaged("image", **{**arguments, **options})


def test_a_seed_gives_one_image_and_another_seed_another() -> None:
    first, same, other = (maker().set_random_state(seed)(head()) for seed in (3, 3, 4))
    assert torch.equal(first["image"], same["image"])
    assert torch.equal(first["label"], same["label"])
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("zoom", [0.8, 1.0, 1.5])
def test_without_deformation_structures_keep_place_and_size(zoom: float) -> None:
    made = maker(**STILL).set_random_state(0)(head(zoom))["label"][0]
    positions = (made > 0).nonzero().float()
    assert positions.mean(0).tolist() == pytest.approx([11.5] * 3, abs=0.3)
    volume = (made > 0).sum().item() * 8
    assert volume == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.1)


def test_left_stays_left_however_a_head_is_mirrored() -> None:
    make = maker(**STILL).set_random_state(0)
    for _ in range(8):
        made = make(head())["label"][0]
        left, right = ((made == side).nonzero().float()[:, 0].mean() for side in (1, 2))
        assert left + 4 < right


def test_a_deformation_moves_image_and_labels_alike() -> None:
    make = maker(prob_typical=1.0).set_random_state(0)
    apart = []
    for _ in range(10):
        made = make(head())
        image, inside = made["image"][0], made["label"][0] > 0
        # However dark or bright: a threshold between the means of inside and outside tells them apart.
        means = image[inside].mean(), image[~inside].mean()
        found = (image - means[1]) * (means[0] - means[1]) > (means[0] - means[1]) ** 2 / 2
        apart.append((found == inside).float().mean().item())
    assert np.median(apart) > 0.85


def test_what_is_taken_out_is_black_and_has_no_label() -> None:
    make = maker(outside=[0, 2], fluid=[3], prob_strip=1.0, prob_typical=0.0, typical=[0.0, 0.8, 0.4, 0.6], max_shift=0)
    make.set_random_state(0)
    with_fluid = head()
    with_fluid["image"][with_fluid["label"] == 2] = 3
    sides = []
    for _ in range(8):
        made = make(with_fluid)
        assert (made["image"][made["label"] == 0] == 0).all()
        sides.append(len(made["label"].unique()) - 1)
    assert set(sides) == {1, 2}


def test_fields_of_view_divide_and_lie_in_the_largest_one() -> None:
    make = maker(prob_crop=1.0).set_random_state(0)
    shapes = {tuple(make(head())["image"].shape[1:]) for _ in range(12)}
    assert len(shapes) > 6
    assert all(extent % 4 == 0 and 12 <= extent <= 24 for shape in shapes for extent in shape)


def test_contrasts_differ_and_are_turned_round() -> None:
    make = maker(prob_typical=1.0).set_random_state(0)
    darker = []
    for _ in range(20):
        made = make(head())
        darker.append(bool(made["image"][made["label"] > 0].mean() < made["image"][made["label"] == 0].mean()))
    assert 0 < sum(darker) < 20


def test_images_are_from_zero_to_one_on_the_grid_that_they_name() -> None:
    made = maker().set_random_state(0)(head())
    for key in ("image", "label"):
        assert made[key].dtype == torch.float32
        assert made[key].pixdim.tolist() == [2.0] * 3
    assert made["image"].min() >= 0
    assert made["image"].max() <= 1


def test_an_empty_map_gives_an_image() -> None:
    empty = {key: torch.zeros(1, 20, 20, 20) for key in ("image", "label")}
    made = maker().set_random_state(0)(empty)
    assert torch.isfinite(made["image"]).all()
    assert not made["label"].any()


def test_what_is_taken_out_is_never_all_there_is() -> None:
    make = maker(outside=[0, 1, 2], prob_strip=1.0).set_random_state(0)
    assert all(make(head())["image"].std() > 0.01 for _ in range(4))


@pytest.mark.parametrize("value", [3.0, -1.0, 0.7])
def test_tissues_that_are_unknown_are_refused(value: float) -> None:
    item = head()
    item["image"] = MetaTensor(item["image"].float() * value, affine=item["image"].affine)
    with pytest.raises(ValueError, match="The map of tissues must hold"):
        maker()(item)


@pytest.mark.parametrize(("factor", "number"), [(-1, "-1"), (0.5, "0.5"), (float("nan"), "nan")])
def test_labels_that_are_no_whole_numbers_are_refused(factor: float, number: str) -> None:
    item = head()
    item["label"] = MetaTensor(item["label"].float() * factor, affine=item["label"].affine)
    with pytest.raises(ValueError, match=f"The map of labels must hold whole numbers from 0, got .*{number}"):
        maker()(item)


def test_a_one_hot_map_is_refused() -> None:
    one_hot = {
        key: MetaTensor(torch.cat([volume == 0, volume == 1, volume == 2]), affine=volume.affine)
        for key, volume in head().items()
    }
    with pytest.raises(InputError, match=r"The map of tissues: a label map of one channel is needed, got \(3, "):
        maker()(one_hot)


@pytest.mark.parametrize("keys", [["image", "other"], ["label"], ["image", "label"]])
def test_several_maps_for_the_same_labels_are_refused(keys: list[str]) -> None:
    with pytest.raises(InputError, match="must be the map of tissues alone"):
        RandSyntheticImaged(keys, pixdim=2.0, spatial_size=(24, 24, 24), typical=(0.0, 0.8))


def test_arrays_are_taken_as_tensors_are() -> None:
    found, expected = (
        maker().set_random_state(0)({key: kind(volume) for key, volume in head().items()})
        for kind in (np.asarray, torch.as_tensor)
    )
    assert torch.equal(found["image"], expected["image"])


def test_labels_on_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="on one grid"):
        maker()({"image": head()["image"], "label": head(2.0)["label"]})
    item = head(2.0)
    item["label"].affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0]))
    with pytest.raises(ValueError, match=r"The map of tissues and that of the labels are up to .* mm apart"):
        maker()(item)


@pytest.mark.parametrize("key", ["image", "label"])
def test_maps_that_are_not_turned_to_ras_are_refused(key: str) -> None:
    item = head()
    item[key].affine = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"is turned LAS, must be RAS"):
        maker()(item)


@pytest.mark.parametrize("options", [{"outside": [0, 3]}, {"fluid": [-1]}], ids=str)
def test_tissues_to_take_out_that_are_none_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match=r"outside, fluid: \[(3|-1)\] are no tissues, which are 0 to 2"):
        maker(**options)
