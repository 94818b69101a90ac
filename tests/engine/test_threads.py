"""Replicas and threads that share one network."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import TorchDispatchMode
from tests.engine.helpers import compare, image, loss, network, work_in_threads
from tests.helpers import relative_errors


def test_replicas_of_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[(tensor.detach() if detach else tensor).clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: 0)

    def run(net: Any, x: Tensor) -> None:
        outputs = [part(half) for part, half in zip(replicate.replicate(net, [0, 1]), x.chunk(2))]
        loss(torch.cat(outputs)).backward()

    compare(run)
    compare(run, norm="BATCH", channel_mixing=1)


class Normalized(nn.Sequential):
    """A branch of one's own with statistics and a counter."""

    def __init__(self, dims: int, inputs: int, outputs: int, *_: Any) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
        self.register_buffer("num_batches_tracked", torch.zeros(()))
        self.act = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return self.act(super().forward(x))


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"make_branch": Normalized}], ids=["", "batch", "own"])
@pytest.mark.parametrize("kinds", [("train", "train", "train"), ("train", "infer"), ("infer", "infer")])
def test_threads(kinds: tuple[str, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch does not guard `buffer.add_(1)`: where two threads meet in it, one of the two is lost.
    add, lock = Tensor.add_, threading.Lock()

    def add_alone(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        with lock:
            return add(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "add_", add_alone)
    net = network(**options)
    parameters = dict(net.named_parameters())
    x = image()

    def train(steps: int = 12) -> list[list[Tensor]]:
        return [list(torch.autograd.grad(loss(net(x)), list(net.parameters()))) for _ in range(steps)]

    def infer(steps: int = 12) -> list[list[Tensor]]:
        with torch.no_grad():
            return [[net(x)] for _ in range(steps)]

    ways = {"train": train, "infer": infer}
    expected = {kind: way(1)[0] for kind, way in ways.items()}
    for kind, found in zip(kinds, work_in_threads([ways[kind] for kind in kinds])):
        for each in found:
            assert max(relative_errors(each, expected[kind])) < 1e-10
    for name, parameter in net.named_parameters():
        assert parameter is parameters[name]
    assert all(not isinstance(module, nn.Dropout) or module.training for module in net.modules())
    counts = [int(buffer) for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [2 + 12 * len(kinds)] * len(counts)


class Writes(TorchDispatchMode):
    """Notes which memory is written to by copies."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.copy_.default:
            self.places.add(args[0].data_ptr())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_not_written_to_while_another_thread_may_use_them(training: bool) -> None:
    net = network(norm="batch").train(training)
    value = loss(net(image()))
    with Writes() as writes:
        value.backward()
    assert not writes.places & {buffer.data_ptr() for buffer in net.buffers()}


def test_two_backward_passes_over_one_graph_in_two_threads() -> None:
    net = network()
    value = loss(net(image()))
    parameters = list(net.parameters())
    expected = torch.autograd.grad(value, parameters, retain_graph=True)

    def differentiate() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(value, parameters, retain_graph=True) for _ in range(8)]

    for found in work_in_threads([differentiate] * 2):
        for each in found:
            assert max(relative_errors(each, expected)) < 1e-10
