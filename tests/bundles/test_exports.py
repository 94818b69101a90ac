"""What MONAI's bundle tools make of a bundle: checks, TorchScript, ONNX, loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, create_workflow, load, onnx_export, verify_net_in_out

from monai_iunet import SegIUNet
from monai_iunet.bundling.task import Task
from tests.bundles.helpers import BUNDLES, TRAINED

BY_NAME = pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
ONE_AT_FIRST = pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, id=task.name, marks=() if "hippocampus" in task.name else pytest.mark.long)
        for task in TRAINED
    ],
)


def files(task: Task) -> dict[str, str]:
    configs = BUNDLES / task.name / "configs"
    return {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}


def eager(task: Task) -> SegIUNet:
    net = SegIUNet(3, 1, task.num_classes, task.channels, couplings=task.couplings)
    net.load_state_dict(torch.load(BUNDLES / task.name / "models" / "model.pt", weights_only=True))
    return net.eval()


@BY_NAME
def test_the_network_has_the_inputs_and_outputs_of_the_metadata(task: Task) -> None:
    verify_net_in_out("network_def", device="cpu", **files(task))


@pytest.mark.parametrize("use_trace", [None, True])
@ONE_AT_FIRST
def test_torchscript_gives_the_same(task: Task, use_trace: bool | None, tmp_path: Path) -> None:
    x = torch.randn(1, 1, *(min(extent, 48) for extent in task.roi_size))
    options = {} if use_trace is None else {"use_trace": True, "input_shape": list(x.shape)}
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(BUNDLES / task.name / "models" / "model.pt"),
        **options,
        **files(task),
    )
    scripted = torch.jit.load(tmp_path / "model.ts")
    with torch.no_grad():
        for image in (x, x[..., 3:-2]):
            torch.testing.assert_close(scripted(image), eager(task)(image), rtol=1e-4, atol=1e-3)


@ONE_AT_FIRST
def test_onnx_gives_the_same(task: Task, tmp_path: Path) -> None:
    x = torch.randn(1, 1, *(min(extent, 48) for extent in task.roi_size))
    onnx_export(
        "network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(BUNDLES / task.name / "models" / "model.pt"),
        use_trace=True,
        input_shape=list(x.shape),
        converter_kwargs={"dynamo": True},  # the default from PyTorch 2.9 on
        **files(task),
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, eager(task)(x).numpy(), rtol=1e-3, atol=1e-3)


@BY_NAME
def test_a_bundle_is_loaded_from_its_folder(task: Task) -> None:
    net = load(task.name, bundle_dir=str(BUNDLES), device="cpu")
    assert isinstance(net, SegIUNet)
    expected = eager(task).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())


@BY_NAME
def test_a_workflow_is_made_of_the_inference_config(task: Task, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(["a.nii.gz"]))
    workflow = create_workflow(
        config_file=files(task)["config_file"],
        bundle_root=str(BUNDLES / task.name),
        dataset_dir=str(tmp_path / "list.json"),
        output_dir=str(tmp_path),
        workflow_type="infer",
    )
    assert isinstance(workflow, ConfigWorkflow)
    assert isinstance(workflow.network_def, SegIUNet)
