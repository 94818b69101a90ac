"""Compare what the bundle finds with manual labels of the MICCAI 2012 challenge, in images as they are and changed.

    python scripts/evaluate_manual_brains.py FOLDER

The folder has `images` and `labels`, of the same names. Printed are tables of Dice: per structure, if the bundle has
weights; and of the hippocampi that `monai-iunet segment` finds in the whole heads, and that it finds where the centers
of the manual labels say the head is. The protocols differ: the bundle gives the vermis to the
sides of the cerebellum and lesions to the white matter, counts the choroid plexus to the ventricles, and has the fluid
around the brain, which the challenge has not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.read import read_image
from monai_iunet.io.weights import weights_file
from monai_iunet.segmentation.landmarks import locate_head, structure_centers
from monai_iunet.segmentation.segmenter import BundleSegmenter

BUNDLE = Path(__file__).parents[1]
# The challenge's numbers on the left and on the right, or in the middle.
PAIRED = {
    "hippocampus": ([48], [47]),
    "amygdala": ([32], [31]),
    "thalamus": ([60], [59]),
    "caudate": ([37], [36]),
    "putamen": ([58], [57]),
    "pallidum": ([56], [55]),
    "accumbens": ([30], [23]),
    "ventral diencephalon": ([62], [61]),
    "lateral ventricle": ([50, 52], [49, 51]),
    "cerebral cortex": ([*range(101, 208, 2)], [*range(100, 208, 2)]),
    "cerebral white matter": ([45], [44]),
    "cerebellum": ([39, 41], [38, 40]),
}
MIDDLE = {"brainstem": [35], "third ventricle": [4], "fourth ventricle": [11]}
DEEP = ("hippocampus", "amygdala", "thalamus", "caudate", "putamen", "pallidum", "accumbens")

Change = Callable[[np.ndarray], np.ndarray]


def inverted(data: np.ndarray) -> np.ndarray:
    """Return the brain with dark and bright exchanged."""
    return np.where(data > 0, data.max() - data, 0)


def thick_slices(data: np.ndarray) -> np.ndarray:
    """Slices of 3 mm from the bottom to the top."""
    return ndimage.uniform_filter1d(data, 3, axis=2)


CHANGES: dict[str, Change] = {
    "as it is": lambda data: data,
    "inverted": inverted,
    "3 mm slices": thick_slices,
}


def dice(found: np.ndarray, true: np.ndarray) -> float:
    """Dice of two masks."""
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def brain_dice(segmenter: BundleSegmenter, image: nibabel.Nifti1Image, truth: np.ndarray) -> dict[str, float]:
    """Dice of each structure that both protocols have; of both sides, their mean."""
    found = segmenter.segment_crop(image)[0]
    numbers = {name: value for value, name in segmenter.labels.items()}
    means = {
        name: np.mean([
            dice(found == numbers[f"{side} {name}"], np.isin(truth, sides[index]))
            for index, side in enumerate(("left", "right"))
        ])
        for name, sides in PAIRED.items()
    }  # fmt: skip
    return means | {name: dice(found == numbers[name], np.isin(truth, group)) for name, group in MIDDLE.items()}


def hippocampus_dice(segmenter: BundleSegmenter, image: nibabel.Nifti1Image, truth: np.ndarray,
                     region: np.ndarray | None) -> list[float]:  # fmt: skip
    """Dice of the left and the right hippocampus in a whole head; none if it was refused."""
    try:
        result = segmenter.segment(image, region=region)
    except InputError as error:
        sys.stderr.write(f"refused: {error}\n")
        return []
    sides = (("left", PAIRED["hippocampus"][0]), ("right", PAIRED["hippocampus"][1]))
    return [
        dice(np.isin(result.labels, [value for value, name in result.names.items() if name.startswith(side)]),
             np.isin(truth, group))
        for side, group in sides
    ]  # fmt: skip


def true_region(image: nibabel.Nifti1Image, truth: np.ndarray) -> np.ndarray:
    """Return where the head is by the centers of its manual labels."""
    groups = [(f"{side} {name}", sides[index]) for name, sides in PAIRED.items()
              for index, side in enumerate(("left", "right"))]  # fmt: skip
    labels = np.zeros(truth.shape, np.uint8)
    for label, (_, group) in enumerate([*groups, *MIDDLE.items()], 1):
        labels[np.isin(truth, group)] = label
    names = {label: name for label, (name, _) in enumerate([*groups, *MIDDLE.items()], 1)}
    return locate_head(structure_centers(labels, image.affine, names))


def structures_table(rows: dict[str, list[dict[str, float]]]) -> Table:
    """Table of the mean Dice of each structure, a column for each change of the images."""
    table = Table("structure", *rows, title="Dice of the brain bundle, mean over heads and sides")
    means = {title: {name: np.mean([row[name] for row in heads]) for name in heads[0]} for title, heads in rows.items()}
    for name in (*PAIRED, *MIDDLE):
        table.add_row(name, *(f"{means[title][name]:.3f}" for title in rows))
    table.add_row("deep structures", *(f"{np.mean([means[title][name] for name in DEEP]):.3f}" for title in rows))
    return table


def main(folder: Path) -> None:
    """Print the tables."""
    paths = sorted((folder / "images").glob("*.nii.gz"))
    if not paths:
        raise InputError(f"{folder}: has no images/*.nii.gz. Name the folder with images and labels.")
    brain = BundleSegmenter(BUNDLE) if weights_file(BUNDLE).is_file() else None
    hippocampus = BundleSegmenter(bundle_folder("hippocampus"))
    heads = Table("image", "mean", "worst side", "refused", "CPU s", title="Dice of hippocampi in whole heads")
    rows: dict[str, list[dict[str, float]]] = {}
    for title, change in {**CHANGES, "as it is, by manual labels": CHANGES["as it is"]}.items():
        sides: list[float] = []
        seconds = 0.0
        for path in paths:
            image = read_image(path)
            truth = np.asarray(read_image(folder / "labels" / path.name).dataobj).astype(int)
            region = None if title in CHANGES else true_region(image, truth)
            image = nibabel.Nifti1Image(change(image.get_fdata(dtype=np.float32)), image.affine)
            if brain is not None and region is None:
                rows.setdefault(title, []).append(brain_dice(brain, image, truth))
            start = time.process_time()
            sides += hippocampus_dice(hippocampus, image, truth, region)
            seconds += time.process_time() - start
        refused = len(paths) - len(sides) // 2
        worst, mean = (f"{measure(sides):.3f}" if sides else "-" for measure in (min, np.mean))
        heads.add_row(title, mean, worst, str(refused), f"{seconds / len(paths):.1f}")
    console = Console(width=100)
    if rows:
        console.print(structures_table(rows))
    console.print(heads)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python evaluate_manual_brains.py FOLDER")
    try:
        main(Path(sys.argv[1]))
    except InputError as error:
        sys.exit(f"Error: {error}")
