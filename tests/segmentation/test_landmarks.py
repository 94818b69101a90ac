"""A head is found by the centers of its structures, and what lies otherwise than a head is refused."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet.errors import InputError
from monai_iunet.segmentation.landmarks import LANDMARKS, check_sides, locate_head, structure_centers
from monai_iunet.segmentation.whole_head import WholeHead
from monai_iunet.transforms.head_labels import STRUCTURES, structure_labels

POINTS = np.array([center for center, _ in LANDMARKS.values()])


def centers(matrix: np.ndarray, noise: float = 0.0) -> dict[str, np.ndarray]:
    """The template's landmarks in another space, not quite where they should be."""
    rng = np.random.default_rng(0)
    moved = POINTS @ matrix[:3, :3].T + matrix[:3, 3] + rng.normal(0, noise or 1e-9, POINTS.shape)
    return dict(zip(LANDMARKS, moved))


def turned(degrees: tuple[float, float, float], scale: float = 1.0) -> np.ndarray:
    rotation = nibabel.eulerangles.euler2mat(*np.deg2rad(degrees))
    return nibabel.affines.from_matvec(scale * rotation, [10.0, -20.0, 30.0])


def test_the_landmarks_are_structures_of_a_symmetric_template() -> None:
    assert set(LANDMARKS) <= set(STRUCTURES)
    for name, (center, volume) in LANDMARKS.items():
        if name.startswith("left"):
            other, other_volume = LANDMARKS[name.replace("left", "right")]
            np.testing.assert_allclose(np.array(center) * [-1, 1, 1], other, atol=4)
            assert volume == pytest.approx(other_volume, rel=0.2)
            assert center[0] < 0


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -10, 15)])
def test_a_pose_is_found(degrees: tuple[float, float, float]) -> None:
    wanted = turned(degrees, 1.1)
    found = locate_head(centers(wanted, noise=2.0))
    corners = np.array([[-44.0, -46, -31], [-7, 5, 8], [44, -46, -31], [7, 5, 8]])
    apart = (corners @ (found - wanted)[:3, :3].T) + (found - wanted)[:3, 3]
    assert np.abs(apart).max() < 4


def test_a_structure_that_was_mistaken_is_left_out() -> None:
    moved = centers(np.eye(4))
    moved["left putamen"] = moved["left putamen"] + [0, 60, 0]
    np.testing.assert_allclose(locate_head(moved), np.eye(4), atol=1e-6)


def test_a_head_without_a_part_of_one_side_is_refused() -> None:
    names = {1: "left putamen", 2: "right putamen", 3: "left cerebellum", 4: "right cerebellum", 5: "brainstem"}
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:2], labels[2:4], labels[4:6], labels[6:8], labels[8:] = range(1, 6)
    check_sides(labels, names)
    check_sides(np.where(labels == 5, 0, labels), names)  # what has no side does not count
    labels[4:6, :7] = 0
    with pytest.raises(InputError, match=r"the left side of the brain is 0\.65 times as large as the right one"):
        check_sides(labels, names)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (turned((180, 0, 0)), "turned by 180 degrees"),
        (turned((0, 0, 90)), "turned by 90 degrees"),
        (turned((0, 0, 0), 0.2), "0.20 to 0.20 times as large"),
        (turned((0, 0, 0), 1.9), "1.90 to 1.90 times as large"),
        (np.diag([1.0, 1.0, -1.0, 1.0]), "orientation in the file is wrong"),
    ],
)
def test_a_wrong_header_is_recognized(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        locate_head(centers(matrix))


def test_structures_in_disorder_are_no_head() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="no head found"):
        locate_head({name: rng.uniform(-60, 60, 3) for name in LANDMARKS})


def test_too_few_structures_are_no_head() -> None:
    with pytest.raises(InputError, match=f"2 of {len(LANDMARKS)} structures"):
        locate_head(dict(list(centers(np.eye(4)).items())[:2]))


class Painted:
    """Segments what was painted: a ball for each structure."""

    def __init__(self, matrix: np.ndarray, left_out: str = "") -> None:
        self.labels = dict(enumerate(STRUCTURES, 1))
        self.affine = nibabel.affines.from_matvec(2 * np.eye(3), [-100.0, -130.0, -90.0])
        self.volume = np.zeros((100, 110, 100), np.uint8)
        voxels = np.stack(np.meshgrid(*map(np.arange, self.volume.shape), indexing="ij"), -1)
        for label, name in self.labels.items():
            if name in LANDMARKS and name != left_out:
                center = np.linalg.inv(self.affine) @ matrix @ np.array([*LANDMARKS[name][0], 1.0])
                self.volume[((voxels - center[:3]) ** 2).sum(-1) < 9] = label

    def segment_coarsely(self, image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
        return self.volume, self.affine


def small_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's landmarks with the volume of a painted ball."""
    balls = {name: (center, 1.0) for name, (center, _) in LANDMARKS.items() if "cortex" not in name}
    monkeypatch.setattr("monai_iunet.segmentation.landmarks.LANDMARKS", balls)


def test_a_segmented_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    small_landmarks(monkeypatch)
    wanted = turned((5, -5, 8))
    wanted[:3, 3] = [3.0, 4.0, 5.0]
    finder = WholeHead({1: "hippocampus"}, lambda: Painted(wanted))
    found = finder.find(nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)))
    moved, true = (POINTS @ matrix[:3, :3].T + matrix[:3, 3] for matrix in (found, wanted))
    assert np.abs(moved - true).max() < 3


def test_a_hippocampus_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    small_landmarks(monkeypatch)
    finder = WholeHead({1: "hippocampus"}, lambda: Painted(np.eye(4), left_out="right hippocampus"))
    with pytest.raises(InputError, match="the right hippocampus is not seen"):
        finder.find(nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)))


def test_real_label_maps_are_heads(head_label_maps: Path) -> None:
    """With true labels, centers of structures say where a head is to a few millimeters."""
    for path in sorted(head_label_maps.glob("*.nii.gz"))[::7]:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        labels = structure_labels(np.asarray(image.dataobj).astype(int)[::2, ::2, ::2])
        affine = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
        found = structure_centers(labels, affine, dict(enumerate(STRUCTURES, 1)))
        matrix = locate_head(found)
        for side in ("left", "right"):
            center = np.array([*LANDMARKS[f"{side} hippocampus"][0], 1.0])
            assert np.linalg.norm((matrix @ center)[:3] - found[f"{side} hippocampus"]) < 5
