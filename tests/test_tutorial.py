"""What the README and the guides show: an invertible network that learns, and one in the middle of other layers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.fl.utils.exchange_object import ExchangeObject
from torch import nn

from monai_iunet import IUNet
from monai_iunet.planning.live_bytes import LiveBytes
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "monai_iunet" / "guides").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]


@pytest.mark.long
def test_a_2d_iunet_learns_to_mirror_images() -> None:
    net = IUNet(spatial_dims=2, channels=(3, 8, 16), couplings=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        x = nn.functional.avg_pool2d(torch.rand(16, 3, 16, 16), 3, 1, 1)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), x.flip(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    torch.testing.assert_close(net.inverse(net(x)), x, atol=1e-3, rtol=1e-3)


def between_convolutions(couplings: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, 64, 3, padding=1),
        IUNet(spatial_dims=3, channels=(64, 128, 256), couplings=couplings),
        nn.Conv3d(64, 10, 3, padding=1),
    )


def test_an_iunet_between_convolutions_trains() -> None:
    net = between_convolutions((2, 3, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, target = torch.rand(1, 3, 8, 8, 8), torch.randint(10, (1, 8, 8, 8))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_its_memory_saving_needs_no_asking() -> None:
    alive = []
    for couplings in ((2, 3, 4), (6, 9, 12)):
        net = between_convolutions(couplings)
        x = torch.rand(1, 3, 8, 8, 8)
        with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
            y = net(x)
            alive.append(live.now())
        assert y.requires_grad
    assert alive[0] == alive[1]


class Client:
    """Stands in for a federated client, whose training adds a number; `tests/bundles` runs the block with real ones."""

    def __init__(self, step: int) -> None:
        self.step = step

    def train(self, data: ExchangeObject) -> None:
        self.weights = {name: torch.as_tensor(value) + self.step for name, value in data.weights.items()}

    def get_weights(self) -> ExchangeObject:
        return ExchangeObject(weights=self.weights)


def test_there_is_code_in_the_pages() -> None:
    assert len(BLOCKS) >= 13
    assert len({"".join(block.split()) for block in BLOCKS}) >= len(BLOCKS) - 1  # the README shows one again


@pytest.mark.parametrize("block", BLOCKS, ids=map(str, range(len(BLOCKS))))
def test_the_code_of_the_pages_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "nnunetv2"):
        if f"import {package}" in block or f"from {package}" in block:
            pytest.importorskip(package)
    if '"cuda"' in block:
        pytest.skip("needs a GPU, where tests/test_gpu.py records a step in the same way")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"np": np, "clients": [Client(1), Client(3)], "weights": {"weight": np.zeros(2)}}
    if "{bundle}" in block:
        leave_out = shutil.ignore_patterns("eval", "train")
        names["bundle"] = str(shutil.copytree(HIPPOCAMPUS, tmp_path / "bundle", ignore=leave_out))
        names["data"] = str(make_hippocampus_data(tmp_path / "data", training=2))
        small = {"network_def#channels": [4, 8], "network_def#couplings": 1, "roi_size": [16, 16, 16]}
        small |= {"device": "cpu", "val_interval": 1}
        block = block.replace("max_epochs=1", f"max_epochs=1, **{small}")
    exec(block.replace("range(100)", "range(3)").replace("64, 64, 64)", "16, 16, 16)"), names)
    if "workflow" in names:
        saved = torch.load(tmp_path / "bundle" / "models" / "last.pt", weights_only=True)
        assert saved["epoch"] == 1
    if "updates" in names:  # three rounds, each adds 1 and 3
        np.testing.assert_array_equal(names["weights"]["weight"], [6, 6])
    if "plan" in names:
        assert names["plan"].training_peak > names["plan"].inference_peak > 2**30
    if "restored" in names:
        torch.testing.assert_close(names["restored"], names["images"], atol=1e-3, rtol=1e-3)
    if "losses" in names:
        assert names["losses"][-1] < 0.8 * names["losses"][0]
        assert names["found"].shape == (1, 40, 40, 40)
    if "trainer" in names:
        assert names["trainer"].global_step == 20
        assert names["trainer"].callback_metrics["train_loss"] < 0.9
        assert not list(tmp_path.iterdir())


def test_the_layout_in_the_guide_is_that_of_its_network() -> None:
    net = IUNet(spatial_dims=2, channels=(3, 8, 16, 32, 64), couplings=4)
    assert f"```text\n{net.layout()}\n```" in (ROOT / "monai_iunet" / "guides" / "networks.md").read_text(
        encoding="utf-8"
    )
