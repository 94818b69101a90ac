"""What is said to fit a memory does, and a little more does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from monai_iunet import IUNet, SegIUNet
from monai_iunet.planning import budget
from monai_iunet.planning.budget import (
    WAYS,
    best_activations,
    largest_patch,
    largest_window,
    most_couplings,
    parse_bytes,
)
from monai_iunet.planning.plan import plan_inference_pass, plan_training, step_without_optimizer


def seg(couplings: int = 1, **options: Any) -> SegIUNet:
    return SegIUNet(3, 1, 3, channels=(8, 16), couplings=couplings, **options)


def test_the_largest_patch_fits_and_a_larger_one_does_not() -> None:
    plan = largest_patch(seg(), "200 MiB", aspect=(1, 1, 0.5))
    assert plan.training_peak <= 200 * 2**20
    longest, _, short = plan.spatial_size
    assert longest % 16 == 0
    assert abs(short - longest / 2) <= 8
    larger = tuple(extent + 16 for extent in plan.spatial_size)
    assert plan_training(seg(), larger).training_peak > 200 * 2**20
    with pytest.raises(ValueError, match="Even a patch of"):
        largest_patch(seg(), "100 KiB")


@pytest.mark.parametrize(("factor", "aspect"), [(32, (1, 1)), (32, (2, 1)), (48, (1, 1))])
def test_a_network_that_divides_by_more_than_was_said_gets_its_largest_patch(
    factor: int, aspect: tuple[int, ...]
) -> None:
    class Divides(torch.nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if any(extent % factor for extent in images.shape[2:]):
                raise ValueError(f"must divide by {factor}")
            return super().forward(images)

    network = Divides(1, 4, 3, padding=1)
    plan, known = (largest_patch(network, "12 MiB", aspect=aspect, multiple_of=multiple) for multiple in (16, factor))
    assert plan == known
    assert plan.spatial_size[0] > 5 * factor


def test_the_budget_decides_what_each_level_keeps() -> None:
    network, shape = SegIUNet(3, 1, 3, (8, 16), couplings=1), (1, 1, 32, 32, 32)

    def peak(levels: Sequence[str]) -> int:
        network.activations = levels
        return plan_training(network, shape[2:], optimizer=None).training_peak

    least, most = (peak((way,) * 2) for way in ("invert", "store"))
    assert best_activations(network, least, shape) == best_activations(network, least // 2, shape) == ("invert",) * 2
    assert best_activations(network, most, shape) == ("store",) * 2
    budget = int(least + 0.2 * (most - least))
    chosen = best_activations(network, budget, shape)
    assert least < peak(chosen) <= budget
    for level, way in enumerate(chosen):  # none could keep more
        for more in WAYS[WAYS.index(way) + 1 :]:
            assert peak([*chosen[:level], more, *chosen[level + 1 :]]) > budget


def test_where_all_can_be_stored_nothing_else_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def count(network: Any, *options: Any) -> int:
        counted.append(network.activations)
        return step_without_optimizer(network, *options)

    monkeypatch.setattr(budget, "step_without_optimizer", count)
    assert best_activations(SegIUNet(2, 1, 2, (8, 16)), "1 GiB", (1, 1, 32, 32)) == ("store",) * 2
    assert counted == ["store"]


def test_auto_chooses_for_each_size() -> None:
    network = seg(activations="auto", memory_budget="12 MiB")
    assert network.activations == "auto"
    chosen = []
    for extent in (8, 32, 40):
        network(torch.randn(1, 1, extent, extent, extent)).square().mean().backward()
        chosen.append(network.chosen_activations.count("store"))
    assert chosen[0] == 2
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[2] < 2
    with torch.no_grad():  # without gradients nothing is chosen
        network(torch.randn(1, 1, 8, 8, 8))
    assert network.chosen_activations.count("store") == chosen[2]


def test_auto_chooses_without_values_too() -> None:
    network = seg(activations="auto", memory_budget="12 MiB").to("meta")
    network(torch.empty(1, 1, 32, 32, 32, device="meta"))
    assert network.chosen_activations == network.activations_for((1, 1, 32, 32, 32))


def test_auto_gives_the_gradients_of_plain_autograd() -> None:
    network = IUNet(2, (4, 8, 16), activations="auto", memory_budget="100 KiB")
    x = torch.randn(1, 4, 32, 32)
    gradients = []
    for activations in ("auto", "store"):
        network.activations = activations
        network.zero_grad()
        network(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _checkpointed(network: IUNet, x: Tensor) -> dict[str, Tensor]:
    checkpoint(network, x, use_reentrant=False).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def _functional(network: IUNet, x: Tensor) -> dict[str, Tensor]:
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    found: dict[str, Tensor] = grad(lambda now: functional_call(network, now, x).square().mean())(weights)
    return found


def _of_the_image(network: IUNet, x: Tensor) -> dict[str, Tensor]:
    network.requires_grad_(False)
    return {"x": torch.autograd.grad(network(x.requires_grad_()).square().mean(), x)[0]}


@pytest.mark.parametrize("gradients", [_checkpointed, _functional, _of_the_image])
def test_auto_in_other_ways_to_gradients(gradients: Callable[[IUNet, Tensor], dict[str, Tensor]]) -> None:
    network, x = (
        IUNet(2, (4, 8), couplings=1, activations="auto", memory_budget="100 KiB").double(),
        torch.rand(1, 4, 8, 8),
    )
    found = gradients(network, x.double())
    network.activations = "store"
    expected = gradients(network, x.double())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_auto_does_not_budget_for_a_frozen_network_as_if_nothing_was_kept() -> None:
    network, shape = IUNet(2, (4, 8), couplings=1), (1, 4, 32, 32)
    chosen = [best_activations(network.requires_grad_(trained), "150 KiB", shape) for trained in (True, False)]
    assert chosen[0] == chosen[1] != ("store", "store")


def test_nobody_sees_that_auto_chooses() -> None:
    network = IUNet(2, (4, 8), couplings=1, activations="auto", memory_budget="100 KiB")
    x, counts, kinds = torch.rand(1, 4, 8, 8), [], set()

    def pack(tensor: Tensor) -> Tensor:
        kinds.add(type(tensor))
        return tensor

    for _ in range(2):
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert kinds <= {Tensor, torch.nn.Parameter}


def test_auto_is_exported_with_gradients_enabled() -> None:
    network = IUNet(2, (4, 8), couplings=1, activations="auto", memory_budget="100 KiB").eval()
    x = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


def test_auto_without_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a memory_budget"):
        seg(activations="auto")
    with pytest.raises(ValueError, match="of the 2 levels"):
        seg(activations=("invert",))


@pytest.mark.long
def test_couplings_that_fit_are_counted() -> None:
    def stored(couplings: int) -> SegIUNet:
        return seg(couplings, activations="store")

    size = (32, 32, 32)
    couplings, plan = most_couplings(stored, "20 MiB", size, limit=8)
    assert plan.training_peak <= 20 * 2**20 < plan_training(stored(couplings + 1), size).training_peak
    assert most_couplings(seg, "20 MiB", size, limit=8)[0] == 8  # what is rebuilt does not grow with depth
    with pytest.raises(ValueError, match="Even one coupling per level needs"):
        most_couplings(stored, "1 MiB", size, limit=8)


@pytest.mark.parametrize(
    ("text", "expected"), [(7, 7), ("24 GiB", 24 * 2**30), ("1.5GB", 1_500_000_000), ("500 mb", 500_000_000), ("9", 9)]
)
def test_sizes_are_read(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1 GiB", "3 apples", "1.2.3 GB", 0, True, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="24 GiB"):
        parse_bytes(text)


def test_a_patch_stays_within_its_limits_and_multiples() -> None:
    net = SegIUNet(2, in_channels=1, out_channels=2, channels=(4, 8))
    plan = largest_patch(net, "64 MiB", aspect=(1, 1), multiple_of=(8, 16), smallest=(24, 16), largest=(45, 100))
    assert plan.spatial_size == (40, 96)
    small = largest_patch(net, "64 MiB", aspect=(1, 4), multiple_of=(8, 16), smallest=(24, 16), largest=(30, 48))
    assert small.spatial_size == (24, 48)
    with pytest.raises(ValueError, match=r"largest=\(45, 10\) leaves no multiple of \(8, 16\)"):
        largest_patch(net, "64 MiB", aspect=(1, 1), multiple_of=(8, 16), largest=(45, 10))


def test_the_smallest_patch_is_one_of_multiples_too() -> None:
    net = SegIUNet(2, in_channels=1, out_channels=2, channels=(4, 8))
    plan = largest_patch(net, "180 KiB", aspect=(1, 1), multiple_of=(8, 16), smallest=(50, 16))
    assert plan.spatial_size == (56, 48)


def test_no_size_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many numbers of steps give one size, as below the smallest one."""
    counted = []

    def count(network: Any, shape: Any, *options: Any) -> int:
        counted.append(tuple(shape))
        return step_without_optimizer(network, shape, *options)

    net = SegIUNet(2, in_channels=1, out_channels=2, channels=(8, 16))
    just_fits = plan_training(net, (64, 64), optimizer=None).training_peak
    monkeypatch.setattr(budget, "step_without_optimizer", count)
    plan = largest_patch(net, just_fits, (1, 1), 8, smallest=(64, 64), optimizer=None)
    assert plan.spatial_size == (64, 64)
    assert counted
    assert len(counted) == len(set(counted))


def test_a_window_is_the_whole_image_where_it_fits_and_else_as_large_as_fits() -> None:
    network = SegIUNet(2, 1, 2, (8, 16, 32))
    factors = (4, 4)
    full = plan_inference_pass(network, (1, 1, 128, 256))
    fixed = sum(parameter.nbytes for parameter in network.parameters())
    assert largest_window(network, full, (1, 128, 256), factors) == (128, 256)
    assert largest_window(network, full - 1, (1, 128, 256), factors) == (128, 128)
    # What is taken as proportional to the voxels is about what is counted.
    size = largest_window(network, fixed + (full - fixed) // 5, (1, 128, 256), factors)
    assert size == (64, 64)
    assert plan_inference_pass(network, (1, 1, *size)) < 1.1 * (fixed + (full - fixed) / 8)
    with pytest.raises(ValueError, match="Even in windows of"):
        largest_window(network, 1000, (1, 128, 256), factors)


def test_a_patch_that_the_network_refuses_does_not_fit() -> None:
    net = SegIUNet(3, 1, 2, channels=(24, 48), couplings=1)
    plan = largest_patch(net, "10 TiB", multiple_of=64)  # 24 channels of 448 cubed are more than 2^31 values
    assert plan.spatial_size == (384, 384, 384)
