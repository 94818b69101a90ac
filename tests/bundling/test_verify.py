"""Bundles are checked as reviewers and other programs check them; each check can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_iunet import Task, verify_bundle, write_bundle
from monai_iunet.bundling import verify
from tests.bundles.helpers import BUNDLES, TRAINED
from tests.bundles.made_data import HIPPOCAMPUS
from tests.test_cli import call


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(
        HIPPOCAMPUS, tmp_path_factory.mktemp("bundle") / "mine", ignore=shutil.ignore_patterns("eval", "train")
    )


def problems(folder: Path) -> dict[str, str]:
    return {check.name: check.problem for check in verify_bundle(folder) if check.problem}


@pytest.mark.parametrize("bundle", [BUNDLES / task.name for task in TRAINED], ids=lambda path: path.name)
def test_nothing_is_found_in_our_bundles(bundle: Path, tmp_path: Path) -> None:
    """Also away from the repository, under another name, and read-only."""
    folder = shutil.copytree(bundle, tmp_path / "renamed", ignore=shutil.ignore_patterns("eval", "train"))
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert problems(folder) == {}
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_new_bundle_lacks_what_only_its_author_knows(modality: Any, tmp_path: Path) -> None:
    task = Task(
        "my_task",
        modality,
        ("liver", "tumor"),
        "data",
        (1.5, 1.5, 2.0),
        (32, 32, 32),
        channels=(8, 16),
        couplings=(1, 1),
    )
    found = problems(write_bundle(task, tmp_path / "my_task"))
    without_weights = {"the weights fit the network", "monai-iunet segment can open it"}
    assert set(found) == {"files", "sections of docs/README.md", *without_weights}
    assert found["files"] == "missing: models/model.pt"
    assert found["sections of docs/README.md"] == "4 places to complete"
    assert {found[name] for name in without_weights} == {"there are no weights yet"}


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "configs" / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return write


def readme(old: str, new: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "docs" / "README.md"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return write


def large_file(folder: Path) -> None:
    with (folder / "large.bin").open("wb") as file:
        file.truncate(26_000_000)


def other_weights(folder: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, folder / "models" / "model.pt")


def infinite_weights(folder: Path) -> None:
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    state["head.bias"][0] = float("inf")
    torch.save(state, folder / "models" / "model.pt")


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "license": (lambda folder: (folder / "LICENSE").unlink(), "files", "missing: LICENSE"),
    "large file": (large_file, "size of files", "large.bin"),
    "version": (edit("metadata.json", lambda data: {**data, "version": "9"}), "metadata.json", "not in the changelog"),
    "section": (readme("## Citation", "## Thanks"), "sections of docs/README.md", "missing: citation"),
    "link": (readme("(comparison.json)", "(../../other.json)"), "links of docs/README.md", "../../other.json"),
    "path": (
        edit("train.json", lambda data: {**data, "dataset_dir": "/home/me/data"}),
        "no paths of a machine in configs",
        "/home/me/data",
    ),
    "entry": (
        edit("inference.json", lambda data: {key: data[key] for key in data if key != "inferer"}),
        "entries of inference.json",
        "missing: inferer",
    ),
    "overlay": (
        edit("evaluate.json", lambda data: {**data, "deterministic_transforms": {"_target_": "Compose"}}),
        "evaluate.json over train.json",
        "RuntimeError: Failed to evaluate",
    ),
    "lambda": (
        edit(
            "inference.json",
            lambda data: {
                **data,
                "preprocessing": {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image"},
            },
        ),
        "transforms can be sent to workers",
        "PicklingError",
    ),
    "weights": (other_weights, "the weights fit the network", "RuntimeError"),
    "infinite": (infinite_weights, "the weights fit the network", "NaN or infinite: head.bias"),
    "names": (
        edit("metadata.json", lambda data: json.loads(json.dumps(data).replace('"2": ', '"3": '))),
        "monai-iunet segment can open it",
        "channel_def must have the numbers 0, 1, 2, ...",
    ),
    "quality": (
        lambda folder: [path.write_text("{}") for path in (folder / "models").glob("quality.json")],
        "monai-iunet segment can open it",
        "not a quality model of this bundle",
    ),
    "classes": (
        edit(
            "metadata.json", lambda data: json.loads(json.dumps(data).replace('"num_channels": 3', '"num_channels": 4'))
        ),
        "the network gives the classes of the metadata",
        "the metadata say (1, 4, ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_can_fail(name: str, pristine: Path, tmp_path: Path) -> None:
    damage, check, problem = BROKEN[name]
    folder = shutil.copytree(pristine, tmp_path / "bundle")
    damage(folder)
    assert problem in verify._problem_of(verify._checks()[check], folder)


def test_the_command_prints_a_table_and_tells_by_its_exit_code(tmp_path: Path) -> None:
    code, printed, _ = call("verify-bundle", HIPPOCAMPUS)
    assert code == 0
    assert "passed" in printed
    folder = shutil.copytree(HIPPOCAMPUS, tmp_path / "bundle", ignore=shutil.ignore_patterns("eval", "train"))
    (folder / "LICENSE").unlink()
    code, printed, _ = call("verify-bundle", folder)
    assert code == 1
    assert "missing: LICENSE" in " ".join(printed.split())
    with (folder / "docs" / "README.md").open("a") as file:
        file.write("[more](gone[/mri])")
    assert "gone[/mri]" in call("verify-bundle", folder)[1]
    code, _, error = call("verify-bundle", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
