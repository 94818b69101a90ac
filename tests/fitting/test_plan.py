"""What is planned for data sets of every kind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss

from monai_iunet import InputError, LiveBytes, SegIUNet
from monai_iunet.bundling.new_bundle import bundle_configs
from monai_iunet.fitting.fingerprint import Fingerprint
from monai_iunet.fitting.limits import Limits, measure_limits
from monai_iunet.fitting.nnunet_rules import plan_like_nnunet
from monai_iunet.fitting.plan import FitPlan, plan_table, read_plan
from monai_iunet.fitting.planner import Wishes, make_plan
from monai_iunet.planning.plan import TrainingPlan
from tests.fitting.made_sets import facts, fingerprint

LARGE = Limits(memory=64 * 2**30)


@pytest.fixture(autouse=True)
def fewer_rehearsals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a step's memory as proportional to its voxels, except where it is what is tested: to count it takes long."""

    def count(network: Any, spatial_size: Any, batch_size: int = 1, **_: Any) -> TrainingPlan:
        return TrainingPlan(tuple(spatial_size), batch_size, *[0] * 5, 1000 * math.prod(spatial_size), 0)

    if "memory" not in request.node.name and "large" not in request.node.name:
        monkeypatch.setattr("monai_iunet.fitting.planner.plan_training", count)


def plan(data: Fingerprint, limits: Limits = LARGE, **options: Any) -> FitPlan:
    return make_plan(data, "made", "data", limits, **options)


def reason(found: FitPlan, name: str) -> str:
    return next(choice.reason for choice in found.choices if choice.name == name)


def test_small_images_are_seen_whole() -> None:
    found = plan(fingerprint(shape=(35, 51, 36)))
    assert found.task.roi_size == (40, 56, 40)
    assert found.task.channels == (32, 64, 128, 256)
    assert found.task.sampling == "anywhere"
    assert found.task.max_field_of_view == 80
    assert reason(found, "patch") == "the whole image at the median size fits"
    assert found.folds == (0, 1, 2, 3, 4)


def test_thick_slices_are_kept_and_halved_later() -> None:
    task = plan(fingerprint(shape=(128, 128, 16), spacing=(0.5, 0.5, 6))).task
    assert task.spacing == (0.5, 0.5, 6)
    assert task.strides[:3] == ((2, 2, 1),) * 3
    assert task.strides[3] == (2, 2, 2)
    assert task.roi_size == (128, 128, 16)
    assert task.in_plane
    assert not task.elastic


@pytest.mark.parametrize(("size", "expected"), [(0.9765625, 0.977), (0.0488, 0.0488), (0.0026, 0.0026)])
def test_voxels_of_micrometers_keep_their_size(size: float, expected: float) -> None:
    assert plan(fingerprint(shape=(32, 32, 32), spacing=(size,) * 3)).task.spacing == (expected,) * 3


def test_tiny_images_get_fewer_levels() -> None:
    task = plan(fingerprint(shape=(20, 20, 20))).task
    assert task.strides is None
    assert len(task.channels) == 3
    assert task.roi_size == (20, 20, 20)
    with pytest.raises(InputError, match="too small"):
        plan(fingerprint(shape=(7, 7, 7)))


@pytest.mark.long
def test_large_images_are_cut_to_what_fits() -> None:
    data = fingerprint(shape=(600, 600, 600), channels=("CT",))
    found = plan(data, Limits(memory=4 * 2**30))
    assert all(extent < 600 for extent in found.task.roi_size)
    assert 0.6 * 4 * 2**30 < found.step.training_peak <= 4 * 2**30
    assert found.task.sampling == "at structures"
    assert "largest part of it that fits 4.0 GiB" in reason(found, "patch")


def test_images_of_more_values_than_convolutions_take_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(network: Any, spatial_size: Any, **_: Any) -> TrainingPlan:
        raise ValueError(f"SegIUNet cannot be planned for images of {spatial_size}")

    def cut(*_: Any, largest: Any, **__: Any) -> TrainingPlan:
        return TrainingPlan(tuple(extent // 2 for extent in largest), 2, *[0] * 5, 1000, 0)

    monkeypatch.setattr("monai_iunet.fitting.planner.plan_training", refuse)
    with pytest.raises(InputError, match=r"roi_size whole: SegIUNet cannot be planned .* \(--roi-size\)"):
        plan(fingerprint(shape=(608, 608, 608)), wishes=Wishes(roi_size="whole"))
    monkeypatch.setattr("monai_iunet.fitting.planner.largest_patch", cut)
    monkeypatch.setattr("monai_iunet.fitting.planner._Planner._memory", lambda _, least, *__: (least, ("store",) * 5))
    found = plan(fingerprint(shape=(608, 608, 608)))
    assert found.task.roi_size == (304, 304, 304)
    assert reason(found, "patch").endswith("in tensors of fewer than 2^31 values, which convolutions take")


def test_a_short_time_makes_voxels_coarser_and_patches_smaller() -> None:
    data = fingerprint(shape=(190, 140, 88), spacing=(0.625,) * 3)
    short = plan(data, dataclasses.replace(LARGE, seconds=3 * 3600, speed=240_000.0), fold=0)
    assert short.task.spacing == pytest.approx((1.25,) * 3, abs=0.07)
    assert short.folds == (0,)
    assert "coarser than the images'" in reason(short, "spacing, mm")
    long = plan(data, dataclasses.replace(LARGE, seconds=30 * 3600, speed=1e7))
    assert long.task.spacing == (0.625,) * 3
    assert long.folds == (0, 1, 2, 3, 4)
    # Small structures forbid coarser voxels; then a part of the image is seen.
    small = Fingerprint(data.channels, data.structures, (1,), "MR", (facts((190, 140, 88), volumes=(1100.0,)),) * 20)
    limited = plan(small, dataclasses.replace(LARGE, seconds=3 * 3600, speed=50_000.0), fold=0).task
    assert limited.spacing == (1, 1, 1)
    assert math.prod(limited.roi_size) < 190 * 140 * 88 / 2


def test_folds_are_as_many_as_there_is_time_for_with_the_voxels_that_are_asked_for() -> None:
    data, hour = fingerprint(shape=(128, 128, 128)), dataclasses.replace(LARGE, seconds=3600, speed=5e6)
    for wishes, folds in (
        (Wishes(), 1),
        (Wishes(spacing=(2, 2, 2)), 5),
        (Wishes(spacing=(0.5, 0.5, 0.5)), 1),
        (Wishes(roi_size=(64, 64, 64)), 5),
        (Wishes(spacing=(2, 2, 2), roi_size="whole"), 5),
        (Wishes(roi_size="whole"), 1),
    ):
        assert len(plan(data, hour, wishes=wishes).folds) == folds, wishes


def test_folds_side_by_side_have_more_time_each() -> None:
    data, hour = fingerprint(shape=(128, 128, 128)), dataclasses.replace(LARGE, seconds=3600, speed=1.2e7)
    for at_once, asked, folds, seconds in (
        (1, 5, 5, 612),
        (2, 5, 5, 1020),
        (8, 5, 5, 3060),
        (2, None, 1, 3060),
        (3, None, 5, 1530),
    ):
        found = plan(data, dataclasses.replace(hour, at_once=at_once), folds=asked)
        assert (len(found.folds), round(found.task.max_seconds or 0)) == (folds, seconds)


def test_a_network_of_all_cases_takes_as_long_as_a_fold_and_needs_no_judges() -> None:
    data, hour = fingerprint(shape=(64, 64, 64), count=60), dataclasses.replace(LARGE, seconds=3600, speed=1.2e7)
    named = [dataclasses.replace(case, name=f"case_{number:02}.nii.gz") for number, case in enumerate(data.cases)]
    data = dataclasses.replace(data, cases=tuple(named))
    for at_once, asked, seconds in ((1, 1, 1530), (1, 5, 510), (2, 5, 1020), (2, 1, 3060)):
        found = plan(data, dataclasses.replace(hour, at_once=at_once), folds=asked, wishes=Wishes(all_cases=True))
        assert round(found.task.max_seconds or 0) == seconds
        assert found.task.judges == ()
        assert reason(found, "network") == "as asked; its figures are those of the folds"
    assert len(plan(data, hour, folds=5).task.judges) == 6


def test_a_short_time_is_said_in_seconds() -> None:
    for seconds, said in ((30, "26 s per fold"), (3600, "51 min per fold")):
        found = plan(fingerprint(), dataclasses.replace(LARGE, seconds=seconds, speed=1e6), fold=0)
        assert next(choice.value for choice in found.choices if choice.name == "length") == said


def test_a_part_of_the_image_is_trained_for_more_steps_than_the_whole() -> None:
    data = fingerprint(shape=(128, 128, 128))

    def patch(speed: float) -> tuple[FitPlan, float]:
        found = plan(
            data, dataclasses.replace(LARGE, seconds=3600, speed=speed), wishes=Wishes(spacing=(1, 1, 1)), fold=0
        )
        return found, 0.85 * 3600 * speed / 2 / math.prod(found.task.roi_size)

    whole, steps = patch(1.5e7)
    assert whole.task.roi_size == (128, 128, 128)
    assert steps > 10_000
    part, steps = patch(4e6)  # enough for 2,900 steps of the whole image
    assert part.task.roi_size == (96, 96, 96)
    assert f"about {steps:.0f} steps can be trained" in reason(part, "patch")
    least, steps = patch(4e5)  # 10,000 steps would leave 48 x 48 x 48 or less
    assert least.task.roi_size == (64, 64, 64)
    assert 2000 < steps < 4000


@pytest.mark.parametrize(("gain", "faster"), [(2.5, True), (1.1, False), (0.2, False)])
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, faster: bool
) -> None:
    speeds = {torch.float32: 100_000.0, torch.bfloat16: 100_000.0 * gain}
    monkeypatch.setattr("monai_iunet.fitting.limits.measure_speed", lambda _, dtype, size=48: speeds[dtype])
    limits = measure_limits(torch.device("cpu"), 2**36, 3600)
    assert limits.speed == max(100_000.0, 100_000.0 * gain * faster)
    task = plan(fingerprint(), limits).task
    assert task.autocast == faster
    inferer = bundle_configs(task)["train.json"]["train"]["inferer"]["_target_"]
    assert inferer == ("monai_iunet.AutocastInferer" if faster else "SimpleInferer")


def test_bfloat16_that_a_cpu_must_emulate_is_timed_on_a_tiny_patch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger one took three minutes, of the time for the training."""
    timed = []

    def speed(_: torch.device, dtype: torch.dtype, size: int = 48) -> float:
        timed.append((dtype, size))
        return 100_000.0 if dtype == torch.float32 else 4000.0

    monkeypatch.setattr("monai_iunet.fitting.limits.measure_speed", speed)
    limits = measure_limits(torch.device("cpu"), 2**36, 3600)
    assert (limits.dtype, limits.gain, limits.speed) == (torch.float32, 0.04, 100_000.0)
    assert max(size for dtype, size in timed if dtype == torch.bfloat16) <= 16


def test_a_gpu_trains_with_mixed_precision_of_monai() -> None:
    found = plan(fingerprint(), dataclasses.replace(LARGE, dtype=torch.bfloat16))
    assert not found.task.autocast
    assert next(choice.value for choice in found.choices if choice.name == "arithmetic") == "16 bits"


def test_another_device_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iunet.fitting.limits.measure_speed", lambda *_: 1e5)
    limits = measure_limits(torch.device("mps"), 2**36, 3600)
    assert limits.dtype == torch.float32
    assert "CPUs and CUDA" in reason(plan(fingerprint(), limits), "arithmetic")


@pytest.mark.parametrize(
    ("intensities", "window"),
    [
        ((-53.0, 151.0), (-60, 160)),
        ((31.0, 42.0), (30, 50)),
        ((0.1234, 0.5678), (0.12, 0.57)),
        ((-2.34, 5.71), (-2.4, 5.8)),
        ((37.0, 37.0), (30, 40)),
    ],
)
def test_the_window_of_a_ct_is_rounded_by_less_than_its_range(
    intensities: tuple[float, ...], window: tuple[float, ...]
) -> None:
    found = plan(fingerprint(channels=("CT",), shape=(32, 32, 32), intensities=intensities))
    assert found.task.window == window


def test_many_rare_structures_are_sampled_alike() -> None:
    names = [f"structure {number}" for number in range(30)]
    limits = dataclasses.replace(LARGE, seconds=3600, speed=100_000.0)
    found = plan(fingerprint(shape=(200, 200, 200), structures=names), limits)
    assert found.task.num_classes == 31
    assert found.task.couplings == (2, 3, 4, 4, 4)[: len(found.task.channels)]
    assert found.task.sampling == "at structures"


@pytest.mark.parametrize(
    ("structures", "centers", "mirrored"),
    [
        (("right kidney", "left kidney"), (0.4, -0.4), ((1, 2),)),
        (("left atrium",), (0.0,), None),
        (("liver",), (0.5,), None),
    ],
)
def test_images_are_mirrored_where_sides_do_not_matter(structures: Any, centers: Any, mirrored: Any) -> None:
    assert plan(fingerprint(structures=structures, shape=(32, 32, 32), centers=centers)).task.mirrored == mirrored


def test_a_tumor_on_either_side_allows_mirroring() -> None:
    cases = tuple(facts((32, 32, 32), centers=(side,)) for side in (-0.5, 0.5)) * 4
    assert plan(Fingerprint(("MRI",), ("tumor",), (1,), "MR", cases)).task.mirrored == ()


@pytest.mark.parametrize(
    ("places", "mirrored"),
    [
        ([(-0.5, 0.5)] * 8, None),  # a pair whose names do not say so
        ([(-0.5, 0.5)] * 3, None),  # as far as 3 cases tell
        ([(-0.5, 0.0), (0.5, 0.0)] * 4, ()),
        ([(-0.5, 0.6), (0.5, 0.6)] * 4, None),  # a tumor of the liver and the liver
        ([(-0.5, None), (0.5, None)] * 4 + [(-0.5, 0.4)], ()),  # of a cyst that one case has nobody knows
    ],
    ids=str,
)
def test_structures_that_keep_to_one_side_each_are_not_mirrored(places: Any, mirrored: Any) -> None:
    cases = tuple(facts((32, 32, 32), classes=2, centers=centers) for centers in places)
    assert plan(Fingerprint(("MRI",), ("a", "b"), (1, 2), "MR", cases)).task.mirrored == mirrored


@pytest.mark.parametrize(("spread", "partial"), [((90.0, 100.0, 110.0), True), ((5.0, 40.0, 900.0), False)])
def test_an_organ_that_is_missing_was_not_labeled(spread: tuple[float, ...], partial: bool) -> None:
    cases = tuple(facts((32, 32, 32), classes=2, volumes=(500.0, second)) for second in (*spread, 0.0, 0.0))
    found = plan(Fingerprint(("MRI",), ("a", "b"), (1, 2), "MR", cases))
    assert found.task.partial_labels is partial
    assert any("b (2 cases)" in choice.reason for choice in found.choices) is partial


@pytest.mark.parametrize(("asked", "partial"), [("background", False), ("unlabeled", True)])
@pytest.mark.parametrize("spread", [(90.0, 100.0, 110.0), (5.0, 40.0, 900.0)])
def test_what_missing_labels_mean_may_be_said(spread: tuple[float, ...], asked: str, partial: bool) -> None:
    cases = tuple(facts((32, 32, 32), classes=2, volumes=(500.0, second)) for second in (*spread, 0.0, 0.0))
    found = plan(Fingerprint(("MRI",), ("a", "b"), (1, 2), "MR", cases), wishes=Wishes(missing_labels=asked))
    assert found.task.partial_labels is partial
    assert reason(found, "missing labels") == "as asked"


def test_few_cases_have_few_folds() -> None:
    assert plan(fingerprint(count=8, shape=(20, 20, 20))).folds == (0, 1, 2, 3, 4)
    assert plan(fingerprint(count=3, shape=(20, 20, 20))).folds == (0, 1, 2)
    assert plan(fingerprint(count=8, shape=(20, 20, 20)), fold=2).folds == (2,)
    assert plan(fingerprint(count=8, shape=(20, 20, 20)), validation_cases=2).folds == (None,)
    with pytest.raises(InputError, match="1 training cases cannot be split"):
        plan(fingerprint(count=1, shape=(20, 20, 20)))


@pytest.mark.parametrize(
    ("validation_cases", "options", "trained"),
    [(0, {}, 32), (8, {}, 32), (30, {}, 10), (36, {}, 4), (20, {"folds": 4}, 15), (38, {"folds": 2}, 1)],
)
def test_so_many_epochs_are_planned_that_there_are_10_000_steps(
    validation_cases: int, options: dict[str, Any], trained: int
) -> None:
    task = plan(fingerprint(count=40, shape=(16, 16, 16)), validation_cases=validation_cases, **options).task
    per_epoch = max(1, trained // task.batch_size)
    assert task.max_epochs * per_epoch == pytest.approx(10_000, rel=0.02)
    assert task.val_interval * per_epoch == pytest.approx(100, rel=0.1)
    assert task.batch_size <= max(1, trained)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"folds": 5}),
        (1, {}),
        (8, {"fold": 5}),
        (8, {"fold": -1}),
        (8, {"folds": 0}),
        (8, {"folds": 5, "validation_cases": 4}),
        (8, {"fold": 0, "validation_cases": 7}),
    ],
)
def test_folds_that_there_cannot_be_are_refused_before_the_start(count: int, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"as many cases as folds|of 5 folds, one from 0 to 4|0 folds: at least one"):
        plan(fingerprint(count=count, shape=(20, 20, 20)), **options)


def test_some_cases_judge_the_networks_of_the_folds() -> None:
    def judges(count: int, **options: Any) -> tuple[str, ...]:
        cases = tuple(facts((32, 32, 32), name=f"data/case_{number:03}.nii.gz") for number in range(count))
        return plan(Fingerprint(("MRI",), ("organ",), (1,), "MR", cases), **options).task.judges

    assert judges(60) == tuple(f"case_{number:03}.nii.gz" for number in range(5, 60, 10))
    assert judges(49) == ()
    assert judges(60, fold=0) == ()
    assert judges(60, validation_cases=9, folds=5) == ()  # there are others


def test_all_scans_of_a_patient_judge_or_none() -> None:
    data = fingerprint(count=1, shape=(20, 20, 20))
    names = [f"patient{patient:02}_scan{scan}.nii.gz" for patient in range(30) for scan in (1, 2)]
    found = plan(
        dataclasses.replace(data, cases=tuple(dataclasses.replace(data.cases[0], name=name) for name in names))
    )
    assert found.task.judges == tuple(name for name in names if name[7:9] in ("05", "15", "25"))


def test_of_few_patients_none_judges() -> None:
    data = fingerprint(count=1, shape=(20, 20, 20))
    names = [f"patient{patient}_scan{scan:02}.nii.gz" for patient in range(5) for scan in range(12)]
    found = plan(
        dataclasses.replace(data, cases=tuple(dataclasses.replace(data.cases[0], name=name) for name in names))
    )
    assert found.task.judges == ()
    (judges,) = (choice for choice in found.choices if choice.name == "judges")
    assert judges.value == "none"
    assert judges.reason.startswith("of 5 patients none can be spared")


def test_a_plan_is_written_and_read(tmp_path: Path) -> None:
    found = plan(fingerprint(shape=(20, 20, 16), spacing=(1, 1, 4)))
    (tmp_path / "plan.json").write_text(json.dumps(found.as_json()))
    assert read_plan(tmp_path / "plan.json") == found
    assert plan_table(found).row_count == len(found.choices)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a plan"):
        read_plan(tmp_path / "plan.json")


def test_the_planned_memory_is_that_of_a_step() -> None:
    found = plan(fingerprint(shape=(16, 16, 16), structures=("a", "b"), channels=("T1", "T2")))
    task = found.task
    network = SegIUNet(3, 2, 3, task.channels, couplings=task.couplings, activations=task.activations)
    optimizer = torch.optim.AdamW(network.parameters())
    loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def step() -> None:
        images = torch.rand(task.batch_size, 2, *task.roi_size)
        labels = torch.zeros(task.batch_size, 1, *task.roi_size)
        optimizer.zero_grad()
        loss(network(images), labels).backward()
        optimizer.step()

    step()
    with LiveBytes() as live:  # which counts what the optimizer keeps from when it was used
        step()
        step()
    assert live.peak == pytest.approx(found.step.training_peak, rel=0.05)


def test_the_rules_of_nnunet_give_its_plan_for_the_hippocampus() -> None:
    # As `nnUNetv2_plan_and_preprocess` plans Task04 with its 260 cases.
    found = plan_like_nnunet([(1, 1, 1)] * 260, [(35, 51, 36)] * 260, num_classes=3)
    assert (found.patch, found.batch_size, found.strides) == ((40, 56, 40), 9, ((2, 2, 2),) * 3)


def test_whole_images_are_planned_by_the_one_with_most_voxels() -> None:
    data = fingerprint(shape=(35, 51, 36))
    largest = dataclasses.replace(data.cases[0], shape=(60, 51, 36))
    data = dataclasses.replace(data, cases=(largest, *data.cases[1:]))
    found = plan(data, wishes=Wishes(roi_size="whole"))
    assert found.task.roi_size == "whole"
    assert found.task.batch_size == 1
    assert found.task.sampling == "anywhere"
    assert found.step.spatial_size == (64, 56, 40)
    assert "the largest has 64 x 56 x 40" in reason(found, "patch")
    assert "in windows only where the memory" in reason(found, "patch")
    with pytest.raises(InputError, match="roi_size whole: a step of 64 x 56 x 40 voxels takes"):
        plan(data, Limits(memory=64 * 56 * 40 * 1000 - 1), wishes=Wishes(roi_size="whole"))


def test_patches_grow_to_what_is_planned() -> None:
    task = plan(fingerprint(shape=(35, 51, 36)), wishes=Wishes(growing=True)).task
    assert task.roi_size == (40, 56, 40)
    assert task.growing == ((16, 32, 16), (32, 40, 32))
    assert task.sampling == "at structures"
    whole = plan(fingerprint(shape=(35, 51, 36)), wishes=Wishes(growing=True, roi_size="whole"))
    assert whole.task.growing == ((16, 24, 16), (24, 40, 24))
    assert "then the patch" in next(choice.value for choice in whole.choices if choice.name == "growing patches")


def test_what_was_asked_for_is_planned_or_refused() -> None:
    task = plan(fingerprint(shape=(35, 51, 36)), wishes=Wishes((1.25, 1.25, 1.25), (32, 40, 32))).task
    assert task.spacing == (1.25, 1.25, 1.25)
    assert task.roi_size == (32, 40, 32)
    with pytest.raises(InputError, match="multiples of 8"):
        plan(fingerprint(shape=(35, 51, 36)), wishes=Wishes(roi_size=(32, 41, 32)))
    for size in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="three positive numbers"):
            plan(fingerprint(shape=(35, 51, 36)), wishes=Wishes((1.0, size, 1.0)))
