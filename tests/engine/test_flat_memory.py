"""Memory of a long run: what is alive and what the process holds, early and late."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from monai_iunet import SegIUNet
from monai_iunet.planning.live_bytes import LiveBytes
from monai_iunet.segmentation.files import Settings, segment_files
from monai_iunet.segmentation.segmenter import BundleSegmenter
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data

pytestmark = pytest.mark.slow

PAGES_MAY_GROW = 32 * 2**20  # bytes that allocators keep, of some 700 MiB


@pytest.fixture(autouse=True)
def without_garbage_collector() -> Iterator[None]:
    """Reference cycles would keep tensors until it runs; there must be none."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def resident() -> int:
    """Bytes of the process in memory."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def alive() -> int:
    """Bytes of all tensors that there are."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, nn.Parameter):
            storage = each.untyped_storage()
            found[storage] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize(
    ("activations", "exact"), [("invert", False), ("invert", True), ("store", False), ("auto", False)]
)
def test_a_thousand_training_steps(activations: str, exact: bool) -> None:
    budget = {"memory_budget": "2 MiB"} if activations == "auto" else {}
    net = SegIUNet(3, 1, 3, (8, 16), couplings=2, dropout=0.1, activations=activations, exact=exact, **budget)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    labels = torch.randint(3, (1, 1, 16, 16, 16))

    def step() -> None:
        optimizer.zero_grad()
        loss_function(net(labels + torch.randn(1, 1, 16, 16, 16)), labels).backward()
        optimizer.step()

    measured = {}
    for number in range(1, 1001):
        if number not in (10, 100, 1000):
            step()
            continue
        with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
            step()
        measured[number] = (live.peak, alive(), resident())
    assert measured[1000][:2] == measured[100][:2] == measured[10][:2]
    assert measured[1000][2] - measured[100][2] < PAGES_MAY_GROW


@pytest.mark.parametrize("overlay", [False, True])
def test_two_hundred_volumes(overlay: bool, tmp_path: Path) -> None:
    images = sorted((make_hippocampus_data(tmp_path / "data", training=10) / "imagesTr").iterdir())
    segmenter = BundleSegmenter(HIPPOCAMPUS, "cpu")
    measured = []
    for _ in range(20):
        assert len(list(segment_files(images[:10], segmenter, tmp_path / "out", Settings(overlay=overlay)))) == 10
        shutil.rmtree(tmp_path / "out")
        if overlay:
            gc.collect()  # figures of matplotlib are reference cycles
        measured.append((alive(), resident()))
    assert overlay or len({tensors for tensors, _ in measured}) == 1
    assert measured[-1][1] - measured[4][1] < PAGES_MAY_GROW
