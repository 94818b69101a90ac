"""The predicted Dice: its features, its file, and what becomes of it on the command line."""

from __future__ import annotations

import copy
import csv
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import monai_iunet
from monai_iunet import BundleSegmenter, InputError, bundle_folder, save_overlay
from monai_iunet.inference.images import WholeImage
from monai_iunet.inference.streaming import Slab
from monai_iunet.segmentation.quality import FEATURES, feature_rows, quality_file
from monai_iunet.segmentation.quality_features import SlabBySlab, SoftDice, describe_structures, second_run
from tests.bundles.helpers import copy_bundle
from tests.test_cli import call, save

DATA = Path(__file__).parents[3] / "shared" / "data"


def ellipsoid(shape: tuple[int, int, int], center: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Labels with an ellipsoid that leans in the first two axes."""
    x, y, z = (index - middle for index, middle in zip(np.indices(shape), center))
    x, y = (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)
    inside = (x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2 < 1
    return inside.astype(np.uint8)


def whole_image(image: np.ndarray) -> WholeImage:
    return WholeImage(torch.from_numpy(image.astype(np.float32))[None])


def threshold(image: torch.Tensor) -> torch.Tensor:
    """A network that finds what is brighter than 1."""
    return torch.cat([torch.zeros_like(image), 20 * (image - 1)], 1)


def test_expected_dice_is_the_same_slab_by_slab() -> None:
    probabilities = torch.rand(4, 12, 6, 5, generator=torch.Generator().manual_seed(0)).softmax(0)
    labels = probabilities.argmax(0)
    labels[labels == 3] = 0  # a structure that was not found
    slabs, whole = SoftDice(4), SoftDice(4)
    whole.add(probabilities, labels)
    for start in range(0, 12, 5):
        slabs.add(probabilities[:, start : start + 5], labels[start : start + 5])
    assert slabs.values() == pytest.approx(whole.values())
    assert set(whole.values()) == {1, 2}
    inside = (labels == 2).float()
    expected = 2 * (inside * probabilities[2]).sum() / (inside.sum() + probabilities[2].sum())
    assert whole.values()[2] == pytest.approx(float(expected))


def test_what_agrees_and_what_does_not_in_a_second_run() -> None:
    labels = ellipsoid((40, 40, 30), (20, 20, 15), (8, 8, 8))
    image = WholeImage(torch.from_numpy(4 * labels.astype(np.float32))[None])
    seen: list[torch.Size] = []

    def note(window: torch.Tensor) -> torch.Tensor:
        seen.append(window.shape)
        return threshold(window)

    assert second_run(image, labels, (40, 40, 40), note) == {1: 1.0}
    assert seen == [(1, 1, 32, 32, 24)]  # 17 x 17 x 15 voxels, 4 around them, to multiples of 8
    assert second_run(image, labels, (40, 40, 40), lambda window: -threshold(window))[1] < 0.1
    labels[2, 2, 2] = 2  # far away: each structure then has a window of its own, of 16 voxels at most
    second_run(image, labels, (16, 16, 16), note)
    assert seen[1:] == [(1, 1, 16, 16, 16), (1, 1, 16, 16, 16)]
    second_run(image, labels, (16, 16, 16), note, divisible_by=16)
    assert seen[3:] == [(1, 1, 32, 16, 16)] * 2  # of more than one voxel on the coarsest level


def test_a_second_run_sees_a_part_of_a_structure_that_is_larger_than_its_window() -> None:
    """The middle of a ring, and of two blobs far apart, holds none of it: no Dice came of that, and no doubt."""
    ring, blobs = np.zeros((2, 60, 60, 9), np.uint8)
    ring[4:56, 4:56] = 1
    ring[8:52, 8:52] = 0
    blobs[2:6, 2:6] = blobs[54:58, 54:58] = 1
    for labels in (ring, blobs):
        image = whole_image(4.0 * labels)
        assert second_run(image, labels, (24, 24, 24), threshold) == {1: 1.0}
        assert second_run(image, labels, (24, 24, 24), lambda window: threshold(0 * window)) == {1: 0.0}


def test_a_voxel_alone_in_the_last_corner_is_described() -> None:
    """Other structures around it leave no shell, and nothing follows it along any axis."""
    labels = np.ones((6, 6, 6), np.uint8)
    labels[-1, -1, -1] = 2
    described = describe_structures(whole_image(np.random.default_rng(0).normal(size=labels.shape)), labels, (1, 1, 1))
    assert np.isfinite(described[2].intensity).all()


def test_descriptions_show_fragments_edges_sides_and_contrast() -> None:
    whole = ellipsoid((40, 40, 30), (20, 20, 15), (12, 6, 5))
    image = np.random.default_rng(0).normal(whole * 2.0, 0.1)
    sound = describe_structures(whole_image(image), whole, (1, 1, 1))[1]
    assert (sound.fragments, sound.edge, sound.uncertainty) == (0, 0, 0)
    assert np.exp(sound.shape[0]) == pytest.approx(whole.sum())
    np.testing.assert_allclose(sound.center, (20, 20, 15), atol=0.1)
    np.testing.assert_allclose(sound.intensity[[1, 4]], [2, 0], atol=0.05)

    torn = whole.copy()
    torn[20] = 0
    assert describe_structures(whole_image(image), torn, (1, 1, 1))[1].fragments == pytest.approx(0.5, abs=0.05)
    assert describe_structures(whole_image(image), np.roll(whole, -20, 0), (1, 1, 1))[1].edge > 0.05
    specks = whole.copy()
    specks[0, :3, :3] = 1  # on the edge, far from the structure: what is left of it is as it was
    with_specks = describe_structures(whole_image(image), specks, (1, 1, 1))[1]
    assert with_specks.fragments == pytest.approx(9 / (whole.sum() + 9))
    assert with_specks.edge == 0
    for name in ("shape", "intensity", "center"):
        np.testing.assert_array_equal(getattr(with_specks, name), getattr(sound, name))
    mirrored = describe_structures(whole_image(image[::-1]), np.ascontiguousarray(whole[::-1]), (1, 1, 1))[1]
    np.testing.assert_allclose(mirrored.shape[4], -sound.shape[4], atol=0.01)
    larger = describe_structures(whole_image(image), whole, (2, 2, 2))[1]
    assert larger.shape[0] - sound.shape[0] == pytest.approx(np.log(8))
    inverted = describe_structures(whole_image(2 - image), whole, (1, 1, 1))[1]
    np.testing.assert_allclose(inverted.intensity[[1, 4]], [0, 2], atol=0.05)


@pytest.mark.parametrize("shape", [(9, 9, 1), (1, 1, 1), (20, 3, 20)])
def test_thin_images_are_described(shape: tuple[int, int, int]) -> None:
    image, logits = torch.rand(1, *shape), torch.zeros(2, *shape)
    logits[1, 0] = 1.0
    found, nothing = SlabBySlab(), SlabBySlab()
    found.add(Slab(0, 0, logits))
    described = found.describe(WholeImage(image), (1, 1, 1), (16, 16, 16), threshold)
    assert np.isfinite(described[1].shape).all()
    assert np.isfinite(described[1].intensity).all()
    nothing.add(Slab(0, 0, -logits))
    assert nothing.describe(WholeImage(image), (1, 1, 1), None, threshold) == {}


def test_what_looks_worse_is_not_rated_better(segmenter: BundleSegmenter) -> None:
    model = segmenter.quality
    assert model is not None
    assert min(model.weights.values()) >= 0
    for name in model.offsets:
        ratings = [model.rate(name, np.full(len(FEATURES), value)) for value in (0.0, 0.2, 1.0, 5.0, 1e9)]
        assert ratings == sorted(ratings, reverse=True)
        assert ratings[-1] < 0.01
        assert model.rate(name, np.full(len(FEATURES), np.nan)) == 0.0
    assert model.predict({}) == dict.fromkeys(model.offsets, 0.0)


def test_a_hippocampus_is_rated_well_and_what_is_none_badly(
    segmenter: BundleSegmenter, left_hippocampus: nibabel.Nifti1Image
) -> None:
    found = segmenter.segment(left_hippocampus)
    assert found.quality is not None
    assert found.warn_below is not None
    assert min(found.quality.values()) > found.warn_below
    assert found.doubts() is None
    data = left_hippocampus.get_fdata(dtype=np.float32)
    inverted = segmenter.segment(nibabel.Nifti1Image(data.max() - data, left_hippocampus.affine))
    assert inverted.doubts() is None
    first, second = inverted.labels > 0, found.labels > 0
    assert 2 * (first & second).sum() > 0.7 * (first.sum() + second.sum())
    assert set(inverted.weights.values()) == {"any_contrast"}
    noise = np.random.default_rng(0).random(data.shape, dtype=np.float32)
    nonsense = {
        "upside down": data[:, :, ::-1],
        "half": np.where(np.arange(data.shape[1])[:, None] > data.shape[1] // 2, data, 0),
        "noise": noise,
        "shuffled": np.roll(data, (15, 25, 20), (0, 1, 2)),
    }
    for name, image in nonsense.items():
        doubts = segmenter.segment(nibabel.Nifti1Image(image, left_hippocampus.affine)).doubts()
        assert doubts is not None, name
        assert "hippocampus" in doubts


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_brains_are_rated_well_and_nonsense_badly(segmenter: BundleSegmenter) -> None:
    """With dark and bright exchanged, the first weights doubt themselves, and the second find what is there."""
    first = copy.copy(segmenter)
    first.second = None
    for path in sorted((DATA / "BrainManual" / "images").glob("*.nii.gz"))[:2]:
        image = monai_iunet.read_image(path)
        region = segmenter.locate(image, path.name)
        assert segmenter.segment(image, region=region).doubts() is None
        truth = np.asarray(monai_iunet.read_image(DATA / "BrainManual" / "labels" / path.name).dataobj)
        data = image.get_fdata(dtype=np.float32)
        brightest = np.percentile(data, 99.5)
        for inverted in (brightest - np.minimum(data, brightest), np.where(data > 0, brightest - data, 0)):
            turned = nibabel.Nifti1Image(inverted.astype(np.float32), image.affine)
            doubts = first.segment(turned, region=region).doubts()
            assert doubts is not None
            assert doubts.count("hippocampus") == 4
            found = segmenter.segment(turned, region=region)
            assert set((found.weights or {}).values()) == {"any_contrast"}
            assert found.doubts() is None
            for side, number in (("left", 48), ("right", 47)):
                mine = np.isin(found.labels, [value for value, name in found.names.items() if name.startswith(side)])
                true = truth == number
                assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.7
    torso = monai_iunet.read_image(DATA / "examples" / "mr_torso.nii.gz")
    assert doubtful_or_refused(segmenter, torso)
    organs = BundleSegmenter(bundle_folder("headneck"), "cpu")
    assert doubtful_or_refused(organs, monai_iunet.read_image(DATA / "examples" / "ct_torso.nii.gz"))


def doubtful_or_refused(segmenter: BundleSegmenter, image: nibabel.Nifti1Image) -> bool:
    try:
        found = segmenter.segment(image)
    except InputError:
        return True
    return found.doubts() is not None


def change(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **values})


def infinite_mean(text: str) -> str:
    content = json.loads(text)
    content["references"]["anterior hippocampus"]["shape"]["mean"][0] = float("inf")
    return json.dumps(content)


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "no weights": change(weights={}),
    "a negative weight": change(weights=dict.fromkeys(FEATURES, -1.0)),
    "a weight that is text": change(weights=dict.fromkeys(FEATURES, "1")),
    "a bound that is none": change(warn_below=float("nan")),
    "other structures": change(offsets={"liver": 1.0}),
    "no references": change(references={}),
    "an infinite mean": infinite_mean,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    path = quality_file(folder)
    path.write_text(DAMAGE[kind](path.read_text()))
    with pytest.raises(InputError, match="not a quality model of this bundle") as caught:
        BundleSegmenter(folder, "cpu")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_model_of_other_weights_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_bundle(tmp_path / "bundle")
    weights = torch.load(folder / "models" / "model.pt", weights_only=True)
    torch.save({name: 1.01 * tensor for name, tensor in weights.items()}, folder / "models" / "model.pt")
    with caplog.at_level(logging.WARNING):
        segmenter = BundleSegmenter(folder, "cpu")
    assert segmenter.quality is None
    assert "fitted to other weights" in caplog.text


def test_without_a_model_the_quality_is_unknown(tmp_path: Path) -> None:
    folder, image = copy_bundle(tmp_path / "bundle"), save(tmp_path / "noise.nii.gz")
    quality_file(folder).unlink()
    assert BundleSegmenter(folder, "cpu").segment(nibabel.load(image)).quality is None
    arguments = ("segment", image, "--bundle", folder, "--output", tmp_path / "out", "--no-overlay")
    code, printed, error = call(*arguments, "--volumes", "csv")
    assert (code, error) == (0, "")
    assert printed.count("quality unknown") == 2
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open()))
    assert [row["quality"] for row in rows] == ["", ""]
    assert call(*arguments, "--volumes", "json", "--overwrite")[0] == 0
    table = json.loads((tmp_path / "out" / "volumes.json").read_text())
    assert [measures["quality"] for measures in table["noise"].values()] == [None, None]
    code, printed, error = call(*arguments, "--overwrite", "--strict")
    assert (code, printed) == (2, "")
    assert error.startswith(f"Error: {folder}: has no quality model of its weights, which --strict needs.")


@pytest.mark.long
def test_doubts_are_said_in_the_table_on_the_terminal_and_in_the_picture(
    tmp_path: Path, left_hippocampus: nibabel.Nifti1Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    savefig = Figure.savefig

    def note(figure: Figure, *arguments: Any, **options: Any) -> None:
        texts.append(" | ".join(text.get_text() for text in figure.texts))
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    images = [save(tmp_path / "noise.nii.gz"), tmp_path / "sound.nii.gz"]
    nibabel.save(left_hippocampus, images[1])
    out = tmp_path / "out"
    code, printed, error = call("segment", *images, "--output", out, "--volumes", "csv")
    assert code == 0
    assert error.startswith(f"Warning: {out / 'noise_seg.nii.gz'}: doubtful, predicted Dice below 0.")
    assert error.count("\n") == 1
    assert printed.count("predicted Dice") == 4
    noise, sound = sorted(texts)  # each begins with the name of its image
    assert noise.startswith("noise")
    assert "Warning: doubtful" in noise
    assert sound.startswith("sound")
    assert "Warning" not in sound
    rows = list(csv.DictReader((out / "volumes.csv").open()))
    assert [float(row["quality"]) > 0.7 for row in rows] == [False, False, True, True]

    code, _, error = call("segment", *images, "--output", tmp_path / "strict", "--strict", "--volumes", "json")
    assert code == 2
    assert error.startswith(f"Error: {images[0]}: doubtful, predicted Dice below")
    assert "Nothing was written" in error
    names = sorted(path.name for path in (tmp_path / "strict").iterdir())
    assert names == ["sound_seg.json", "sound_seg.nii.gz", "sound_seg.png", "volumes.json"]
    assert set(json.loads((tmp_path / "strict" / "volumes.json").read_text())) == {"sound"}


def test_doubts_are_said_in_the_log(segmenter: BundleSegmenter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        monai_iunet.segment(np.random.default_rng(0).random((35, 50, 36)), segmenter, affine=np.eye(4))
    assert "image (ndarray): doubtful, predicted Dice below" in caplog.text


def test_a_side_is_as_good_as_its_worst_part() -> None:
    names = {1: "left front organ", 2: "left back organ"}
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4))
    labels = np.ones((2, 2, 2), np.uint8)
    found = monai_iunet.Segmentation(image, labels, names, None, {"left front organ": 0.9, "left back organ": 0.3}, 0.5)
    assert found.qualities() == {"left front organ": 0.9, "left back organ": 0.3, "left, whole": 0.3}
    assert found.doubts() == "doubtful, predicted Dice below 0.50: left back organ 0.30"
    unknown = monai_iunet.Segmentation(image, labels, names)
    assert unknown.doubts() is None
    assert unknown.qualities()["left, whole"] is None


def test_a_warning_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4))
    save_overlay(image, np.ones((9, 9, 9), np.uint8), {1: "liver"}, tmp_path / "a.png", warning="$_$ " * 60)
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_warning_of_many_lines_can_be_read_over_the_planes(tmp_path: Path) -> None:
    """The 28 structures of a brain take five lines, for which there is no room above the planes."""
    white = nibabel.Nifti1Image(np.linspace(0.99, 1, 8000, dtype=np.float32).reshape(20, 20, 20), np.eye(4))
    labels, pictures = np.zeros((20, 20, 20), np.uint8), []
    for warning in (None, "left structure 0.00, " * 40):
        path = tmp_path / "picture.png"
        save_overlay(white, labels, {}, path, window=(0.0, 0.9), warning=warning)
        pictures.append(imread(path)[..., :3])
    plain, warned = pictures
    lines = np.ptp(warned - plain, axis=(1, 2)) > 0
    over_planes = (plain.min(2) > 0.9) & lines[:, None]
    covered = over_planes & (warned.max(2) < 0.1)
    assert covered.sum() > 0.4 * over_planes.sum()


def test_places_beside_each_other_count(segmenter: BundleSegmenter, left_hippocampus: nibabel.Nifti1Image) -> None:
    model = segmenter.quality
    assert model is not None
    found = segmenter.describe_crop(left_hippocampus)[2]
    front, back = found
    swapped = {front: found[back], back: found[front]}
    place = FEATURES.index("place")
    assert feature_rows(swapped, model.references)[front][place] > feature_rows(found, model.references)[front][place]


def test_what_the_others_look_like_counts(segmenter: BundleSegmenter, left_hippocampus: nibabel.Nifti1Image) -> None:
    model = segmenter.quality
    assert model is not None
    found = segmenter.describe_crop(left_hippocampus)[2]
    front, back = found
    others = FEATURES.index("others")
    odd = {**found, back: replace(found[back], shape=found[back].shape + 3)}
    rows, rows_beside_odd = feature_rows(found, model.references), feature_rows(odd, model.references)
    assert rows_beside_odd[front][others] > rows[front][others]
    assert rows_beside_odd[back][others] == rows[back][others]  # a structure is none of its own others
    alone = feature_rows({front: found[front]}, model.references)
    assert alone[front][others] == 0
