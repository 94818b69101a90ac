"""Peak bytes of live tensors, in units of the input's bytes: a figure that repeats exactly."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from monai_iunet import IUNet, SegIUNet, plan_training
from monai_iunet.benchmark.measure import forward_macs, peak_of_training
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.planning.live_bytes import LiveBytes


@cache
def peaks(couplings: int, input_gradient: bool = False, exact: bool = False) -> tuple[float, float]:
    """Peak of a training step and of a forward pass without gradients, above parameters and their gradients.

    In the step these are subtracted, not ignored: what backward of the loss itself holds, while no gradient of a
    parameter has been touched yet, is no matter of the network.
    """
    net = IUNet(3, (32, 64, 128), couplings=couplings, exact=exact)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameters = list(net.parameters())
    x = torch.randn(1, 32, 32, 32, 32, requires_grad=input_gradient)
    with LiveBytes(ignore=net.buffers()) as training:
        z = x * 1
        y = net(z)
        y.square().mean().backward()
    del y, z
    with LiveBytes(ignore=[*net.buffers(), *parameters]) as inference, torch.no_grad():
        z = x * 1
        y = net(z)
    assert y.shape == z.shape == x.shape
    unit = x.numel() * x.element_size()
    held = 2 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return (training.peak - held) / unit, inference.peak / unit


def check(depths: list[int], input_gradient: bool = False) -> None:
    found = [peaks(couplings, input_gradient) for couplings in depths]
    training, inference = zip(*found)
    assert max(training) < 6.5
    # Of a shallow network the peak lies where the loss is, a little higher.
    assert training[-1] < 1.01 * min(training)
    # Input, copy and state make 3, two tensors inside a branch 1; statistics and small matrices come on top.
    assert max(inference) < 4.001


@pytest.mark.parametrize("input_gradient", [False, True])
def test_peak_is_flat_in_depth(input_gradient: bool) -> None:
    check([2, 5], input_gradient)


def test_exactness_costs_a_seventh_of_it_and_stays_flat() -> None:
    plain, exact, deeper = (peaks(couplings, exact=exact)[0] for couplings, exact in ((2, False), (2, True), (5, True)))
    assert plain < exact < 1.15 * plain
    assert deeper < 1.01 * exact


def per_voxel(net: torch.nn.Module, dtype: torch.dtype, size: int = 64) -> tuple[float, float]:
    """Planned bytes per voxel of a training step, without parameters and their gradients, and of a forward pass."""
    plan = plan_training(net, (size,) * 3, dtype=dtype, optimizer=None)
    step = plan.training_peak - plan.parameters - plan.gradients
    return step / size**3, (plan.inference_peak - plan.parameters) / size**3


def test_under_autocast_exactness_takes_less_memory_for_its_stream_has_16_bits() -> None:
    shape = (24, 112, 416)
    plain, exact = (
        per_voxel(SegIUNet(3, 1, 3, shape, couplings=3, exact=exact), torch.bfloat16) for exact in (False, True)
    )
    assert exact[0] < 0.75 * plain[0]
    assert exact[1] < 0.75 * plain[1]
    # In inference: two states around a mixing, or a state and what a branch works on; no copies of cast weights.
    assert plain[1] < 200
    assert exact[1] < 125


def test_a_patch_takes_a_quarter_of_the_bytes_of_nnunet_s_network() -> None:
    net = EQUAL_COST["SegIUNet"]()
    x = torch.rand(1, 1, 48, 48, 48)
    assert peak_of_training(net, lambda: net(x).square().mean().backward()) < 540 * 48**3
    assert 220e3 < forward_macs(net, x) / 48**3 < 230e3


@pytest.mark.slow
def test_peak_is_flat_in_depth_to_30_couplings_per_level() -> None:
    check([5, 10, 20, 30])
