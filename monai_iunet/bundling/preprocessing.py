"""Transforms of a bundle's configs: before the network, in training, and of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from monai_iunet.bundling.sections import Config, beyond, divisor, mirrored
from monai_iunet.bundling.task import SyntheticImages, Task
from monai_iunet.errors import InputError

__all__ = [
    "IMAGE_AND_LABEL",
    "READER",
    "Transforms",
    "label_transforms",
    "largest_component",
    "loading",
    "map_labels",
    "other_contrasts",
    "preprocessing",
    "random_transforms",
]

IMAGE_AND_LABEL = ["image", "label"]
# Reads what `monai-iunet segment` reads, and refuses what it refuses.
READER = "monai_iunet.SimpleITKReader"
Transforms = list[Config]


def loading(keys: str | Sequence[str], channels: int = 1) -> Transforms:
    """Return the transforms that load images, or images and labels, and turn them to RAS."""
    load: Transforms = [{"_target_": "LoadImaged", "keys": keys, "reader": READER}]
    if channels > 1:
        load = [{"_target_": "LoadImaged", "keys": "image", "reader": READER, "channels": channels}]
        load += [] if isinstance(keys, str) else [{"_target_": "LoadImaged", "keys": "label", "reader": READER}]
    return [
        *load,
        # Apart, because MONAI Deploy leaves out what loads.
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        # The labels of an affine that leads to RAS, as all readers give it, whatever space the meta data name.
        {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
    ]


def preprocessing(task: Task, keys: str | Sequence[str]) -> Transforms:
    """Return the transforms before the network, of images or of images and labels."""
    both = not isinstance(keys, str)
    transforms = [*loading(keys, task.in_channels), *(map_labels(task, "label") if both else [])]
    if task.modality == "CT":
        # What lies around the scanned region is air, or was never there.
        transforms.append(
            {
                "_target_": "CropForegroundd",
                "keys": keys,
                "source_key": "image",
                "select_fn": "$monai_iunet.is_scanned",
                "allow_smaller": True,
            }
        )
    transforms.append(
        {
            "_target_": "Spacingd",
            "keys": keys,
            "pixdim": "@spacing",
            "mode": ["bilinear", "nearest"] if both else "bilinear",
        }
    )
    transforms += _intensities(task)
    if task.one_piece:  # the network needs a voxel at its coarsest level
        least = 2 ** (len(task.channels) - 1)
        transforms.append({"_target_": "SpatialPadd", "keys": keys, "spatial_size": [least] * 3})
    return transforms


def _intensities(task: Task) -> Transforms:
    """Return the transforms that bring intensities to one scale."""
    if task.modality == "CT":
        low, high = ("$@intensity_window[0]", "$@intensity_window[1]")
        scale = {"a_min": low, "a_max": high, "b_min": -1.0, "b_max": 1.0, "clip": True}
        return [{"_target_": "ScaleIntensityRanged", "keys": "image", **scale}]
    channel_wise = {"channel_wise": True} if task.in_channels > 1 else {}
    low, high = ("$@intensity_percentiles[0]", "$@intensity_percentiles[1]")
    scale = {"lower": low, "upper": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
    return [
        {"_target_": "ScaleIntensityRangePercentilesd", "keys": "image", **scale, **channel_wise},
        _normalized(task),
    ]


def map_labels(task: Task, key: str) -> Transforms:
    """Return the transform that numbers structures 1, 2, ... whose labels in the files have other values."""
    if task.label_values is None:
        return []
    numbers = list(range(1, task.num_classes))
    values = {"orig_labels": list(task.label_values), "target_labels": numbers}
    return [{"_target_": "MapLabelValued", "keys": key, **values}]


def label_transforms(task: Task) -> Transforms:
    """Return what is noted of labels before they are cropped."""
    if not task.partial_labels:
        return []
    note = "monai_iunet.NoteContouredd"
    return [{"_target_": note, "keys": "label", "num_classes": "@num_classes"}]


def random_transforms(task: Task) -> Transforms:
    """Return the transforms of training, which vary patches at random."""
    if task.synthetic:
        return [_synthetic_images(task, task.synthetic), *_intensities(task)]
    transforms: Transforms = [_patch(task)]
    if task.mirrored is not None:
        transforms.append(
            {
                "_target_": "monai_iunet.RandMirrord",
                "keys": IMAGE_AND_LABEL,
                "label_keys": "label",
                "swap": mirrored(task),
            }
        )
    if task.modality == "MR":
        transforms.append({"_target_": "RandGaussianSmoothd", "keys": "image", "prob": 0.15})
        transforms.append({"_target_": "RandBiasFieldd", "keys": "image", "prob": 0.15, "coeff_range": [0.0, 0.2]})
        transforms.append({"_target_": "RandAdjustContrastd", "keys": "image", "prob": 0.2, "gamma": [0.7, 1.5]})
    factor, offset, noise = (0.25, 0.25, 0.15) if task.modality == "MR" else (0.1, 0.1, 0.05)
    transforms += [
        {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.3, "factors": factor},
        {"_target_": "RandShiftIntensityd", "keys": "image", "prob": 0.3, "offsets": offset},
        {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.2, "std": noise},
    ]
    if task.partial_labels:
        transforms.append({"_target_": "monai_iunet.OneHotContouredd", "keys": "label"})
    return (other_contrasts(task) if task.any_contrast else []) + transforms


def other_contrasts(task: Task) -> Transforms:
    """Return what makes an image one of another contrast and resolution, on the scale of intensities that all have.

    It comes before images are padded, so that a network sees other contrasts as it will see them.
    """
    return [
        {"_target_": "monai_iunet.RandIntensityCurved", "keys": "image", "prob": 0.5},
        {"_target_": "RandSimulateLowResolutiond", "keys": "image", "prob": 0.2, "zoom_range": [0.4, 1.0]},
        _normalized(task),
    ]


def _normalized(task: Task) -> Config:
    return {
        "_target_": "NormalizeIntensityd",
        "keys": "image",
        **({"channel_wise": True} if task.in_channels > 1 else {}),
    }


def _patch(task: Task) -> Config:
    """Return the transform that cuts what a step sees, and deforms it."""
    at_structures = task.modality == "CT" if task.sampling is None else task.sampling == "at structures"
    elastic = task.modality == "MR" if task.elastic is None else task.elastic
    deformation: Config = {
        "_target_": "RandAffined",
        "_mode_": "callable",  # it depends on the size of the patch, which may grow
        "keys": IMAGE_AND_LABEL,
        "prob": 0.7,
        "rotate_range": [0.0, 0.0, 0.3] if task.in_plane else [0.3, 0.3, 0.3],
        "scale_range": [0.15, 0.15, 0.15],
        "shear_range": [0.05, 0.05, 0.05],
        "mode": ["bilinear", "nearest"],
        "padding_mode": "border",
    }
    if elastic:
        # Shifts of 0.5 to 2 voxels that vary over some 5 voxels: one structure differs in shape, not in pose alone.
        shifts: Config = {"sigma_range": [4.0, 7.0], "magnitude_range": [50.0, 250.0]}
        deformation = {**deformation, "_target_": "Rand3DElasticd", **shifts}
    patch: Config = {
        "_target_": "monai_iunet.TrainingPatchd",
        "keys": IMAGE_AND_LABEL,
        "roi_size": "@roi_size",
        "deformation": deformation,
        "divisible_by": divisor(task),
        "cval": beyond(task),
    }
    if at_structures:
        # Structures in a large field of view: look where they are, each class as often as the background. CT deformed
        # seldom: voxels of some 4 mm are not many across a parotid, and interpolation blurs them.
        seldom = {"prob": 0.2} if task.modality == "CT" else {}
        patch |= {"num_classes": "@num_classes", "shifted": {**seldom, "translate_range": [6.0, 6.0, 6.0]}}
    return patch


def _synthetic_images(task: Task, synthetic: SyntheticImages) -> Config:
    """Return the transform that makes images from label maps."""
    if len(set(task.spacing)) > 1:
        raise InputError(f"spacing {task.spacing}: images are made with the same along all axes.")
    return {
        "_target_": "monai_iunet.RandSyntheticImaged",
        "keys": "image",
        "label_key": "label",
        "pixdim": "$@spacing[0]",
        "spatial_size": "@roi_size",
        "swap": [list(pair) for pair in task.mirrored or ()],
        **{name: list(values) for name, values in asdict(synthetic).items()},
    }


def largest_component() -> Config:
    """Return the transform that keeps the largest component of each structure, if it is asked for."""
    return {
        "_target_": "monai_iunet.LargestComponentsd",
        "keys": "pred",
        "applied_labels": "$@largest_component if isinstance(@largest_component, list) else [*range(1, @num_classes)]",
        "_disabled_": "$not @largest_component",
    }
