"""The description of a task: what a bundle segments, and how its network learns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from monai_iunet.errors import InputError
from monai_iunet.transforms.head_labels import FLUID, OUTSIDE, STRUCTURES, SWAP, TYPICAL

__all__ = ["BRAIN", "HEADNECK", "HIPPOCAMPUS", "TASKS", "SyntheticImages", "Task"]


@dataclass(frozen=True)
class SyntheticImages:
    """Describes the tissues of label maps that images are made from.

    Attributes:
        typical: see `RandSyntheticImaged`, as are the others.
        outside: tissues that are taken out at times.
        fluid: tissues that are then taken out as often as not.

    Example:
        >>> SyntheticImages(typical=(0.0, 0.8)).outside
        ()
    """

    typical: tuple[float, ...]
    outside: tuple[int, ...] = ()
    fluid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """Describes what is segmented, and how the network learns it.

    Attributes:
        name: folder of the bundle.
        modality: "MR" or "CT"; decides how intensities are normalized and varied.
        classes: names of the structures, in the order of their labels 1, 2, ...
        dataset: name of the folder with `dataset.json`.
        spacing: voxels that the network sees, in mm.
        roi_size: patch, in voxels.
        window: for CT, Hounsfield units that become -1 and 1.
        mirrored: pairs of labels that change places when left and right do; None if the side matters, so that
            images are not mirrored.
        partial_labels: whether structures that are there may not be contoured in some cases.
        largest_component: whether, unless asked otherwise, only the largest component of each structure is kept.
        max_field_of_view: longest axis, in mm, of the images that the network has learned from, if others must be
            cropped; None for any.
        synthetic: what images are made from in training, if the training cases are label maps: their "image" is a map
            of tissues.
        any_contrast: whether intensities are mapped by random curves in training, so that a network learns from one
            contrast to segment others.
        one_piece: whether an image is segmented as a whole, not in patches of `roi_size`.
        validation_cases: whether the cases to validate on are listed in `configs/validation_cases.json`; otherwise
            they are the section "validation" of `dataset.json`.
        channels: of the network, per level.
        couplings: of the network, per level.
        max_epochs: epochs of the full training.
        batch_size: cases per step.
        learning_rate: at the beginning.

    Example:
        >>> task = Task("iunet_liver_ct", "CT", ("liver",), "data", spacing=(1.5, 1.5, 2.0), roi_size=(96, 96, 64))
        >>> from monai_iunet.bundling.new_bundle import bundle_configs
        >>> bundle_configs(task)["train.json"]["network_def"]["_target_"]
        'monai_iunet.SegIUNet'
    """

    name: str
    modality: Literal["MR", "CT"]
    classes: tuple[str, ...]
    dataset: str
    spacing: tuple[float, float, float]
    roi_size: tuple[int, int, int]
    window: tuple[float, float] = (-160.0, 240.0)
    mirrored: tuple[tuple[int, int], ...] | None = None
    partial_labels: bool = False
    largest_component: bool = False
    max_field_of_view: float | None = None
    synthetic: SyntheticImages | None = None
    any_contrast: bool = False
    one_piece: bool = False
    validation_cases: bool = False
    channels: tuple[int, ...] = (32, 64, 128, 256)
    couplings: tuple[int, ...] = (2, 2, 2, 2)
    max_epochs: int = 60
    batch_size: int = 2
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise InputError(f"name {self.name!r}: must consist of letters, digits and underscores.")
        if self.modality not in ("MR", "CT"):
            raise InputError(f"modality {self.modality!r}: must be MR or CT.")
        if not all(self.classes) or len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes {', '.join(self.classes)!r}: must be names that differ from each other.")
        if min(self.spacing) <= 0:
            raise InputError(f"spacing {self.spacing}: must be positive.")
        if len(self.couplings) != len(self.channels):
            raise InputError(f"couplings {self.couplings}: must be one per level, as channels {self.channels} are.")
        factor = 2 ** (len(self.channels) - 1)
        if any(extent <= 0 or extent % factor for extent in self.roi_size):
            raise InputError(f"roi_size {self.roi_size}: must be multiples of {factor}.")

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.classes) + 1


HIPPOCAMPUS = Task(
    name="iunet_hippocampus_mri_segmentation",
    modality="MR",
    classes=("anterior hippocampus", "posterior hippocampus"),
    dataset="Task04_Hippocampus",
    spacing=(1.0, 1.0, 1.0),
    roi_size=(40, 56, 40),
    max_field_of_view=80.0,
    validation_cases=True,
    max_epochs=90,
)

HEADNECK = Task(
    name="iunet_headneck_ct_segmentation",
    modality="CT",
    classes=("brainstem", "spinal cord", "right parotid", "left parotid", "esophagus", "larynx", "mandible"),
    dataset="OpenKBP_HeadNeck",
    spacing=(3.906, 3.906, 2.5),
    roi_size=(56, 48, 48),
    mirrored=((3, 4),),
    partial_labels=True,
    largest_component=True,
    # Depth where it costs little: seven organs in a large field of view need more of it than one hippocampus.
    couplings=(2, 3, 4, 4),
    max_epochs=60,
)

BRAIN = Task(
    name="iunet_brain_mri_segmentation",
    modality="MR",
    classes=tuple(STRUCTURES),
    dataset="SyntheticHeads",
    spacing=(2.0, 2.0, 2.0),
    roi_size=(96, 112, 96),
    mirrored=SWAP,
    synthetic=SyntheticImages(TYPICAL, OUTSIDE, FLUID),
    one_piece=True,
    max_field_of_view=320.0,
    # Few at the finest level, where a channel costs most; the place of a structure in the head is seen at the coarsest.
    channels=(16, 64, 128, 256, 256),
    couplings=(1, 2, 2, 2, 1),
    max_epochs=2000,
    batch_size=1,
)

TASKS = (HIPPOCAMPUS, HEADNECK, BRAIN)
