"""The data set of derivatives: what describes it, and the files of each image with their side-cars."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai_iunet.bids.images import BidsImage
from monai_iunet.errors import InputError
from monai_iunet.io.files import check_folder, write_text
from monai_iunet.io.text import csv_text
from monai_iunet.segmentation.files import (
    Case,
    Origin,
    Settings,
    Write,
    write_nifti,
    write_picture,
    write_probabilities,
)
from monai_iunet.segmentation.origin import origin_of
from monai_iunet.segmentation.records import RECORD_SUFFIX, write_record
from monai_iunet.segmentation.report import VIEWS, write_view
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.visualization.palette import label_colors

__all__ = ["as_tsv", "bids_case", "contrasts", "description_label", "start_derivatives"]

BIDS_VERSION = "1.11.1"
GENERATOR = "monai_iunet"
# Words in the names of bundles that say nothing of what is segmented.
GENERAL_WORDS = ("iunet", "segmentation", "mri", "mr", "ct")
COLUMNS = ("index", "name", "color", "volume_mm3", "quality")
# What BIDS does not know: pictures, and the table of the group, named as MRIQC names its own.
IGNORED = "figures\nfigures/**\ngroup_*\nreport.html\nreport_files\nreport_files/**\n"
README = """# Segmentations by invertible U-Nets

This folder holds BIDS derivatives that were written by `monai-iunet bids`. For each image there are

- `*_dseg.nii.gz`, the labels on the grid of the image, with a side-car that names the image and the version,
- `*_dseg.tsv`, value, name, color and volume in cubic millimeters of each structure,
- `figures/*_dseg.png`, the contours of the structures over the image.

`monai-iunet bids ... group` collects the volumes in one table, `group_*.tsv`.

For research only. This is not a medical device: look at the pictures before you use the volumes.
"""


def contrasts(segmenter: BundleSegmenter) -> list[str]:
    """Return the contrasts that a bundle segments, as BIDS names them.

    Raises:
        InputError: when its metadata name none.
    """
    suffixes = segmenter.metadata.get("bids_suffixes")
    if not isinstance(suffixes, list) or not suffixes or not all(isinstance(name, str) for name in suffixes):
        raise InputError(
            f"{segmenter.folder}: its metadata.json does not say which contrasts of BIDS it segments. "
            'Add "bids_suffixes": ["T1w"], or the contrasts that it has learned from.'
        )
    return suffixes


def description_label(segmenter: BundleSegmenter) -> str:
    """Return the label of the entity `desc` for a bundle, made of letters and digits: "hippocampus"."""
    words = [word for word in segmenter.folder.resolve().name.split("_") if word.lower() not in GENERAL_WORDS]
    return "".join(letter for letter in "".join(words) if letter.isalnum()) or "iunet"


def start_derivatives(output: Path, bids_dir: Path, segmenter: BundleSegmenter) -> None:
    """Write what describes a data set of derivatives, or complete the description that an earlier run wrote.

    Raises:
        InputError: when the folder is the data set itself, holds that of another program, or cannot be written.
    """
    if os.path.realpath(output) == os.path.realpath(bids_dir):
        raise InputError(
            f"{output}: is the data set itself. Name another folder, such as {bids_dir}/derivatives/iunet."
        )
    check_folder(output)
    path = output / "dataset_description.json"
    description: dict[str, Any] = {
        "Name": "Segmentations by invertible U-Nets",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [],
        "SourceDatasets": [{"URL": bids_dir.resolve().as_uri()}],
        "DatasetLinks": {"raw": bids_dir.resolve().as_uri()},
    }
    if path.exists():
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            ours = all(entry["Name"] == GENERATOR for entry in description["GeneratedBy"])
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise InputError(f"{path}: describes the data set of another program. Name another output folder.")
    entry = {
        "Name": GENERATOR,
        "Version": version("monai-iunet"),
        "Description": segmenter.title,
    }
    if entry not in description["GeneratedBy"]:
        description["GeneratedBy"].append(entry)
    write_text(path, _json(description))
    _write_once(output / ".bidsignore", IGNORED)
    _write_once(output / "README.md", README)
    _describe_label(output / "descriptions.tsv", description_label(segmenter), str(segmenter.metadata.get("task", "")))


def bids_case(image: BidsImage, segmenter: BundleSegmenter, output: Path, settings: Settings) -> Case:
    """Return the files that the results of an image go to.

    The labels are `STEM_desc-LABEL_dseg.nii.gz`, beside them are the side-car, `dseg.json`, the names and volumes of
    the structures, `dseg.tsv`, the picture under `figures`, and the probabilities if the segmenter gives them.
    """
    stem = f"{image.stem}_desc-{description_label(segmenter)}"
    folder = (output / image.source).parent
    origin, sidecar = partial(origin_of, [image.path], segmenter), folder / f"{stem}_dseg.json"
    beside: dict[Path, Write] = {
        sidecar: partial(_write_sidecar, image, segmenter, origin, "Labels of the structures"),
        folder / f"{stem}_dseg.tsv": _write_structures,
        output / "figures" / f"{stem}_dseg.png": partial(write_picture, stem, segmenter.window),
    }
    probabilities = folder / f"{stem}_probseg.nii.gz"
    if segmenter.gives_probabilities:
        text = "Probabilities of the background and the structures"
        beside[folder / f"{stem}_probseg.json"] = partial(_write_sidecar, image, segmenter, origin, text)
        beside[probabilities] = write_probabilities
    record, view = output / VIEWS / f"{stem}{RECORD_SUFFIX}", output / VIEWS / f"{stem}.json"
    # What later runs read must be of these labels.
    if settings.view or record.exists() or view.exists():
        beside[record] = partial(write_record, image.path, origin)
        beside[view] = partial(write_view, stem, segmenter.window)
    others = () if segmenter.gives_probabilities else (probabilities,)
    labels = folder / f"{stem}_dseg.nii.gz"
    return Case(image.path, stem, labels, sidecar, origin, write_nifti, beside, others=others)


def _write_sidecar(
    image: BidsImage, segmenter: BundleSegmenter, origin: Origin, text: str, segmentation: Segmentation, path: Path
) -> None:
    second = sorted(set((segmentation.weights or {}).values()) - {segmenter.weights})
    weights = f", weights {', '.join(second)}" if second else ""
    sidecar: dict[str, Any] = {
        "Description": f"{text}, by monai_iunet {version('monai-iunet')} with the bundle {segmenter.title}{weights}.",
        "Sources": [f"bids:raw:{image.source}"],
        "SpatialReference": f"bids:raw:{image.source}",
        "Manual": False,
        "origin": origin(),
    }
    if "Probabilities" in text:
        sidecar["LabelMap"] = ["background", *segmentation.names.values()]
    else:
        sidecar["volume_mm3"] = {"Description": "Volume: voxels times the volume of a voxel.", "Units": "mm^3"}
        sidecar["quality"] = {"Description": "Predicted Dice; n/a if the bundle has no model of it."}
    path.write_text(_json(sidecar), encoding="utf-8")


def _write_structures(segmentation: Segmentation, path: Path) -> None:
    colors, volumes, quality = label_colors(segmentation.names), segmentation.volumes(), segmentation.qualities()
    rows = [
        [value, name, colors[value], f"{volumes[name]:.3f}", quality[name]]
        for value, name in segmentation.names.items()
    ]
    path.write_text(as_tsv([COLUMNS, *rows]), encoding="utf-8")


def _describe_label(path: Path, label: str, text: str) -> None:
    """Add what the label of the entity `desc` means to the table of labels."""
    header = as_tsv([["desc_id", "description"]])
    known = path.read_text(encoding="utf-8") if path.exists() else header
    if f"\ndesc-{label}\t" not in known:
        write_text(path, known + as_tsv([[f"desc-{label}", text or label]]))


def as_tsv(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as tab-separated lines; cells that are empty are "n/a", as BIDS has it."""
    return csv_text((["n/a" if cell in ("", None) else cell for cell in row] for row in rows), delimiter="\t")


def _write_once(path: Path, text: str) -> None:
    if not path.exists():
        write_text(path, text)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
