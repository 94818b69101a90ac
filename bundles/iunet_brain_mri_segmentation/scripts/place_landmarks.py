"""Print where the structures of label maps lie in MNI space: the table of `monai_iunet/segmentation/landmarks.py`.

    python scripts/place_landmarks.py MAP.nii.gz...

A T1-weighted brain is made of each map, and the MNI152 template registered to it. Centers and volumes are means over
the maps, and over each structure and the mirror image of the one on the other side.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from monai_iunet.errors import InputError
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.whole_head import register_template
from monai_iunet.transforms.head_labels import OUTSIDE, STRUCTURES, TYPICAL, structure_labels, tissue_numbers

MIRRORED = np.array([-1.0, 1.0, 1.0])


def place(path: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Center in MNI space, in mm, and volume in ml of each structure of a label map."""
    image = nibabel.as_closest_canonical(read_image(path))
    numbers = np.asarray(image.dataobj).astype(int)
    tissues = tissue_numbers(numbers)
    brain = np.where(np.isin(tissues, OUTSIDE), 0, np.array(TYPICAL, np.float32)[tissues])
    brain = ndimage.gaussian_filter(brain, 0.6)
    brain += 0.02 * np.random.default_rng(0).normal(size=brain.shape).astype(np.float32) * (brain > 0)
    to_template = np.linalg.inv(register_template(nibabel.Nifti1Image(brain, image.affine))) @ image.affine
    labels = structure_labels(numbers)
    found = {}
    for label, name in enumerate(STRUCTURES, 1):
        voxels = np.argwhere(labels == label)
        center = to_template[:3, :3] @ np.median(voxels, axis=0) + to_template[:3, 3]
        found[name] = center, len(voxels) * abs(np.linalg.det(to_template[:3, :3])) / 1000
    return found


def main(paths: list[Path]) -> None:
    """Print a line for each structure but the fluid, which has no place."""
    heads = [place(path) for path in paths]
    for name in STRUCTURES:
        if name == "cerebrospinal fluid":
            continue
        side, _, rest = name.partition(" ")
        other = {"left": f"right {rest}", "right": f"left {rest}"}.get(side, name)
        center = np.mean([head[name][0] + MIRRORED * head[other][0] for head in heads], axis=0) / 2
        volume = np.mean([head[name][1] + head[other][1] for head in heads]) / 2
        x, y, z = center + 0.0
        sys.stdout.write(f'    "{name}": (({x:.1f}, {y:.1f}, {z:.1f}), {volume:.1f}),\n')


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Usage: python place_landmarks.py MAP.nii.gz...")
    try:
        main([Path(path) for path in sys.argv[1:]])
    except InputError as error:
        sys.exit(f"Error: {error}")
