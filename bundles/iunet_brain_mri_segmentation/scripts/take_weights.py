"""Take the averaged weights of trainings that are still running, or were stopped, into `models/model.pt`.

    python scripts/take_weights.py LAST.pt ...

Each file is the `last.pt` that a training writes after each epoch. Of several files, each of which went on from the one
before, the mean of the weights is taken. They are stored with 16 bits, half of the bytes; what loads them computes with
32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_atomically
from monai_iunet.training.record import write_record


def take(paths: Sequence[Path], target: Path) -> int:
    """Write the mean of averaged weights, and return the epoch that the last of them are of."""
    states = [_read(path) for path in paths]
    last = states[-1]
    if any(state["model"].keys() != last["model"].keys() for state in states):
        raise InputError(f"{', '.join(map(str, paths))}: of different networks. Name trainings that follow each other.")
    sums = {name: sum(state["model"][name].float() for state in states) for name in last["model"]}
    weights = {name: (tensor / len(states)).half() for name, tensor in sums.items()}
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, lambda temporary: torch.save(weights, temporary))
    if last.get("record"):
        write_record(last["record"], target)
    return int(last["epoch"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {"model": dict(state["model"]), "epoch": int(state["epoch"]), "record": state.get("record")}
    except Exception as error:  # whatever a damaged file brings about
        raise InputError(f"{path}: not the last.pt of a training. Name the file in its ckpt_dir.") from error


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Usage: python take_weights.py LAST.pt ...")
    try:
        taken = take([Path(name) for name in sys.argv[1:]], Path(__file__).parents[1] / "models" / "model.pt")
    except InputError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(f"weights of epoch {taken}\n")
