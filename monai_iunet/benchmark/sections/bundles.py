"""Segmenting an image with each bundle on a GPU: what PyTorch allocates at most, weights included, and the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import nibabel
import numpy as np
import torch

from monai_iunet.benchmark.measure import Spread, time_alternately
from monai_iunet.benchmark.section import Job, Row, Section, Settings, number, spread
from monai_iunet.io.bundles import installed_bundles
from monai_iunet.io.text import times
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.whole_head import load_template

__all__ = ["SECTION"]


def _jobs(settings: Settings) -> Iterator[Job]:
    for name in installed_bundles():
        yield Job(name, partial(_measure, settings, name))


def _measure(settings: Settings, name: str) -> list[Row]:
    gc.collect()
    before = torch.cuda.memory_allocated(settings.device)
    segmenter = BundleSegmenter(installed_bundles()[name], settings.device)
    image = _image(name, settings.sizes.time_size)
    segment = partial(segmenter.segment, image)
    segment()
    torch.cuda.reset_peak_memory_stats(settings.device)
    seconds = time_alternately({name: segment}, settings.sizes.rounds, settings.device, settings.deadline)[name]
    allocated = torch.cuda.max_memory_allocated(settings.device) - before
    shape = times(image.shape)
    return [{"bundle": name, "image": shape, "mebibytes": allocated / 2**20, "seconds": Spread.of(seconds)}]


def _image(name: str, size: int) -> nibabel.Nifti1Image:
    """Return the head of the ICBM template for a bundle of MRI, else a cube of CT numbers, of 4 mm."""
    if "mri" in name:
        return load_template(1 if size >= 96 else 2)
    noise = np.random.default_rng(0).integers(-1000, 1000, (size,) * 3)
    return nibabel.Nifti1Image(noise.astype(np.int16), np.diag([4.0, 4.0, 4.0, 1.0]))


SECTION = Section(
    "bundles",
    "Segmenting an image with each bundle: what PyTorch allocates, weights included, and the time",
    (
        ("bundle", "bundle", str),
        ("image", "image", str),
        ("allocated, MiB", "mebibytes", number(0)),
        ("s", "seconds", spread()),
    ),
    _jobs,
    needs_gpu=True,
)
