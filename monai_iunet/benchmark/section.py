"""What a section of the benchmark is made of: settings, jobs, rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from monai_iunet.benchmark.measure import Spread

__all__ = [
    "FULL_CPU",
    "FULL_GPU",
    "QUICK",
    "Column",
    "Job",
    "Row",
    "Section",
    "Settings",
    "Sizes",
    "SkippedError",
    "number",
    "spread",
]

Row = dict[str, Any]  # values that JSON knows, and `Spread`
Column = tuple[str, str, Callable[[Any], str]]  # heading, key in the row, how to write the value


class SkippedError(Exception):
    """What cannot be measured here, with the reason in a line."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        depths: couplings per level, of which memory is measured.
        timed_depth: couplings per level, of which time is measured.
        depth_channels: channels per level of the networks of the section on depth.
        depth_size: voxels along an axis there.
        memory_size: voxels along an axis for the memory of segmentation networks.
        time_size: the same for their time.
        resampling_channels: channels of the tensor that is resampled.
        resampling_size: voxels along an axis of it.
        loss_size: voxels along an axis for losses.
        whole_volume: voxels of a whole image.
        rounds: times that each action is timed.
    """

    depths: tuple[int, ...]
    timed_depth: int
    depth_channels: tuple[int, ...]
    depth_size: int
    memory_size: int
    time_size: int
    resampling_channels: int
    resampling_size: int
    loss_size: int
    whole_volume: tuple[int, int, int]
    rounds: int


FULL_CPU = Sizes((5, 10, 20, 30), 10, (32, 64, 128), 32, 96, 64, 32, 64, 64, (512, 512, 304), rounds=3)
FULL_GPU = Sizes((5, 10, 20, 30), 10, (32, 64, 128), 64, 128, 128, 32, 128, 128, (512, 512, 304), rounds=5)
QUICK = Sizes((2, 4), 2, (8, 16, 32), 16, 32, 32, 8, 32, 32, (64, 64, 32), rounds=1)


@dataclass(frozen=True)
class Settings:
    """Where and how much to measure.

    Attributes:
        device: where the networks run.
        sizes: how much is measured.
        peers: other packages that take part.
        deadline: moment of `time.monotonic()` at which repeated measurements end.
    """

    device: torch.device
    sizes: Sizes
    peers: tuple[str, ...] = ()
    deadline: float = math.inf


@dataclass(frozen=True)
class Job:
    """Something that is measured as a whole; what it found is saved before the next one begins.

    Attributes:
        name: unique in its section.
        measure: returns the rows, or raises `SkippedError`. A row may have the key "skipped", which says why it holds
            nothing else.
    """

    name: str
    measure: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Section:
    """A table of the benchmark.

    Attributes:
        name: for `--section` and in the JSON file.
        title: over the table.
        columns: of the table; those that no row has are left out.
        jobs: returns the jobs in the order of their worth.
        needs_gpu: whether the section is left out elsewhere.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    jobs: Callable[[Settings], Iterator[Job]]
    needs_gpu: bool = False


def spread(scale: float = 1.0, digits: int = 2) -> Callable[[Spread], str]:
    """Write a `Spread`."""
    return lambda value: value.text(scale, digits)


def number(digits: int) -> Callable[[float], str]:
    """Write a number."""
    return lambda value: f"{value:.{digits}f}"
