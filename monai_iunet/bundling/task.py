"""The description of a task: what a bundle segments, and how its network learns."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from monai_iunet.errors import InputError
from monai_iunet.transforms.head_labels import FLUID, OUTSIDE, STRUCTURES, SWAP, TYPICAL
from monai_iunet.transforms.mirror import read_swap
from monai_iunet.transforms.patches import WHOLE, read_size

__all__ = ["BRAIN", "HEADNECK", "HIPPOCAMPUS", "TASKS", "SyntheticImages", "Task"]

MOST_CLASSES = 255  # beside the background


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
        roi_size: patch, in voxels; or "whole", to train and to segment on whole images.
        growing: smaller patches that a training begins with, in order; each gets as long as `roi_size`, the last.
        window: for CT, Hounsfield units that become -1 and 1.
        mirrored: pairs of labels that change places when left and right do; None if the side matters, so that
            images are not mirrored.
        partial_labels: whether structures that are there may not be contoured in some cases.
        largest_component: whether, unless asked otherwise, only the largest component of each structure is kept; or
            the labels of those of which it is.
        max_field_of_view: longest axis, in mm, of the images that the network has learned from, if others must be
            cropped; None for any.
        synthetic: what images are made from in training, if the training cases are label maps: their "image" is a map
            of tissues.
        any_contrast: whether intensities are mapped by random curves in training, so that a network learns from one
            contrast to segment others.
        any_contrast_where_doubted: whether the bundle has second weights, `models/any_contrast.pt`, which have learned
            other contrasts beginning with the first, and segment what is doubtful with the first.
        one_piece: whether an image is segmented as a whole, not in patches of `roi_size`.
        validation_cases: whether the cases to validate on are listed in `configs/validation_cases.json`; otherwise
            they are the section "validation" of `dataset.json`.
        channels: of the network, per level.
        couplings: of the network, per level.
        max_epochs: epochs of the full training.
        batch_size: cases per step.
        learning_rate: at the beginning.
        val_interval: epochs from one validation to the next.
        in_channels: channels of an image.
        label_values: value of each structure in the label files, where they are not 1, 2, ...
        strides: of the network, per downsampling the factor of each axis.
        activations: of the network, "invert", "convolutions" or "store", per level or for all.
        autocast: whether the training runs in bfloat16 on a CPU, too.
        sampling: whether patches are cut "at structures", each class as often as the background, or "anywhere"; by
            default at structures in CT, where they are small in a large field of view.
        elastic: whether images are deformed elastically in training; by default MR images are.
        in_plane: whether images are only rotated about the axis of their thick slices, the last.
        max_seconds: of the training, if it is to last for a time and not for `max_epochs`.
        fold: which part of the training cases is for validation; None for the data set's own validation cases.
        folds: number of such parts.
        left_out: file names of images that are not used, because something is wrong with them.
        judges: file names of images that no network is trained or validated on: they judge networks of several folds.
        members: networks that segment together, as a `SegEnsemble`; 1 for one alone. They are evaluated on the judges,
            or on the data set's own validation cases.

    Raises:
        InputError: for values that no bundle can be made of, such as equal names of classes, a patch that the network
            does not divide, or a number that is not positive.

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
    roi_size: tuple[int, int, int] | Literal["whole"]
    window: tuple[float, float] = (-160.0, 240.0)
    mirrored: tuple[tuple[int, int], ...] | None = None
    partial_labels: bool = False
    largest_component: bool | tuple[int, ...] = False
    max_field_of_view: float | None = None
    synthetic: SyntheticImages | None = None
    any_contrast: bool = False
    any_contrast_where_doubted: bool = False
    one_piece: bool = False
    validation_cases: bool = False
    channels: tuple[int, ...] = (32, 64, 128, 256)
    couplings: tuple[int, ...] = (2, 2, 2, 2)
    max_epochs: int = 60
    batch_size: int = 2
    learning_rate: float = 2e-3
    val_interval: int = 5
    in_channels: int = 1
    label_values: tuple[int, ...] | None = None
    strides: tuple[tuple[int, int, int], ...] | None = None
    activations: str | tuple[str, ...] = "invert"
    autocast: bool = False
    sampling: Literal["at structures", "anywhere"] | None = None
    elastic: bool | None = None
    in_plane: bool = False
    max_seconds: float | None = None
    fold: int | None = None
    folds: int = 5
    left_out: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    members: int = 1
    growing: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise InputError(f"name {self.name!r}: must consist of letters, digits and underscores.")
        if self.modality not in ("MR", "CT"):
            raise InputError(f"modality {self.modality!r}: must be MR or CT.")
        if self.modality == "CT" and (self.any_contrast or self.any_contrast_where_doubted or self.synthetic):
            raise InputError(
                "modality CT: its contrast is the same in all images. Leave out any_contrast and synthetic."
            )
        if not self.classes or not all(self.classes) or len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes {', '.join(self.classes)!r}: must be names that differ from each other.")
        if any(name.casefold() == "background" for name in self.classes):  # whose numbers would be one too high
            raise InputError("classes: the background is label 0 by itself, and no class. Leave it out.")
        special = [name for name in self.classes if name[0] in "$@%" or "#" in name]
        if special:  # the configs read them as expressions, references and paths
            raise InputError(f"classes {', '.join(special)!r}: no name may begin with $, @ or %, or have a #. Rename.")
        for name in (*self.left_out, *self.judges):
            if name[0] in "$@%":  # as in classes
                raise InputError(f"{name}: the name of an image may not begin with $, @ or %. Rename it.")
        if len(self.classes) > MOST_CLASSES:
            raise InputError(
                f"{len(self.classes)} classes: labels are written as bytes, so {MOST_CLASSES} are the most."
            )
        if len(self.spacing) != 3 or not all(0 < size < math.inf for size in self.spacing):
            raise InputError(f"spacing {self.spacing}: must be three positive numbers of millimeters.")
        self._check_numbers()
        self._check_labels()
        if len(self.couplings) != len(self.channels):
            raise InputError(f"couplings {self.couplings}: must be one per level, as channels {self.channels} are.")
        if self.strides is not None and len(self.strides) != len(self.channels) - 1:
            raise InputError(f"strides {self.strides}: must be one less than channels {self.channels}.")
        if self.synthetic and (self.growing or self.roi_size == WHOLE):
            raise InputError("roi_size whole, growing: images that are made have one size. Name it.")
        for size in map(read_size, (*self.growing, self.roi_size)):
            if not isinstance(size, str) and any(extent % factor for extent, factor in zip(size, self.factors)):
                one = len(set(self.factors)) == 1
                raise InputError(f"roi_size {size}: must be multiples of {self.factors[0] if one else self.factors}.")

    def _check_numbers(self) -> None:
        """Refuse numbers with which no training runs, or one that nobody means."""
        for name in ("max_epochs", "batch_size", "val_interval", "in_channels", "members"):
            if (number := getattr(self, name)) < 1:
                raise InputError(f"{name} {number}: must be at least 1.")
        for name in ("learning_rate", "max_seconds", "max_field_of_view"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"{name} {value}: must be a positive number.")
        if not self.window[0] < self.window[1]:
            raise InputError(f"window {self.window}: must be a smaller and a larger intensity.")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise InputError(f"fold {self.fold}: of {self.folds} folds, one from 0 to {self.folds - 1} is needed.")

    def _check_labels(self) -> None:
        """Refuse numbers of structures that are none."""
        values = self.label_values
        if values is not None and (len(set(values)) < len(values) or len(values) != len(self.classes) or 0 in values):
            raise InputError(
                f"label_values {values}: must be one for each of {len(self.classes)} classes, none twice or 0."
            )
        kept = self.largest_component if isinstance(self.largest_component, tuple) else ()
        for name, labels in (("mirrored", sum(read_swap(self.mirrored or ()), ())), ("largest_component", kept)):
            if not all(0 < label <= len(self.classes) for label in labels):
                raise InputError(f"{name} {getattr(self, name)}: must be labels from 1 to {len(self.classes)}.")

    @property
    def factors(self) -> tuple[int, int, int]:
        """Factor of each axis by which the network downsamples in all."""
        if self.strides is None:
            return (2 ** (len(self.channels) - 1),) * 3
        first, second, third = (math.prod(stride[axis] for stride in self.strides) for axis in range(3))
        return first, second, third

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
    any_contrast_where_doubted=True,
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
