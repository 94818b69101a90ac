"""The benchmark measures what it says, in small."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from typer.testing import CliRunner

from monai_iunet import SegIUNet
from monai_iunet.benchmark import run, sections
from monai_iunet.benchmark.measure import Spread, peak_of_inference, peak_of_training, ratio, time_alternately
from monai_iunet.benchmark.peers import CONTESTANTS, PEERS, available_peers
from monai_iunet.cli import app

CPU = torch.device("cpu")
TINY = run.Sizes((1, 2), (4, 8), 8, 8, 2, 8, 8, rounds=2)


def test_spread_and_ratio() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert ratio([2.0, 9.0], [1.0, 3.0]) == Spread(2.5, 2.0, 3.0)
    assert Spread(0.0012, 0.001, 0.002).text(1e3, 1) == "1.2 (1.0-2.0)"


def test_all_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    actions = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in "ab"}
    seconds = time_alternately(actions, 3, CPU)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert all(len(found) == 3 and min(found) >= 0.001 for found in seconds.values())


def test_peaks_of_a_network_whose_memory_is_known() -> None:
    net = nn.Linear(64, 64, bias=False)
    x = torch.rand(1000, 64, requires_grad=True)
    unit = x.numel() * 4
    # The input and its gradient (the output is gone by then), two sums, and a gradient to be added to the weight's.
    assert peak_of_training(net, lambda: net(x).sum().backward()) == 2 * unit + 2 * 4 + 64 * 64 * 4
    assert peak_of_inference(net, lambda: net(x)) == 2 * unit


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in PEERS])
def test_contestants_are_the_same_network(name: str) -> None:
    counts = [
        sum(parameter.numel() for parameter in CONTESTANTS[n]((8, 16), 2).parameters()) for n in (name, "ours, store")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_as_many_parameters_and_all_get_gradients(name: str) -> None:
    if name not in available_peers():
        pytest.skip(f"{name} is not installed")
    net = CONTESTANTS[name]((8, 16), 2)
    net(torch.randn(1, 8, 8, 8, 8, requires_grad=True) * 1).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    ours = CONTESTANTS["ours, store"]((8, 16), 2)
    assert sum(map(torch.numel, net.parameters())) == sum(map(torch.numel, ours.parameters()))


def test_the_command_writes_tables_a_file_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK", TINY)
    small = {"SegIUNet": lambda: SegIUNet(3, 1, 2, (4, 8)), "convolution": lambda: nn.Conv3d(1, 2, 3, padding=1)}
    monkeypatch.setattr(sections, "EQUAL_COST", small)
    result = CliRunner().invoke(app, ["benchmark", "--quick", "--peers", "--output", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    for name in ("ours, invert", "torch checkpoint", "SegIUNet", "strided grouped convolution"):
        assert name in result.output
    for name in set(PEERS) - set(available_peers()):
        assert name in result.output.split("left out: ")[1].splitlines()[0]
    found = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    memory = {(row["network"], row["couplings"]): row["training_memory"] for row in found["depth"]}
    assert memory["ours, invert", 2] < 1.05 * memory["ours, invert", 1]
    assert memory["ours, store", 2] > 1.2 * memory["ours, store", 1]
    assert memory["ours, invert", 2] < memory["ours, auto", 2] <= sections.AUTO_UNITS
    assert memory["ours, invert", 2] < memory["ours, exact", 2] < 1.2 * memory["ours, invert", 2]
    bytes_per_voxel = [row["training_bytes_per_voxel"] for row in found["choices"]]
    assert bytes_per_voxel == sorted(bytes_per_voxel)
    assert [found["choices"][place]["activations"] for place in (0, -1)] == ["invert", "store"]
    for row in found["plans"]:
        assert row["planned_over_measured"] == pytest.approx(1, abs=0.1)
    for row in found["losses"]:
        assert (row["memory"] < 3) == (row["loss"] == "ours, chunked")
    convolution = found["per_voxel"][1]
    assert convolution["kmac_per_voxel"] == pytest.approx(2 * 27 / 1e3)
    assert convolution["inference_bytes_per_voxel"] == 12
    assert found["resampling"][-1]["backward_milliseconds"]["median"] is None
    assert imread(tmp_path / "new" / "benchmark.png").std() > 0.05


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["benchmark", "--device", "cuda:99", "--output", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "--device cuda:99: not available here" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("largest", "found"), [(0, 0), (31, 0), (32, 32), (100, 96), (512, 512), (9999, 512)])
def test_bisection(largest: int, found: int) -> None:
    assert sections._largest(lambda size: size <= largest, limit=512) == found


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    """The whole benchmark: the largest cubes and the whole volume among it."""
    result = CliRunner().invoke(app, ["benchmark", "--device", "cuda", "--peers", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "benchmark.json").read_text())
    cubes = {row["network"]: row["largest_cube"] for row in found["largest_cubes"]}
    assert cubes["SegIUNet"] > cubes["DynUNet"] > 0
    assert found["whole_volume"][0]["fits"]
    for row in found["plans"]:
        assert row["planned_over_measured"] == pytest.approx(1, abs=0.15)
