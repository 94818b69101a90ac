"""Cases that weights were trained on are noticed where they are to judge them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iunet import InputError, check_unseen, evaluate_quality
from monai_iunet.bundling.evaluation_data import bundle_cases
from monai_iunet.bundling.new_bundle import write_bundle
from monai_iunet.training.dataset import list_cases
from monai_iunet.training.record import trained_value, write_record
from monai_iunet.training.seen_cases import image_digests, seen_cases
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

QUICK: dict[str, Any] = {"max_epochs": 1, "val_interval": 1, "device": "$torch.device('cpu')"}
SAID = "was trained on"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    caplog.clear()
    return said


@pytest.mark.long
def test_an_evaluation_says_which_cases_were_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=5, validation=0)
    bundle = write_bundle(SMALL_TASK, tmp_path / "small")
    weights = bundle / "models" / "model.pt"
    run(bundle, "train.json", dataset_dir=data, fold=0, **QUICK)
    assert trained_value(weights, "trained_on", None) == image_digests(list_cases(data, "training", 0))
    evaluation = {"dataset_dir": data, "device": QUICK["device"]}
    run(bundle, "evaluate.json", fold=0, **evaluation)
    assert warnings_of(caplog) == []
    run(bundle, "evaluate.json", fold=1, **evaluation)
    (said,) = warnings_of(caplog)
    assert "model.pt was trained on 1 of these 1 cases, such as made_1.nii.gz." in said
    # Nor is a quality model fitted to them.
    other_fold = {"training": [], "validation": list_cases(data, "validation", 1)}
    with pytest.raises(InputError, match="was trained on 1 of the 1 validation cases, such as made_1"):
        evaluate_quality(bundle, other_fold, "cpu", refit=True)
    assert bundle_cases(bundle, data)["validation"] == list_cases(data, "validation", 0)

    # A training that begins with these weights has seen their cases, too, and remembers it when it goes on.
    new = make_hippocampus_data(tmp_path / "new", training=6, validation=0)
    for path in (new / "imagesTr").iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine), path)
    tuned: dict[str, Any] = {"ckpt_dir": tmp_path / "tuned", "output_dir": tmp_path / "log", "dataset_dir": new}
    run(bundle, "train.json", pretrained=weights, fold=0, **tuned, **QUICK)
    run(bundle, "train.json", fold=0, resume=True, **tuned, **{**QUICK, "max_epochs": 2})
    before, learned = list_cases(data, "training", 0), list_cases(new, "training", 0)
    assert seen_cases(tmp_path / "tuned" / "model.pt", [*before, *learned]) == [*before, *learned]
    assert seen_cases(tmp_path / "tuned" / "model.pt", list_cases(new, "validation", 0)) == []


def test_images_are_known_by_what_they_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in {"a.nii.gz": b"1", "b.nii.gz": b"2", "a_0001.nii.gz": b"3"}.items():
        (tmp_path / name).write_bytes(content)
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"4")
    first, second = str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")
    trained = [{"image": first}, {"image": [second, str(tmp_path / "a_0001.nii.gz")]}, {"image": str(series)}]
    digests = image_digests([*trained, {"image": str(tmp_path / "gone.nii.gz")}, {"image": 3}, "no case"])
    assert len(digests) == 3
    weights = tmp_path / "model.pt"
    write_record({"trained_on": digests}, weights)
    assert "a.nii" not in json.dumps(digests)
    shutil.copyfile(first, tmp_path / "renamed.nii.gz")
    renamed, alone = {"image": str(tmp_path / "renamed.nii.gz")}, {"image": second}
    assert seen_cases(weights, [*trained, renamed, alone]) == [*trained, renamed]
    check_unseen(weights, [alone, renamed])
    assert len(warnings_of(caplog)) == 1
    check_unseen(weights, [alone])
    check_unseen(tmp_path / "unknown" / "model.pt", [renamed])
    assert warnings_of(caplog) == []
