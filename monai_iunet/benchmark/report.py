"""How the results are shown and kept: tables in the terminal, a JSON file with everything."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from monai_iunet.benchmark.measure import Spread
from monai_iunet.benchmark.section import Row, Section
from monai_iunet.io.files import write_text
from monai_iunet.system import processor_name

__all__ = ["code_of", "for_json", "header", "read_json", "show", "write_json"]

# What all results depend on, in the folder of the package.
COMMON_FILES = ("benchmark/measure.py", "benchmark/networks.py", "benchmark/peers.py", "benchmark/section.py")
COMMON_FOLDERS = ("engine", "losses", "networks", "planning")
OWN_FOLDERS = {"inference": ("inference",)}  # what a section depends on beside that


def header(device: torch.device, peers: dict[str, str]) -> dict[str, Any]:
    """Return machine and versions."""
    packages = {"monai-iunet": version("monai-iunet"), "torch": torch.__version__}
    packages |= {name: version(name) for name in ("monai", "numpy")} | peers
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": packages,
    }


def code_of(section: Section) -> str:
    """Return a digest of the code whose results a section holds."""
    package = Path(__file__).parents[1]
    files = [Path(inspect.getfile(section.jobs)), *(package / name for name in COMMON_FILES)]
    folders = (*COMMON_FOLDERS, *OWN_FOLDERS.get(section.name, ()))
    files += sorted(path for folder in folders for path in (package / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def show(section: Section, rows: Sequence[Row], console: Console) -> None:
    """Print a section as a table; columns that no row has, and rows that hold nothing, are left out."""
    columns = [column for column in section.columns if any(column[1] in row for row in rows)]
    measured = [row for row in rows if not row.keys() & {"skipped", "failed"}]
    if not measured:
        return
    table = Table(title=section.title, title_justify="left", header_style="bold")
    for heading, key, _ in columns:
        table.add_column(heading, justify="left" if isinstance(measured[0].get(key), str) else "right", no_wrap=True)
    for row in measured:
        table.add_row(*(write(row[key]) if row.get(key) is not None else "" for _, key, write in columns))
    console.print(table)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Write all results so far, in the place of those that are there."""
    write_text(path, json.dumps(for_json(results), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote, with spreads as `Spread`."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=_spread_from)


def _spread_from(value: dict[str, Any]) -> Any:
    return Spread(**value) if value.keys() == {"median", "low", "high"} and None not in value.values() else value


def for_json(value: Any) -> Any:
    """Return results as JSON knows them: spreads as dictionaries, and None for what is not a number."""
    if isinstance(value, Spread):
        return None if math.isnan(value.median) else value.as_dict()
    if isinstance(value, dict):
        return {key: for_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
