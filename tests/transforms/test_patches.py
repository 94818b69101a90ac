"""What a step of training sees of an image."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, RandAffined, RandFlipd

from monai_iunet import (
    CollatePadded,
    InputError,
    MarginalLoss,
    OneHotContouredd,
    RandMirrord,
    StreamingInferer,
    TrainingPatchd,
)

KEYS = ["image", "label"]
AFFINE = partial(
    RandAffined, keys=KEYS, prob=1.0, rotate_range=[0.2] * 3, mode=["bilinear", "nearest"], padding_mode="border"
)


def case(*size: int) -> dict[str, Any]:
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) + 1
    label = torch.zeros(1, *size)
    label[:, -3:, -3:, -3:] = 1
    return {"image": image, "label": label}


def test_a_whole_image_is_padded_as_whole_images_are_segmented() -> None:
    item = case(17, 24, 30)
    cut = TrainingPatchd(KEYS, "whole", divisible_by=[4, 8, 8], cval=-1.0)(item)
    seen: list[torch.Tensor] = []

    def network(window: torch.Tensor) -> torch.Tensor:
        seen.append(window)
        return window

    StreamingInferer("whole", divisible_by=[4, 8, 8], cval=-1.0)(item["image"][None], network)
    assert seen[0].shape == (1, 1, 20, 24, 32)
    torch.testing.assert_close(cut["image"].as_tensor(), seen[0][0])
    assert cut["label"].shape == cut["image"].shape
    assert cut["label"].sum() == item["label"].sum()


@pytest.mark.parametrize("roi_size", ["whole", (8, 16, 12)])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_image_and_label_stay_together(roi_size: Any, num_classes: int | None) -> None:
    item = case(20, 20, 20)
    item["image"] = item["label"].clone()
    cut = TrainingPatchd(KEYS, roi_size, AFFINE, 8, num_classes, {"translate_range": [2.0] * 3})
    cut.set_random_state(0)
    for _ in range(4):
        found = cut(item)
        assert found["image"].shape[1:] == ((24, 24, 24) if roi_size == "whole" else roi_size)
        assert set(found["label"].unique().tolist()) <= {0, 1}
        differ = (found["image"].round() != found["label"]).float().mean()
        assert differ < 0.01


def test_rare_structures_are_found_and_patches_anywhere_are_not_all_the_same() -> None:
    at_structures = TrainingPatchd(KEYS, (8, 8, 8), num_classes=2)
    at_structures.set_random_state(1)
    hits = [bool(at_structures(case(40, 40, 40))["label"].any()) for _ in range(20)]
    assert sum(hits) >= 5
    anywhere = TrainingPatchd(KEYS, (8, 8, 8))
    anywhere.set_random_state(1)
    first, second = (anywhere(case(40, 40, 40))["image"] for _ in range(2))
    assert not torch.equal(first.as_tensor(), second.as_tensor())


def test_the_same_seed_gives_the_same_patches_whatever_was_cut_before() -> None:
    item, sizes = case(20, 24, 20), ((8, 8, 8), (16, 16, 16))
    one, other = (TrainingPatchd(KEYS, sizes[0], AFFINE) for _ in range(2))
    for _ in range(3):
        one(item)
    one.roi_size = sizes[1]
    for cut in (one, other):
        cut.roi_size = sizes[1]
        Compose([cut]).set_random_state(5)
    for _ in range(2):
        torch.testing.assert_close(one(item)["image"].as_tensor(), other(item)["image"].as_tensor())
    assert one.roi_size == sizes[1]


def test_workers_cut_what_the_size_is_at_the_beginning_of_an_epoch() -> None:
    cut = TrainingPatchd(KEYS, (8, 8, 8))
    data = CacheDataset([case(20, 20, 20)] * 2, Compose([cut]), progress=False)
    loader = DataLoader(data, batch_size=2, num_workers=1)
    assert next(iter(loader))["image"].shape[2:] == (8, 8, 8)
    cut.roi_size = (16, 8, 8)
    assert next(iter(loader))["image"].shape[2:] == (16, 8, 8)


def test_images_of_a_batch_are_padded_to_a_common_size_with_what_lies_beyond() -> None:
    batch = CollatePadded(cval=-1)([case(16, 8, 8), case(8, 8, 24)])
    assert batch["image"].shape == batch["label"].shape == (2, 1, 16, 8, 24)
    outside = batch["image"][0] == -1
    assert outside.sum() == 16 * 8 * 16
    assert batch["label"][0][outside].sum() == 0
    assert batch["label"].sum() == 54


def test_what_is_padded_of_partly_contoured_cases_has_no_class() -> None:
    items = [case(8, 8, 8), case(16, 8, 8)]
    for item in items:
        item["label_contoured"] = torch.tensor([True, True, False])
    batch = CollatePadded()([OneHotContouredd("label")(item) for item in items])
    losses: list[torch.Tensor] = []

    def note(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        losses.append(truth)
        return logits.sum()

    MarginalLoss(note)(torch.zeros(2, 3, 16, 8, 8), batch["label"])  # type: ignore[arg-type]
    assert [truth.shape[1] for truth in losses] == [2, 2]
    assert losses[0].sum() == 8**3
    assert losses[1].sum() == 16 * 8**2


@pytest.mark.parametrize("size", ["all", [8, 8], [8, 8, 0], [8, 8, 8.5], 8, None])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match='must be "whole", or three numbers'):
        TrainingPatchd(KEYS, size)


def test_what_does_not_belong_together_is_refused() -> None:
    image, label = torch.rand(1, 12, 12, 12), torch.zeros(1, 12, 12, 12)
    cut = TrainingPatchd(["image", "label"], roi_size=(8, 8, 8))
    with pytest.raises(ValueError, match="must have the same size"):
        cut({"image": image, "label": label[:, :6]})
    cases = [{"image": image, "label": label}, {"image": torch.rand(2, 12, 12, 12), "label": label}]
    with pytest.raises(ValueError, match=r"image: the cases of a batch have different channels \(1 in 3D, 2 in 3D\)"):
        CollatePadded()(cases)
    with pytest.raises(ValueError, match=r"label: the cases of a batch have different channels \(1 in 2D, 1 in 3D\)"):
        CollatePadded()([{"image": image, "label": label}, {"image": image, "label": label[..., 0]}])


def test_labels_that_lie_elsewhere_than_their_image_are_refused() -> None:
    image = MetaTensor(torch.rand(1, 12, 12, 12), affine=torch.diag(torch.tensor([-1.0, 1.0, 2.0, 1.0])))
    cut = TrainingPatchd(["image", "label"], roi_size=(8, 8, 8))
    turned = Orientationd("label", "RAS", labels=None)({"label": image})["label"]
    with pytest.raises(ValueError, match=r"image and label are up to 13 mm apart"):
        cut({"image": image, "label": turned})
    near = MetaTensor(image.as_tensor(), affine=image.affine + torch.tensor([[0, 0, 0, 0.9]] * 3 + [[0] * 4]))
    # Of these the last two do not say where they lie.
    for label in (image, near, image.as_tensor(), MetaTensor(image.as_tensor())):
        assert cut({"image": image, "label": label})["label"].shape == (1, 8, 8, 8)


def test_several_patches_of_an_image_are_cases_of_a_batch() -> None:
    batch = CollatePadded()([[case(16, 8, 8), case(8, 8, 24)], [case(8, 8, 8)]])
    assert batch["image"].shape == batch["label"].shape == (3, 1, 16, 8, 24)


def test_labels_that_would_not_be_swapped_are_refused() -> None:
    with pytest.raises(InputError, match=r"label_keys \['labels'\]: are not among keys"):
        RandMirrord(["image", "label"], ["labels"], swap=[[1, 2]])


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_mirroring_is_undone_among_other_transforms(prob: float) -> None:
    affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    image = MetaTensor(torch.rand(1, 8, 9, 10), affine=affine)
    labels = MetaTensor(torch.randint(0, 4, (1, 8, 9, 10)).float(), affine=affine)
    contoured = torch.tensor([True, True, False, True])
    transforms = Compose(
        [
            Orientationd(KEYS, "LPS", labels=None),
            RandMirrord(KEYS, "label", swap=[[1, 2]], prob=prob),
            RandFlipd(KEYS, prob=0.5, spatial_axis=1),
        ]
    )
    for seed in range(4):
        transforms.set_random_state(seed)
        item = transforms({"image": image, "label": labels, "label_contoured": contoured})
        found = transforms.inverse(item)
        for key, expected in (("image", image), ("label", labels)):
            torch.testing.assert_close(found[key].as_tensor(), expected.as_tensor(), rtol=0, atol=0)
            torch.testing.assert_close(found[key].affine, expected.affine)
            assert not found[key].applied_operations
        assert found["label_contoured"].tolist() == contoured.tolist()


def test_labels_that_were_found_in_a_mirrored_image_are_brought_back_as_labels_only() -> None:
    affine = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    labels = MetaTensor(torch.randint(0, 4, (1, 8, 9, 10)), affine=affine)
    transforms = Compose([Orientationd(KEYS, "LPS", labels=None), RandMirrord(KEYS, "label", swap=[[1, 2]], prob=1)])
    item = transforms({"image": MetaTensor(labels.float(), affine=affine), "label": labels})
    item["pred"] = MetaTensor(item["label"].as_tensor())
    with pytest.raises(RuntimeError) as caught:
        Invertd("pred", transforms, "image")(dict(item))
    assert isinstance(caught.value.__cause__, InputError)
    assert "image: was mirrored, and no label map is beside it" in str(caught.value.__cause__)
    found = Invertd("pred", transforms, "label")(dict(item))["pred"]
    assert torch.equal(found.as_tensor(), labels.as_tensor())
    transforms = Compose([RandMirrord(KEYS, "label", swap=[], prob=1)])  # no sides to change places
    item = transforms({"image": labels, "label": labels})
    item["pred"] = MetaTensor(item["label"].as_tensor())
    assert torch.equal(Invertd("pred", transforms, "image")(item)["pred"].as_tensor(), labels.as_tensor())


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 12, 10), (1, 10)])
def test_labels_of_another_size_than_their_image_make_no_batch(size: tuple[int, ...]) -> None:
    case = {"image": torch.rand(1, 10, 10), "label": torch.ones(size)}
    with pytest.raises(ValueError, match=r"is not that of the image, \(10, 10\)\. Resample both"):
        CollatePadded()([case])
