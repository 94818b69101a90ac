"""A bundle for a task of one's own, from the template."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import verify_metadata
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, InputError, Task, read_image
from monai_iunet.bundling import new_bundle
from monai_iunet.cli import app
from monai_iunet.training.evaluation import compare
from tests.bundles.helpers import SCHEMA, launch, losses, run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

OPTIONS = {"--name": "my_task", "--modality": "MR", "--classes": "front,back", "--roi-size": "24,32,24"}


def init(folder: Path, **changes: str) -> tuple[int, str]:
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [word for option in options.items() for word in option]
    result = CliRunner().invoke(app, ["init-bundle", *words, "--output", str(folder)])
    return result.exit_code, result.output


@pytest.mark.long
def test_a_new_bundle_trains_evaluates_and_segments(tmp_path: Path) -> None:
    code, output = init(tmp_path)
    assert code == 0, output
    bundle = tmp_path / "my_task"
    assert output.strip() == str(bundle)
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json", "configs/logging.conf"):
        assert (bundle / name).stat().st_size > 0, name
    verify_metadata(bundle / "configs" / "metadata.json", str(SCHEMA))
    data = make_hippocampus_data(tmp_path / "data", training=5, validation=0)  # without a section "validation"
    small = {"network_def__channels": [8, 16], "network_def__couplings": 1, "dataset_dir": data}
    log = launch(
        [],
        bundle,
        "train.json",
        **small,
        max_epochs=8,
        val_interval=4,
        batch_size=1,
        learning_rate=0.02,
        roi_size=[32, 48, 32],
        spacing=[1.2, 1.1, 1.3],
        intensity_percentiles=[2, 98],
    )
    assert "of its 5 cases, 1 are for validation, every 5th patient by name" in log
    found = losses(bundle / "train")
    assert np.mean(found[-4:]) < np.mean(found[:4])
    assert "trained with" not in launch([], bundle, "evaluate.json", **small)
    with (bundle / "eval" / "cases.csv").open() as file:
        dice = {row["structure"]: float(row["dice"]) for row in csv.DictReader(file)}
    # What the training was given is used, and the same everywhere, though no command was told of it.
    image = data / "imagesTr" / "made_0.nii.gz"
    run(bundle, "inference.json", **{**small, "dataset_dir": image})
    labels = nibabel.load(bundle / "eval" / "made_0_seg.nii.gz")
    for config in (bundle / "configs").glob("inference.json"):
        content = json.loads(config.read_text())
        content["network_def"] |= {"channels": [8, 16], "couplings": 1}
        config.write_text(json.dumps(content))
    segmenter = BundleSegmenter(bundle, "cpu")
    assert tuple(segmenter.windows.roi_size) == (32, 48, 32)
    np.testing.assert_array_equal(labels.get_fdata(), segmenter.segment(read_image(image)).labels)
    truth = torch.from_numpy(nibabel.load(data / "labelsTr" / "made_0.nii.gz").get_fdata())
    measured = compare(torch.from_numpy(labels.get_fdata()), truth, (1, 1, 1), list(dice))
    assert {row["structure"]: row["dice"] for row in measured} == pytest.approx(dice, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "letters, digits"),
        ({"modality": "PET"}, "must be MR or CT"),
        ({"classes": "a,a"}, "differ"),
        ({"classes": "a,"}, "differ"),
        ({"classes": "background,liver"}, "the background is label 0 by itself"),
        ({"classes": "a,@network"}, "no name may begin with"),
        ({"classes": "a,#2"}, "no name may begin with"),
        ({"spacing": "1,2"}, "three numbers"),
        ({"classes": ",".join(map(str, range(256)))}, "255 are the most"),
        ({"spacing": "1,2,-1"}, "must be three positive numbers"),
        ({"spacing": "1,2,nan"}, "must be three positive numbers"),
        ({"spacing": "1,2,inf"}, "must be three positive numbers"),
        ({"roi_size": "30,30,30"}, "multiples of 8"),
    ],
)
def test_what_does_not_describe_a_task_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    code, output = init(tmp_path / "new", **changes)
    assert code == 2
    assert message in output
    assert not (tmp_path / "new").exists()


def test_contrasts_are_varied_if_that_is_asked_for(tmp_path: Path) -> None:
    words = [word for option in OPTIONS.items() for word in option]
    for number, flag in enumerate(([], ["--any-contrast"])):
        result = CliRunner().invoke(app, ["init-bundle", *words, *flag, "--output", str(tmp_path / str(number))])
        assert result.exit_code == 0, result.output
        config = (tmp_path / str(number) / "my_task" / "configs" / "train.json").read_text()
        assert ("monai_iunet.RandIntensityCurved" in config) == bool(flag)


def test_a_ct_has_one_contrast() -> None:
    with pytest.raises(InputError, match="modality CT"):
        Task("name", "CT", ("a",), "data", (1.0, 1.0, 1.0), (16, 16, 16), any_contrast=True)


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "my_task").mkdir()
    (tmp_path / "my_task" / "notes.txt").write_text("mine")
    code, output = init(tmp_path)
    assert code == 2
    assert "not an empty folder" in output
    assert [path.name for path in (tmp_path / "my_task").iterdir()] == ["notes.txt"]


def test_a_full_disk_gets_no_part_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = new_bundle.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "logging.conf":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(new_bundle, "write_text", full)
        code, output = init(tmp_path)
    assert (code, "Make room there, and call it again" in output) == (1, True), output
    assert list(tmp_path.iterdir()) == []
    assert init(tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing": (1.0, 1.0)}, "three positive numbers"),
        ({"classes": ()}, "must be names"),
        ({"window": (5.0, 5.0)}, "a smaller and a larger intensity"),
        ({"window": (math.nan, 5.0)}, "a smaller and a larger intensity"),
        ({"max_epochs": 0}, "max_epochs 0: must be at least 1"),
        ({"batch_size": -1}, "batch_size -1: must be at least 1"),
        ({"val_interval": 0}, "val_interval 0: must be at least 1"),
        ({"in_channels": 0}, "in_channels 0: must be at least 1"),
        ({"members": 0}, "members 0: must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate -1.0: must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate nan: must be a positive number"),
        ({"max_seconds": 0.0}, "max_seconds 0.0: must be a positive number"),
        ({"fold": 5}, "one from 0 to 4 is needed"),
        ({"label_values": (1, 1)}, "one for each of 2 classes"),
        ({"label_values": (0, 1)}, "none twice or 0"),
        ({"label_values": (1, 2, 3)}, "one for each of 2 classes"),
        ({"mirrored": ((1, 3),)}, "must be labels from 1 to 2"),
        ({"largest_component": (3,)}, "must be labels from 1 to 2"),
    ],
    ids=str,
)
def test_numbers_that_describe_no_task_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL_TASK, **changes)


@pytest.mark.parametrize("files", [{"left_out": ("@a.nii.gz",)}, {"judges": ("b.nii.gz", "$a.nii.gz")}])
def test_files_that_configs_would_evaluate_are_refused(files: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a\.nii\.gz: the name of an image may not begin with"):
        replace(SMALL_TASK, **files)
