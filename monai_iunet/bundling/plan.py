"""What training a bundle's network will hold, and what fits a given memory, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from rich.progress import track
from rich.table import Table

from monai_iunet.errors import InputError
from monai_iunet.networks.nets.seg_iunet import SegIUNet
from monai_iunet.planning.budget import largest_patch, most_couplings, parse_bytes
from monai_iunet.planning.plan import plan_training

__all__ = ["BundleTraining", "read_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_COUPLINGS = 16  # more say little: each further one takes longer to plan
PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer (AdamW)",
    "activations": "activations",
    "loss": "loss (Dice and cross-entropy)",
    "training_peak": "peak of a training step",
    "inference_peak": "peak of an inference pass",
}


def read_dtype(name: str) -> torch.dtype:
    """Return the type of a name."""
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


class BundleTraining:
    """How a bundle trains, as its `train.json` says.

    Args:
        bundle: its folder.
        dtype: of autocast; float32 for none.
        spatial_size: of the patch; by default the bundle's.
        batch_size: patches per step; by default the bundle's.

    Raises:
        InputError: when the folder is none of a bundle of this package.
    """

    def __init__(
        self,
        bundle: str | Path,
        dtype: torch.dtype,
        spatial_size: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._config = Path(bundle, "configs", "train.json")
        if not self._config.is_file():
            raise InputError(f"{self._config}: no such file. Name the folder of a bundle.")
        try:
            self.spatial_size = tuple(spatial_size or self._read("roi_size"))
            self.batch_size = int(batch_size or self._read("batch_size"))
            self.network()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self._config}: must have network_def, roi_size and batch_size. {error}") from error
        self.dtype = dtype

    def _read(self, name: str, **network_arguments: Any) -> Any:
        parser = ConfigParser()
        parser.read_config(self._config)
        for argument, value in network_arguments.items():
            parser[f"network_def#{argument}"] = value
        return parser.get_parsed_content(name)

    def network(self, **changes: Any) -> SegIUNet:
        """Return the network of the bundle, with some of its arguments changed."""
        network: SegIUNet = self._read("network_def", **changes)
        return network

    def parts(self) -> Table:
        """Return a table of what a step holds, part by part, with rebuilt and with stored activations."""
        with _as_input_error():
            plans = {
                activations: plan_training(self.network(activations=activations), self.spatial_size, **self._options)
                for activations in ("invert", "store")
            }
        table = Table(
            "MiB", *plans, title=f"One step, {self.batch_size} x {_size(self.spatial_size)} voxels, {self._kind}"
        )
        for field, name in PARTS.items():
            table.add_row(name, *(f"{getattr(plan, field) / 2**20:.1f}" for plan in plans.values()))
        return table

    def fitting(self, memory: int | str) -> Table:
        """What fits a memory: the largest patch of the same proportions, and the most couplings with this patch."""
        try:
            budget = parse_bytes(memory)
        except ValueError as error:
            raise InputError(f"--gpu-memory {memory}: {error}") from error
        title = f"What fits in {budget / 2**30:.1f} GiB, batch {self.batch_size}, {self._kind}"
        table = Table("activations", "largest patch", "its peak, MiB", "most couplings per level", title=title)
        for activations in track(("invert", "store"), "Planning", transient=True):
            with _as_input_error():
                table.add_row(activations, *self._most(activations, budget))
        return table

    def _most(self, activations: str, budget: int) -> tuple[str, str, str]:
        network = self.network(activations=activations)
        patch = largest_patch(network, budget, self.spatial_size, max(network.iunet.factors), **self._options)
        try:
            couplings, _ = most_couplings(
                lambda couplings: self.network(activations=activations, couplings=couplings),
                budget,
                self.spatial_size,
                MOST_COUPLINGS,
                **self._options,
            )
        except ValueError:  # a smaller patch may still fit
            couplings = 0
        or_more = " or more" if couplings == MOST_COUPLINGS else ""
        return _size(patch.spatial_size), f"{patch.training_peak / 2**20:.0f}", f"{couplings}{or_more}"

    @property
    def _kind(self) -> str:
        return str(self.dtype).removeprefix("torch.") + ("" if self.dtype == torch.float32 else " autocast")

    @property
    def _options(self) -> dict[str, Any]:
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        return {"batch_size": self.batch_size, "dtype": self.dtype, "loss": loss}


@contextmanager
def _as_input_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def _size(extents: Sequence[int]) -> str:
    return " x ".join(map(str, extents))
