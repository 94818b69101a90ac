"""Inversion and gradients of architectures that nobody has thought of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monai_iunet import IUNet

NORMS = [None, "INSTANCE", ("INSTANCE", {"affine": True}), ("GROUP", {"num_groups": 1}), "BATCH"]


@st.composite
def architectures(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of an `IUNet`, and the shape of images for it."""
    dims = draw(st.integers(1, 3))
    levels = draw(st.integers(1, 3))
    strides = [tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(levels - 1)]
    channels = [draw(st.integers(2, 6))]
    for number, stride in enumerate(strides):
        following = math.prod(stride) * draw(st.integers(1, min(channels[-1] - 1, 2)))
        if following < 2:  # a level of one channel cannot be halved
            strides = strides[:number]
            break
        channels.append(following)
    arguments = {
        "spatial_dims": dims,
        "channels": channels,
        "strides": strides,
        "couplings": [draw(st.integers(1, 3)) for _ in channels],
        "convs_per_coupling": draw(st.integers(1, 2)),
        "kernel_size": [draw(st.sampled_from([1, 3])) for _ in range(dims)],
        "norm": draw(st.sampled_from(NORMS)),
        "act": draw(st.sampled_from(["LEAKYRELU", "GELU", None])),
        "channel_mixing": draw(st.sampled_from(["split", 1, 2, None])),
        "orthogonal_map": draw(st.sampled_from(["cayley", "matrix_exp", "householder"])),
        "resampling_init": draw(st.sampled_from(["pixel_shuffle", "random"])),
        "padding_mode": draw(st.sampled_from(["constant", "replicate"])),
    }
    factors = [math.prod(stride[axis] for stride in strides) for axis in range(dims)]
    spatial = [factor * draw(st.integers(1, 2)) + draw(st.integers(0, 2)) + 1 for factor in factors]
    return arguments, (draw(st.integers(1, 2)), channels[0], *spatial)


def check(case: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    arguments, shape = case
    torch.manual_seed(0)
    net = IUNet(**arguments).double()
    assert list(net.channels) == arguments["channels"]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(shape, dtype=torch.double)
    gradients = []
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for activations in ("store", "invert", "convolutions"):
        net.load_state_dict(state)
        net.activations = activations
        image = x.clone().requires_grad_()
        (net(image) * torch.linspace(-1, 1, x.numel(), dtype=torch.double).view(shape)).sum().backward()
        gradients.append([image.grad, *(parameter.grad for parameter in net.parameters())])
        net.zero_grad()
    for stored, *others in zip(*gradients, strict=True):
        for rebuilt in others:
            assert (rebuilt is None) == (stored is None)
            if stored is not None and rebuilt is not None:
                torch.testing.assert_close(rebuilt, stored, rtol=1e-6, atol=1e-8 * (1 + float(stored.abs().max())))
    net.eval()
    with torch.no_grad():
        y = net(x, crop=False)
        torch.testing.assert_close(net.inverse(y, spatial_size=shape[2:]), x, rtol=1e-6, atol=1e-6)


quick = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
thorough = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(architectures())
def test_thirty_architectures(case: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    check(case)


@pytest.mark.slow
@thorough
@given(architectures())
def test_three_hundred_architectures(case: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    check(case)
