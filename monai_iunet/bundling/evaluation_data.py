"""The data set of a bundle's evaluation: its cases, how its labels are numbered, and whether the bundle finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import parsed_content, read_config
from monai_iunet.training.structures import check_structures

__all__ = ["Case", "bundle_cases", "label_values"]

Case = dict[str, Any]  # paths "image" and "label"


def bundle_cases(bundle: Path, dataset_dir: str | Path) -> dict[str, list[Case]]:
    """Return the training and validation cases of a bundle's `evaluate.json`.

    Raises:
        InputError: when there is no such file, or no such data set, or its labels are not the bundle's structures.
    """
    parser = _evaluation(bundle)
    if "structures" in parser.get():
        check_structures(dataset_dir, parser["structures"], label_values(bundle))
    # Absolute, since MONAI evaluates text that begins with $, @ or %.
    place = {"bundle_root": str(bundle.absolute()), "dataset_dir": str(Path(dataset_dir).absolute())}
    parser.update({**place, "check_data": False})
    cases: dict[str, list[Case]] = parsed_content(parser, "datalist")
    return cases


def label_values(bundle: Path) -> list[int] | None:
    """Return the values of the structures in the label files; None where they are 1, 2, ..."""
    transforms = _evaluation(bundle).get("validate#preprocessing#transforms")
    for transform in transforms if isinstance(transforms, list) else []:
        if isinstance(transform, dict) and transform.get("_target_") == "MapLabelValued":
            return list(transform["orig_labels"])
    return None


def _evaluation(bundle: Path) -> ConfigParser:
    path = bundle / "configs" / "evaluate.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file. Name the folder of a bundle that has one.")
    return read_config(path)
