"""What is doubtful with the first weights of a bundle is segmented with its second ones, which may know better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.segmentation.quality import quality_file
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.whole_head import load_template
from tests.bundles.helpers import copy_bundle
from tests.test_cli import call

REGION = np.eye(4)  # of the template, which need not be looked for


def template(change: Callable[[np.ndarray], np.ndarray] = lambda data: data) -> nibabel.Nifti1Image:
    head = load_template()
    return nibabel.Nifti1Image(change(head.get_fdata(dtype=np.float32)), head.affine)


def turned_round(data: np.ndarray) -> np.ndarray:
    """The head with dark and bright exchanged, as T2-weighted images have them."""
    return np.where(data > 0.01, 1 - data, 0).astype(np.float32)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first > 0, second > 0
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


@pytest.fixture(scope="module")
def segmenter() -> BundleSegmenter:
    return BundleSegmenter(bundle_folder("hippocampus"), "cpu")


@pytest.mark.long
def test_another_contrast_is_segmented_by_the_second_weights(segmenter: BundleSegmenter, tmp_path: Path) -> None:
    first = copy_bundle(tmp_path / "first")
    metadata = first / "configs" / "metadata.json"
    content = json.loads(metadata.read_text())
    del content["weights_where_doubted"]
    metadata.write_text(json.dumps(content))

    as_it_is = segmenter.segment(template(), region=REGION)
    assert set(as_it_is.weights.values()) == {"model"}
    assert as_it_is.doubts() is None
    head = template(turned_round)
    found = segmenter.segment(head, region=REGION)
    assert set(found.weights.values()) == {"any_contrast"}
    assert dice(found.labels, as_it_is.labels) > 0.8
    by_the_first = BundleSegmenter(first, "cpu").segment(head, region=REGION)
    assert dice(by_the_first.labels, as_it_is.labels) < 0.3
    assert by_the_first.doubts() is not None


def test_what_is_doubtful_with_both_stays_that_of_the_first(segmenter: BundleSegmenter) -> None:
    noise = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(40, 48, 40)).astype(np.float32), np.eye(4))
    second = BundleSegmenter(segmenter.folder, "cpu", weights="any_contrast")
    assert second.second is None
    assert second.segment(noise).doubts() is not None
    found = segmenter.segment(noise)
    assert set(found.weights.values()) == {"model"}
    assert max(found.quality.values()) < min(second.segment(noise).quality.values())
    assert found.doubts() is not None


def test_the_record_names_the_weights(tmp_path: Path) -> None:
    assert call("segment", "--example", "--output", tmp_path, "--no-overlay", "--volumes", "csv")[0] == 0
    record = json.loads((tmp_path / "mni152_seg.json").read_text())
    assert record["weights"] == dict.fromkeys(record["labels"].values(), "model")


def test_second_weights_that_are_missing_are_said_before_the_first_image(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    (folder / "models" / "any_contrast.pt").unlink()
    with pytest.raises(InputError, match=r"models/any_contrast\.pt is missing"):
        BundleSegmenter(folder, "cpu")


@pytest.mark.parametrize("name", ["../model", "a/b", "", 7, ["any_contrast"]])
def test_second_weights_are_a_file_of_the_bundle(name: object, tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    metadata = folder / "configs" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "weights_where_doubted": name}))
    with pytest.raises(InputError, match="names the weights"):
        BundleSegmenter(folder, "cpu")


def test_second_weights_without_a_quality_model_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    quality_file(folder, "any_contrast").unlink()
    assert BundleSegmenter(folder, "cpu").second is None
    assert "any_contrast.pt: not used" in caplog.text
    quality_file(folder).unlink()
    assert BundleSegmenter(folder, "cpu").second is None


def test_the_command_names_what_belongs_to_the_second_weights(tmp_path: Path) -> None:
    # The models belong to the weights, so that nothing is fitted.
    dataset = tmp_path / "dataset.json"
    dataset.write_text(json.dumps({"training": [], "validation": []}))
    folder = bundle_folder("hippocampus")
    printed = {
        weights: call("quality", "--bundle", folder, "--dataset-dir", tmp_path, "--weights", weights)
        for weights in ("model", "any_contrast")
    }
    assert [result[0] for result in printed.values()] == [0, 0]
    assert printed["model"][1] != printed["any_contrast"][1]
    assert call("quality", "--bundle", folder, "--dataset-dir", tmp_path, "--weights", "none")[0] == 2
