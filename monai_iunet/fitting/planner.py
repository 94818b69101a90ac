"""Planning for a data set: what the bundle's network sees, what it is and how it learns, each choice with its reason.

Spacing, size and depth follow the rules that nnU-Net found to hold for most data sets (Isensee et al., Nature Methods
2021). The patch does not have to be as small as there: where the memory of a training step, which is counted, and the
time allow it, the patch is the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from monai.losses import DiceCELoss

from monai_iunet.bundling.task import Task
from monai_iunet.errors import InputError
from monai_iunet.fitting.data_choices import (
    choose_field_of_view,
    choose_mirroring,
    choose_missing_labels,
    choose_window,
)
from monai_iunet.fitting.fingerprint import Fingerprint, round_size
from monai_iunet.fitting.limits import Limits
from monai_iunet.fitting.nnunet_rules import factors_of, plan_like_nnunet, target_spacing
from monai_iunet.fitting.plan import Choice, FitPlan
from monai_iunet.io.text import times
from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.networks.nets.architecture import reachable_channels
from monai_iunet.networks.nets.seg_iunet import SegIUNet
from monai_iunet.planning.budget import best_activations, largest_patch
from monai_iunet.planning.plan import TrainingPlan, plan_training
from monai_iunet.training.dataset import FOLDS, patients_of
from monai_iunet.transforms.patches import WHOLE

__all__ = ["Wishes", "count_parts", "largest_image", "make_plan"]

Chosen = TypeVar("Chosen")

CHANNELS = (32, 64, 128, 256, 320)
WANTED_STEPS = 4000  # fewer leave a network of this size undertrained
LONG_STEPS = 10_000  # without a limit of time; within one, the patch is made small enough for as many
LEAST_PATCH = 150_000  # voxels; a patch is smaller only where WANTED_STEPS of so many take too long
STEPS_TO_VALIDATION = 100  # at least, so that small data sets are not validated more than trained
TRAINING_SHARE = 0.85  # of the time; the rest is evaluation
FEWEST_VOXELS = 1000  # of the smallest structure, if voxels are made larger
COARSEST = 2.0  # times the voxels of the images
SMALLEST_MAP = 4  # voxels along an axis of the coarsest level
MOST_BATCH = 8
VOXELS_OF_BATCH = 60_000
DEEPER_FROM = 96  # voxels along each axis that is downsampled: a fifth level sees enough there
ELASTIC_UP_TO = 500_000  # voxels; elastic deformation of larger ones takes longer than their training step
SHORTEST = 32  # voxels along an axis of a patch, unless the image is shorter
LARGE_PATCH = 128**3  # voxels
THICK = 2.0  # slices, times the size of voxels in them
GROWTH = (0.5, 0.75)  # of the length of the patch along each axis, before the patch itself
JUDGED_FROM = 50  # cases: a tenth of fewer would not tell networks apart
JUDGES = 10  # every so many cases


@dataclass(frozen=True)
class Wishes:
    """What is not left to the planner.

    Attributes:
        spacing: of the voxels that the network sees, in mm.
        roi_size: patch, in voxels, or "whole".
        growing: whether the training begins with smaller patches.
        missing_labels: what a structure is in a case whose label has no voxel of it: "background", it is absent, or
            "unlabeled", which is no part of the loss.
        all_cases: whether one more network is trained, on all cases, for the bundle.

    Example:
        >>> Wishes(roi_size="whole").growing
        False
    """

    spacing: tuple[float, ...] | None = None
    roi_size: tuple[int, ...] | str | None = None
    growing: bool = False
    missing_labels: str | None = None
    all_cases: bool = False

    def __post_init__(self) -> None:
        if self.missing_labels not in (None, "background", "unlabeled"):
            raise InputError(f"missing_labels {self.missing_labels!r}: must be background or unlabeled.")
        sizes = (1.0, 1.0, 1.0) if self.spacing is None else self.spacing
        if len(sizes) != 3 or not all(0 < size < math.inf for size in sizes):
            raise InputError(f"spacing {self.spacing}: must be three positive numbers, in mm.")


def make_plan(
    fingerprint: Fingerprint,
    name: str,
    dataset: str,
    limits: Limits,
    folds: int | None = None,
    fold: int | None = None,
    validation_cases: int = 0,
    wishes: Wishes | None = None,
) -> FitPlan:
    """Plan a bundle for a data set.

    Args:
        fingerprint: of the data set.
        name: of the bundle.
        dataset: name of the data set's folder.
        limits: memory and time.
        folds: number of folds that are trained; by default five where the time is enough, else one.
        fold: the only fold to train.
        validation_cases: number of the cases that are the data set's own validation cases.
        wishes: what is not left to the planner.

    Raises:
        InputError: when there are too few cases, or not even the smallest network fits; and for wishes that cannot be.
    """
    return _Planner(fingerprint, limits, wishes or Wishes()).plan(name, dataset, folds, fold, validation_cases)


def count_parts(training_cases: int, folds: int | None, fold: int | None, has_validation: bool) -> int:
    """Return the number of parts into which training cases are split.

    Args:
        training_cases: number of them.
        folds: number of folds that are asked for, if any.
        fold: the only fold to train, if one is asked for.
        has_validation: whether the data set has validation cases of its own.

    Raises:
        InputError: for folds that there cannot be.
    """
    if folds is not None and folds < 1:
        raise InputError(f"{folds} folds: at least one is trained. Name their number, or leave it to the plan.")
    parts = folds if folds and folds > 1 else FOLDS
    if has_validation and folds is None and fold is None:
        return parts
    if folds is None:
        parts = max(2, min(parts, training_cases))
    if training_cases < parts:
        raise InputError(
            f"{training_cases} training cases cannot be split into {parts} folds. At least as many cases as folds are "
            "needed."
        )
    if fold is not None and not 0 <= fold < parts:
        raise InputError(f"fold {fold}: of {parts} folds, one from 0 to {parts - 1} is needed.")
    return parts


class _Planner:
    """Makes the choices of a plan, one after another, and notes the reason of each."""

    def __init__(self, fingerprint: Fingerprint, limits: Limits, wishes: Wishes) -> None:
        self.data = fingerprint
        self.limits = limits
        self.wishes = wishes
        self.choices: list[Choice] = []
        self.in_channels = len(fingerprint.channels)
        self.num_classes = len(fingerprint.structures) + 1
        spacings, shapes = ([getattr(case, name) for case in fingerprint.cases] for name in ("spacing", "shape"))
        self.nnunet = plan_like_nnunet(spacings, shapes, self.num_classes)
        self.target = np.array(target_spacing(spacings, shapes))
        self.extent = np.median([case.extent for case in fingerprint.cases], axis=0)  # mm
        deep = len(fingerprint.structures) >= 5
        self.couplings = (2, 3, 4, 4, 4) if deep else (2, 2, 2, 2, 2)

    def plan(self, name: str, dataset: str, folds: int | None, fold: int | None, validation_cases: int) -> FitPlan:
        """Make all choices."""
        has_validation = validation_cases > 0
        training_cases = len(self.data.cases) - validation_cases
        parts = count_parts(training_cases, folds, fold, has_validation)
        trained = self._folds(parts, folds, fold, has_validation)
        judges = self._judges(len(trained), has_validation)
        if self.wishes.all_cases:
            self._note("network", "one more, of all cases", "as asked; its figures are those of the folds", "fold all")
        in_a_row = math.ceil((len(trained) + self.wishes.all_cases) / self.limits.at_once)
        seconds = None if self.limits.seconds is None else TRAINING_SHARE * self.limits.seconds / in_a_row
        spacing = self._spacing(seconds)
        size = self.extent / spacing
        strides = self._strides(spacing, size)
        is_whole = self.wishes.roi_size == WHOLE
        batch = self._batch(size, training_cases)
        patch, least = self._patch(spacing, size, strides, batch, seconds)
        growing = self._growing(np.minimum(patch, size) if is_whole else np.array(patch), strides)
        step, activations = self._memory(least, patch, strides, batch)
        autocast = self._arithmetic()
        window = self._noted(choose_window(self.data))
        mirrored = self._noted(choose_mirroring(self.data))
        partial = self._partial_labels()
        longest = self._noted(choose_field_of_view(self.data))
        holds_image = not growing and (is_whole or bool((np.array(patch) >= size).all()))
        in_plane = max(spacing) > THICK * min(spacing)
        elastic = self._deformation(patch, in_plane)
        uniform = all(stride == (2, 2, 2) for stride in strides)
        values = self.data.label_values
        interval, epochs = _epochs(training_cases - len(judges), 0 if trained == (None,) else parts, batch)
        task = Task(
            name=name,
            modality=self.data.modality,  # type: ignore[arg-type] # it checks
            classes=self.data.structures,
            dataset=dataset,
            spacing=spacing,
            roi_size="whole" if is_whole else patch,
            growing=growing,
            window=window,
            mirrored=mirrored,
            partial_labels=partial,
            max_field_of_view=longest,
            channels=self._channels(strides),
            couplings=self.couplings[: len(strides) + 1],
            strides=None if uniform else strides,
            activations=activations,
            autocast=autocast,
            batch_size=batch,
            max_epochs=100_000 if seconds else epochs,
            val_interval=interval,
            in_channels=self.in_channels,
            label_values=None if values == tuple(range(1, len(values) + 1)) else values,
            sampling=self._sampling(holds_image),
            elastic=elastic,
            in_plane=in_plane,
            max_seconds=seconds,
            left_out=self.data.left_out,
            fold=trained[0],
            folds=parts,
            judges=judges,
        )
        self._length(seconds, batch * math.prod(size if is_whole else patch), epochs)
        return FitPlan(task, trained, tuple(self.choices), step)

    def _note(self, name: str, value: Any, reason: str, nnunet: Any = "") -> None:
        self.choices.append(Choice(name, str(value), reason, str(nnunet)))

    def _noted(self, found: tuple[Chosen, Choice | None]) -> Chosen:
        """Note the reason of what was chosen, and return what it is."""
        chosen, choice = found
        if choice is not None:
            self.choices.append(choice)
        return chosen

    def _partial_labels(self) -> bool:
        if self.wishes.missing_labels is None:
            return self._noted(choose_missing_labels(self.data))
        partial = self.wishes.missing_labels == "unlabeled"
        self._note("missing labels", "no part of the loss" if partial else "background", "as asked", "background")
        return partial

    def _folds(self, parts: int, folds: int | None, fold: int | None, has_validation: bool) -> tuple[int | None, ...]:
        """Choose which folds are trained, of the parts into which the cases are split."""
        if has_validation and folds is None and fold is None:
            self._note("folds", "1", "the data set has validation cases of its own", 5)
            return (None,)
        if fold is not None or folds == 1:
            self._note("folds", f"fold {fold or 0} of {parts}", "as asked", 5)
            return (fold or 0,)
        if folds is None and self.limits.seconds is not None:
            trainings = parts + self.wishes.all_cases
            needed = WANTED_STEPS * self._voxels_of_step() * math.ceil(trainings / self.limits.at_once)
            if needed > self._voxels_in(TRAINING_SHARE * self.limits.seconds):
                self._note("folds", f"fold 0 of {parts}", f"the time is not enough for {parts} trainings", 5)
                return (0,)
        self._note("folds", parts, "as asked" if folds else "each case is validated once, by a network without it", 5)
        return tuple(range(parts))

    def _judges(self, trainings: int, has_validation: bool) -> tuple[str, ...]:
        """Choose cases that no network is trained on, which compare the best network of a fold and all together."""
        if trainings < 2 or self.wishes.all_cases:
            return ()
        if has_validation:
            self._note("judges", "validation cases", "the data set has cases that no fold is trained on", "none")
            return ()
        if len(self.data.cases) < JUDGED_FROM:
            reason = f"of fewer than {JUDGED_FROM} cases none can be spared: the best network is used, not an ensemble"
            self._note("judges", "none", reason, "none")
            return ()
        found = sorted(Path(case.name).name for case in self.data.cases)
        patients = patients_of(found, FOLDS)
        judging = set(list(dict.fromkeys(patients))[JUDGES // 2 :: JUDGES])
        names = [name for name, patient in zip(found, patients) if patient in judging]
        if not names:
            reason = f"of {len(set(patients))} patients none can be spared: the best network is used, not an ensemble"
            self._note("judges", "none", reason, "none")
            return ()
        reason = "no network is trained on them: they tell whether the ensemble of the folds is better than the best"
        self._note("judges", f"{len(names)} cases", reason, "none")
        return tuple(names)

    def _voxels_of_step(self) -> float:
        """Count about how many voxels a step takes: two median images or parts of larger ones, or what is asked for."""
        wished = self.wishes.roi_size
        if isinstance(wished, tuple):
            return 2.0 * math.prod(wished)
        voxels = float(np.prod(self.extent / (self.wishes.spacing or self.target)))
        return voxels if wished == WHOLE else 2 * min(voxels, LARGE_PATCH)

    def _voxels_in(self, seconds: float) -> float:
        return math.inf if self.limits.speed is None else seconds * self.limits.speed

    def _spacing(self, seconds: float | None) -> tuple[float, float, float]:
        """Choose the spacing: that of the images, or a coarser one where the time is short."""
        target = self.target
        if self.wishes.spacing is not None:
            self._note("spacing, mm", times(self.wishes.spacing), "as asked", times(self.nnunet.spacing))
            first, second, third = self.wishes.spacing
            return first, second, third
        volumes = [
            float(np.median(found))
            for number in range(len(self.data.structures))
            if (found := [case.volumes[number] for case in self.data.cases if case.volumes[number] > 0])
        ]
        reason = "the median of the images"
        chosen = target
        if seconds is not None:
            for factor in np.arange(1.0, COARSEST + 0.01, 0.05):
                coarser = np.maximum(target, target.min() * factor)
                if factor > 1 and min(volumes) / coarser.prod() < FEWEST_VOXELS:
                    break
                chosen = coarser
                if 2 * np.prod(self.extent / coarser) * WANTED_STEPS <= self._voxels_in(seconds):
                    break
            if (chosen > target).any():
                reason = (
                    f"coarser than the images' {times(target)}: so many voxels can be trained in the time, and the "
                    f"smallest structure has {min(volumes) / chosen.prod():.0f} of them"
                )
        first, second, third = (round_size(float(size), 3) for size in chosen)
        self._note("spacing, mm", times((first, second, third)), reason, times(self.nnunet.spacing))
        return first, second, third

    def _strides(self, spacing: Sequence[float], size: np.ndarray) -> tuple[tuple[int, int, int], ...]:
        """Choose the strides: an axis is halved while its voxels are not thicker than the others', and enough."""
        sizes, voxels = np.array(size, dtype=float), np.array(spacing, dtype=float)
        strides: list[tuple[int, int, int]] = []
        while len(strides) < len(CHANNELS) - 1:
            possible = sizes >= 2 * SMALLEST_MAP
            if not possible.any() or (len(strides) == 3 and sizes.max() * 8 < DEEPER_FROM):
                break
            halved = possible & (voxels < 2 * voxels[possible].min())
            strides.append(tuple(2 if part else 1 for part in halved))  # type: ignore[arg-type] # three axes
            sizes, voxels = np.where(halved, np.ceil(sizes / 2), sizes), np.where(halved, 2 * voxels, voxels)
        if not strides:
            raise InputError(f"Images of {times(np.round(size))} voxels are too small: at least 8 along an axis.")
        self._note(
            "levels",
            f"{len(strides) + 1}, strides {_strides_text(strides)}",
            "an axis is halved as long as its voxels are the smaller ones and 4 remain",
            f"{len(self.nnunet.strides) + 1}, strides {_strides_text(self.nnunet.strides)}",
        )
        channels, couplings = self._channels(strides), self.couplings[: len(strides) + 1]
        self._note(
            "channels, couplings",
            f"{', '.join(map(str, channels))}; {', '.join(map(str, couplings))}",
            "depth costs no activations: more of it for five structures or more"
            if self.couplings[1] > 2
            else "what the bundles of this package were trained with",
            "32 to 320 channels, 2 convolutions per stage",
        )
        return tuple(strides)

    def _channels(self, strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
        return reachable_channels(CHANNELS[: len(strides) + 1], strides)

    def _network(self, strides: Sequence[Sequence[int]], **options: Any) -> SegIUNet:
        return SegIUNet(
            3,
            self.in_channels,
            self.num_classes,
            self._channels(strides),
            strides=strides,
            couplings=self.couplings[: len(strides) + 1],
            **options,
        )

    def _batch(self, size: np.ndarray, cases: int) -> int:
        """Choose the patches per step: two, and more of small images; whole images, whose sizes differ, one by one."""
        if self.wishes.roi_size == WHOLE:
            self._note("batch", 1, "whole images differ in size", self.nnunet.batch_size)
            return 1
        batch = int(min(max(2, VOXELS_OF_BATCH // np.prod(size)), MOST_BATCH, max(1, cases // 2)))
        self._note("batch", batch, "two, more only where images are small", self.nnunet.batch_size)
        return batch

    def _patch(
        self,
        spacing: Sequence[float],
        size: np.ndarray,
        strides: Sequence[Sequence[int]],
        batch: int,
        seconds: float | None,
    ) -> tuple[tuple[int, int, int], TrainingPlan]:
        """Choose the patch: the whole image, or the largest that memory and time allow.

        Returns:
            Its size, where images are seen whole that of the largest; and the plan of a step that stores nothing.
        """
        factors = factors_of(strides)
        if self.wishes.roi_size is not None:
            return self._wished_patch(spacing, strides, batch)
        whole = [math.ceil(round(length, 3) / factor) * factor for length, factor in zip(size, factors)]
        chosen, reason = whole, "the whole image at the median size fits"
        options = {"batch_size": batch, **self._step_options}
        if seconds is not None:
            # Many steps of a part of the image reached more than few of the whole: see guides/whole_images.md.
            voxels = self._voxels_in(seconds) / batch
            in_time = max(voxels / LONG_STEPS, min(voxels / WANTED_STEPS, LEAST_PATCH))
            if math.prod(whole) > in_time:
                # Of the same length in mm along each axis, rounded up.
                cube = (in_time * math.prod(spacing)) ** (1 / 3)
                chosen = [
                    min(max(math.ceil(cube / part / factor), math.ceil(SHORTEST / factor)) * factor, most)
                    for part, factor, most in zip(spacing, factors, whole)
                ]
            if chosen != whole:
                reason = (
                    f"the image at the median size is {times(whole)}, of this part of it about "
                    f"{voxels / math.prod(chosen):.0f} steps can be trained in the time"
                )
        network, limit = self._network(strides), f"fits {self.limits.memory / 2**30:.1f} GiB"
        least = None
        try:
            least = plan_training(network, chosen, **options)
        except ValueError:
            limit += ", in tensors of fewer than 2^31 values, which convolutions take"
        if least is None or least.training_peak > self.limits.memory:
            extent = size * np.array(spacing)
            # Of images that are long along one axis no longer a part than twice the shortest.
            aspect = np.minimum(extent, 2 * extent.min()) / np.array(spacing)
            memory = self.limits.memory
            try:
                least = largest_patch(network, memory, aspect.tolist(), factors, largest=chosen, **options)
            except ValueError as error:
                raise InputError(f"--gpu-memory: {error}") from error
            chosen = list(least.spatial_size)
            reason = f"the image at the median size is {times(whole)}, this is the largest part of it that {limit}"
        self._note("patch", times(chosen), reason, times(self.nnunet.patch))
        first, second, third = chosen
        return (first, second, third), least

    def _wished_patch(
        self, spacing: Sequence[float], strides: Sequence[Sequence[int]], batch: int
    ) -> tuple[tuple[int, int, int], TrainingPlan]:
        """Return what `_patch` does for the patch that was asked for, after checking that it fits."""
        factors, wished = factors_of(strides), self.wishes.roi_size
        largest = largest_image(self.data, spacing, factors)
        chosen = list(largest if isinstance(wished, str) or wished is None else wished)
        try:
            least = plan_training(self._network(strides), chosen, batch_size=batch, **self._step_options)
        except ValueError as error:  # as of more values than convolutions take
            raise InputError(
                f"roi_size {wished if isinstance(wished, str) else times(chosen)}: {error} To change the plan, name "
                "larger voxels (--spacing) or a smaller patch (--roi-size)."
            ) from error
        held, memory = least.training_peak, self.limits.memory
        if held > memory:
            raise InputError(
                f"roi_size {wished if isinstance(wished, str) else times(chosen)}: a step of {times(chosen)} voxels "
                f"takes {held / 2**30:.1f} GiB, there are {memory / 2**30:.1f}. Allow more (--gpu-memory), larger "
                "voxels (--spacing), or leave the choice to the plan."
            )
        if wished == WHOLE:
            self._note(
                "patch",
                "whole images",
                f"as asked. Each is padded to multiples of {times(factors)} voxels; the largest has {times(chosen)}. "
                "Images are segmented whole too, in windows only where the memory that is free does not take them",
                times(self.nnunet.patch),
            )
        else:
            self._note("patch", times(chosen), "as asked", times(self.nnunet.patch))
        first, second, third = chosen
        return (first, second, third), least

    def _growing(self, size: np.ndarray, strides: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
        """Choose the patches that a training begins with."""
        if not self.wishes.growing:
            return ()
        factors = np.array(factors_of(strides))
        sizes: list[tuple[int, ...]] = []
        for part in GROWTH:
            # Of more than one voxel at the coarsest level, as a normalization needs.
            counts = np.maximum(np.round(size * part / factors), 2).astype(int)
            smaller = tuple(int(extent) for extent in np.minimum(counts * factors, np.ceil(size / factors) * factors))
            if smaller not in sizes and math.prod(smaller) < np.prod(size):
                sizes.append(smaller)
        if sizes:
            names = ", ".join(map(times, sizes))
            reason = "as asked: a step of a small patch is fast; each size has an equal share of the training"
            self._note("growing patches", f"{names}, then the patch", reason, "one size")
        return tuple(sizes)  # type: ignore[arg-type] # three axes

    @property
    def _step_options(self) -> dict[str, Any]:
        """Arguments of `plan_training`, without the batch."""
        kind = ChunkedDiceCELoss if self.wishes.roi_size == WHOLE else DiceCELoss
        loss = kind(to_onehot_y=True, softmax=True)
        return {"in_channels": self.in_channels, "dtype": self.limits.dtype, "loss": loss}

    def _memory(
        self, least: TrainingPlan, patch: Sequence[int], strides: Sequence[Sequence[int]], batch: int
    ) -> tuple[TrainingPlan, str | tuple[str, ...]]:
        """Choose what each level keeps of its activations: as much as fits, which is faster."""
        memory = self.limits.memory

        def plan(activations: str | tuple[str, ...]) -> TrainingPlan:
            network = self._network(strides, activations=activations)
            return plan_training(network, patch, batch_size=batch, **self._step_options)

        activations: str | tuple[str, ...] = "store"
        step = plan(activations)
        if step.training_peak > memory:
            beside = least.optimizer_state + least.loss
            shape = (batch, self.in_channels, *patch)
            activations = best_activations(self._network(strides), max(memory - beside, 1), shape, self.limits.dtype)
            step = plan(activations)
        if step.training_peak > memory or set(activations) == {"invert"}:
            activations, step = "invert", least
        text = activations if isinstance(activations, str) else ", ".join(activations)
        self._note(
            "activations",
            text,
            f"a step holds {step.training_peak / 2**20:.0f} MiB of {memory / 2**20:.0f}, and "
            f"{least.training_peak / 2**20:.0f} where all are rebuilt; what is kept need not be computed again",
            "store",
        )
        return step, activations

    def _arithmetic(self) -> bool:
        """Choose in what a CPU trains; return whether that is bfloat16."""
        gain = self.limits.gain
        if self.limits.dtype == torch.float32:
            reason = (
                "16 bits are for CPUs and CUDA" if gain is None else "this processor is not much faster in bfloat16"
            )
            self._note("arithmetic", "float32", reason, "float32 on a CPU")
            return False
        if gain is None:
            self._note("arithmetic", "16 bits", "MONAI's automatic mixed precision, as on every GPU", "16 bits")
            return False
        reason = f"this processor trains {gain:.1f} times as many voxels in the same time as in float32"
        self._note("arithmetic", "bfloat16", reason, "float32 on a CPU")
        return True

    def _sampling(self, holds_image: bool) -> Literal["at structures", "anywhere"]:
        if holds_image and not self.wishes.growing:
            self._note("sampling", "anywhere", "a patch holds the whole image", "a third at structures")
            return "anywhere"
        reason = "each structure is as often in the middle of a patch as the background, rare ones too"
        if self.wishes.growing:
            reason = "patches are small at first: each structure is as often in their middle as the background"
        self._note("sampling", "at structures", reason, "a third at structures")
        return "at structures"

    def _deformation(self, patch: Sequence[int], in_plane: bool) -> bool:
        elastic, kind = False, "affine"
        if in_plane:
            kind, reason = "affine, rotated in the plane of the slices only", "slices are thick"
        elif math.prod(patch) > ELASTIC_UP_TO:
            reason = "elastic deformation would take longer than the training of a step"
        elif self.data.modality == "CT":
            reason = "as in the bundle of this package for CT"
        else:
            elastic, kind, reason = True, "elastic", "shapes differ"
        self._note("augmentation", f"{kind}, intensities", reason, "affine")
        return elastic

    def _length(self, seconds: float | None, voxels_of_step: float, epochs: int) -> None:
        if seconds is None:
            self._note("length", f"{epochs} epochs", f"about {LONG_STEPS} steps", "1000 epochs of 250 steps")
            return
        steps = self._voxels_in(seconds) / voxels_of_step
        about = "" if not math.isfinite(steps) else f": about {steps:.0f} steps"
        few = f", fewer than the {WANTED_STEPS} that are wanted" if steps < 0.8 * WANTED_STEPS else ""
        reason = f"{TRAINING_SHARE:.0%} of the time{about}{few}"
        length = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
        self._note("length", f"{length} per fold", reason, "1000 epochs of 250 steps")


def _epochs(cases: int, parts: int, batch: int) -> tuple[int, int]:
    """Return after how many epochs to validate, and how many there are without a limit of time.

    Args:
        cases: that can be trained on.
        parts: into which they are split, one to validate on; 0 where other cases are for that.
        batch: cases per step.
    """
    per_epoch = max(1, (cases - (math.ceil(cases / parts) if parts else 0)) // batch)
    interval = max(5, math.ceil(STEPS_TO_VALIDATION / per_epoch))
    return interval, math.ceil(LONG_STEPS / per_epoch / interval) * interval


def largest_image(fingerprint: Fingerprint, spacing: Sequence[float], factors: Sequence[int]) -> tuple[int, int, int]:
    """Return the size of the image with the most voxels of a spacing, in mm, rounded up to multiples of the factors."""
    sizes = [np.array(case.extent) / spacing for case in fingerprint.cases]
    first, second, third = max((np.ceil(np.round(size, 3) / factors) * factors for size in sizes), key=np.prod)
    return int(first), int(second), int(third)


def _strides_text(strides: Sequence[Sequence[int]]) -> str:
    return ", ".join("".join(map(str, stride)) for stride in strides)
