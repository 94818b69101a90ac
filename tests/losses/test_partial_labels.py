"""Organs that were not contoured in a case do not count as background."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss, FocalLoss, GeneralizedDiceFocalLoss
from monai.transforms import Compose, Orientation
from torch import nn

from monai_iunet import ChunkedDiceCELoss, InputError, MirrorInferer
from monai_iunet.losses.partial_labels import MarginalLoss, NoteContouredd, OneHotContouredd
from monai_iunet.transforms.mirror import RandMirrord

ENCODE = Compose([NoteContouredd("label", 4), OneHotContouredd("label")])


def label_map(*classes: int) -> torch.Tensor:
    return torch.tensor(classes).repeat(64)[:64].reshape(1, 4, 4, 4)


def test_classes_without_voxels_are_unknown() -> None:
    case = ENCODE({"label": label_map(0, 2, 3)})
    assert case["label_contoured"].tolist() == [True, False, True, True]
    expected = nn.functional.one_hot(label_map(0, 2, 3)[0], 4).movedim(-1, 0).float()
    expected[1] = -1
    assert torch.equal(case["label"], expected)


@pytest.mark.parametrize("value", [4.0, -1.0, 0.4, float("nan")])
def test_labels_that_are_no_class_are_refused(value: float) -> None:
    labels = label_map(0, 2, 3).float()
    case = ENCODE.transforms[0]({"label": labels.clone()})
    case["label"][0, 1, 2, 3] = value  # resampled linearly, say
    for transform in ENCODE.transforms:
        with pytest.raises(ValueError, match=rf"label must hold the numbers of 4 classes, 0 to 3, got {value:g}\."):
            transform(dict(case))


def test_what_is_contoured_is_noted_before_a_crop() -> None:
    note, encode = ENCODE.transforms
    case = note({"label": label_map(0, 1)})
    case["label"] = torch.zeros(1, 2, 2, 2)
    encoded = encode(case)["label"]
    assert encoded[1].eq(0).all()  # contoured, but not in this crop
    assert encoded[2].eq(-1).all()


def test_with_all_classes_known_it_is_the_loss_itself() -> None:
    loss = DiceCELoss(softmax=True, include_background=False)
    target = torch.stack([ENCODE({"label": label_map(0, 1, 2, 3)})["label"]] * 2)
    logits = torch.randn(2, 4, 4, 4, 4)
    torch.testing.assert_close(MarginalLoss(loss)(logits, target), loss(logits, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 3, 41, 40, 40).to(dtype)  # more voxels than the largest float16
    labels = torch.rand(1, 41, 40, 40) > 0.9
    target = torch.stack([~labels, labels, torch.zeros_like(labels)], 1).float()
    loss = MarginalLoss(DiceCELoss(softmax=True))
    torch.testing.assert_close(loss(logits, target), loss(logits.float(), target))


def test_an_unknown_class_may_stand_for_the_background_but_not_for_another_class() -> None:
    loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
    truth = label_map(0, 2, 3)
    target = ENCODE({"label": truth})["label"][None]
    right = 20 * nn.functional.one_hot(truth[0], 4).movedim(-1, 0).float()[None]
    unknown_for_background, unknown_for_known = right.clone(), right.clone()
    unknown_for_background[:, 1] = 40 * (truth == 0)
    unknown_for_known[:, 1] = 40 * (truth == 2)
    assert loss(unknown_for_background, target) == pytest.approx(loss(right, target).item(), abs=1e-5)
    assert loss(unknown_for_known, target) > loss(right, target) + 1


def test_a_class_whose_marks_were_resampled_stays_unknown() -> None:
    loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
    target = ENCODE({"label": label_map(0, 2, 3)})["label"][None]
    logits = torch.randn(1, 4, 4, 4, 4)
    resampled = target.clone()
    resampled[:, 1] = torch.nextafter(target[:, 1], torch.zeros(()))
    resampled[:, 1, 0] = -0.3  # at the border, towards padding with zeros
    assert loss(logits, resampled) == loss(logits, target)


def test_logits_of_unknown_classes_get_the_gradient_of_the_background() -> None:
    logits = torch.randn(1, 4, 4, 4, 4, dtype=torch.double, requires_grad=True)
    target = ENCODE({"label": label_map(0, 2, 3)})["label"][None].double()
    loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    # A merged class shares its gradient in proportion to the probabilities.
    share = (logits[0, 1] - logits[0, 0]).exp()
    torch.testing.assert_close(gradient[0, 1], gradient[0, 0] * share)


@pytest.mark.parametrize(
    "loss", [DiceLoss(), DiceCELoss(sigmoid=True), FocalLoss(), ChunkedDiceCELoss(sigmoid=True)], ids=type
)
def test_a_loss_without_a_softmax_is_refused(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(loss).__name__} takes none. Build it with softmax=True"):
        MarginalLoss(loss)


@pytest.mark.parametrize("kind", [DiceFocalLoss, GeneralizedDiceFocalLoss])
def test_a_loss_with_a_part_without_a_softmax_is_refused(kind: Any) -> None:
    loss = kind(softmax=True)
    with pytest.raises(ValueError, match=f"the FocalLoss of {kind.__name__} takes none"):
        MarginalLoss(loss)
    loss.focal.use_softmax = True
    target = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    logits = torch.randn(1, 3, 4, 4)
    # Neither a constant nor what moves between the background and a class that is merged with it changes anything.
    moved = logits.clone()
    moved[:, 2] = logits[:, ::2].logsumexp(1)
    moved[:, 0] = -math.inf
    for other in (logits + 7, moved):
        torch.testing.assert_close(MarginalLoss(loss)(other, target), MarginalLoss(loss)(logits, target))


@pytest.mark.parametrize(
    "loss",
    [FocalLoss(use_softmax=True), DiceLoss(other_act=torch.nn.Softmax(1)), nn.MSELoss()],
    ids=type,
)
def test_a_loss_with_a_softmax_or_one_of_ones_own_is_taken(loss: nn.Module) -> None:
    assert MarginalLoss(loss).loss is loss


def test_a_target_that_is_not_one_hot_is_refused() -> None:
    with pytest.raises(ValueError, match="OneHotContouredd"):
        MarginalLoss(DiceCELoss(softmax=True))(torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 2, 2))
    for background, marks in ((-1.0, 1.0), (0.0, 255.0)):
        target = torch.tensor([background, marks, -1.0, 0.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
        with pytest.raises(ValueError, match="must be one-hot: 0 and 1"):
            MarginalLoss(DiceCELoss(softmax=True))(torch.zeros(1, 4, 2, 2), target)


def test_mirroring_flips_both_and_swaps_paired_labels() -> None:
    image, label = torch.rand(1, 4, 3, 2), torch.randint(0, 5, (1, 4, 3, 2))
    mirror = RandMirrord(["image", "label"], "label", [[3, 4]], prob=1.0)
    case = mirror({"image": image, "label": label})
    assert torch.equal(torch.as_tensor(case["image"]), image.flip(1))
    expected = label.flip(1)
    assert torch.equal(torch.as_tensor(case["label"]) == 3, expected == 4)
    assert torch.equal(torch.as_tensor(case["label"]) == 4, expected == 3)
    assert torch.equal(torch.as_tensor(case["label"]) == 2, expected == 2)
    again = mirror(case)
    assert torch.equal(torch.as_tensor(again["label"]).long(), label)


def test_mirroring_swaps_what_is_noted_as_contoured() -> None:
    mirror = RandMirrord("label", "label", [[3, 4]], prob=1.0)
    channels = Compose([NoteContouredd("label", 5), mirror, OneHotContouredd("label")])({"label": label_map(0, 1, 3)})[
        "label"
    ]
    assert channels[4].sum() > 0  # the right one, contoured, has become the left one
    assert channels[3].eq(-1).all()  # and whether there is a right one now, nobody knows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_mirrored_labels_keep_their_type(dtype: torch.dtype) -> None:
    """A batch of mirrored label maps and others is of one type."""
    mirror = RandMirrord("label", "label", swap=[[1, 2]], prob=1.0)
    found = mirror({"label": torch.tensor([[0, 1, 1, 2]], dtype=dtype)})["label"]
    assert found.dtype == dtype
    assert found.tolist() == [[1, 2, 2, 0]]


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "PIR", "ASR", "SRA"])
def test_sides_change_places_only_along_the_axis_between_them(axcodes: str) -> None:
    turn = Orientation(axcodes, labels=None)
    labels = turn(MetaTensor(torch.arange(64.0).reshape(1, 4, 4, 4) % 3, affine=torch.eye(4)))
    for axis in range(3):
        mirror = RandMirrord("label", "label", swap=[[1, 2]], prob=1.0, spatial_axis=axis)
        if axcodes[axis] in "LR":
            assert mirror({"label": labels})["label"].shape == labels.shape
        else:
            with pytest.raises(InputError, match=f"label: is turned {axcodes}, so spatial_axis {axis} does not run"):
                mirror({"label": labels})
        assert RandMirrord("label", (), swap=[], prob=1.0, spatial_axis=axis)({"label": labels})["label"].ndim == 4


@pytest.mark.parametrize("swap", [[[1, 2], [2, 3]], [[1, 1]], [1, 2], [[1, 2, 3]], [[-1, 1]], [[1.0, 2.0]], ["12"]])
@pytest.mark.parametrize("kind", ["transform", "inferer"])
def test_what_are_no_pairs_of_labels_is_refused(swap: Any, kind: str) -> None:
    with pytest.raises(InputError, match="pairs of labels") as caught:
        RandMirrord("label", "label", swap=swap) if kind == "transform" else MirrorInferer(swap, roi_size=(8, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spatial_axis", [[0], None, "0"], ids=str)
def test_what_is_no_single_axis_is_refused(spatial_axis: Any) -> None:
    with pytest.raises(InputError, match="must be the number of a single axis"):
        RandMirrord(["image"], [], swap=[[1, 2]], spatial_axis=spatial_axis)


def test_mirroring_happens_as_often_as_asked() -> None:
    mirror = RandMirrord("image", (), [], prob=0.5)
    mirror.set_random_state(0)
    image = torch.arange(2.0).reshape(1, 2)
    flipped = sum(bool(mirror({"image": image})["image"][0, 0] == 1) for _ in range(200))
    assert 70 < flipped < 130


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, float("inf")])
def test_a_sample_in_which_nothing_was_contoured_gives_no_loss_and_no_gradient(scale: float) -> None:
    loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
    nothing = torch.full((1, 3, 6, 6, 6), -1.0)
    nothing[:, 0] = 1
    logits = torch.randn(1, 3, 6, 6, 6)
    logits = (logits * scale if scale < float("inf") else torch.full_like(logits, scale)).requires_grad_()
    value = loss(logits, nothing)
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_beside_such_a_sample_another_one_counts_as_alone() -> None:
    loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
    truth = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 6, 6, 6)), 3).movedim(-1, 1).float()
    truth[1, 1:] = -1
    truth[1, 0] = 1
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    value = loss(logits, truth)
    gradient = torch.autograd.grad(value, logits)[0]
    alone = loss(logits[:1], truth[:1])
    torch.testing.assert_close(value, alone / 2)
    torch.testing.assert_close(gradient[:1], torch.autograd.grad(alone, logits)[0][:1] / 2)
    assert not gradient[1].any()


@pytest.mark.parametrize(
    "transform",
    [*ENCODE.transforms, RandMirrord("label", "label", swap=[[1, 2]], prob=1.0)],
    ids=lambda t: type(t).__name__,
)
def test_one_hot_maps_are_taken_for_no_labels(transform: Any) -> None:
    one_hot = nn.functional.one_hot(label_map(0, 2, 3)[0], 4).movedim(-1, 0)
    with pytest.raises(InputError, match=r"label: a label map of one channel is needed, got \(4, 4, 4, 4\)"):
        transform({"label": one_hot, "label_contoured": torch.ones(4, dtype=torch.bool)})


def test_arrays_are_taken_as_tensors_are() -> None:
    labels = label_map(0, 2, 3)
    assert torch.equal(ENCODE({"label": labels.numpy()})["label"], ENCODE({"label": labels})["label"])
