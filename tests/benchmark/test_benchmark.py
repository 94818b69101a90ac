"""The benchmark measures what it says, in small."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import Result
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from typer.testing import CliRunner

from monai_iunet import SegIUNet
from monai_iunet.benchmark import run
from monai_iunet.benchmark.figure import _memory, draw
from monai_iunet.benchmark.measure import (
    Spread,
    allocated_on_cpu,
    peak_of_inference,
    peak_of_training,
    ratio,
    time_alternately,
)
from monai_iunet.benchmark.networks import EQUAL_COST
from monai_iunet.benchmark.peers import CONTESTANTS, PEERS, available_peers
from monai_iunet.benchmark.report import write_json
from monai_iunet.benchmark.section import Job, Row, Section, Settings, Sizes, SkippedError
from monai_iunet.benchmark.sections import SECTIONS, bundles, compiled, inference
from monai_iunet.benchmark.sections.depth import AUTO_UNITS
from monai_iunet.benchmark.sections.inference import BUFFERED, LONG, MONAI, OURS, measure_here
from monai_iunet.benchmark.sections.largest_cubes import largest
from monai_iunet.cli import app

CPU = torch.device("cpu")
TINY = Sizes((1, 3), 1, (4, 8), 8, 8, 8, 2, 8, 8, (16, 16, 16), rounds=1)


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in small."""
    monkeypatch.setattr(run, "QUICK", TINY)
    networks = {"SegIUNet": lambda: SegIUNet(3, 1, 2, (4, 8)), "DynUNet": lambda: nn.Conv3d(1, 2, 3, padding=1)}
    for name in list(EQUAL_COST):
        monkeypatch.delitem(EQUAL_COST, name)
    for name, make in networks.items():
        monkeypatch.setitem(EQUAL_COST, name, make)


def benchmark(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["benchmark", "--quick", "--output", str(folder), *options])


def sections_of(folder: Path) -> dict[str, list[Row]]:
    return json.loads((folder / "benchmark.json").read_text())["sections"]


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_the_command_writes_tables_a_file_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("budgets", "compiled", "exactness", "gradient_errors", "inference"):  # which have tests of their own
        monkeypatch.delitem(SECTIONS, name)
    result = benchmark(tmp_path / "new", "--peers")
    assert result.exit_code == 0, result.output
    assert "whole_volume: left out, needs a GPU" in result.output
    for name in ("ours, invert", "torch checkpoint", "SegIUNet", "strided grouped convolution"):
        assert name in result.output
    for name in set(PEERS) - set(available_peers()):
        assert name in result.output.split("left out: ")[1].splitlines()[0]
    assert "save_on_cpu moves nothing where the network is on the CPU" in result.output
    assert json.loads((tmp_path / "new" / "benchmark.json").read_text())["versions"]["torch"] == torch.__version__
    found = sections_of(tmp_path / "new")
    for dtype in ("float32", "bf16 autocast"):
        memory = {
            (row["network"], row["couplings"]): row["training_memory"]
            for row in found["depth_memory"]
            if row.get("dtype") == dtype
        }
        assert memory["ours, invert", 3] < 1.1 * memory["ours, invert", 1]
        assert memory["ours, store", 3] > 1.3 * memory["ours, store", 1]
        assert memory["ours, invert", 3] < memory["ours, auto", 3] <= AUTO_UNITS
    for row in found["plans"]:
        assert row["planned_over_measured"] == pytest.approx(1, abs=0.1)
    for row in found["losses"]:
        if row["dtype"] == "float32":
            assert (row["memory"] < 3) == (row["loss"] == "ours, chunked")
    convolution = next(row for row in found["memory"] if row["network"] == "DynUNet")
    assert convolution["kmac_per_voxel"] == pytest.approx(2 * 27 / 1e3)
    assert convolution["inference_bytes_per_voxel"] == 12
    assert found["resampling"][-1]["backward_milliseconds"] is None
    assert imread(tmp_path / "new" / "benchmark.png").std() > 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_more_memory_takes_less_time_and_gradients_have_errors(tmp_path: Path) -> None:
    result = benchmark(tmp_path, "--section", "budgets", "--section", "gradient_errors")
    assert result.exit_code == 0, result.output
    found = sections_of(tmp_path)
    for dtype in ("float32", "bf16 autocast"):
        bytes_per_voxel = [row["training_bytes_per_voxel"] for row in found["budgets"] if row["dtype"] == dtype]
        assert bytes_per_voxel == sorted(bytes_per_voxel)
    assert [found["budgets"][place]["activations"] for place in (0, -1)] == ["invert", "store"]
    assert len(found["gradient_errors"]) > 2


def section_of(*jobs: Job, needs_gpu: bool = False) -> Section:
    return Section("made", "A table", (("value", "value", str),), lambda settings: iter(jobs), needs_gpu)


def test_what_is_saved_is_kept_and_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure(name: str, error: Exception | None = None) -> list[Row]:
        calls.append(name)
        if error is not None:
            raise error
        return [{"value": 2.5}]

    def interrupted() -> list[Row]:
        saved = sections_of(tmp_path)["made"]
        assert saved == [{"job": "first", "value": 2.5}, {"job": "second", "failed": "ValueError: no [luck]"}]
        raise KeyboardInterrupt

    first = Job("first", lambda: measure("first"))
    second = Job("second", lambda: measure("second", ValueError("no [luck]\nat all")))
    monkeypatch.setitem(SECTIONS, "made", section_of(first, second, Job("third", interrupted)))
    assert benchmark(tmp_path, "--section", "made").exit_code != 0
    assert calls == ["first", "second"]

    left_out = Job("third", lambda: measure("third", SkippedError("needs luck")))
    monkeypatch.setitem(SECTIONS, "made", section_of(first, second, left_out))
    result = benchmark(tmp_path, "--section", "made")
    assert calls == ["first", "second", "second", "third"]
    assert result.exit_code == 1
    assert "made, third: skipped, needs luck" in result.stdout
    assert "Error: made, second: ValueError: no [luck]" in result.stderr

    monkeypatch.setitem(SECTIONS, "made", section_of(first, Job("second", lambda: measure("second"))))
    assert benchmark(tmp_path, "--section", "made").exit_code == 0
    assert calls[4:] == ["second"]
    assert benchmark(tmp_path, "--section", "made", "--overwrite").exit_code == 0
    assert calls[5:] == ["first", "second"]


def test_when_the_time_is_over_nothing_new_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def measure(number: int) -> list[Row]:
        done.append(number)
        time.sleep(0.4)
        return [{"value": number}]

    monkeypatch.setitem(SECTIONS, "made", section_of(*(Job(str(n), partial(measure, n)) for n in range(5))))
    result = benchmark(tmp_path, "--section", "made", "--section", "losses", "--minutes", "0.01")
    assert result.exit_code == 0
    assert "0.01 minutes are over. The same command goes on from here." in result.output
    assert 1 <= len(done) <= 3
    assert "losses" not in sections_of(tmp_path)


@pytest.mark.usefixtures("small")
def test_results_from_elsewhere_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "made", section_of(Job("only", lambda: [{"value": 1}])))
    file = tmp_path / "benchmark.json"
    assert benchmark(tmp_path, "--section", "made").exit_code == 0
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "device": "other", "sections": {"losses": []}}))
    result = benchmark(tmp_path, "--section", "made")
    assert result.exit_code == 2
    assert "its results come from another device. Pass --overwrite" in result.stderr
    assert benchmark(tmp_path, "--section", "made", "--overwrite").exit_code == 0
    assert json.loads(file.read_text()) == found
    changed = {**found, "code": {"made": "other"}, "sections": {"made": [{"job": "only", "value": 0}]}}
    file.write_text(json.dumps(changed))
    assert "made: kept, though its code has changed" in benchmark(tmp_path, "--section", "losses").output
    assert sections_of(tmp_path)["made"] == changed["sections"]["made"]
    assert benchmark(tmp_path, "--section", "made").exit_code == 0
    assert sections_of(tmp_path)["made"] == found["sections"]["made"]
    file.write_text("[]")
    result = benchmark(tmp_path, "--section", "made")
    assert result.exit_code == 2
    assert "holds no results of a benchmark" in result.stderr


def test_sections_for_a_gpu_and_unknown_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "made", section_of(needs_gpu=True))
    assert "made: left out, needs a GPU" in benchmark(tmp_path, "--section", "made").output
    result = benchmark(tmp_path, "--section", "unknown")
    assert result.exit_code == 2
    assert "--section unknown: not one of memory, " in result.stderr


def test_memory_that_the_profiler_sees() -> None:
    def action() -> None:
        x = torch.zeros(1000)
        y = x + 1
        del x
        (y + 1).sum()

    assert 8000 <= allocated_on_cpu(action) < 8300


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["benchmark", "--device", "cuda:99", "--output", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "--device cuda:99: not available here" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (31, 0), (32, 32), (100, 96), (512, 512), (9999, 512)])
def test_bisection(limit: int, found: int) -> None:
    assert largest(lambda size: size <= limit, limit=512) == found


class Failing(nn.Module):
    def forward(self, _: torch.Tensor) -> None:
        raise RuntimeError("no compiler\nhere")


def test_a_compiler_that_is_missing_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(compiled, "_compiled", lambda net: (Failing(), "branches"))
    for name in list(EQUAL_COST):
        monkeypatch.setitem(EQUAL_COST, name, lambda: nn.Conv3d(1, 2, 3, padding=1))
    result = benchmark(tmp_path, "--section", "compiled")
    assert result.exit_code == 0
    assert "torch.compile raises RuntimeError: no compiler" in result.output


@pytest.mark.slow
def test_exactness_on_the_cpu() -> None:
    jobs = SECTIONS["exactness"].jobs(Settings(CPU, TINY))
    found = {(row["dtype"], row["network"]): row for job in jobs for row in job.measure()}
    assert len(found) == 4
    for (_, network), row in found.items():
        assert row["stored_repeats"]
        assert row["equal"] == (row["difference"] == 0) == (network == "exact")


@pytest.mark.parametrize("name", [MONAI, BUFFERED, OURS])
def test_a_segmentation_is_measured(name: str) -> None:
    found = measure_here(name, 3, (24, 20, 30), window=16, rounds=2)
    assert len(found["cpu_seconds"]) == len(found["seconds"]) == 2
    assert 0 <= found["bytes"] < found["interpreter_bytes"]


def test_the_figure_of_a_gpu_shows_the_bytes_of_its_table() -> None:
    """Live bytes count what `save_on_cpu` moves to the host, too."""
    rows = [
        {
            "network": name,
            "dtype": "float32",
            "training_bytes_per_voxel": 2933.0,
            "training_allocated_per_voxel": 1029.0,
        }
        for name in ("DynUNet", "DynUNet, save_on_cpu")
    ]
    axes = Figure().subplots()
    _memory(rows, axes)
    assert [bar.get_width() for bar in axes.patches] == [1029, 1029]


def test_the_figure_of_segmentations(tmp_path: Path) -> None:
    rows = [
        {"job": name, "inferer": name, "classes": classes, "length": length, "mebibytes": classes * 9.0}
        | {"image": f"8 x 8 x {length}", "image_and_labels_mebibytes": length / 9}
        for name in (MONAI, OURS)
        for classes, length in ((8, 16), (LONG, 16), (LONG, 32))
    ]
    place, said = tmp_path / "found.json", {"device": "", "versions": {"torch": torch.__version__}, "date": ""}
    write_json({"sections": {"inference": rows}, "sizes": dataclasses.asdict(TINY), **said}, place)
    assert draw(place, tmp_path / "found.png")
    assert imread(tmp_path / "found.png").std() > 0.05


@pytest.mark.slow
def test_segmentations_beside_each_other() -> None:
    settings = Settings(CPU, dataclasses.replace(TINY, memory_size=96))
    rows = [row for job in SECTIONS["inference"].jobs(settings) for row in job.measure()]
    memory = {(row["inferer"], row["classes"], row["image"]): row["mebibytes"] for row in rows}
    assert memory[OURS, 118, "96 x 96 x 192"] < 0.3 * memory[MONAI, 118, "96 x 96 x 192"]
    assert len(rows) == 15
    held = [row["mebibytes"] - row["image_and_labels_mebibytes"] for row in rows if row["classes"] == LONG]
    assert held[-1] < 1.3 * held[2]  # ours, four times as long
    assert held[-3] > 2.5 * held[0]  # MONAI's


@pytest.mark.long
def test_bundles_segment_images_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2**20)
    jobs = {job.name: job for job in SECTIONS["bundles"].jobs(Settings(CPU, dataclasses.replace(TINY, time_size=32)))}
    assert len(jobs) == 3
    (row,) = jobs["iunet_headneck_ct_segmentation"].measure()
    assert (row["image"], row["mebibytes"]) == ("32 x 32 x 32", 0)
    assert row["seconds"].median > 0
    assert bundles._image("iunet_brain_mri_segmentation", 32).shape == (99, 117, 95)


@pytest.mark.gpu
def test_all_sections_on_a_gpu(tmp_path: Path) -> None:
    result = benchmark(tmp_path, "--device", "cuda", "--peers")
    assert result.exit_code == 0, result.output
    found = sections_of(tmp_path)
    assert set(found) == set(SECTIONS)
    cubes = {(row["network"], row["dtype"]): row["largest_cube"] for row in found["largest_cubes"]}
    assert cubes["SegIUNet", "bf16 autocast"] > cubes["DynUNet", "bf16 autocast"] > 0


@pytest.mark.gpu
def test_a_whole_volume_is_as_planned(tmp_path: Path) -> None:
    words = ["benchmark", "--device", "cuda", "--section", "whole_volume", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    fitting = [row for row in sections_of(tmp_path)["whole_volume"] if row.get("fits")]
    assert fitting
    for row in fitting:
        assert row["planned_over_allocated"] == pytest.approx(1, abs=0.15)


@pytest.mark.long
def test_the_memory_of_a_process_is_not_that_of_the_one_that_has_started_it() -> None:
    ballast = torch.ones(2**28)  # 1 GiB, more than the process that measures will have
    found = inference._in_a_process(name=OURS, classes=3, size=[24, 20, 30], window=16)
    assert 0 < found["bytes"] < found["interpreter_bytes"] < ballast.nbytes
