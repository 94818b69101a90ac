"""What only a GPU shows: each row against stored activations of the same network, on the same card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ckpt_export, trt_export
from torch import Tensor, distributed, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel

from monai_iunet import SegIUNet
from monai_iunet.bundling.task import Task
from monai_iunet.engine.slabs import slices
from monai_iunet.networks.layers import normalized_activation, slab_convolution
from tests.bundles.helpers import BUNDLES, TRAINED
from tests.bundles.test_exports import eager, files
from tests.helpers import randomize, relative_errors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in TF32, the default, would round where the tests look for errors of the engine."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def network(activations: str, **options: Any) -> SegIUNet:
    torch.manual_seed(0)
    return randomize(SegIUNet(3, 1, 3, (8, 16, 32), activations=activations, **options), std=0.2).cuda()


def image() -> Tensor:
    return torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()


def compare(run: Callable[[nn.Module, Tensor], None], tolerance: float = 1e-3, **options: Any) -> None:
    found = []
    for activations in ("store", "invert", "convolutions"):
        net = network(activations, **options)
        torch.manual_seed(2)
        run(net, image())
        found.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()])[None])
    for rebuilt in found[1:]:
        assert max(relative_errors(rebuilt, found[0])) < tolerance


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
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        compare(plain)


def test_tf32_rounds_no_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions may round to ten bits, twice alike; the orthogonal matrices that are inverted must not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    compare(plain, tolerance=0.01)
    net = network("invert").eval().iunet
    x = torch.rand(2, 8, 16, 16, 16, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert max(relative_errors([net.inverse(net(x))], [x])) < 1e-4


@pytest.mark.parametrize("amp", [False, True])
def test_exact_gradients_are_those_of_stored_activations(amp: bool) -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = net(x)
        y.float().square().mean().backward()

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # TF32 is on
        compare(run, tolerance=1e-12, exact=True)


@pytest.mark.parametrize("amp", [False, True])
def test_slabs_and_parts_change_nothing(amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of large images go slab by slab, and rows of a normalization in parts, as on no CPU."""
    found = []
    for cut in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(slab_convolution, "LARGE", 500)
            patch.setattr(slab_convolution, "slabs", lambda size, *_: slices(size, 2))
            if not cut:
                patch.setattr(slab_convolution, "_is_large", lambda x, layer: False)
                patch.setattr(normalized_activation, "_parts", lambda x: 1)
            net = network("invert")
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                y = net(image())
            y.float().square().mean().backward()
        found.append([y.float(), *(parameter.grad for parameter in net.parameters())])
    whole, parts = (torch.cat([tensor.detach().flatten() for tensor in tensors])[None] for tensors in found)
    assert 0 < max(relative_errors(parts, whole)) < (0.1 if amp else 1e-4)


def test_a_step_does_not_wait_for_the_gpu() -> None:
    net, x = network("invert"), image()
    plain(net, x)  # libraries are loaded at the first use
    net.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain(net, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
        scaler = torch.amp.GradScaler("cuda", init_scale=1024)  # from which no step overflows and is left out
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


@pytest.mark.parametrize("options", [{"exact": False}, {"exact": True}, {"exact": True, "amp": True}], ids=str)
def test_a_cuda_graph_of_a_training_step(options: dict[str, Any]) -> None:
    """Its replay on other images gives what a step on these gives; values beyond the grid of `exact` give NaN."""
    options = dict(options)
    amp = options.pop("amp", False)
    net, static = network("invert", **options), torch.zeros_like(image())

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = net(x).float().square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)
    static.copy_(image())
    graph.replay()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    torch.testing.assert_close(loss, step(image()))
    expected = [parameter.grad for parameter in net.parameters()]
    assert max(relative_errors(*([torch.cat([each.flatten() for each in g])[None]] for g in (found, expected)))) < 0.01
    if net.exact:
        static.copy_(1e6 * image())
        graph.replay()
        assert loss.isnan()


def logits(network: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return network(torch.rand(1, 1, *task.roi_size, generator=torch.Generator().manual_seed(0)).cuda()).float()


@pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
def test_a_bundle_as_torchscript(task: Task, tmp_path: Path) -> None:
    weights = str(BUNDLES / task.name / "models" / "model.pt")
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=weights, **files(task))
    exported = torch.jit.load(tmp_path / "model.ts", map_location="cuda")
    torch.testing.assert_close(logits(exported, task), logits(eager(task).cuda(), task), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
def test_a_bundle_as_tensorrt(task: Task, tmp_path: Path) -> None:
    """The command of the bundle's README, in 16 bits."""
    pytest.importorskip("torch_tensorrt")
    trt_export(
        "network_def",
        filepath=str(tmp_path / "model_trt.ts"),
        ckpt_file=str(BUNDLES / task.name / "models" / "model.pt"),
        precision="fp16",
        use_onnx=True,
        use_trace=True,
        **files(task),
    )
    found = logits(torch.jit.load(tmp_path / "model_trt.ts"), task)
    assert (found.argmax(1) == logits(eager(task).cuda(), task).argmax(1)).float().mean() > 0.99
