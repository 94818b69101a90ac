"""`monai-iunet plan`, as a person calls it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, SegIUNet, bundle_folder, plan_training
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.cli import app
from tests.bundles.made_data import SMALL_TASK


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(SMALL_TASK, tmp_path / "bundle")


def plan(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def row(printed: str, name: str) -> list[str]:
    line = next(line for line in printed.splitlines() if re.match(rf"\W*{re.escape(name)}\W", line))
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_the_parts_of_a_step_are_shown(bundle: Path) -> None:
    code, printed = plan("--bundle", bundle)
    assert code == 0
    batch = json.loads((bundle / "configs" / "train.json").read_text())["batch_size"]
    assert f"One step, {batch} x 24 x 32 x 24 voxels, float32" in printed
    network = SegIUNet(3, 1, 3, SMALL_TASK.channels, couplings=SMALL_TASK.couplings)
    expected = plan_training(network, (24, 32, 24), batch_size=batch)
    assert row(printed, "parameters")[0] == row(printed, "gradients")[1] == f"{expected.parameters / 2**20:.1f}"
    rebuilt, kept, stored = map(float, row(printed, "activations"))
    assert rebuilt < kept < stored


@pytest.mark.slow
def test_what_fits_is_shown(bundle: Path) -> None:
    code, printed = plan("--bundle", bundle, "--gpu-memory", "60 MiB", "--patch", "16,16,16", "--batch-size", 1)
    assert code == 0
    assert "What fits in 0.1 GiB, nine tenths of the GPU, batch 1, float32" in printed
    patches = {}
    for activations in ("invert", "convolutions", "store"):
        size, peak, couplings = row(printed.split("What fits")[1], activations)
        patches[activations] = [int(extent) for extent in size.split(" x ")]
        assert float(peak) <= 54
        assert couplings == "16 or more" or 1 <= int(couplings) < 16
    assert patches["store"][0] < patches["convolutions"][0] <= patches["invert"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "much"], "--gpu-memory much"),
        (["--gpu-memory", "100 KiB"], "Use fewer channels"),
        (["--gpu-memory", "24"], "'24' is a number of bytes. Name the unit, as in \"24 GiB\""),
        (["--dtype", "int8"], "must be one of float32, bfloat16, float16"),
        (["--patch", "16,16"], "three numbers"),
        (["--patch", ""], "three numbers"),
        (["--patch", "-16,16,16"], "Error: --patch -16 x 16 x 16: must be positive"),
    ],
)
def test_what_cannot_be_planned_is_said(bundle: Path, options: list[str], message: str) -> None:
    code, printed = plan("--bundle", bundle, *options)
    assert code == 2
    assert message in printed
    assert ("One step" in printed) == (message == "Use fewer channels")  # what cannot be read is refused at once


def test_a_folder_that_is_no_bundle_is_said(tmp_path: Path) -> None:
    assert "Name the folder of a bundle" in plan("--bundle", tmp_path)[1]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text('{"roi_size": [16, 16, 16], "batch_size": 1}')
    code, printed = plan("--bundle", tmp_path)
    assert code == 2
    assert "must have network_def, roi_size and batch_size" in printed


def test_the_segmentation_of_an_image_is_planned() -> None:
    code, printed = plan("--bundle", "headneck", "--image", "512,512,600", "--spacing", "1,1,1", "--measure")
    assert code == 0
    cells = {line.split("│")[2].strip(): float(line.split("│")[1]) for line in printed.splitlines() if "│" in line}
    assert cells["image, 2 bytes per voxel"] == 2 * cells["labels"] == 300
    assert cells["a slab of the logits, 132 x 132 x 241 voxels in all"] == pytest.approx(
        4 * 132 * 132 * (10 * 48 + 8) / 2**20, abs=1
    )
    peak = cells["peak, beside Python and PyTorch; the last two not at once"]
    assert 600 <= peak < 1000
    # On the grid that the bundle resamples to, 5 x 5 x 10 windows at half overlap, of image and mirror image.
    assert re.search(r"400 windows of [\d.]+ s, \d+ s in all", printed)


def test_the_time_of_a_network_of_several_channels_is_told(tmp_path: Path) -> None:
    folder = write_bundle(replace(SMALL_TASK, in_channels=2), tmp_path / "bundle")
    network = SegIUNet(3, 2, 3, SMALL_TASK.channels, couplings=SMALL_TASK.couplings)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    code, printed = plan("--bundle", folder, "--image", "32,32,32", "--measure")
    assert code == 0, printed
    assert re.search(r"windows of \S+ s", printed)


def test_what_is_padded_before_the_network_is_planned() -> None:
    """An image may be smaller than what the network divides by, such as one slab of a head."""
    code, printed = plan("--bundle", "brain", "--image", "64,64,9")
    assert code == 0
    assert "a slab of the logits, 32 x 32 x 16 voxels in all" in " ".join(printed.split())


def test_a_longer_image_takes_no_more_but_for_image_and_labels() -> None:
    segmenter = BundleSegmenter(bundle_folder("headneck"), "cpu")
    short, long = (segmenter.plan((256, 256, extent), (2.0, 2.0, 2.0)) for extent in (300, 900))
    assert long.peak - short.peak == 3 * 256 * 256 * 600
    assert (short.preprocessed, long.slab) == (0, short.slab)
    hippocampus = BundleSegmenter(bundle_folder("hippocampus"), "cpu").plan((40, 50, 60), (1.0, 1.0, 1.0), 4)
    assert hippocampus.preprocessed == hippocampus.image == 4 * 40 * 50 * 60


@pytest.mark.parametrize(
    ("size", "spacing", "said"),
    [
        ("0,5,5", "1,1,1", "must be positive"),
        ("9,5,5", "nan,1,1", "must be positive, and numbers that are finite"),
        ("9,5,5", "1,inf,1", "must be positive, and numbers that are finite"),
        ("99999999,99999999,99999999", "1,1,1", "more voxels than any image has"),
    ],
)
def test_sizes_must_be_those_of_an_image(size: str, spacing: str, said: str) -> None:
    code, printed = plan("--bundle", "headneck", "--image", size, "--spacing", spacing)
    assert code == 2
    assert said in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "64,64,64", "--gpu-memory", "24 GiB"], "--gpu-memory: of a training, not of a segmentation"),
        (["--image", "64,64,64", "--patch", "16,16,16", "--batch-size", "1"], "--patch, --batch-size: of a training"),
        (["--image", "64,64,64", "--dtype", "bfloat16"], "--dtype: of a training"),
        (["--measure"], "--measure: of a segmentation, not of a training. Pass --image"),
        (["--spacing", "1,1,3"], "--spacing: of a segmentation"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(options: list[str], said: str) -> None:
    code, printed = plan("--bundle", "hippocampus", *options)
    assert code == 2
    assert said in " ".join(printed.split())


def test_a_batch_that_cannot_be_counted_is_one_line(bundle: Path) -> None:
    code, printed = plan("--bundle", bundle, "--batch-size", 10**20)
    assert code == 2
    (error,) = (line for line in printed.splitlines() if "a folder, whose configs" not in line)
    assert "cannot be planned" in error
