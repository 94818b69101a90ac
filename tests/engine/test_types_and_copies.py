"""Networks of 16 bits, other memory formats, shared modules and copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import SegIUNet
from monai_iunet.networks.blocks.chain import InvertibleChain
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import MODES, image, largest_error, loss, network, plain
from tests.helpers import randomize, relative_errors


@pytest.mark.parametrize("how", ["cast", "half", "default type"])
def test_networks_of_16_bits(how: str) -> None:
    found = []
    for activations in MODES:
        torch.manual_seed(0)
        arguments = {"channels": (8, 16), "couplings": 2, "activations": activations, "act": "TANH"}
        if how == "default type":
            torch.set_default_dtype(torch.bfloat16)
            try:
                net = SegIUNet(2, 1, 3, **arguments)
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            net = SegIUNet(2, 1, 3, **arguments).to(torch.half if how == "half" else torch.bfloat16)
        dtype = next(net.parameters()).dtype
        y = net(image().to(dtype))
        assert y.dtype == dtype
        loss(y.float()).backward()
        found.append([parameter.grad.float() for parameter in net.parameters()])
    whole = [torch.cat([tensor.flatten() for tensor in each])[None] for each in found]
    assert largest_error(whole) < 0.02


def test_channels_last() -> None:
    def run(net: Any, x: Tensor) -> None:
        plain(net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))

    found = []
    for activations in MODES:
        net = network(activations=activations)
        run(net, image())
        found.append([parameter.grad for parameter in net.parameters()])
    assert largest_error(found) < 1e-10


def test_chains_share_modules() -> None:
    branch = randomize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())).double()
    layer = AdditiveCoupling(branch)
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    found = []
    for layer.rebuilds in (True, False):
        outputs = InvertibleChain([layer] * 5)(*inputs)
        found.append(torch.autograd.grad(sum(map(loss, outputs)), [*inputs, *layer.parameters()]))
    assert largest_error(found) < 1e-12


def test_copies_are_independent() -> None:
    net = network()
    other = copy.deepcopy(net)
    value = loss(net(image()))
    randomize(other)
    plain(other, image())
    value.backward()
    expected = network(activations="store")
    plain(expected, image())
    assert max(relative_errors([p.grad for p in net.parameters()], [p.grad for p in expected.parameters()])) < 1e-10
