"""Take the averaged weights of a training that is still running, or was stopped, into `models/model.pt`.

    python scripts/take_weights.py LAST.pt

The file is the `last.pt` that a training writes after each epoch. Weights are stored with 16 bits, half of the bytes;
what loads them computes with 32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_atomically
from monai_iunet.training.record import write_record


def take(path: Path, target: Path) -> int:
    """Write the averaged weights, and return the epoch that they are of."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: tensor.half() for name, tensor in state["model"].items()}
        epoch, record = int(state["epoch"]), state.get("record")
    except Exception as error:  # whatever a damaged file brings about
        raise InputError(f"{path}: not the last.pt of a training. Name the file in its ckpt_dir.") from error
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, lambda temporary: torch.save(weights, temporary))
    if record:
        write_record(record, target)
    return epoch


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python take_weights.py LAST.pt")
    try:
        taken = take(Path(sys.argv[1]), Path(__file__).parents[1] / "models" / "model.pt")
    except InputError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(f"weights of epoch {taken}\n")
