"""The command `monai-iunet`. What a command needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import NoReturn

# They add their commands to the application, in the order in which the help lists them.
from monai_iunet.cli import segmenting, training, bundles, about  # isort: skip # noqa: F401
from monai_iunet.cli.application import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every encoding has a "³"
    # Each `LoadImage` of MONAI 1.6 says that a decoder for GPUs is not there, which nothing here uses.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        # The system clears large tensors in pages of 2 MiB instead of 4 KiB, which saves a tenth to a quarter of the
        # CPU time of a network. See pytorch pull request 107697.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _end)
    app()


def _end(number: int, _: object) -> NoReturn:
    """End as an interruption does, which takes files that are half written away; the next signal ends at once."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)
