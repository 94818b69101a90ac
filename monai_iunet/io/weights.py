"""Reading weights that somebody hands in, without running anything that may be in the file, and writing them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_atomically
from monai_iunet.io.text import in_one_line

__all__ = ["read_weights", "weights_file", "write_state"]


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read the state of a network from a `.safetensors` file or one that `torch.save` wrote, without unpickling code.

    With torch before 2.10 even this way of reading a `.pt` file can be abused (advisory GHSA-63cw-57p8-fm3p); take
    weights of strangers as safetensors there.

    Raises:
        InputError: when the file holds no such state.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged files bring about
        raise InputError(
            f"{path}: not the weights of a network. Save its `state_dict()` again. {in_one_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path}: not the weights of a network alone. Save its `state_dict()`.")
    return state


def weights_file(bundle: str | Path, name: str = "model") -> Path:
    """Return the file with weights of a bundle: `models/NAME.pt`, or `models/NAME.safetensors` if that is missing."""
    models = Path(bundle) / "models"
    pickled, safetensors = models / f"{name}.pt", models / f"{name}.safetensors"
    return safetensors if safetensors.is_file() and not pickled.is_file() else pickled


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a network or of a training, whole or not at all.

    Raises:
        OSError: when there is no room for it.
    """
    # Through memory, because of a full disk `torch.save` says only that a position in the file is unexpected.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
