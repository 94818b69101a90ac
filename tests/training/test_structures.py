"""Data sets whose labels are not the structures of a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monai_iunet import InputError, check_structures
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.bundling.task import HEADNECK, HIPPOCAMPUS
from monai_iunet.cli import app
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data


def describe(folder: Path, labels: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": []}))
    return folder


@pytest.mark.parametrize(
    ("structures", "values", "labels"),
    [
        (HIPPOCAMPUS.classes, None, {"0": "background", "1": "Anterior", "2": "Posterior"}),  # as the Decathlon
        (HEADNECK.classes, None, {"background": 0, "SpinalCord": 2, "LeftParotid": 4}),  # as OpenKBP
        (("liver", "liver tumor"), None, {"1": "liver", "2": "liver tumor"}),
        (("liver", "spleen"), (3, 7), {"3": "Liver", "7": "Spleen"}),
        (("liver",), None, {}),
        (("liver", "spleen"), None, {"0": "0", "1": "1", "2": "2"}),
    ],
)
def test_names_that_mean_the_same_are_taken(
    structures: tuple[str, ...], values: Any, labels: dict[str, Any], tmp_path: Path
) -> None:
    check_structures(describe(tmp_path, labels), structures, values)


@pytest.mark.parametrize(
    ("structures", "values", "labels", "message"),
    [
        (HIPPOCAMPUS.classes, None, {"1": "Posterior", "2": "Anterior"}, "label 1 'Posterior', the bundle finds 'ant"),
        (HIPPOCAMPUS.classes, None, {"1": "hippocampus"}, "names label 1 'hippocampus'"),
        (HEADNECK.classes, None, {"3": "LeftParotid", "4": "RightParotid"}, "finds 'right parotid' there"),
        (("liver", "liver tumor"), None, {"1": "liver tumor", "2": "liver"}, "names label 1 'liver tumor'"),
        (("liver", "spleen"), (3, 7), {"1": "liver", "2": "spleen"}, "finds nothing there. .* 3 liver, 7 spleen;"),
        (("liver",), None, {"1": "liver", "2": "tumor"}, "names label 2 'tumor', the bundle finds nothing"),
    ],
)
def test_names_of_others_are_refused(
    structures: tuple[str, ...], values: Any, labels: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check_structures(describe(tmp_path, labels), structures, values)


@pytest.mark.parametrize("command", ["quality", "compare", "evaluate"])
def test_commands_refuse_a_data_set_of_others_before_they_begin(command: str, tmp_path: Path) -> None:
    data, bundle = make_hippocampus_data(tmp_path / "data"), write_bundle(SMALL_TASK, tmp_path / "bundle")
    (bundle / "models" / "model.pt").touch()
    path = data / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": {"1": "front", "2": "left"}}))
    message = "names label 2 'left', the bundle finds 'back' there"
    if command == "evaluate":
        with pytest.raises(RuntimeError) as error:
            run(bundle, "evaluate.json", dataset_dir=data)
        assert message in str(error.value.__cause__)
        return
    words = [command, "--bundle", bundle, "--dataset-dir", data]
    words += ["--max-epochs", 1, "--output", tmp_path / "out"] if command == "compare" else []
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_comparison_refuses_labels_that_are_no_classes_before_it_begins(tmp_path: Path) -> None:
    data = make_hippocampus_data(tmp_path / "data")
    bundle = write_bundle(replace(SMALL_TASK, classes=("front",)), tmp_path / "bundle")
    words = ["compare", "--bundle", bundle, "--dataset-dir", data, "--max-epochs", 1, "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, "has the values 2, labels are 0 to 1" in result.stderr) == (2, True), result.output
    assert not (tmp_path / "out").exists()
