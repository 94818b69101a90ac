"""Turn a clone of ababier/open-kbp into NIfTI files and a `dataset.json`, as the configs of the bundle expect them.

    python scripts/convert_openkbp.py OPEN_KBP_CLONE OUTPUT_FOLDER

The challenge stores each volume of a patient, 128 x 128 x 128 voxels, as a CSV file of voxel numbers and values, and
each structure as one of voxel numbers. Voxels are numbered in C order of [row, column, slice], which run to the
posterior, the left and the inferior end. Values are Hounsfield units plus 1000. Outside the region in which dose was
planned only voxels of contoured structures have a value, which would give the labels away: both are empty there.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from monai_iunet.errors import InputError
from monai_iunet.io.files import check_folder, write_atomically, write_text

STRUCTURES = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")
SECTIONS = {"training": "train-pats", "validation": "validation-pats", "test": "test-pats"}
SHAPE = (128, 128, 128)


def read_volume(path: Path, columns: int) -> np.ndarray:
    """Rows of a sparse CSV file: voxel numbers, and with two columns their values."""
    try:
        rows = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(columns), ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a sparse volume of the challenge ({error}). Clone the repository again."
        ) from error
    if len(rows) and not (rows[:, 0].min() >= 0 and rows[:, 0].max() < np.prod(SHAPE)):
        raise InputError(f"{path}: has voxel numbers outside 128 x 128 x 128. Clone the repository again.")
    return rows


def dense(path: Path, columns: int = 1) -> np.ndarray:
    """Return a volume with axes that run to the right, anterior and superior; a mask, or values with two columns."""
    rows = read_volume(path, columns)
    volume = np.zeros(SHAPE, np.float32)
    volume.flat[rows[:, 0].astype(np.int64)] = rows[:, 1] if columns == 2 else 1
    return volume.transpose(1, 0, 2)[::-1, ::-1, ::-1]


def convert_patient(folder: Path) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """CT in Hounsfield units and labels of a patient."""
    missing = [
        name for name in ("ct", "possible_dose_mask", "voxel_dimensions") if not (folder / f"{name}.csv").is_file()
    ]
    if missing:
        raise InputError(f"{folder}: {', '.join(missing)} missing. Clone the repository again.")
    spacing = np.loadtxt(folder / "voxel_dimensions.csv", delimiter=",").ravel()
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise InputError(f"{folder}: voxel_dimensions.csv must hold three lengths in mm. Clone the repository again.")
    region = dense(folder / "possible_dose_mask.csv") > 0
    hounsfield = np.where(region, dense(folder / "ct.csv", columns=2).clip(0, 4095) - 1000, -1000)
    labels = np.zeros(SHAPE, np.uint8)
    for value, name in enumerate(STRUCTURES, 1):
        if (folder / f"{name}.csv").is_file():
            labels[(dense(folder / f"{name}.csv") > 0) & region] = value
    affine = np.diag([*spacing, 1.0])
    return nibabel.Nifti1Image(hounsfield.astype(np.int16), affine), nibabel.Nifti1Image(labels, affine)


def convert(clone: Path, output: Path) -> None:
    """Convert all patients of a clone; patients that have been converted are left out."""
    data = clone / "provided-data"
    if not data.is_dir():
        raise InputError(f"{clone}: has no folder provided-data. Name a clone of the repository ababier/open-kbp.")
    dataset: dict[str, object] = {
        "name": "OpenKBP head and neck CT",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(("background", *STRUCTURES))},
    }
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        check_folder(output / name)
    for section, folder in SECTIONS.items():
        end = "Ts" if section == "test" else "Tr"
        entries = []
        patients = sorted(
            (path for path in (data / folder).glob("pt_*") if path.is_dir()), key=lambda path: int(path.name[3:])
        )
        for patient in tqdm(patients, desc=folder):
            paths = [f"{kind}{end}/{patient.name}.nii.gz" for kind in ("images", "labels")]
            if not all((output / path).is_file() for path in paths):
                for volume, path in zip(convert_patient(patient), paths):
                    write_atomically(output / path, partial(nibabel.save, volume))
            entries.append(paths[0] if section == "test" else {"image": paths[0], "label": paths[1]})
        dataset[section] = entries
    text = json.dumps(dataset, indent=1) + "\n"
    write_text(output / "dataset.json", text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Usage: python convert_openkbp.py OPEN_KBP_CLONE OUTPUT_FOLDER")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        sys.exit(f"Error: {error}")
