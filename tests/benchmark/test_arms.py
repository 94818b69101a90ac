"""Whole images beside patches: the same time for all, memory that is counted, and nothing done twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from monai.networks.blocks.dynunet_block import UnetResBlock
from typer.testing import CliRunner

from monai_iunet import BundleSegmenter, InputError, bundle_folder, fit, read_image
from monai_iunet.benchmark import arms, comparison
from monai_iunet.benchmark.arms import arms_as_markdown, compare_arms
from monai_iunet.benchmark.arms_figure import draw_arms
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.bundling.task import HIPPOCAMPUS
from monai_iunet.cli import app
from monai_iunet.fitting.plan import read_plan
from monai_iunet.io.bundles import read_config
from monai_iunet.io.files import hold_folder
from tests.bundles.helpers import run
from tests.fitting.made_sets import make_set


@pytest.fixture(scope="module")
def plan_of_patches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and the plan of a small network for it."""
    folder = tmp_path_factory.mktemp("arms")
    data = make_set(folder / "data", shape=(32, 40, 32), count=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monai_iunet.fitting.planner.CHANNELS", (4, 8, 16))
        patch.setattr("monai_iunet.fitting.limits.measure_speed", lambda *_: 1e6)
        options: dict[str, Any] = {"roi_size": (16, 16, 16), "spacing": (1, 1, 1), "plan_only": True, "device": "cpu"}
        return data, fit(data, folder / "plan", **options)


@pytest.fixture
def planned(plan_of_patches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same, where other networks are small too, and trainings run in this process."""
    monkeypatch.setattr("monai_iunet.fitting.planner.CHANNELS", (4, 8, 16))
    small = {**arms.NETWORKS["SegResNet"], "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
    monkeypatch.setattr(arms, "NETWORKS", {"SegResNet": small})
    for module in (arms, comparison):
        monkeypatch.setattr(module, "run_config", lambda bundle, config, settings: run(bundle, config, **settings))
    return plan_of_patches


@pytest.mark.slow
def test_arms_are_trained_for_the_same_time_and_compared(planned: tuple[Path, Path], tmp_path: Path) -> None:
    data, plan = planned
    names = ("patch", "whole", "growing", "SegResNet", "residual")
    found = compare_arms(plan, data, tmp_path / "out", 0.02, names, tests=2)
    assert found == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["clock"] == "processor"
    assert len(found["test_cases"]) == 2
    trained: dict[str, Any] = found["arms"]
    assert tuple(trained) == names
    for arm in trained.values():
        assert arm["seconds"] >= 1.2
        assert arm["steps"] >= 2
        assert set(arm["dice"]) == set(arm["hausdorff95_mm"])
        assert 1 < len(arm["losses"]) <= min(40, arm["steps"])
        assert set(arm["cases"]) == set(found["test_cases"])
        assert np.mean([case["dice"] for case in arm["cases"].values()]) == pytest.approx(arm["mean_dice"], abs=1e-3)
    assert trained["whole"]["step_voxels"] == [32, 40, 32]
    assert trained["whole"]["roi_size"] == "whole"
    assert trained["growing"]["growing"] == [[16, 16, 16], [24, 28, 24]]
    # What others are allowed is what a whole image takes here.
    most = trained["whole"]["step_bytes"]
    assert trained["growing"]["step_bytes"] == most
    assert all(arm["step_bytes"] <= most for arm in trained.values())
    weights = torch.load(tmp_path / "out" / "residual" / "models" / "model_final.pt", weights_only=True)
    assert any(name.endswith(".conv1.conv.weight") for name in weights)  # of MONAI's residual block
    assert len(found["differences"]) == 10
    difference = found["differences"]["patch - whole"]["dice"]
    assert difference["mean"] == pytest.approx(trained["patch"]["mean_dice"] - trained["whole"]["mean_dice"], abs=1e-4)
    assert difference["cases"] == 2
    for name in names:
        assert f"| {name} |" in arms_as_markdown(found)
    figure = Figure()
    draw_arms(found, figure)
    assert [len(axes.lines) for axes in figure.axes] == [5, 5]
    # An arm is a bundle, whose test cases no step has seen.
    cases = {line.split(",")[0] for line in (tmp_path / "out" / "whole" / "eval" / "cases.csv").open()} - {"case"}
    assert cases == set(found["test_cases"])
    labels = BundleSegmenter(tmp_path / "out" / "SegResNet", "cpu").segment(
        read_image(data / "imagesTr/case_00.nii.gz")
    )
    assert labels.labels.shape == (32, 40, 32)

    # What is done is not done again.
    before = (tmp_path / "out" / "whole" / "models" / "model_final.pt").stat().st_mtime_ns
    assert compare_arms(plan, data, tmp_path / "out", 0.02, names, tests=2) == found
    assert (tmp_path / "out" / "whole" / "models" / "model_final.pt").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="that of another comparison"):
        compare_arms(plan, data, tmp_path / "out", 0.03, names, tests=2)


@pytest.mark.long
def test_branches_are_those_of_the_patch_but_for_their_kind(planned: tuple[Path, Path]) -> None:
    _, plan = planned
    task = replace(read_plan(plan / "docs" / "plan.json").task, channels=(4, 8), couplings=(1, 1))
    for name, step_bytes, activations in (("residual", 2**30, ("store",) * 2), ("mednext", 1, "invert")):
        arm = arms._patch_arm(task, name, step_bytes)
        assert arm.step == (task.batch_size, (16, 16, 16))
        assert arm.task == replace(task, activations=activations)
        kinds = {type(layer) for layer in arms._network(arm.task, arm.network).modules()}
        assert (UnetResBlock in kinds, torch.nn.GELU in kinds) == (name == "residual", name == "mednext")


def test_of_an_arm_that_could_not_be_written_nothing_is_left(
    planned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = planned
    task = replace(read_plan(plan / "docs" / "plan.json").task, validation_cases=True, judges=())
    arm = arms._Arm(task, None, (1, (16, 16, 16)), 1)

    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(arms, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            arms._write_arm(arm, tmp_path / "patch", ["case_00.nii.gz"], "processor", 0)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # which goes on
        arms._write_arm(arm, tmp_path / "patch", ["case_00.nii.gz"], "processor", 0)
    assert (tmp_path / "patch" / "configs" / "validation_cases.json").is_file()


def test_arms_of_other_cases_are_not_compared(
    planned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plan = shutil.copytree(planned[0], tmp_path / "data"), planned[1]

    def trained(*_: Any) -> None:
        raise RuntimeError("an arm is trained")

    monkeypatch.setattr(arms, "_plan_arms", trained)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an arm is trained"):
            compare_arms(plan, data, tmp_path / "out", 1.0, tests=2)
    label = data / "labelsTr" / "case_05.nii.gz"
    image = nibabel.load(label)
    mended = np.asarray(image.dataobj).copy()
    mended[0, 0, 0] = 1
    before = label.read_bytes()
    nibabel.save(nibabel.Nifti1Image(mended, image.affine), label)
    with pytest.raises(InputError, match="a comparison with another contents is there"):
        compare_arms(plan, data, tmp_path / "out", 1.0, tests=2)
    label.write_bytes(before)
    description = json.loads((data / "dataset.json").read_text())
    description["training"].pop()
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="a comparison with another cases and another contents is there"):
        compare_arms(plan, data, tmp_path / "out", 1.0, tests=2)


def test_two_comparisons_do_not_train_in_one_folder(
    planned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plan = planned
    monkeypatch.setattr(arms, "hold_folder", partial(hold_folder, patience=0))
    with hold_folder(tmp_path), pytest.raises(InputError, match="another process works in this folder"):
        compare_arms(plan, data, tmp_path, 1.0, tests=2)
    assert list(tmp_path.iterdir()) == []


def test_test_cases_that_are_listed_are_taken(planned: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = planned
    listed = tmp_path / "test_cases.json"
    drawn = arms._test_cases(data, listed, 2)
    assert arms._test_cases(data, listed, 5) == drawn == json.loads(listed.read_text())
    listed.write_text('["case_05.nii.gz"]')
    assert arms._test_cases(data, listed, 2) == ["case_05.nii.gz"]
    listed.write_text('["case_50.nii.gz"]')
    with pytest.raises(InputError, match=r"no image case_50\.nii\.gz"):
        arms._test_cases(data, listed, 2)
    with pytest.raises(InputError, match="--tests 6"):
        arms._test_cases(data, tmp_path / "other.json", 6)


def test_all_cases_of_a_patient_are_tested_or_trained_on() -> None:
    cases = [f"p{patient}_scan{scan}.nii.gz" for patient in range(8) for scan in range(3)]
    drawn = arms._drawn(cases, 6)
    assert len(drawn) == 6
    assert {case[:2] for case in drawn}.isdisjoint(case[:2] for case in set(cases) - set(drawn))


def test_what_a_plan_leaves_out_is_neither_trained_nor_tested_on(planned: tuple[Path, Path], tmp_path: Path) -> None:
    data, plan = planned
    listed, left_out = tmp_path / "test_cases.json", ("case_01.nii.gz", "case_05.nii.gz")
    drawn = arms._test_cases(data, listed, 3, left_out)
    assert len(drawn) == 3
    task = replace(read_plan(plan / "docs" / "plan.json").task, validation_cases=True, left_out=left_out)
    bundle = write_bundle(task, tmp_path / "bundle")
    (bundle / "configs" / "validation_cases.json").write_text(json.dumps(drawn))
    parser = read_config(bundle / "configs" / "train.json")
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(data)})
    found = {
        name: {Path(case["image"]).name for case in cases}
        for name, cases in parser.get_parsed_content("datalist").items()
    }
    assert found["validation"] == {*drawn}
    assert found["training"] == {f"case_{number:02}.nii.gz" for number in range(6)} - {*drawn, *left_out}
    listed.write_text('["case_01.nii.gz"]')
    with pytest.raises(InputError, match=r"no image case_01\.nii\.gz, or the plan leaves it out"):
        arms._test_cases(data, listed, 3, left_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_05.nii.gz", "must list file names of images, such as .*case_00"),
        ('"case_05.nii.gz"', "must list file names of images, such as .*case_00"),
        ('[{"image": "case_05.nii.gz"}]', "must list file names of images, such as .*case_00"),
        ("[]", "lists 0 of 6 cases"),
        (json.dumps([f"case_{number:02}.nii.gz" for number in range(6)]), "lists 6 of 6 cases"),
    ],
)
def test_lists_that_leave_no_comparison_are_refused(
    text: str, message: str, planned: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = planned
    (tmp_path / "test_cases.json").write_text(text)
    with pytest.raises(InputError, match=message):
        arms._test_cases(data, tmp_path / "test_cases.json", 2)


def test_a_plan_of_whole_images_has_no_patch_to_compare(planned: tuple[Path, Path], tmp_path: Path) -> None:
    data, plan = planned
    content = json.loads((plan / "docs" / "plan.json").read_text())
    content["task"]["roi_size"] = "whole"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="must be the plan of a patch"):
        compare_arms(tmp_path, data, tmp_path / "out", 1.0)


def test_images_too_large_to_be_seen_whole_are_refused_in_a_line() -> None:
    with pytest.raises(InputError, match=r"608.*2\^31.*plan the bundle with another --spacing"):
        arms._plan_arms(HIPPOCAMPUS, (608, 608, 608), ["patch"])


def test_distances_to_what_was_not_found_are_left_out() -> None:
    def rows(*distances: float) -> list[dict[str, str]]:
        return [{"case": str(number), "hausdorff95_mm": str(value)} for number, value in enumerate(distances)]

    found = arms._differences(rows(3, np.inf, 5, 4), rows(1, 2, 2, np.inf), "hausdorff95_mm")
    assert (found["mean"], found["cases"]) == (2.5, 2)
    assert found["low"] <= 2.5 <= found["high"]
    assert arms._differences(rows(np.inf), rows(1), "hausdorff95_mm")["mean"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --max-epochs"),
        (["--minutes", "1", "--max-epochs", "1"], "either --max-epochs"),
        (["--minutes", "1", "--arms", "patch,half"], "one or several of patch,whole,growing"),
        (["--minutes", "1", "--networks", "DynUNet"], "--networks: of a comparison by --max-epochs"),
        (["--max-epochs", "1", "--arms", "patch", "--tests", "3"], "--arms, --tests: of a comparison by --minutes"),
        (["--max-epochs", "1", "--seed", "0"], "--seed: of a comparison by --minutes"),
        (["--minutes", "1", "--arms", ""], "--arms : one or several of patch"),
        (["--max-epochs", "1", "--networks", ""], "--networks : one or several of"),
    ],
)
def test_what_compares_nothing_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "--bundle", str(tmp_path), "--dataset-dir", str(tmp_path), *words])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_prints_the_tables_and_draws_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arm(dice: float) -> dict[str, Any]:
        cases = {name: {"dice": dice, "hausdorff95_mm": None} for name in ("a.nii.gz", "b.nii.gz")}
        cases["empty.nii.gz"] = {"dice": None, "hausdorff95_mm": None}
        facts = {"batch_size": 1, "step_voxels": [8, 8, 8], "step_bytes": 2**20, "parameters": 1000, "steps": 9}
        return {**facts, "losses": [0.9, 0.4], "cases": cases, "mean_dice": dice, "hausdorff95_mm": {"organ": None}}

    nothing = {"mean": None, "low": None, "high": None, "cases": 0}
    more = {"mean": 0.1, "low": 0.05, "high": 0.15, "cases": 2}
    found = {"minutes": 1.0, "clock": "processor", "arms": {"patch": arm(0.5), "whole": arm(0.6)},
             "differences": {"patch - whole": {"dice": more, "hausdorff95_mm": nothing}}}  # fmt: skip
    monkeypatch.setattr(arms, "compare_arms", lambda *arguments: found)
    words = ["--bundle", bundle_folder("hippocampus"), "--dataset-dir", tmp_path, "--minutes", 1, "--output", tmp_path]
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert arms_as_markdown(found) in result.output
    assert imread(tmp_path / "comparison.png").std() > 0.05


@pytest.mark.parametrize(
    ("result", "guide"),
    [
        ("left_atrium", "whole_images"),
        ("left_atrium_seed_1", "whole_images"),
        ("left_atrium_seed_2", "whole_images"),
        ("branches", "networks"),
        ("branches_seed_1", "networks"),
    ],
)
def test_the_guide_shows_what_is_kept(result: str, guide: str) -> None:
    package = Path(arms.__file__).parents[1]
    found = json.loads((package / "benchmark" / "results" / f"{result}.json").read_text())
    assert arms_as_markdown(found) in (package / "guides" / f"{guide}.md").read_text()
