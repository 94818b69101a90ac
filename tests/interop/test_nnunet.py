"""The adapter for nnU-Net, and its plans."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn

from monai_iunet.benchmark.comparison import difference
from monai_iunet.errors import InputError
from monai_iunet.interop.nnunet import PlannedIUNet, _count_classes, add_configurations
from monai_iunet.planning.plan import plan_training
from tests.test_cli import call

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
FEATURES = [8, 16, 32]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]


def plans() -> dict[str, Any]:
    """As nnU-Net writes them, as far as they are read."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {"strides": STRIDES, "features_per_stage": FEATURES, "kernel_sizes": KERNELS, "n_stages": 3},
        "_kw_requires_import": ["conv_op"],
    }
    own = {"patch_size": [16, 32, 32], "batch_size": 2, "architecture": architecture, "spacing": [3, 1, 1]}
    own["median_image_size_in_voxels"] = [24.0, 100.0, 90.0]
    return {
        "dataset_name": "Dataset001_Made",
        "configurations": {"3d_fullres": own, "3d_lowres": {"inherits_from": "3d_fullres"}},
    }


def planned(arguments: dict[str, Any], deep_supervision: bool = False) -> PlannedIUNet:
    """As nnU-Net builds it."""
    return PlannedIUNet(input_channels=1, num_classes=2, **arguments, deep_supervision=deep_supervision)


@pytest.mark.long
def test_the_plans_gain_two_configurations(tmp_path: Path) -> None:
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(plans()))
    assert add_configurations(path, couplings=1) == ["3d_fullres_iunet", "3d_fullres_iunet_large"]
    written = json.loads(path.read_text())
    kept = copy.deepcopy(written)
    small = kept["configurations"].pop("3d_fullres_iunet")
    large = kept["configurations"].pop("3d_fullres_iunet_large")
    assert kept == plans()
    assert small["inherits_from"] == large["inherits_from"] == "3d_fullres"
    assert "patch_size" not in small
    assert large["architecture"] == small["architecture"]

    net = planned(small["architecture"]["arch_kwargs"])
    assert net.iunet.channels == (8, 16, 32)
    # nnU-Net's plain network, as MONAI has it.
    own = DynUNet(3, 1, 2, KERNELS, STRIDES, STRIDES[1:], filters=FEATURES)
    budget = plan_training(own, (16, 32, 32), batch_size=2, dtype=torch.bfloat16, optimizer=torch.optim.SGD)
    patch = large["patch_size"]
    assert all(more >= less for more, less in zip(patch, (16, 32, 32)))
    assert patch != [16, 32, 32]
    # No larger than the median image, rounded up to what the network divides by.
    assert all(size <= limit for size, limit in zip(patch, (24, 100, 92)))
    peak = plan_training(net, patch, batch_size=2, dtype=torch.bfloat16, optimizer=torch.optim.SGD).training_peak
    assert peak <= budget.training_peak


@pytest.mark.parametrize(
    ("couplings", "expected"),
    [(1, 2), pytest.param(40, 40, marks=pytest.mark.slow)],  # 80 would not fit
)
def test_where_the_patch_is_the_image_the_larger_one_is_deeper(couplings: int, expected: int, tmp_path: Path) -> None:
    path, made = tmp_path / "nnUNetPlans.json", plans()
    settings = made["configurations"]["3d_fullres"]
    settings["median_image_size_in_voxels"] = settings["patch_size"]
    path.write_text(json.dumps(made))
    small, large = (
        json.loads(path.read_text())["configurations"][name] for name in add_configurations(path, couplings=couplings)
    )
    assert large["patch_size"] == settings["patch_size"]
    arguments = large["architecture"]["arch_kwargs"]
    assert arguments == {**small["architecture"]["arch_kwargs"], "couplings": expected}
    own = DynUNet(3, 1, 2, KERNELS, STRIDES, STRIDES[1:], filters=FEATURES)
    options = {"batch_size": 2, "dtype": torch.bfloat16, "optimizer": torch.optim.SGD}
    budget = plan_training(own, (16, 32, 32), **options).training_peak
    assert plan_training(planned(arguments).train(), (16, 32, 32), **options).training_peak <= budget


def test_deep_supervision_is_as_the_trainer_expects() -> None:
    net = planned({"strides": STRIDES, "channels": [8, 16, 32], "couplings": 1})
    image = torch.rand(1, 1, 8, 16, 16)
    net.decoder.deep_supervision = False
    for module in (net.train(), net.eval()):
        assert module(image).shape == (1, 2, 8, 16, 16)
    net.decoder.deep_supervision = True
    for module in (net.train(), net.eval()):
        assert [tuple(logits.shape[2:]) for logits in module(image)] == [(8, 16, 16), (8, 8, 8)]
    state = planned({"strides": STRIDES, "channels": [8, 16, 32], "couplings": 1}, True).state_dict()
    net.load_state_dict(state)


def test_what_are_no_plans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    circle = {"3d_fullres": {"inherits_from": "3d_lowres"}, "3d_lowres": {"inherits_from": "3d_fullres"}}
    for text in ("", "[]", "{}", *(json.dumps({"configurations": found}) for found in ({"3d_fullres": {}}, circle))):
        path.write_text(text)
        code, _, error = call("nnunet-plans", path)
        assert code == 2
        assert error.startswith(f"Error: {path}: no plans of nnU-Net v2 with a configuration 3d_fullres")
        assert path.read_text() == text
    with pytest.raises(InputError, match="no plans"):
        add_configurations(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="begin with that of 1"):
        PlannedIUNet(1, 2, strides=[[2, 2], [2, 2]], channels=[8, 16])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("patch_size", [16, 32]),
        ("patch_size", [16, 32, 30]),
        ("patch_size", [16.0, 32.0, 32.0]),
        ("patch_size", "16"),
        ("batch_size", 0),
        ("batch_size", "2"),
        ("median_image_size_in_voxels", None),
        ("median_image_size_in_voxels", [24.0, 100.0]),
        ("median_image_size_in_voxels", [24.0, 100.0, float("nan")]),
    ],
)
def test_sizes_that_cannot_be_planned_for_are_refused(setting: str, value: Any, tmp_path: Path) -> None:
    path, made = tmp_path / "plans.json", plans()
    made["configurations"]["3d_fullres"][setting] = value
    path.write_text(json.dumps(made))
    before = path.read_text()
    with pytest.raises(InputError, match="no plans of nnU-Net v2 with a configuration 3d_fullres"):
        add_configurations(path, couplings=1)
    assert path.read_text() == before


@pytest.mark.long
def test_the_logits_of_many_classes_take_memory_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, made, sizes = tmp_path / "nnUNetPlans.json", plans(), []
    for count in (None, 1, 60):
        path.write_text(json.dumps(made))
        if count is not None:
            labels = {"background": 0, **{f"part {label}": label for label in range(1, count + 1)}}
            (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        _, large = add_configurations(path, couplings=1)
        written = json.loads(path.read_text())["configurations"][large]
        sizes.append(written.get("patch_size"))
    assert sizes[0] == sizes[1] > sizes[2]
    assert caplog.text.count("dataset.json: not there, so memory is planned for two classes") == 1
    own = DynUNet(3, 1, 61, KERNELS, STRIDES, STRIDES[1:], filters=FEATURES)
    options = {"batch_size": 2, "dtype": torch.bfloat16, "optimizer": torch.optim.SGD}
    budget = plan_training(own, (16, 32, 32), **options).training_peak
    net = PlannedIUNet(1, 61, **written["architecture"]["arch_kwargs"]).train()
    assert plan_training(net, sizes[2], **options).training_peak <= budget


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "a": 1, "b": 2}, 3),
        ({"background": 0, "a": 1, "ignore": 2}, 2),
        ({"background": 0, "whole": [1, 2], "core": [2]}, 2),
        ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, 2),
    ],
)
def test_there_is_a_logit_for_each_label_or_region(labels: dict[str, Any], expected: int, tmp_path: Path) -> None:
    """As nnU-Net's `LabelManager.num_segmentation_heads` counts them."""
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    assert _count_classes(path) == expected
    path.write_text("{}")
    with pytest.raises(InputError, match="has no labels"):
        _count_classes(path)


THICK = {
    "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "features_per_stage": [8, 16, 32, 32, 32],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
}


@pytest.mark.parametrize(
    ("patch", "median", "channels"),
    [
        pytest.param([20, 64, 64], [18.0, 80.0, 80.0], 1, marks=pytest.mark.long),
        pytest.param([8, 64, 32], [30.0, 200.0, 40.0], 4, marks=pytest.mark.slow),
    ],
)
def test_each_axis_has_its_own_multiple(patch: list[int], median: list[float], channels: int, tmp_path: Path) -> None:
    path = tmp_path / "nnUNetPlans.json"
    settings = {"patch_size": patch, "batch_size": 2, "median_image_size_in_voxels": median}
    made = {"configurations": {"3d_fullres": {**settings, "architecture": {"arch_kwargs": THICK}}}}
    made["foreground_intensity_properties_per_channel"] = {str(number): {} for number in range(channels)}
    path.write_text(json.dumps(made))
    _, large = add_configurations(path, couplings=1)
    written = json.loads(path.read_text())["configurations"][large]
    size = written["patch_size"]
    net = PlannedIUNet(channels, 2, **written["architecture"]["arch_kwargs"]).train()
    assert net.iunet.factors == (4, 16, 16)
    assert all(extent % factor == 0 for extent, factor in zip(size, net.iunet.factors))
    rounded = [max(low, -(-int(limit) // factor) * factor) for low, limit, factor in zip(patch, median, (4, 16, 16))]
    assert all(low <= extent <= high for low, extent, high in zip(patch, size, rounded))
    own = DynUNet(
        3, channels, 2, THICK["kernel_sizes"], THICK["strides"], THICK["strides"][1:], filters=[8, 16, 32, 32, 32]
    )
    options = {"batch_size": 2, "dtype": torch.bfloat16, "optimizer": torch.optim.SGD, "in_channels": channels}
    budget = plan_training(own, patch, **options).training_peak
    assert plan_training(net, size, **options).training_peak <= budget
    # Nothing of the budget is given away: any axis that may grow by its factor would not fit.
    larger = [
        [extent + factor * (axis == number) for number, (extent, factor) in enumerate(zip(size, net.iunet.factors))]
        for axis in range(3)
        if size[axis] < rounded[axis]
    ]
    both = [max(sizes) for sizes in zip(*larger)] if larger else None
    assert both is None or plan_training(net, both, **options).training_peak > budget


def test_weights_of_other_classes_can_be_taken_over() -> None:
    """As nnU-Net does it: what has `.seg_layers.` in its name is left out, all else must be there and fit."""
    arguments = {"strides": STRIDES, "channels": [8, 16, 32], "couplings": 1}
    source, target = PlannedIUNet(1, 3, **arguments), PlannedIUNet(1, 2, **arguments)
    weights, state = source.state_dict(), target.state_dict()
    assert weights.keys() == state.keys()
    differing = {name for name in state if state[name].shape != weights[name].shape}
    assert differing == {name for name in state if ".seg_layers." in name}
    assert len(differing) == 4  # weights and biases of two resolutions
    target.load_state_dict({**state, **{name: weights[name] for name in state if ".seg_layers." not in name}})
    image = torch.rand(1, 1, 8, 16, 16)
    torch.testing.assert_close(target.iunet(target.stem(image)), source.iunet(source.stem(image)))


def test_the_state_goes_through_a_file_and_through_wrappers(tmp_path: Path) -> None:
    arguments = {"strides": STRIDES, "channels": [8, 16, 32], "couplings": 1}
    source, target = PlannedIUNet(1, 3, **arguments), PlannedIUNet(1, 3, **arguments)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    target.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    image = torch.rand(1, 1, 8, 16, 16)
    torch.testing.assert_close(target.eval()(image), source.eval()(image))
    wrapped = nn.ModuleDict({"module": PlannedIUNet(1, 3, **arguments)})
    wrapped.load_state_dict({f"module.{name}": tensor for name, tensor in source.state_dict().items()})
    torch.testing.assert_close(wrapped["module"].eval()(image), source(image))
    assert copy.deepcopy(source).state_dict().keys() == source.state_dict().keys()


@pytest.mark.long
def test_stages_of_a_cascade_are_not_mixed_up(tmp_path: Path) -> None:
    path = tmp_path / "nnUNetPlans.json"
    made = plans()
    made["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    made["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(made))
    with pytest.raises(InputError, match="3d_cascade_fullres is the second stage of a cascade"):
        add_configurations(path, "3d_cascade_fullres", couplings=1)
    assert json.loads(path.read_text()) == made
    for name in add_configurations(path, "3d_lowres", couplings=1):
        assert json.loads(path.read_text())["configurations"][name]["next_stage"] is None


def test_the_table_of_the_guide_is_that_of_the_stored_cases() -> None:
    """Means, differences and intervals are computed anew, from the Dice of each case."""
    root = Path(__file__).parents[2] / "monai_iunet"
    results = json.loads((root / "benchmark" / "results" / "nnunet.json").read_text())
    stored, one_core = results["configurations"], results["one_core"]
    table = (root / "guides" / "nnunet.md").read_text(encoding="utf-8")
    own = np.array(list(stored["3d_fullres"]["dice"].values()))
    for name, found in stored.items():
        assert list(found["dice"]) == list(stored["3d_fullres"]["dice"])
        dice = np.array(list(found["dice"].values()))
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {dice.mean():.4f} | {dice[:, 0].mean():.4f}, {dice[:, 1].mean():.4f} |" in row
        assert f"| {found['parameters'] / 1e6:.1f} million |" in row
        assert f"| {found['allocated_mib']} | {found['training_seconds']:.0f} |" in row
        if name != "3d_fullres":
            gain = difference(dice.mean(1), own.mean(1))
            assert f"| {gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f}) |" in row
    for name, beginning in (
        ("monai-iunet fit", "| `monai-iunet fit` |"),
        ("nnU-Net 3d_fullres", "| nnU-Net `3d_fullres` |"),
    ):
        found = one_core[name]
        assert sorted(found["dice"]) == sorted(stored["3d_fullres"]["dice"])
        dice = np.array(list(found["dice"].values()))
        row = next(line for line in table.splitlines() if line.startswith(beginning))
        assert row.endswith(f"| {dice.mean():.4f} | {dice[:, 0].mean():.4f}, {dice[:, 1].mean():.4f} |")
        steps = found.get("steps") or found["epochs"] * found["steps_per_epoch"]
        assert f"| {steps} | {int(found['seconds'] / 60 + 0.5)} |" in row
    gain = difference(np.array(list(one_core["monai-iunet fit"]["dice"].values())).mean(1), own.mean(1))
    assert f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f}) more" in " ".join(table.split())
