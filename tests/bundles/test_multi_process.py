"""Bundles in several processes: as one process, but for the time."""

from __future__ import annotations

import csv
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_iunet import SegIUNet
from tests.bundles.helpers import launch, run
from tests.bundles.made_data import HIPPOCAMPUS as BUNDLE
from tests.bundles.made_data import make_hippocampus_data

SMALL: dict[str, Any] = {"network_def__channels": [4, 8], "network_def__couplings": 1, "amp": False}


def torchrun() -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="these processes would share a GPU")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=2, validation=3)
    recipe = {
        **SMALL,
        "dataset_dir": data,
        "max_epochs": 2,
        "val_interval": 2,
        "roi_size": [56, 56, 56],
        "output_dir": tmp_path / "log",
        "train__random_transforms": "$[monai.transforms.SpatialPadd(['image', 'label'], @roi_size)]",
    }
    run(BUNDLE, "train.json", **recipe, batch_size=2, ckpt_dir=tmp_path / "one")
    launch(torchrun(), BUNDLE, "multi_gpu_train.json", **recipe, batch_size=1, ckpt_dir=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    assert one["epoch"] == two["epoch"] == 2
    for name, weight in one["network"].items():
        torch.testing.assert_close(two["network"][name], weight, rtol=1e-3, atol=1e-5)
    assert one["best"] == pytest.approx(two["best"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="these processes would share a GPU")
def test_two_processes_evaluate_and_segment_as_one(tmp_path: Path) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=2, validation=3)
    weights = tmp_path / "model.pt"
    torch.save(SegIUNet(3, 1, 3, SMALL["network_def__channels"], couplings=1).state_dict(), weights)
    options = {**SMALL, "dataset_dir": data, "checkpoint": weights}
    run(BUNDLE, "evaluate.json", **options, output_dir=tmp_path / "one evaluates")
    launch(torchrun(), BUNDLE, "multi_gpu_evaluate.json", **options, output_dir=tmp_path / "two evaluate")
    tables = [(tmp_path / name / "cases.csv").read_text() for name in ("one evaluates", "two evaluate")]
    assert tables[0] == tables[1]
    assert len(list(csv.DictReader(tables[0].splitlines()))) == 2 * 3

    images = data / "imagesTr"
    options |= {"dataset_dir": images, "output_dir": tmp_path / "out"}
    launch(torchrun(), BUNDLE, "multi_gpu_inference.json", **options)
    assert len(list((tmp_path / "out").iterdir())) == 5
