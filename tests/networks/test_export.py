"""Exported networks give what the network itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from monai_iunet import SegIUNet
from tests.helpers import randomize, relative_errors

SIZES = [(16, 16, 16), (8, 24, 12)]


@pytest.fixture(scope="module")
def net() -> SegIUNet:
    torch.manual_seed(0)
    return randomize(SegIUNet(3, 1, 3, (8, 16, 32), couplings=1), std=0.2).eval()


def dynamic_shapes() -> tuple[dict[int, object]]:
    """Any size that divides by the network's factor of 4."""
    return ({axis: 4 * torch.export.Dim(f"quarter{axis}", min=2) for axis in (2, 3, 4)},)


def image(size: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(1, 1, *size)


def expected(net: SegIUNet, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(net: SegIUNet) -> None:
    x = image(SIZES[0])
    torch.testing.assert_close(torch.jit.trace(net, x)(x), expected(net, x))


@pytest.mark.long
def test_torch_export_with_dynamic_sizes(net: SegIUNet) -> None:
    exported = torch.export.export(net, (image(SIZES[0]),), dynamic_shapes=dynamic_shapes()).module()
    for x in map(image, SIZES):
        torch.testing.assert_close(exported(x), expected(net, x))


def test_the_exported_graph_holds_constants_in_place_of_linear_algebra(net: SegIUNet) -> None:
    graph = torch.export.export(net, (image(SIZES[0]),)).graph
    assert not [node for node in graph.nodes if "linalg" in str(node.target) or "matrix_exp" in str(node.target)]


@pytest.mark.filterwarnings("ignore")
def test_the_onnx_exporter_that_traces_is_refused(net: SegIUNet, tmp_path: Path) -> None:
    """It writes a file that no program loads."""
    file = tmp_path / "net.onnx"
    for size in (SIZES[0], (15, 16, 17)):
        with pytest.raises(RuntimeError, match="Pass dynamo=True to"):
            torch.onnx.export(net, (image(size),), file, dynamo=False)
        assert not file.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_onnx_with_dynamic_sizes(net: SegIUNet, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "net.onnx"
    torch.onnx.export(net, (image(SIZES[0]),), dynamo=True, dynamic_shapes=dynamic_shapes(), verbose=False).save(file)
    session = onnxruntime.InferenceSession(file)
    for x in map(image, SIZES):
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected(net, x), atol=1e-4, rtol=1e-4)


def test_torch_compile_breaks_the_graph_once_in_training_and_never_in_evaluation() -> None:
    net = randomize(SegIUNet(2, 1, 3, (4, 8), couplings=1), std=0.2)
    x = torch.rand(1, 1, 8, 8)
    found = []
    for forward in (torch.compile(net, backend="aot_eager"), net):
        net.zero_grad()
        forward(x).square().mean().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert max(relative_errors(*found)) < 1e-4
    assert torch._dynamo.explain(net)(x).graph_count == 2  # the stem, and the head

    net.activations = "store"
    net.zero_grad()
    torch.compile(net, backend="aot_eager")(x).square().mean().backward()
    assert max(relative_errors([parameter.grad for parameter in net.parameters()], found[1])) < 1e-4

    net.eval()
    with torch.no_grad():
        assert torch._dynamo.explain(net)(x).graph_count == 1
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), net(x))
        torch.nn.init.normal_(net.iunet.splits[0].matrix.weight)
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), net(x))


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"activations": "convolutions"}], ids=["", "exact", "kept"])
def test_a_step_is_compiled_with_its_backward_pass(options: dict[str, Any]) -> None:
    net = randomize(SegIUNet(2, 1, 3, (4, 8), couplings=1, **options), std=0.2)
    x = torch.rand(1, 1, 8, 8)

    def step() -> None:
        net(x).square().mean().backward()

    found = []
    for run in (step, torch.compile(step, backend="eager")):
        net.zero_grad()
        run()
        found.append([parameter.grad for parameter in net.parameters()])
    assert max(relative_errors(*found)) < 1e-4
