"""Branches that change their own buffers and weights get the gradients of plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import (
    compare,
    gradients,
    gradients_of_a_branch,
    image,
    largest_error,
    loss,
    network,
    plain,
    spectral,
    weighted,
)


def old_spectral(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


class Counting(nn.Module):
    """Puts a new tensor in the place of its buffer in each evaluation, and depends on it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.conv(x).tanh() * self.count


@pytest.mark.parametrize(
    "make", [spectral, old_spectral, weighted, lambda dims, inputs, outputs, *_: Counting(inputs, outputs)]
)
def test_branches_that_change_their_own_buffers(make: Any) -> None:
    buffers = []

    def run(net: Any, x: Tensor) -> None:
        first = loss(net(x))
        (first + loss(net(x + 1))).backward()
        plain(net, x)
        buffers.append([buffer.clone() for buffer in net.buffers()])

    compare(run, make_branch=make)
    for stored, *others in zip(*buffers, strict=True):
        for rebuilt in others:
            torch.testing.assert_close(rebuilt, stored)


class Counters(nn.Conv2d):
    """Counts its evaluations in several places, in place, and depends on one of them."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.name = name
        self.register_buffer("buffer", torch.ones(()))
        self.register_buffer("through_data", torch.ones(()))
        self.attribute = torch.ones((), dtype=torch.double)
        self.list, self.array, self.dictionary = [1.0], np.ones(1), {"in": [1.0]}

    def count(self) -> dict[str, Any]:
        self.list[0] += 1
        self.array += 1
        self.dictionary["in"][0] += 1
        counts = {"list": self.list[0], "array": float(self.array[0]), "dictionary": self.dictionary["in"][0]}
        tensors = {"buffer": self.buffer.add_(1), "attribute": self.attribute.add_(1)}
        self.through_data.data.add_(1)
        return counts | {name: tensor.clone() for name, tensor in tensors.items()} | {"data": self.through_data.clone()}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * self.count()[self.name]


@pytest.mark.parametrize("name", ["buffer", "attribute", "data", "list", "array", "dictionary"])
def test_branches_that_change_in_place_what_they_depend_on(name: str) -> None:
    counts = []

    def run(net: Any, x: Tensor) -> None:
        (loss(net(x)) + loss(net(x + 1))).backward(retain_graph=True)
        value = loss(net(x))
        value.backward(retain_graph=True)
        value.backward()
        counts.append(net.iunet.encoder[0][0].branch.count())

    compare(run, make_branch=lambda _, inputs, outputs, *__: Counters(name, inputs, outputs))
    assert counts[0] == counts[1] == dict.fromkeys(counts[0], 5.0)


def test_quantization_that_moves_its_range_unnoticed_by_autograd() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    branch = nn.Sequential(nn.Conv1d(2, 2, 1), quantization.default_fused_act_fake_quant(), nn.Tanh())
    found = []
    for rebuilds in (True, False):
        layer = AdditiveCoupling(copy.deepcopy(branch))
        layer.rebuilds = rebuilds
        state = [torch.ones(1, 2, 4) * torch.linspace(0, 1, 4) for _ in range(2)]
        values = [loss(layer(state[0], scale * state[1])[1]) for scale in (1, 3)]
        found.append(torch.autograd.grad(sum(values), list(layer.parameters())))
    assert largest_error(found) < 1e-4


def test_observers_that_give_their_ranges_a_shape_in_their_first_evaluation() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    branch = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()).train()
    branch.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    quantization.prepare_qat(branch, inplace=True)
    found = []
    for rebuilds in (True, False):
        layer = AdditiveCoupling(copy.deepcopy(branch))
        layer.rebuilds = rebuilds
        state = [torch.ones(1, 2, 4, 4) * torch.linspace(0, 1, 4) for _ in range(2)]
        value = sum(loss(layer(state[0], scale * state[1])[1]) for scale in (1, 3))
        found.append(
            [
                *torch.autograd.grad(value, list(layer.parameters()), retain_graph=True),
                *torch.autograd.grad(value, list(layer.parameters())),
                *(buffer.float() for buffer in layer.buffers()),
            ]
        )
    assert largest_error(found) < 1e-4


class Limited(nn.Conv1d):
    """Changes its weight before it uses it."""

    change = staticmethod(lambda weight: weight.clamp_(-0.1, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(self.weight)
        return super().forward(x).tanh()


def test_a_branch_may_limit_its_weights() -> None:
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        found.append(gradients_of_a_branch(Limited(2, 2, 1), lambda _: None, rebuilds))
    assert largest_error(found) < 1e-10


def test_a_weight_that_is_no_number_is_not_blamed_on_the_branch_that_limits_it() -> None:
    branch = Limited(2, 2, 1)
    with torch.no_grad():
        branch.weight.fill_(torch.nan)
    assert all(gradient.isnan().any() for gradient in gradients_of_a_branch(branch, lambda _: None, True)[:1])


def test_a_branch_that_changes_its_weights_again_and_again_is_refused() -> None:
    branch = Limited(2, 2, 1)
    branch.change = lambda weight: weight.mul_(0.9)
    before = 0.9 * branch.weight.detach().double()
    with pytest.raises(RuntimeError, match="changes a parameter in place whenever it is evaluated"):
        gradients_of_a_branch(branch, lambda _: None, rebuilds=True)
    torch.testing.assert_close(branch.weight.detach(), before)


@pytest.mark.parametrize("way", ["hook", "method", "closure", "alias", "dictionary"])
def test_buffers_that_are_known_by_another_way_than_the_module(way: str) -> None:
    """They are those of the network in the second evaluation, too, as a replica cannot have them."""

    class Known(nn.Conv2d):
        def __init__(self, dims: int, inputs: int, outputs: int, *_: Any) -> None:
            super().__init__(inputs, outputs, 3, padding=1)
            self.register_buffer("count", torch.zeros((), dtype=torch.double))
            self.counting: Any = {"method": self.counted, "closure": lambda: self.counted()}.get(way)
            self.others: Any = {"alias": self.count, "dictionary": {...: self.count}}.get(way)
            if way == "hook":
                self.register_forward_hook(lambda _, inputs, output: output * self.counted())

        def counted(self) -> Tensor:
            self.count.add_(1)
            count: Tensor = self.count if self.others is None else self.others[...]
            return count.clone()

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).tanh()
            return y if way == "hook" else y * (self.counting or self.counted)()

    counts = []

    def run(net: Any, x: Tensor) -> None:
        (loss(net(x)) + loss(net(x + 1))).backward()
        counts.append([float(buffer) for name, buffer in net.named_buffers() if name.endswith("count")])

    compare(run, make_branch=Known)
    assert counts[0] == counts[1] == counts[2] == [2.0] * len(counts[0])


def test_what_is_saved_of_a_buffer_stays_as_it_was_in_its_evaluation() -> None:
    """Plain autograd refuses a second evaluation before the backward pass, unless a copy is saved."""

    class Buffer(Counters):
        copies = False

        def forward(self, x: Tensor) -> Tensor:
            self.buffer.add_(1)
            return nn.Conv2d.forward(self, x).tanh() * (self.buffer.clone() if self.copies else self.buffer)

    found = []
    for copies in (False, True):
        Buffer.copies = copies
        net = network(make_branch=lambda _, inputs, outputs, *__: Buffer("buffer", inputs, outputs))
        found.append(gradients(net, lambda net, x: (loss(net(x)) + loss(net(x + 1))).backward()))
    assert largest_error(found) < 1e-10


def test_statistics_of_a_graph_in_evaluation_are_not_counted_as_changed() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net.train()(x))
        other = loss(net.eval()(x))
        value.backward()  # puts the statistics back for a moment
        other.backward()
        net.train()

    compare(run, norm="BATCH")


def test_statistics_that_moved_since_an_evaluation_are_noticed() -> None:
    net = network(norm="BATCH").eval()
    value = loss(net(image()))
    net.train()(image())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
