"""Reading a file in a process of its own first, because its parser trusts it.

The parsers behind SimpleITK believe headers: a MetaImage with a negative number of dimensions ends the process, and a
damaged length in a DICOM file takes gigabytes. A process that dies of it, or of its limit of memory, says that the file
is damaged; what it survives, this process may read.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from monai_iunet.errors import InputError
from monai_iunet.io.simpleitk import read_with_simpleitk

__all__ = ["try_in_a_process"]

SPARE_MEMORY = 2 * 2**30  # bytes, beside what a file may unpack to
LARGEST_USUAL_COMPRESSION = 40
SECONDS = 600
REFUSED = 3  # exit status


def try_in_a_process(path: Path, series: str | None = None) -> None:
    """Read a file, or a series of a folder, in a process of its own, and raise what goes wrong there.

    Raises:
        InputError: when it cannot be read.
    """
    words = [sys.executable, "-m", __name__, str(path), *([series] if series else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{path}: damaged, reading it takes more than {SECONDS} seconds. Export or copy it again."
        ) from None
    if result.returncode == REFUSED:
        raise InputError(result.stdout.strip())
    if not 0 <= result.returncode <= 255:  # a signal, or what Windows says of one
        raise InputError(f"{path}: damaged, reading it ends the process that does. Export or copy it again.")
    if result.returncode:
        raise OSError(f"{path} could not be read: {result.stderr.strip()[-500:]}")


def _limit_memory(path: Path) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        stored = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = taken + SPARE_MEMORY + LARGEST_USUAL_COMPRESSION * stored
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _main(path: str, series: str | None = None) -> None:
    _limit_memory(Path(path))
    try:
        read_with_simpleitk(Path(path), series)
    except InputError as error:
        sys.stdout.write(str(error))
        sys.exit(REFUSED)
    except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        sys.stdout.write(f"{path}: damaged ({type(error).__name__} while it was read). Export or copy it again.")
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
