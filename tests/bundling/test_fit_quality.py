"""Quality models are fitted, and judged on other cases."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from monai_iunet import BundleSegmenter, InputError, bundle_folder
from monai_iunet.bundling.fit_quality import (
    Job,
    Result,
    as_markdown,
    cases_digest,
    damaged_results,
    evaluate_quality,
    fit_quality,
    judge_quality,
)
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.bundling.references import describe_training
from monai_iunet.segmentation.quality import (
    FEATURES,
    Normal,
    Reference,
    quality_file,
    read_quality,
    weights_digest,
    write_quality,
)
from monai_iunet.segmentation.quality_features import INTENSITY, SHAPE
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data
from tests.test_cli import call

STRUCTURES = ("liver", "tumor")


class ThresholdNetwork(nn.Module):
    """Finds the brighter and the brightest of smoothed intensities: the balls of `make_hippocampus_data`."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        smooth = nn.functional.avg_pool3d(image, 3, 1, 1)
        return torch.cat([10 - 0 * smooth, 10 * (smooth - 0.5), 20 * (smooth - 2.5) + 15], 1)


def references() -> dict[str, Reference]:
    shape, intensity = (Normal(np.zeros(size), np.eye(size)) for size in (SHAPE, INTENSITY))
    return {name: Reference(shape, intensity, {}) for name in STRUCTURES}


def made_results(weights: dict[str, float], noise: float = 0.03, count: int = 600) -> list[Result]:
    """Results whose Dice depends on the features as a model with these weights says."""
    rng = np.random.default_rng(0)
    results = []
    for number in range(count):
        features = rng.exponential(0.5, len(FEATURES))
        structure = number % 2
        score = features @ [weights.get(name, 0.0) for name in FEATURES] - (2 + structure)
        dice = float(np.clip(1 / (1 + np.exp(score)) + rng.normal(0, noise), 0, 1))
        job = (f"case_{number // 10}", "noise", number)
        results.append(Result(job, number // 10 % 2 == 0, STRUCTURES[structure], tuple(features), dice))
    return results


def test_a_known_relation_is_found() -> None:
    known = {"uncertainty": 3.0, "shape": 1.0, "fragments": 2.0}
    model = fit_quality(made_results(known), references(), "digest")
    assert model.weights == pytest.approx({name: known.get(name, 0.0) for name in FEATURES}, abs=0.3)
    assert model.offsets == pytest.approx({"liver": 2.0, "tumor": 3.0}, abs=0.3)
    assert model.held_out["correlation"] > 0.98
    assert model.held_out["bad_that_pass"] <= 0.02
    assert model.held_out["good_that_are_doubted"] <= 0.05
    assert 0.5 < model.warn_below < 0.8
    assert model.held_out["cases"] == 30


def test_both_sides_of_a_structure_share_an_offset_that_all_their_results_fit() -> None:
    names = dict(zip(STRUCTURES, ("RightParotid", "LeftParotid")))
    results = [replace(result, structure=names[result.structure]) for result in made_results({"uncertainty": 3.0})]
    made = {names.get(name, name): reference for name, reference in references().items()}
    model = fit_quality(results, made, "digest")
    assert model.offsets["LeftParotid"] == model.offsets["RightParotid"] == pytest.approx(2.5, abs=0.3)


def test_what_is_better_when_it_looks_worse_gets_no_weight() -> None:
    model = fit_quality(made_results({"uncertainty": 2.0, "edge": -1.0}), references(), "digest")
    assert model.weights["edge"] == pytest.approx(0, abs=1e-4)


def test_cases_that_fitted_do_not_judge() -> None:
    results = made_results({"uncertainty": 3.0})
    model = fit_quality(results, references(), "digest")
    turned = [r if r.fits else Result(r.job, False, r.structure, r.features, 1 - r.dice) for r in results]
    other = fit_quality(turned, references(), "digest")
    assert other.weights == model.weights
    assert other.warn_below == model.warn_below
    assert other.held_out["correlation"] < -0.9
    assert other.held_out == judge_quality(other, [r for r in turned if not r.fits])


def test_results_that_are_all_alike_have_no_correlation(tmp_path: Path) -> None:
    """As where a network that was trained for a short time finds each structure in the wrong place."""
    results = [result if result.fits else replace(result, dice=0.0) for result in made_results({"uncertainty": 3.0})]
    (tmp_path / "models").mkdir()
    torch.save({}, tmp_path / "models" / "model.pt")
    model = fit_quality(results, references(), weights_digest(tmp_path))
    write_quality(model, tmp_path)
    read = read_quality(tmp_path, STRUCTURES)
    assert read is not None
    assert read.held_out == model.held_out
    assert "| correlation of predicted and true Dice | none: all are alike |" in as_markdown(read)


def test_too_few_cases_are_an_error() -> None:
    alone = [result for result in made_results({"uncertainty": 3.0}) if result.fits or result.structure == "liver"]
    with pytest.raises(InputError, match="tumor: found in too few validation cases"):
        fit_quality(alone, references(), "digest")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_hippocampus_data(tmp_path / "data", training=7, validation=0)
    cases = json.loads((folder / "dataset.json").read_text())["training"]
    (folder / "dataset.json").write_text(json.dumps({"training": cases[:3], "validation": cases[3:]}))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose network needs no training."""
    folder = write_bundle(SMALL_TASK, tmp_path / "bundle")
    for name in ("evaluate", "inference"):
        path = folder / "configs" / f"{name}.json"
        config = {**json.loads(path.read_text()), "network_def": {"_target_": f"{__name__}.ThresholdNetwork"}}
        path.write_text(json.dumps(config))
    torch.save({}, folder / "models" / "model.pt")
    return folder


def test_labels_of_other_structures_are_refused(tmp_path: Path) -> None:
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    image, labels = np.random.default_rng(0).random((35, 50, 36), np.float32), np.zeros((35, 50, 36), np.int16)
    labels[5:9] = 257  # a byte would take it for 1
    for name, data in (("image", image), ("label", labels)):
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
    cases = [{name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")}]
    message = "has the values 257, labels are 0 to 2"
    with pytest.raises(InputError, match=message):
        describe_training(segmenter, cases)
    with pytest.raises(InputError, match=message):
        damaged_results(segmenter, {}, cases, 1, tmp_path / "table.csv")


def test_the_command_fits_and_the_model_is_used(bundle: Path, data: Path) -> None:
    arguments = ("quality", "--bundle", bundle, "--dataset-dir", data, "--damages", 6, "--device", "cpu")
    code, printed, error = call(*arguments)
    assert (code, error) == (0, "")
    assert "correlation" in printed
    assert (bundle / "docs" / "quality.png").stat().st_size > 10_000
    content = quality_file(bundle).read_text()
    model = read_quality(bundle, SMALL_TASK.classes)
    assert model is not None
    assert model.held_out["cases"] == 2

    (table,) = (bundle / "eval").glob(f"quality_{weights_digest(bundle)[:8]}_*.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["case"] for row in rows} == {"made_3", "made_4", "made_5", "made_6"}
    sound = [float(row["dice"]) for row in rows if row["damage"] == "none"]
    harmed = [float(row["dice"]) for row in rows if row["damage"] != "none"]
    assert min(sound) > 0.6
    assert min(harmed) < 0.3

    segmenter = BundleSegmenter(bundle, "cpu")
    image = nibabel.load(data / "imagesTr" / "made_5.nii.gz")
    quality = segmenter.segment(image).quality
    inverted = nibabel.Nifti1Image(-image.get_fdata(dtype=np.float32), image.affine)
    worse = segmenter.segment(inverted).quality
    assert quality is not None
    assert worse is not None
    assert min(quality.values()) > max(worse.values())

    assert call(*arguments)[0] == 0  # nothing to do
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if ",5," not in line) + "\n")  # as if interrupted
    assert call(*arguments, "--refit")[0] == 0
    assert quality_file(bundle).read_text() == content
    table.write_text("case,damage\nx,y\n")
    code, _, error = call(*arguments, "--refit")
    assert code == 2
    assert "not a table of results" in error


def test_contours_of_unusual_volume_neither_fit_nor_judge(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_hippocampus_data(tmp_path / "many", training=13, validation=0)
    listed = json.loads((folder / "dataset.json").read_text())["training"]
    for number in (0, 10):  # of each a training and a validation case has a scratch in the place of a structure
        path = folder / "labelsTr" / f"made_{number}.nii.gz"
        label = nibabel.load(path)
        values = np.asarray(label.dataobj).copy()
        values[values == 1] = 0
        values[2:4, 2:4, 2] = 1
        nibabel.save(nibabel.Nifti1Image(values, label.affine), path)
    sections = {"training": listed[:9], "validation": listed[9:]}
    cases = {
        section: [{key: str(folder / case[key]) for key in ("image", "label")} for case in entries]
        for section, entries in sections.items()
    }
    with caplog.at_level("WARNING"):
        model = evaluate_quality(bundle, cases, "cpu", damages=4)
    told = [text.split(" has ")[0] for text in caplog.messages]
    assert told == ["made_0: the largest component of front", "made_10: the largest component of front"]
    (table,) = (bundle / "eval").glob("quality_*.csv")
    rows = {(row["case"], row["structure"]) for row in csv.DictReader(table.open())}
    assert ("made_10", "front") not in rows
    assert {("made_10", "back"), ("made_9", "front")} <= rows
    assert model is not None
    assert model.held_out["contours_left_out"] == 1
    assert "| structures found; true contours left out for their volume: 1 |" in as_markdown(model)
    volume = model.references["front"].shape.mean[0]
    assert abs(volume - model.references["back"].shape.mean[0]) < 0.1


def test_a_patient_with_several_cases_fits_or_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves: dict[bool, set[str]] = {True: set(), False: set()}
    monkeypatch.setattr(
        "monai_iunet.bundling.fit_quality._segment_damaged", lambda *given: halves[given[-1]].add(given[-2][0]) or []
    )
    cases = [{"image": f"p{patient}_scan{scan}.nii", "label": "x"} for patient in (1, 2, 3) for scan in (1, 2)]
    segmenter: Any = SimpleNamespace(windows=None)
    damaged_results(segmenter, {}, cases, 1, tmp_path / "table.csv")
    assert halves == {True: {"p1_scan1", "p1_scan2", "p3_scan1", "p3_scan2"}, False: {"p2_scan1", "p2_scan2"}}


def test_results_of_other_labels_are_not_taken(data: Path) -> None:
    case = {"image": str(data / "imagesTr" / "made_5.nii.gz"), "label": str(data / "labelsTr" / "made_5.nii.gz")}
    cases: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [case]}
    before = cases_digest(cases)
    assert cases_digest(cases) == before
    # Nor those beside the references of other training cases: one has changed its section.
    assert cases_digest({"training": [case], "validation": []}) != before
    label = nibabel.load(case["label"])
    nibabel.save(nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), case["label"])
    assert cases_digest(cases) != before


def test_labels_of_other_values_are_refused(bundle: Path) -> None:
    labels = write_bundle(replace(SMALL_TASK, label_values=(2, 1)), bundle.with_name("other")) / "configs/evaluate.json"
    shutil.copyfile(labels, bundle / "configs" / "evaluate.json")
    with pytest.raises(InputError, match=r"label files have the values \[2, 1\], a quality model is for 1, 2"):
        evaluate_quality(bundle, {"training": [], "validation": []}, "cpu")


def test_a_case_of_another_format_has_a_name(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(
        "monai_iunet.bundling.fit_quality._segment_damaged",
        lambda segmenter, references, case, job, fits: jobs.append(job) or [],
    )
    damaged_results(BundleSegmenter(bundle, "cpu"), {}, [{"image": "scan.nrrd"}], 0, tmp_path / "table.csv")
    assert jobs == [("scan", "none", 0)]


def test_the_evaluation_fits_what_is_not_fitted_yet(
    bundle: Path, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(
        "monai_iunet.bundling.fit_quality.write_quality", lambda model, folder, weights: calls.append(folder) or folder
    )

    def evaluate(**settings: object) -> None:
        parser = ConfigParser()
        parser.read_config(bundle / "configs" / "evaluate.json")
        parser.update({"bundle_root": str(bundle), "dataset_dir": str(data), "device": "cpu", **settings})
        parser.get_parsed_content("run")

    evaluate(fit_quality=False)
    shutil.copyfile(bundle / "models" / "model.pt", bundle / "other.pt")
    evaluate(checkpoint=str(bundle / "other.pt"))  # trained on other cases, for all that is known
    assert calls == []
    evaluate()
    assert calls == [bundle]
    listed = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**listed, "training": listed["training"][:2]}))
    evaluate()
    assert "No quality model was fitted: front: in 2 training cases, at least 3 are needed" in caplog.text
    assert calls == [bundle]
