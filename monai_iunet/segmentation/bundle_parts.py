"""The parts of a bundle that segment images, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from monai_iunet.errors import InputError
from monai_iunet.inference.labels import check_postprocessing
from monai_iunet.io.bundles import read_config
from monai_iunet.io.text import first_line, in_one_line
from monai_iunet.io.weights import read_weights, weights_file
from monai_iunet.training.record import check_training, training_record

__all__ = ["BundleParts", "read_parts"]

REQUIRED = ("configs/inference.json", "configs/metadata.json")
SECTIONS = ("network_def", "inferer", "preprocessing", "postprocessing")  # in the order of the parts
# What a training is given by these names.
GIVEN = ("num_classes", "roi_size", "spacing", "intensity_window", "intensity_percentiles")


@dataclass(frozen=True)
class BundleParts:
    """Holds what a bundle segments images with.

    Attributes:
        metadata: its `configs/metadata.json`.
        channels: of its images.
        network: with its weights.
        inferer: runs the network on an image.
        preprocessing: transforms that turn a loaded image into what the network sees.
        postprocessing: transforms that turn logits, or labels, into what is saved.
    """

    metadata: dict[str, Any]
    channels: int
    network: Any
    inferer: Any
    preprocessing: Any
    postprocessing: Any


def read_parts(folder: Path, weights: str, device: torch.device, with_probabilities: bool) -> BundleParts:
    """Read a bundle, without what loads and saves files, and check that its parts belong together.

    Args:
        folder: the bundle.
        weights: name of the weights.
        device: that its config names for the inferer.
        with_probabilities: whether its postprocessing is to give probabilities.

    Raises:
        InputError: when the folder is not a bundle, or cannot be used here.
    """
    _check_files(folder, weights)
    metadata, channels = _read_metadata(folder)
    parser = _inference_config(folder, device, with_probabilities)
    try:
        parts = BundleParts(metadata, channels, *(parser.get_parsed_content(name) for name in SECTIONS))
    except Exception as error:  # whatever the components of a bundle may raise
        raise InputError(
            f"{folder}: its inference.json cannot be used here ({type(error).__name__}: {first_line(error)}). "
            "Segment with `python -m monai.bundle run`, as its README says."
        ) from error
    try:
        check_postprocessing(parts.inferer, parts.postprocessing)
    except InputError as error:
        raise InputError(f"{folder}: its inference.json cannot be used, {error}") from error
    file = weights_file(folder, weights)
    try:
        parts.network.load_state_dict(read_weights(file))
    except RuntimeError as error:
        raise InputError(f"{file}: does not fit the network of the bundle: {in_one_line(error)}") from error
    values = {name: parser.get_parsed_content(name) for name in GIVEN if name in parser.get()}
    check_training(file, training_record(parts.network, parts.preprocessing, **values))
    return parts


def _check_files(folder: Path, weights: str) -> None:
    """Check that the folder holds what a bundle needs to segment."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    missing += [] if weights_file(folder, weights).is_file() else [f"models/{weights}.pt"]
    if missing:
        raise InputError(f"{folder}: not a bundle with weights, {', '.join(missing)} is missing. Name its folder.")


def _read_metadata(folder: Path) -> tuple[dict[str, Any], int]:
    """Read the metadata and the number of channels, and check that they say what classes and images are."""
    path = folder / "configs" / "metadata.json"
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        formats = metadata["network_data_format"]
        classes = formats["outputs"]["pred"]["channel_def"]
        if not all(str(value).isdigit() and isinstance(name, str) for value, name in classes.items()):
            raise ValueError("channel_def must name each class by its number")
        if sorted(map(int, classes)) != list(range(len(classes))) or len(set(classes.values())) < len(classes):
            raise ValueError("channel_def must have the numbers 0, 1, 2, ... and as many different names")
        formats["inputs"]["image"]["format"]
        channels = int(formats["inputs"]["image"].get("num_channels", 1))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: does not describe a segmentation of `image` into the classes of `pred` ({error!r}). Add "
            "network_data_format with inputs, outputs and channel_def, as in the bundles of this package."
        ) from error
    return metadata, channels


def _inference_config(folder: Path, device: torch.device, with_probabilities: bool) -> ConfigParser:
    """Read `inference.json` without what loads and saves files."""
    parser = read_config(folder / "configs" / "inference.json")
    parser["bundle_root"] = str(folder.absolute())  # MONAI evaluates text that begins with $, @ or %
    parser["device"] = device
    missing = [name for name in SECTIONS if name not in parser.get()]
    if missing:
        raise InputError(
            f"{folder}: its inference.json has no {', '.join(missing)}, by which images are segmented here. "
            "Segment with `python -m monai.bundle run`, as its README says."
        )
    if with_probabilities:
        if "save_probabilities" not in parser.get():
            raise InputError(f"{folder}: its inference.json has no `save_probabilities`. Segment without them.")
        parser["save_probabilities"] = True
    _leave_out(parser, "preprocessing", "LoadImaged")
    _leave_out(parser, "postprocessing", "SaveImaged", "SaveImageLabelsd")
    return parser


def _leave_out(parser: ConfigParser, section: str, *names: str) -> None:
    """Take transforms out of the `Compose` of a section, by the names of their classes."""
    content = parser[section]
    if not isinstance(content, dict) or not isinstance(content.get("transforms"), list):
        return
    parser[section]["transforms"] = [
        transform
        for transform in content["transforms"]
        if not (isinstance(transform, dict) and str(transform.get("_target_")).rpartition(".")[2] in names)
    ]
