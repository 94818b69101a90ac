"""What training a bundle's network will hold, and what fits a given memory, as tables."""

from __future__ import annotations

import math
import time
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
from monai_iunet.io.text import times
from monai_iunet.networks.nets.seg_iunet import SegIUNet
from monai_iunet.planning.budget import WAYS, for_a_step, largest_patch, most_couplings
from monai_iunet.planning.plan import plan_training
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.system import available_memory
from monai_iunet.transforms.patches import read_size

__all__ = ["BundleTraining", "inference_table", "read_budget", "read_dtype"]

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
MOST_VOXELS = 2**48  # of an image, beyond which nothing could be counted


def read_budget(gpu_memory: str) -> int:
    """Return the bytes that a step may hold on a GPU of this memory."""
    try:
        return for_a_step(gpu_memory)
    except ValueError as error:
        raise InputError(f"--gpu-memory {gpu_memory}: {error}") from error


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
        if spatial_size is not None and min(spatial_size) < 1:
            raise InputError(f"--patch {times(spatial_size)}: must be positive numbers of voxels, such as 96,96,96.")
        try:
            size = read_size(spatial_size or self._read("roi_size"))
            self.batch_size = int(batch_size or self._read("batch_size"))
            self.network()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self._config}: must have network_def, roi_size and batch_size. {error}") from error
        if isinstance(size, str):
            raise InputError(f"{self._config}: trains on whole images. Say how large one is: --patch 128,128,80.")
        self.spatial_size = size
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
        """Return a table of what a step holds, part by part, by what is kept of activations."""
        with _as_input_error():
            plans = {
                activations: plan_training(self.network(activations=activations), self.spatial_size, **self._options)
                for activations in WAYS
            }
        table = Table(
            "MiB", *plans, title=f"One step, {self.batch_size} x {times(self.spatial_size)} voxels, {self._kind}"
        )
        for field, name in PARTS.items():
            table.add_row(name, *(f"{getattr(plan, field) / 2**20:.1f}" for plan in plans.values()))
        return table

    def fitting(self, budget: int) -> Table:
        """Return a table of what fits a GPU: largest patch of the same proportions, most couplings with this patch."""
        title = f"What fits in {budget / 2**30:.1f} GiB, nine tenths of the GPU, batch {self.batch_size}, {self._kind}"
        table = Table("activations", "largest patch", "its peak, MiB", "most couplings per level", title=title)
        for activations in track(WAYS, "Planning", transient=True):
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
        return times(patch.spatial_size), f"{patch.training_peak / 2**20:.0f}", f"{couplings}{or_more}"

    @property
    def _kind(self) -> str:
        return str(self.dtype).removeprefix("torch.") + ("" if self.dtype == torch.float32 else " autocast")

    @property
    def _options(self) -> dict[str, Any]:
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        return {"batch_size": self.batch_size, "dtype": self.dtype, "loss": loss}


def inference_table(
    bundle: str | Path, image_size: tuple[int, ...], spacing: tuple[float, ...], measure: bool = False
) -> Table:
    """Return a table of what the segmentation of an image holds, part by part, and where.

    Args:
        bundle: its folder.
        image_size: in voxels.
        spacing: in mm.
        measure: whether to run the network on one window, and to say how long all take.

    Raises:
        InputError: when the folder is none of a bundle whose segmentation can be planned, or for sizes of no image.
    """
    asked = f"--image {times(image_size)}, --spacing {times(spacing)}"
    if not all(0 < number < math.inf for number in (*image_size, *spacing)):
        raise InputError(f"{asked}: must be positive, and numbers that are finite.")
    if math.prod(image_size) > MOST_VOXELS:
        raise InputError(f"{asked}: more voxels than any image has. Name its size in voxels, such as 512,512,800.")
    segmenter = BundleSegmenter(bundle)
    with _as_input_error():
        plan = segmenter.plan(image_size, spacing, with_network=True)
    on_gpu = segmenter.device.type != "cpu"
    place = {True: str(segmenter.device), False: "host"}
    table = Table("MiB", "of", "where", title=f"Segmentation of {times(image_size)} voxels of {times(spacing)} mm")
    rows = (
        (plan.image, "image, 2 bytes per voxel", False),
        (plan.preprocessed, "image on the grid of the network", on_gpu),
        (plan.labels, "labels", False),
        (plan.slab, f"a slab of the logits, {times(plan.network_size)} voxels in all", on_gpu),
        (plan.blocks, "probabilities on the grid of the image, block by block", on_gpu),
        (plan.network, f"network with a batch of windows of {times(plan.roi_size)}", on_gpu),
        (plan.peak, "peak, beside Python and PyTorch; the last two not at once", False),
    )
    for size, name, is_there in rows:
        if size:
            table.add_row(f"{size / 2**20:.0f}", name, place[is_there])
    available = available_memory()
    if available is not None:
        verdict = "enough" if plan.peak <= available else "NOT ENOUGH"
        table.add_row(f"{available / 2**20:.0f}", f"available now: {verdict}", "host")
    table.caption = f"{plan.windows} windows"
    if measure:
        window = torch.zeros(1, segmenter.channels, *plan.roi_size, device=segmenter.device)
        with torch.no_grad():
            segmenter.network(window)
            start = time.perf_counter()
            float(segmenter.network(window).sum())  # waits for the device
        seconds = time.perf_counter() - start
        table.caption += f" of {seconds:.2f} s, {seconds * plan.windows:.0f} s in all"
    return table


@contextmanager
def _as_input_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
