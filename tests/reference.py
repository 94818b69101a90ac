"""The reference documentation, from the docstrings: python -m tests.reference FOLDER."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

import monai_iunet


def modules() -> list[str]:
    """The package and its modules, without those of its own command and benchmark."""
    found = [module.name for module in pkgutil.walk_packages(monai_iunet.__path__, "monai_iunet.")]
    left_out = (
        "monai_iunet.bundles",
        "monai_iunet.benchmark",
        "monai_iunet.cli",
        "monai_iunet.visualization.network_drawing",
    )
    return ["monai_iunet", *(name for name in found if not name.removeprefix("monai_iunet.").startswith(left_out))]


if __name__ == "__main__":
    import pdoc

    for name in monai_iunet.__all__:  # which are loaded on first use, and pdoc only sees what is loaded
        getattr(monai_iunet, name)
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*modules(), output_directory=Path(sys.argv[1]))
