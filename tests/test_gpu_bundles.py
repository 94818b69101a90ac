"""Segmentation, training and `fit` on a GPU: each gives what it gives on the CPU, but for rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from monai_iunet import BundleSegmenter, ChunkedDiceCELoss, LabelInferer, StreamingInferer, fit, verify_bundle
from monai_iunet.bundling.task import Task
from monai_iunet.inference.prepare import prepare
from tests.bundles.helpers import BUNDLES, TRAINED, losses, run
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data
from tests.fitting.made_sets import make_set
from tests.inference.test_labels import preprocessing, scan
from tests.inference.test_streaming import Network

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels flip where two classes are near each other, so that convolutions must not round to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("stitched", [None, "cpu", DEVICE])
def test_windows_are_stitched_as_on_the_cpu(stitched: str | None) -> None:
    """On the GPU, and in the memory of the host while the next windows are computed."""
    net, image = Network().eval(), torch.randn(1, 1, 40, 24, 16)
    options: dict[str, Any] = {"roi_size": (16, 16, 16), "overlap": 0.5, "mode": "gaussian", "sw_batch_size": 2}
    with torch.no_grad():
        expected = StreamingInferer(**options)(image, net)
        found = StreamingInferer(**options, device=stitched)(image.to(DEVICE), net.to(DEVICE))
    assert found.device.type == (stitched or DEVICE)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_labels_of_a_slab_at_a_time_are_those_of_the_cpu() -> None:
    steps, net = preprocessing(), Network().eval()
    options: dict[str, Any] = {"roi_size": (8, 8, 8), "overlap": 0.5, "mode": "gaussian", "cval": -1.0}
    found = []
    for device in ("cpu", DEVICE):
        prepared, meta = prepare(steps, scan(), device)
        with torch.no_grad():
            found.append(np.asarray(LabelInferer(steps, **options).segment(prepared, meta, net.to(device))[0]))
    assert (found[0] == found[1]).mean() > 0.999
    assert len(np.unique(found[0])) > 2


@pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
def test_a_network_gives_what_it_gives_on_the_cpu(task: Task) -> None:
    image, found = torch.rand(1, 1, *[min(int(extent), 64) for extent in task.roi_size]), []
    for device in ("cpu", DEVICE):
        segmenter = BundleSegmenter(BUNDLES / task.name, device=device)
        with torch.no_grad():
            found.append(segmenter.network(image.to(segmenter.device)).float().cpu())
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.02)


def test_whole_heads_are_segmented_as_on_the_cpu() -> None:
    """The example that comes with the package: both hippocampi of a template, in crops."""
    found = []
    for device in ("cpu", DEVICE):
        segmenter = BundleSegmenter(HIPPOCAMPUS, device=device)
        image, region = segmenter.example()
        found.append(np.asarray(segmenter.segment(image, region=region).labels))
    overlap = 2 * ((found[0] > 0) & (found[0] == found[1])).sum() / sum((labels > 0).sum() for labels in found)
    assert overlap > 0.98


def test_a_bundle_trains_and_goes_on(tmp_path: Path) -> None:
    """Under autocast, which configs turn on where there is a GPU, from pinned batches."""
    small = {"network_def__channels": [8, 16], "network_def__couplings": 1, "roi_size": [24, 32, 24]}
    recipe = {
        **small,
        "dataset_dir": make_hippocampus_data(tmp_path / "data"),
        "device": f"$torch.device('{DEVICE}')",
        "val_interval": 6,
        "batch_size": 1,
        "learning_rate": 0.02,
        "ckpt_dir": tmp_path / "weights",
        "output_dir": tmp_path / "log",
    }
    run(HIPPOCAMPUS, "train.json", **recipe, max_epochs=6)
    run(HIPPOCAMPUS, "train.json", **recipe, max_epochs=12, resume=True)
    found = losses(tmp_path / "log")
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:4])
    record = json.loads((tmp_path / "weights" / "training.json").read_text())
    assert record["roi_size"] == [24, 32, 24]


def test_fit_makes_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iunet.fitting.planner.CHANNELS", (8, 16, 32))
    monkeypatch.setattr("monai_iunet.fitting.planner.LONG_STEPS", 150)
    data = make_set(tmp_path / "data", count=6)
    fit(data, tmp_path / "bundle", fold=0, device=DEVICE)
    assert [check for check in verify_bundle(tmp_path / "bundle") if check.problem] == []
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["mean_dice"] > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_monais(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 8, 24, 20, 28, device=DEVICE).to(dtype)
    labels = torch.randint(0, 8, (2, 1, 24, 20, 28), device=DEVICE)
    found = []
    for loss in (ChunkedDiceCELoss, DiceCELoss):
        leaf = logits.clone().requires_grad_()
        value: Any = loss(to_onehot_y=True, softmax=True)(leaf.float() if loss is DiceCELoss else leaf, labels)
        value.backward()
        found.append((value.float(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3, rtol=1e-3)
    assert found[0][1] is not None
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=0.02)
