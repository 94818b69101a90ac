"""Images per minute one after another and several at once, in turns: python -m tests.throughput [IMAGES [ROUNDS]].

Segments copies of the MNI152 template, and of its left hippocampus, and draws their pictures, on all cores, with memory
as the command sets it. Run it on a quiet machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from monai_iunet import BundleSegmenter, bundle_folder, load_template
from monai_iunet.segmentation.files import Settings, segment_files
from monai_iunet.segmentation.whole_head import LEFT_BOX


def left_hippocampus() -> nibabel.Nifti1Image:
    template = load_template()
    low, high = (np.linalg.inv(template.affine) @ [*corner, 1] for corner in LEFT_BOX)
    return template.slicer[tuple(slice(int(a), int(b) + 1) for a, b in zip(low[:3], high[:3]))]


def seconds(images: list[Path], segmenter: BundleSegmenter, overlap: bool) -> float:
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        results = list(segment_files(images, segmenter, Path(output), Settings(overlap=overlap)))
        assert len(results) == len(images)
        return time.perf_counter() - start


def compare(title: str, image: nibabel.Nifti1Image, segmenter: BundleSegmenter, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder) / f"image{number}.nii.gz" for number in range(count)]
        for path in images:
            nibabel.save(image, path)
        seconds(images[:2], segmenter, True)  # what is loaded on first use
        turns = [(seconds(images, segmenter, False), seconds(images, segmenter, True)) for _ in range(rounds)]
    quotients = [apart / together for apart, together in turns]
    apart, together = (60 * count / statistics.median(times) for times in zip(*turns))
    sys.stdout.write(
        f"{title}: {apart:.1f} images per minute one after another, {together:.1f} several at once, quotient "
        f"{statistics.median(quotients):.2f} ({min(quotients):.2f}-{max(quotients):.2f})\n"
    )


def main(count: int = 12, rounds: int = 5) -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when the first large tensor is made
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    compare("crops", left_hippocampus(), segmenter, count, rounds)
    compare("whole heads", load_template(), segmenter, count, rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
