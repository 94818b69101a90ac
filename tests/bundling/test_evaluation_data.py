"""Folders of data sets and bundles whose names mean something to MONAI's configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from monai_iunet import BundleSegmenter, InputError, SegIUNet
from monai_iunet.bundling.evaluation_data import bundle_cases
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.fitting import fit as fitting
from monai_iunet.fitting.fit import fit
from monai_iunet.io.bundles import parsed_content, read_config
from monai_iunet.planning.budget import for_a_step
from monai_iunet.training.record import write_record
from tests.bundles.made_data import SMALL_TASK
from tests.fitting.made_sets import make_set


def unnamed_set(folder: str) -> Path:
    """A data set that no dataset.json describes, by its path from here."""
    data = make_set(Path(folder), shape=(12, 12, 12))
    (data / "dataset.json").unlink()
    return data


@pytest.mark.parametrize("sign", "$@%")
def test_a_folder_may_begin_with_what_monai_evaluates(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, bundle = unnamed_set(f"{sign}data"), write_bundle(SMALL_TASK, Path(f"{sign}bundle"))
    assert sum(map(len, bundle_cases(bundle, data).values())) == 6
    network = SegIUNet(3, 1, 3, SMALL_TASK.channels, couplings=SMALL_TASK.couplings)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    assert BundleSegmenter(bundle, "cpu").channels == 1


def test_a_fit_may_be_in_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("monai_iunet.fitting.planner.CHANNELS", (8, 16))
    monkeypatch.setattr("monai_iunet.fitting.limits.measure_speed", lambda *_: 1e6)
    data = unnamed_set("$data")
    output = fit(data, "@fit", gpu_memory="1 GiB", device="cpu", fold=0, plan_only=True)
    run = fitting._Fit(data, output, fitting.FitOptions(for_a_step("1 GiB"), device="cpu", fold=0), Console(quiet=True))
    run.prepare()
    assert len(parsed_content(run._parser("train.json", 0), "datalist")["training"]) == 4


def test_weights_are_evaluated_on_the_fold_that_they_were_not_trained_on(tmp_path: Path) -> None:
    data, bundle = unnamed_set(str(tmp_path / "data")), write_bundle(SMALL_TASK, tmp_path / "bundle")
    parser = read_config(bundle / "configs" / "train.json")
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(data), "check_data": False, "fold": 2, "folds": 3})
    trained = parsed_content(parser, "datalist")
    record = parsed_content(parser, "checkpoints#record")
    assert bundle_cases(bundle, data) != trained
    write_record(record, bundle / "models" / "model.pt")
    assert bundle_cases(bundle, data) == trained


def test_a_bundle_without_an_evaluation_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.json: no such file"):
        bundle_cases(tmp_path, tmp_path)
