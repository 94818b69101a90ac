"""Checks of a bundle before others use it: what reviewers of MONAI's model zoo ask for, and what programs rely on.

Nothing is downloaded, and no data are needed.

Source: Project-MONAI/model-zoo, folder `ci` and CONTRIBUTING.md, 2024.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from rich.table import Table

from monai_iunet.errors import InputError
from monai_iunet.io.text import first_line
from monai_iunet.io.weights import read_weights, weights_file
from monai_iunet.segmentation.segmenter import BundleSegmenter

__all__ = ["Check", "as_table", "verify_bundle"]

FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
)
LARGEST_FILE = 25_000_000  # bytes
WEIGHTS = ("model.pt", "model.safetensors", "model_final.pt")  # which the model zoo downloads from elsewhere if larger
METADATA = ("version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "network_data_format")
HEADINGS = (
    "data",
    "input",
    "output",
    "system configuration",
    "performance",
    "commands",
    "limitations",
    "citation",
    "references",
    "license",
)
WORDS = ("author", "tags", "torchscript", "tensorrt")
PREPROCESSING = ("preprocessing", "brought to ras")  # one of them
# By these entries programs drive a bundle.
ENTRIES = {
    "train.json": [
        "bundle_root",
        "device",
        "dataset_dir",
        "network_def",
        "val_interval",
        "train#trainer",
        "train#trainer#max_epochs",
        "train#dataset#data",
        "train#inferer",
        "train#handlers",
        "validate#evaluator",
        "validate#dataset#data",
        "validate#handlers",
        "validate#preprocessing",
        "validate#postprocessing",
        "validate#key_metric",
    ],
    "evaluate.json": [
        "bundle_root",
        "device",
        "network_def",
        "inferer",
        "validate#evaluator",
        "validate#handlers",
        "evaluator",
    ],
    "inference.json": [
        "bundle_root",
        "device",
        "network_def",
        "inferer",
        "preprocessing",
        "postprocessing",
        "evaluator",
    ],
}


@dataclass(frozen=True)
class Check:
    """A check of a bundle: what was checked, and what is wrong, in one line; empty if nothing is."""

    name: str
    problem: str


def verify_bundle(folder: str | Path) -> list[Check]:
    """Check a bundle, without data and without a network.

    Args:
        folder: of the bundle.

    Raises:
        InputError: when there is no such folder.

    Example:
        >>> from monai_iunet import bundle_folder
        >>> [check for check in verify_bundle(bundle_folder("hippocampus")) if check.problem]
        []
    """
    folder = Path(folder)
    if not (folder / "configs").is_dir():
        raise InputError(f"{folder}: not a bundle, it has no folder `configs`. Name the folder of a bundle.")
    return [Check(name, _problem_of(check, folder)) for name, check in _checks().items()]


def as_table(checks: list[Check], title: str) -> Table:
    """Return checks as a table to print."""
    table = Table(title=title, title_justify="left")
    table.add_column("check")
    table.add_column("result", overflow="fold")
    for check in checks:
        table.add_row(check.name, check.problem or "passed")
    return table


def _checks() -> dict[str, Callable[[Path], str]]:
    """Return what tells the problem of a bundle, empty if there is none, by the name of each check."""
    return {
        "files": _files,
        "size of files": _sizes,
        "metadata.json": _metadata,
        "sections of docs/README.md": _readme,
        "links of docs/README.md": _links,
        "no paths of a machine in configs": _paths,
        **{f"entries of {config}": partial(_entries, config) for config in ENTRIES},
        "evaluate.json over train.json": _overlay,
        "transforms can be sent to workers": _pickled,
        "the weights fit the network": _weights,
        "the network gives the classes of the metadata": _classes,
        "the network can be exported": _exportable,
        "monai-iunet segment can open it": _opened,
    }


def _problem_of(check: Callable[[Path], str], folder: Path) -> str:
    try:
        return check(folder)
    except Exception as error:  # whatever a bundle's components may raise
        return f"{type(error).__name__}: {first_line(error)}"


def _files(folder: Path) -> str:
    missing = [name for name in FILES if not (folder / name).is_file()]
    missing += [] if weights_file(folder).is_file() else ["models/model.pt"]
    return f"missing: {', '.join(missing)}" if missing else ""


def _sizes(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in WEIGHTS]
    large = [path.name for path in files if path.stat().st_size > LARGEST_FILE]
    return f"above 25 MB: {', '.join(large)}" if large else ""


def _metadata(folder: Path) -> str:
    metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    missing = [name for name in METADATA if name not in metadata]
    if missing:
        return f"missing: {', '.join(missing)}"
    if metadata["version"] not in metadata["changelog"]:
        return f"version {metadata['version']} is not in the changelog"
    return ""


def _readme(folder: Path) -> str:
    text = (folder / "docs" / "README.md").read_text(encoding="utf-8").lower()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    missing = [name for name in HEADINGS if not any(name in heading for heading in headings)]
    missing += [word for word in WORDS if word not in text]
    missing += [] if any(word in text for word in PREPROCESSING) else ["preprocessing"]
    unfinished = text.count("to complete")
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"{unfinished} places to complete"] if unfinished else []
    return "; ".join(problems)


def _links(folder: Path) -> str:
    text = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path = (folder / "docs" / target).resolve()
        if "://" not in target and not (path.is_relative_to(folder.resolve()) and path.exists()):
            wrong.append(target)
    return f"lead out of the bundle or nowhere: {', '.join(wrong)}" if wrong else ""


def _paths(folder: Path) -> str:
    pattern = re.compile(r"[\"'](/(?:home|root|Users|mnt|data|work)/[^\"']*)")
    found = [
        match for path in (folder / "configs").glob("*.json") for match in pattern.findall(path.read_text("utf-8"))
    ]
    return f"found: {', '.join(found)}" if found else ""


def _entries(config: str, folder: Path) -> str:
    parser = _parser(folder, config)
    missing = [entry for entry in ENTRIES[config] if entry not in parser]
    return f"missing: {', '.join(missing)}" if missing else ""


def _overlay(folder: Path) -> str:
    parser = _parser(folder, "train.json", "evaluate.json")
    parser["datalist"] = {"training": [], "validation": []}
    parser["validate#handlers"] = []
    for section in ("train#preprocessing", "validate#preprocessing", "validate#postprocessing", "validate#evaluator"):
        parser.get_parsed_content(section)
    return ""


def _pickled(folder: Path) -> str:
    for config, section in (
        ("train.json", "train#preprocessing"),
        ("train.json", "validate#preprocessing"),
        ("evaluate.json", "validate#preprocessing"),
        ("inference.json", "preprocessing"),
    ):
        ForkingPickler.dumps(_parser(folder, config).get_parsed_content(section))
    return ""


def _network(folder: Path) -> Any:
    network = _parser(folder, "inference.json").get_parsed_content("network_def")
    if weights_file(folder).is_file():
        network.load_state_dict(read_weights(weights_file(folder)))
    return network.eval()


def _weights(folder: Path) -> str:
    state = _network(folder).state_dict()
    if not weights_file(folder).is_file():
        return "there are no weights yet"
    damaged = [name for name, value in state.items() if not torch.as_tensor(value).isfinite().all()]
    return f"NaN or infinite: {', '.join(damaged[:3])}" if damaged else ""


def _opened(folder: Path) -> str:
    if not weights_file(folder).is_file():
        return "there are no weights yet"
    BundleSegmenter(folder, "cpu")
    return ""


def _classes(folder: Path) -> str:
    metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    image, pred = (
        metadata["network_data_format"][part][name] for part, name in (("inputs", "image"), ("outputs", "pred"))
    )
    # Of images of any size the metadata say of what it is a multiple.
    shape = [int(str(extent).removesuffix("*n")) for extent in image["spatial_shape"]]
    with torch.no_grad():
        logits = _network(folder)(torch.zeros(1, image["num_channels"], *shape))
    expected = (1, pred["num_channels"], *shape)
    if tuple(logits.shape) != expected or len(pred["channel_def"]) != pred["num_channels"]:
        return f"the metadata say {expected} and {len(pred['channel_def'])} classes, the network {tuple(logits.shape)}"
    return ""


def _exportable(folder: Path) -> str:
    torch.jit.script(_network(folder))
    return ""


def _parser(folder: Path, *configs: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(folder / "configs" / name) for name in configs])
    parser.update({"bundle_root": str(folder.absolute()), "device": torch.device("cpu"), "rank": 0})
    return parser
