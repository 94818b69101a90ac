"""What only a GPU shows: each row against stored activations of the same network, on the same card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel

from monai_iunet import SegIUNet
from tests.helpers import randomize, relative_errors

pytestmark = pytest.mark.gpu


def network(activations: str, **options: Any) -> SegIUNet:
    torch.manual_seed(0)
    return randomize(SegIUNet(3, 1, 3, (8, 16, 32), activations=activations, **options), std=0.2).cuda()


def image() -> Tensor:
    return torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()


def compare(run: Callable[[nn.Module, Tensor], None], tolerance: float = 1e-3, **options: Any) -> None:
    found = []
    for activations in ("invert", "store"):
        net = network(activations, **options)
        torch.manual_seed(2)
        run(net, image())
        found.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()])[None])
    assert max(relative_errors(*found)) < tolerance


def plain(net: nn.Module, x: Tensor) -> None:
    net(x).float().square().mean().backward()


def test_a_stream_of_ones_own() -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = net(x).square().mean()
        loss.backward()
        torch.cuda.synchronize()

    compare(run)


@pytest.mark.parametrize("pin_memory", [False, True])
def test_offloaded_to_the_host(pin_memory: bool) -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        with save_on_cpu(pin_memory=pin_memory):
            y = net(x)
        y.square().mean().backward()

    compare(run)


def test_kernels_that_are_chosen_by_timing() -> None:
    with torch.backends.cudnn.flags(benchmark=True):
        compare(plain)


def test_channels_last() -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        plain(net.to(memory_format=torch.channels_last_3d), x.contiguous(memory_format=torch.channels_last_3d))

    compare(run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_16_bits(dtype: torch.dtype) -> None:
    compare(lambda net, x: plain(net.to(dtype), x.to(dtype)), tolerance=0.05)


def test_fused_adamw_with_a_scaler_trains_as_with_stored_activations() -> None:
    losses = []
    for activations in ("invert", "store"):
        net = network(activations)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (net(image()).float() - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(float(loss))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_nccl_with_one_process(tmp_path: Path) -> None:
    with process_group(tmp_path):
        compare(lambda net, x: plain(DistributedDataParallel(net, device_ids=[0]), x))


def test_a_cuda_graph_of_the_inference() -> None:
    net, x = network("invert").eval(), image()
    with torch.no_grad():
        expected = net(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
