"""Dice and cross-entropy in chunks: MONAI's value and gradient, in a third of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.losses.partial_labels import NoteContouredd, OneHotContouredd
from monai_iunet.planning.live_bytes import LiveBytes

OPTIONS: list[dict[str, Any]] = [
    {"softmax": True},
    {"softmax": True, "include_background": False},
    {"sigmoid": True},
    {},
    {"softmax": True, "squared_pred": True},
    {"sigmoid": True, "squared_pred": True, "jaccard": True, "include_background": False},
    {"softmax": True, "jaccard": True, "batch": True},
    {"softmax": True, "reduction": "sum"},
    {"softmax": True, "weight": torch.tensor([0.2, 1.0, 3.0])},
    {"softmax": True, "weight": torch.tensor([0.2, 1.0, 3.0]), "include_background": False, "reduction": "sum"},
    {"softmax": True, "label_smoothing": 0.2, "weight": torch.tensor([0.2, 1.0, 3.0])},
    {"softmax": True, "lambda_dice": 0.3, "lambda_ce": 2.0, "smooth_nr": 1.0, "smooth_dr": 0.5},
]


def data(one_hot: bool, shape: tuple[int, ...] = (2, 3, 7, 5, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]))
    channels = torch.nn.functional.one_hot(numbers[:, 0], shape[1]).movedim(-1, 1).float()
    return 3 * torch.randn(shape), channels if one_hot else numbers.float()


def value_and_gradient(loss: torch.nn.Module, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    (2 * value).backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("one_hot", [False, True])
def test_value_and_gradient_are_those_of_monai(options: dict[str, Any], one_hot: bool) -> None:
    logits, target = data(one_hot)
    options = {**options, "to_onehot_y": not one_hot}
    expected = value_and_gradient(DiceCELoss(**options), logits, target)
    found = value_and_gradient(ChunkedDiceCELoss(**options), logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_soft_targets_are_taken_as_they_are() -> None:
    logits, _ = data(one_hot=True)
    target = torch.rand_like(logits).softmax(1)
    expected = value_and_gradient(DiceCELoss(softmax=True), logits, target)
    found = value_and_gradient(ChunkedDiceCELoss(softmax=True), logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format])
def test_any_order_of_the_memory(memory_format: torch.memory_format) -> None:
    logits, target = data(one_hot=False)
    expected = value_and_gradient(DiceCELoss(softmax=True, to_onehot_y=True), logits, target)
    turned = logits.transpose(2, 4).contiguous().transpose(2, 4)
    for given in (logits.contiguous(memory_format=memory_format), turned):
        found = value_and_gradient(ChunkedDiceCELoss(softmax=True, to_onehot_y=True), given, target)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    logits, target = data(one_hot=False, shape=(1, 3, 40, 40, 40))
    logits = logits.bfloat16()
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)
    value, gradient = value_and_gradient(loss, logits, target)
    expected, expected_gradient = value_and_gradient(loss, logits.double(), target)
    assert gradient.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-8)


def test_metatensors_and_one_dimension() -> None:
    logits, target = data(one_hot=False, shape=(2, 4, 9))
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)
    expected = DiceCELoss(softmax=True, to_onehot_y=True)(logits, target)
    torch.testing.assert_close(torch.as_tensor(loss(MetaTensor(logits), MetaTensor(target))), expected)


def test_a_second_backward_pass_gives_the_same() -> None:
    logits, target = data(one_hot=False)
    logits.requires_grad_()
    value = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)(logits, target)
    first, second = (torch.autograd.grad(value, logits, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, logits)


def test_autocast_changes_nothing() -> None:
    logits, target = data(one_hot=False)
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)
    expected = value_and_gradient(loss, logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(loss, logits, target)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"squared_pred": True}], ids=str)
def test_the_peak_is_little_more_than_logits_and_gradient(classes: int, options: dict[str, Any]) -> None:
    logits, target = data(one_hot=False, shape=(1, classes, 48, 48, 48))
    leaf = logits.requires_grad_()
    options = {"softmax": True, "to_onehot_y": True, **options}
    peaks = []
    for loss in (ChunkedDiceCELoss(**options), DiceCELoss(**options)):
        leaf.grad = None
        with LiveBytes(ignore=[target]) as live:
            loss(leaf, target).backward()
        peaks.append(live.peak / (4 * leaf.numel()))
    assert peaks[0] < 2.2
    assert peaks[1] > 5


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"other_act": torch.tanh}, 3), ({"sigmoid": True}, 1)],
)
def test_what_cannot_be_chunked_falls_back_and_says_so(
    options: dict[str, Any], channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    logits, target = torch.randn(2, channels, 6, 6), torch.rand(2, channels, 6, 6).round()
    loss = ChunkedDiceCELoss(**options)
    for _ in range(2):
        torch.testing.assert_close(loss(logits, target), DiceCELoss(**options)(logits, target))
    assert caplog.text.count("computes in one piece") == 1


@pytest.mark.parametrize("options", [{}, {"squared_pred": True}], ids=str)
def test_functional_transforms(options: dict[str, bool]) -> None:
    logits, target = data(one_hot=False)
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True, **options)
    value, gradient = value_and_gradient(loss, logits, target)
    try:
        torch.func.grad(DiceCELoss(softmax=True, to_onehot_y=True))(logits, target)
    except RuntimeError as error:
        pytest.skip(f"MONAI's loss does not work in torch.func with PyTorch {torch.__version__}: {error}")
    torch.testing.assert_close(torch.func.grad(loss)(logits, target), gradient / 2)
    direction = torch.randn_like(logits)
    found, change = torch.func.jvp(lambda x: loss(x, target), (logits,), (direction,))
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(change.float(), (gradient / 2 * direction).sum())  # float64 as MONAI's
    several = torch.stack([logits, 2 * logits])
    expected = torch.stack([loss(each, target) for each in several])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(several, target), expected)


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 3, 6, 5), (2, 3, 6)])
def test_targets_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target must have the shape \(2, 3, 6, 6\)"):
        ChunkedDiceCELoss(softmax=True)(torch.randn(2, 3, 6, 6), torch.zeros(shape))


@pytest.mark.parametrize("value", [3.0, 7.0, -1.0, 0.4, float("nan")])
@pytest.mark.parametrize("options", [{}, {"squared_pred": True}, {"include_background": False}], ids=str)
def test_labels_that_are_no_class_are_refused(value: float, options: dict[str, bool]) -> None:
    logits, labels = torch.randn(2, 3, 5, 5, 5), torch.randint(0, 3, (2, 1, 5, 5, 5)).float()
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True, **options)
    assert loss(logits, labels).isfinite()
    labels[1, 0, 2, 3, 4] = value
    with pytest.raises(ValueError, match=rf"numbers of 3 classes, 0 to 2, got {value:g}\. Map the labels"):
        loss(logits, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16])
def test_labels_of_all_types_are_taken(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 3, 5, 5, 5), torch.randint(0, 2, (2, 1, 5, 5, 5))
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels.float()))


@pytest.mark.parametrize("logits_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "largest", "classes"),
    [
        (torch.uint8, 255, 256),
        (torch.uint8, 255, 300),
        (torch.int8, 127, 128),
        (torch.int8, 127, 200),
        (torch.uint16, 299, 300),
        (torch.uint16, 1, 2),
    ],
)
def test_labels_of_a_type_that_does_not_hold_the_number_of_classes_are_taken(
    dtype: torch.dtype, largest: int, classes: int, logits_type: torch.dtype
) -> None:
    logits = torch.randn(1, classes, 4, 4, 4).to(logits_type)
    labels = torch.randint(0, largest + 1, (1, 1, 4, 4, 4))
    labels[..., 0] = largest
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))
    item = OneHotContouredd("label")(NoteContouredd("label", classes)({"label": labels[0].to(dtype)}))
    assert torch.equal(item["label"].argmax(0), labels[0, 0])


def test_more_voxels_are_counted_than_a_float32_can_count_one_by_one() -> None:
    voxels = 2**24 * 11 // 10
    logits = torch.zeros(1, 2, voxels)
    logits[:, 0] = 100
    loss = ChunkedDiceCELoss(softmax=True, to_onehot_y=True, batch=True, lambda_ce=0)
    assert loss(logits, torch.zeros(1, 1, voxels, dtype=torch.uint8)).item() < 1e-4


@pytest.mark.parametrize("batch", [False, True])
def test_a_single_structure_has_the_weight_that_monai_gives_it(batch: bool) -> None:
    logits, target = data(one_hot=False, shape=(2, 2, 7, 5, 6))
    options = {"to_onehot_y": True, "softmax": True, "include_background": False, "weight": torch.tensor([0.2, 3.0])}
    expected = value_and_gradient(DiceCELoss(**options, batch=batch), logits, target)
    found = value_and_gradient(ChunkedDiceCELoss(**options, batch=batch), logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weights_of_another_number_of_classes_are_refused(count: int, one_hot: bool) -> None:
    loss = ChunkedDiceCELoss(to_onehot_y=not one_hot, softmax=True, weight=torch.ones(count))
    with pytest.raises(ValueError, match=rf"weight must have a value for each of the 3 classes, got \({count},\)"):
        loss(*data(one_hot))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_weights_that_are_negative_are_refused_as_monai_does(value: float) -> None:
    logits, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    for include_background in (True, False):
        weight = torch.tensor([1.0, 1.0, value])
        loss = ChunkedDiceCELoss(include_background, to_onehot_y=True, softmax=True, weight=weight)
        with pytest.raises(ValueError, match="weight must not be negative"):
            loss(logits, labels)
