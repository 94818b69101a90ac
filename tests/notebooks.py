"""Running a notebook from a fresh kernel; as a program, running all in full and writing their outputs into the files.

python -m tests.notebooks [NAME...]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What MONAI's print_config says of the machine.
OF_THE_MACHINE = re.compile(r"^MONAI __file__: .*\n", flags=re.MULTILINE)


def execute(path: Path, parameters: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in its folder.

    Args:
        path: of the notebook.
        parameters: what is set after the cell with the tag "parameters".
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        number = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(source))
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
    ).execute()
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what belongs to the machine or to the moment: paths, times of execution, versions of the kernel."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = OF_THE_MACHINE.sub("", output.text)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if len(sys.argv) < 2 or path.stem in sys.argv[1:]:
            nbformat.write(tidy(execute(path)), path)
