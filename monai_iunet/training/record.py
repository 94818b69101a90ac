"""What a training was given, kept beside its weights: the patch, the voxels, the intensities, the classes, the network.

Weights are right for one preprocessing and one window only, and a file of weights does not say which. So a training
writes `training.json` beside them. Evaluation, inference and `segment` take their values from there; a config or an
override that says otherwise is noticed.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_text
from monai_iunet.io.text import first_line

__all__ = [
    "check_training",
    "differences",
    "record_file",
    "trained_value",
    "training_record",
    "write_record",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# They read or arrange files; what they do is not part of what a network learns.
NOT_LEARNED = ("LoadImaged", "EnsureChannelFirstd")


def record_file(checkpoint: str | Path) -> Path:
    """Return the file that says what the training of weights was given.

    Example:
        >>> record_file("models/model.pt").name
        'training.json'
    """
    return Path(str(checkpoint)).with_name("training.json")


def training_record(network: nn.Module, transforms: Any, **values: Any) -> Record:
    """Describe what a training is given, in numbers and text alone.

    Args:
        network: that is trained.
        transforms: a list of transforms, or a `Compose`; what they do to "image" is described.
        values: by their names in the config, such as `roi_size`.

    Example:
        >>> from monai.transforms import ScaleIntensityRanged
        >>> transforms = [ScaleIntensityRanged("image", a_min=-160, a_max=240, b_min=-1, b_max=1)]
        >>> record = training_record(nn.Conv3d(1, 2, 1), transforms, roi_size=(96, 72, 48))
        >>> record["roi_size"], record["network"]["layers"], record["preprocessing"][0]["scaler"]["a_max"]
        ([96, 72, 48], '1 Conv3d', 240)
    """
    return {
        **{name: _plain(value) for name, value in values.items()},
        "network": _describe_network(network),
        "preprocessing": _describe_transforms(transforms),
    }


def write_record(record: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Write what a training was given beside its weights."""
    write_text(record_file(checkpoint), json.dumps(record, indent=1) + "\n")


def trained_value(checkpoint: str | Path, name: str, default: Any) -> Any:
    """Return a value that the training of weights was given.

    Args:
        checkpoint: file of the weights.
        name: of the value.
        default: where nothing is known of the training.

    Raises:
        InputError: when what lies beside the weights is no record.

    Example:
        >>> trained_value("model_of_somebody.pt", "roi_size", [96, 96, 96])
        [96, 96, 96]
    """
    return _read_record(checkpoint).get(name, default)


def check_training(checkpoint: str | Path, used: Mapping[str, Any]) -> None:
    """Compare what weights were trained with and what they are used with.

    Values that differ can only have been overridden, and are named in a warning. A preprocessing or a network that
    differs is an error, unless it follows from such a value.

    Args:
        checkpoint: file of the weights; without a record beside it there is nothing to compare.
        used: see `training_record`.

    Raises:
        InputError: when network or preprocessing are not those of the training.

    Example:
        >>> check_training("model_of_somebody.pt", {"roi_size": [96, 96, 96]})
    """
    record = _read_record(checkpoint)
    values = {name: value for name, value in used.items() if name not in ("network", "preprocessing")}
    overridden = list(differences(record, values))
    deeper = list(differences({name: record.get(name) for name in ("network", "preprocessing")}, used))
    if deeper and not overridden:
        raise InputError(
            f"{checkpoint}: trained with {deeper[0][1]} for {deeper[0][0]}, used with {deeper[0][2]}"
            f"{f' and {len(deeper) - 1} more' if len(deeper) > 1 else ''}. Pass what was passed to the training, or "
            f"remove {record_file(checkpoint).name} beside the weights to use them all the same."
        )
    for name, trained, now in (*overridden, *deeper):
        logger.warning("%s: trained with %s for %s, used with %s", checkpoint, trained, name, now)


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of what differs in two records; what only one has is left out.

    Versions of MONAI differ in what their transforms keep.

    Example:
        >>> list(differences({"spacing": [1, 1, 2], "a": 1}, {"spacing": [1, 1, 1], "b": 1}))
        [('spacing[2]', 2, 1)]
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in first:
            if key in second:
                yield from differences(first[key], second[key], f"{name}.{key}" if name else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second)):
            yield from differences(*pair, f"{name}[{number}]")
    elif first is not None and first != second:
        yield name, _short(first), _short(second)


def _short(value: Any) -> Any:
    """Return a value as a message names it: of transforms their names."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return ", ".join(str(part.get("name")) for part in value)
    return value


def _read_record(checkpoint: str | Path) -> Record:
    path = record_file(checkpoint)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no dictionary")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not what a training was given ({first_line(error)}). Copy it again, or remove it."
        ) from error
    return record


def _describe_network(network: nn.Module) -> Record:
    """Describe a network by its layers without parameters too, which weights do not show: activations, say."""
    layers = Counter(type(module).__name__ for module in network.modules() if not list(module.children()))
    description: Record = {"layers": ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))}
    design = getattr(getattr(network, "iunet", None), "design", None)
    if design is not None:
        description |= {name: _plain(getattr(design, name)) for name in ("channels", "strides", "couplings")}
    return description


def _describe_transforms(transforms: Any, key: str = "image") -> list[Record]:
    """Describe what transforms do to an entry of a case, by their attributes."""
    described = []
    for transform in getattr(transforms, "transforms", transforms):
        keys = list(getattr(transform, "keys", ()))
        name = type(transform).__name__
        if key not in keys or name in NOT_LEARNED:
            continue
        attributes = {
            # One value per key is a sequence as long as the keys are.
            attribute: value[keys.index(key)] if isinstance(value, (tuple, list)) and len(value) == len(keys) else value
            for attribute, value in vars(transform).items()
            if attribute not in ("keys", "allow_missing_keys")
        }
        described.append({"name": name, **_plain(attributes)})
    return described


def _plain(value: Any) -> Any:
    """Return a value in what JSON knows; of objects their public attributes."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items() if not str(name).startswith("_")}
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(part) for part in value]
    if isinstance(value, (type, torch.dtype)) or callable(value):
        name = getattr(value, "__name__", None)
        described = name is None or type(value).__module__.startswith("monai.")
        own = _plain(getattr(value, "__dict__", {})) if described else {}
        return own or name or _without_addresses(value)
    return _plain(vars(value)) if hasattr(value, "__dict__") else _without_addresses(value)


def _without_addresses(value: Any) -> str:
    """Return the text of an object without where it lies in the memory, which is another place in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
