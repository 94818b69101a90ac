"""Measures of a segmentation, where they are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from scipy import ndimage

from monai_iunet.fitting.cross_validation import read_scores
from monai_iunet.training.evaluation import CaseReport, compare, mean_dice_of_cases, read_rows, write_rows


def boxes(start: int) -> torch.Tensor:
    labels = torch.zeros(20, 10, 10, dtype=torch.uint8)
    labels[start : start + 8, 2:8, 2:8] = 1
    return labels


def test_a_box_that_is_shifted_by_two_voxels() -> None:
    (row,) = compare(boxes(6), boxes(4), (1.5, 1.0, 2.0), ["box"])
    assert row["dice"] == pytest.approx(6 / 8)
    assert row["hausdorff95_mm"] == pytest.approx(3.0)  # two voxels of 1.5 mm
    assert 0 < row["surface_distance_mm"] < 3.0
    assert row["volume_mm3"] == row["reference_mm3"] == 8 * 36 * 3.0


def test_identical_and_missing_structures() -> None:
    truth = boxes(4)
    truth[0, 0, 0] = 3
    found = boxes(4)
    found[15:17] = 2
    rows = compare(found, truth, (1, 1, 1), ["same", "not contoured", "not found"])
    assert [rows[0][key] for key in ("dice", "hausdorff95_mm", "surface_distance_mm")] == [1, 0, 0]
    assert all(np.isnan(rows[1][key]) for key in ("dice", "hausdorff95_mm", "surface_distance_mm"))
    assert rows[1]["volume_mm3"] == 200
    assert [rows[2][key] for key in ("dice", "hausdorff95_mm", "surface_distance_mm")] == [0, np.inf, np.inf]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_surface_of_a_single_slice_is_its_outline(axis: int) -> None:
    rows, columns = np.mgrid[:40, :40]
    found, true = (((rows - 20) ** 2 / 2 + (columns - start) ** 2) < 90 for start in (18, 22))
    voxel = (0.5, 0.8)
    outlines = [disk & ~ndimage.binary_erosion(disk) for disk in (found, true)]
    apart = [
        ndimage.distance_transform_edt(~outlines[1 - number], voxel)[outline] for number, outline in enumerate(outlines)
    ]
    spacing = [*voxel[:axis], 4, *voxel[axis:]]
    volumes = [torch.tensor(np.expand_dims(disk, axis)).byte() for disk in (found, true)]
    (row,) = compare(*volumes, spacing, ["disk"])
    assert row["hausdorff95_mm"] == pytest.approx(max(np.percentile(part, 95) for part in apart))
    assert row["surface_distance_mm"] == pytest.approx(np.concatenate(apart).mean())
    assert row["volume_mm3"] == pytest.approx(found.sum() * 1.6)


def test_the_report_counts_contoured_structures_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    second = boxes(4)
    second[16:18, :4] = 2
    cases = [(boxes(6), boxes(4)), (second, second)]

    def case(found: torch.Tensor, truth: torch.Tensor, name: str) -> dict[str, MetaTensor]:
        meta = {"filename_or_obj": f"/somewhere/{name}.nii.gz"}
        affine = torch.diag(torch.tensor([2.0, 1, 1, 1]))
        return {"pred": MetaTensor(found[None]), "label": MetaTensor(truth[None], affine=affine, meta=meta)}

    engine = Engine(lambda engine, pair: [case(*pair, name=f"case{engine.state.iteration}")])
    CaseReport(tmp_path / "eval", ["box", "slab"]).attach(engine)
    with caplog.at_level("INFO"):
        engine.run(cases)
    assert engine.state.metrics["val_mean_dice"] == pytest.approx(((0.75 + 1) / 2 + 1) / 2)
    with (tmp_path / "eval" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"]) for row in rows] == [
        ("case1.nii.gz", "box"),
        ("case1.nii.gz", "slab"),
        ("case2.nii.gz", "box"),
        ("case2.nii.gz", "slab"),
    ]
    assert float(rows[0]["hausdorff95_mm"]) == 4.0
    assert rows[1]["dice"] == "nan"
    with (tmp_path / "eval" / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert [row["cases"] for row in summary] == ["2", "1"]
    assert float(summary[0]["dice_mean"]) == pytest.approx(0.875)
    assert "slab      1  1.000" in caplog.text


def test_volumes_of_voxels_of_micrometers_are_written_with_their_digits(tmp_path: Path) -> None:
    """Those of nothing would not count in a cross-validation."""
    truth, prediction = torch.zeros(16, 16, 16), torch.zeros(16, 16, 16)
    truth[4:12, 4:12, 4:12], prediction[5:12, 4:12, 4:12] = 1, 1
    (row,) = compare(prediction, truth, (0.0026,) * 3, ["cell"])
    write_rows(tmp_path / "cases.csv", [{"case": "a", **row}])
    (written,) = read_rows(tmp_path / "cases.csv")
    for name in ("dice", "hausdorff95_mm", "surface_distance_mm", "volume_mm3", "reference_mm3"):
        assert float(written[name]) == pytest.approx(row[name], rel=1e-3)
    assert len(read_scores([tmp_path / "cases.csv"])) == 1


def test_volumes_of_sheared_voxels_are_theirs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As dcm2niix writes a CT with a tilted gantry: a voxel is less than the product of its sides."""
    affine = torch.tensor([[1, 0, 0, 0], [0, 1, 0.75, 0], [0, 0, 3, 0], [0, 0, 0, 1]], dtype=torch.float64)
    truth = MetaTensor(boxes(4)[None], affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    evaluator = Engine(lambda *_: [{"pred": truth.clone(), "label": truth}])
    CaseReport(tmp_path, ["box"]).attach(evaluator)
    evaluator.run([0])
    (row,) = read_rows(tmp_path / "cases.csv")
    assert float(row["reference_mm3"]) == float(row["volume_mm3"]) == pytest.approx(3 * boxes(4).sum().item())
    assert "a.nii.gz: its axes are sheared. Distances are those of axes at right angles." in caplog.text


def test_cases_whose_files_have_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    files = [f"/data/{patient}/seg.nii.gz" for patient in ("patient2", "patient1")]
    starts = {files[0]: 4, files[1]: 6}

    def step(_: Engine, file: str) -> list[dict[str, MetaTensor]]:
        label = MetaTensor(boxes(4)[None], meta={"filename_or_obj": file})
        return [{"pred": MetaTensor(boxes(starts[file])[None]), "label": label}]

    engine = Engine(step)
    CaseReport(tmp_path, ["box"]).attach(engine)
    engine.run(files)
    dice = mean_dice_of_cases(read_rows(tmp_path / "cases.csv"))
    assert dice == {"patient1/seg.nii.gz": pytest.approx(0.75), "patient2/seg.nii.gz": 1.0}


@pytest.mark.parametrize("axes", [2, 3])
def test_images_of_two_axes_are_compared(axes: int, tmp_path: Path) -> None:
    affine = torch.diag(torch.tensor([1.5, 2.0, *[1.0] * (axes - 1)]))
    pred, label = (MetaTensor(boxes(start)[None, ..., 4], affine=affine) for start in (6, 4))
    engine = Engine(lambda *_: [{"pred": pred, "label": label}])
    CaseReport(tmp_path, ["box"]).attach(engine)
    engine.run([0])
    (row,) = read_rows(tmp_path / "cases.csv")
    assert (row["dice"], row["hausdorff95_mm"], row["volume_mm3"]) == ("0.7500", "3.0000", "144.0000")
    moved = MetaTensor(boxes(6)[None, ..., 4], affine=affine.clone().fill_diagonal_(2.5))
    engine = Engine(lambda *_: [{"pred": moved, "label": label}])
    CaseReport(tmp_path, ["box"]).attach(engine)
    with pytest.raises(ValueError, match="mm apart: invert the transforms"):
        engine.run([0])


def test_a_prediction_with_axes_turned_round_is_refused(tmp_path: Path) -> None:
    affine = torch.diag(torch.tensor([2.0, 1, 1, 1]))
    turned = torch.diag(torch.tensor([-2.0, 1, 1, 1]))
    turned[0, 3] = 38  # of the first axis, mirrored in place
    label = MetaTensor(boxes(4)[None], affine=affine, meta={"filename_or_obj": "case.nii.gz"})
    for pred, refused in ((turned, True), (affine, False), (affine + 0.001, False), (None, False)):
        output = {"pred": MetaTensor(boxes(4)[None], affine=pred), "label": label}
        engine = Engine(lambda engine, batch, output=output: [output])
        CaseReport(tmp_path / "eval", ["box"]).attach(engine)
        if refused:
            with pytest.raises(ValueError, match=r"of case\.nii\.gz lie up to 42 mm apart: invert the transforms"):
                engine.run([0])
        else:
            engine.run([0])


@pytest.mark.parametrize("value", [2.0, -1.0, 0.7, float("nan")], ids=["unknown", "negative", "resampled", "NaN"])
@pytest.mark.parametrize("which", ["The prediction", "The true labels"])
def test_what_is_no_number_of_a_structure_is_refused(value: float, which: str) -> None:
    good = torch.zeros(6, 6, 6)
    bad = good.clone()
    bad[1:4] = value
    maps = (bad, good) if which == "The prediction" else (good, bad)
    with pytest.raises(ValueError, match=which):
        compare(*maps, (1.0, 1.0, 3.0), ["structure"])


def test_maps_of_two_grids_are_not_compared() -> None:
    with pytest.raises(ValueError, match="on the grid of the image"):
        compare(torch.ones(6, 6, 5), torch.ones(6, 6, 6), (1.0, 1.0, 3.0), ["structure"])


@pytest.mark.parametrize("key", ["pred", "label"])
def test_one_hot_maps_are_not_compared(key: str, tmp_path: Path) -> None:
    case = {"pred": MetaTensor(boxes(4)[None]), "label": MetaTensor(boxes(4)[None])}
    case[key] = torch.cat([1 - case[key], case[key]])
    engine = Engine(lambda engine, batch: [case])
    CaseReport(tmp_path / "eval", ["box"]).attach(engine)
    with pytest.raises(ValueError, match=rf"{key}: a label map of one channel is needed, got \(2, 20, 10, 10\)"):
        engine.run([0])


def test_labels_need_the_size_of_their_voxels(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: [{"pred": boxes(4)[None], "label": boxes(4)[None]}])
    CaseReport(tmp_path / "eval", ["box"]).attach(engine)
    with pytest.raises(ValueError, match="label: a MetaTensor is needed, whose affine says how large a voxel is"):
        engine.run([0])
