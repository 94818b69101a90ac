"""Turn label maps of whole heads, with FreeSurfer's numbers, into the data set that the configs of the bundle expect.

    python scripts/convert_label_maps.py HEAD_LABEL_MAPS OUTPUT_FOLDER

Each head gives a map of tissues, from which images are made, and the labels that are to be found in them. The last
three are kept back to validate: of each a few images are made once, with a fixed seed.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm

from monai_iunet.bundling.task import BRAIN
from monai_iunet.errors import InputError
from monai_iunet.io.files import check_folder, image_name, write_atomically, write_text
from monai_iunet.io.read import read_image
from monai_iunet.transforms.head_labels import FLUID, OUTSIDE, SWAP, TYPICAL, structure_labels, tissue_numbers
from monai_iunet.transforms.synthetic import RandSyntheticImaged

VALIDATION_HEADS = 3
IMAGES_PER_HEAD = 2
MARGIN = 10  # voxels of air that stay around a head


def convert_head(path: Path, output: Path, name: str) -> dict[str, str]:
    """Write tissues and labels of a head, in RAS, without the air around it."""
    image = nibabel.as_closest_canonical(read_image(path))
    numbers = np.asarray(image.dataobj).astype(int)
    occupied = [np.flatnonzero(numbers.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(int(found[0]) - MARGIN, 0), int(found[-1]) + MARGIN + 1) for found in occupied)
    affine = image.slicer[box].affine
    case = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
    for key, convert in (("image", tissue_numbers), ("label", structure_labels)):
        write(nibabel.Nifti1Image(convert(numbers[box]), affine), output / case[key])
    return case


def make_images(case: dict[str, str], output: Path, name: str, make: RandSyntheticImaged) -> list[dict[str, str]]:
    """Write images made from a head, and their labels."""
    maps = [nibabel.load(output / case[key]) for key in ("image", "label")]
    tissues, labels = (MetaTensor(np.asarray(volume.dataobj)[None], affine=volume.affine) for volume in maps)
    cases = []
    for number in range(IMAGES_PER_HEAD):
        made = make({"image": tissues, "label": labels})
        made_case = {key: f"{key}sTr/{name}_{number}.nii.gz" for key in ("image", "label")}
        for key, kind in (("image", np.float32), ("label", np.uint8)):
            affine = made[key].affine.numpy()
            write(nibabel.Nifti1Image(made[key][0].numpy().astype(kind), affine), output / made_case[key])
        cases.append(made_case)
    return cases


def write(image: nibabel.Nifti1Image, path: Path) -> None:
    """Write an image, whole or not at all."""
    write_atomically(path, partial(nibabel.save, image))


def convert(maps: Path, output: Path) -> None:
    """Convert all label maps of a folder."""
    paths = sorted(maps.glob("*.nii.gz"))
    if len(paths) <= VALIDATION_HEADS:
        raise InputError(f"{maps}: more than {VALIDATION_HEADS} label maps (.nii.gz) are needed, got {len(paths)}.")
    for name in ("imagesTr", "labelsTr"):
        check_folder(output / name)
    make = RandSyntheticImaged(
        "image",
        pixdim=BRAIN.spacing[0],
        spatial_size=BRAIN.roi_size,
        swap=SWAP,
        typical=TYPICAL,
        outside=OUTSIDE,
        fluid=FLUID,
        prob_crop=0.0,
    ).set_random_state(0)
    dataset: dict[str, object] = {
        "name": "Synthetic heads",
        "modality": {"0": "any MRI"},
        "labels": {str(value): name for value, name in enumerate(("background", *BRAIN.classes))},
    }
    training, validation = [], []
    for number, path in enumerate(tqdm(paths)):
        name = image_name(path)
        case = convert_head(path, output, name)
        if number < len(paths) - VALIDATION_HEADS:
            training.append(case)
        else:
            validation += make_images(case, output, name, make)
    text = json.dumps({**dataset, "training": training, "validation": validation}, indent=1) + "\n"
    write_text(output / "dataset.json", text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Usage: python convert_label_maps.py HEAD_LABEL_MAPS OUTPUT_FOLDER")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        sys.exit(f"Error: {error}")
