"""Reading a file in a process of its own first, because its parser trusts it.

The parsers behind SimpleITK believe headers: a MetaImage with a negative number of dimensions ends the process, and a
damaged length in a DICOM file takes gigabytes. A process that dies of it, or of its limit of memory, says that the file
is damaged; what it survives, this process may read.

The process imports what this one could import, but nothing from the working directory or the folder of the data, which
may hold files with the names of modules.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import monai_iunet
from monai_iunet.errors import InputError
from monai_iunet.io.files import files_in
from monai_iunet.io.formats import read_format

__all__ = ["try_in_a_process"]

SPARE_MEMORY = 2 * 2**30  # bytes, beside what a file may unpack to
LARGEST_USUAL_COMPRESSION = 40
SECONDS = 600
REFUSED = 3  # exit status
NAMES = "surrogateescape"  # how Python keeps names of files that are not UTF-8
# Isolated (-I), so that neither the environment nor the working directory adds to the path.
CODE = "import sys; sys.path[:] = sys.argv[3:]; from monai_iunet.io.untrusted import main; main(*sys.argv[1:3])"

# Files and folders that were read without harm, with their times and sizes.
_harmless: set[tuple[object, ...]] = set()


def try_in_a_process(path: Path, series: str | None = None) -> None:
    """Read a file, or a series of a folder, in a process of its own, once, and raise what goes wrong there.

    Raises:
        InputError: when it cannot be read.
    """
    key = _stamp(path, series)
    if key in _harmless:
        return
    words = [sys.executable, "-I", "-c", CODE, str(path), series or "", *_import_path(path)]
    try:
        result = subprocess.run(words, capture_output=True, encoding="utf-8", errors=NAMES, timeout=SECONDS)
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
    _harmless.add(key)


def _stamp(path: Path, series: str | None) -> tuple[object, ...]:
    """Return what changes when a file, or a file of a folder, changes."""
    stats = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files_in(path) if file.is_file()]
    return path.resolve(), series, *stats


def _import_path(path: Path) -> list[str]:
    """Return where this process imports from, without the working directory and the folder of the data.

    The folder that the package itself lies in is kept.
    """
    package = Path(monai_iunet.__file__).resolve().parents[1]
    left_out = {Path.cwd().resolve(), path.resolve(), path.resolve().parent} - {package}
    return [entry for entry in sys.path if entry and Path(entry).resolve() not in left_out]


def _limit_memory(path: Path) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        stored = sum(file.stat().st_size for file in files_in(path) if file.is_file())
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = taken + SPARE_MEMORY + LARGEST_USUAL_COMPRESSION * stored
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(path: str, series: str) -> None:
    """Read a file, or a series of a folder, in this process, and exit with what came of it.

    Args:
        path: the file or folder.
        series: DICOM series; empty for the only one.
    """
    _limit_memory(Path(path))
    try:
        read_format(Path(path), series or None)
    except InputError as error:
        _refuse(str(error))
    except Exception as error:  # whatever a parser may raise
        _refuse(f"{path}: damaged ({type(error).__name__} while it was read). Export or copy it again.")


def _refuse(reason: str) -> None:
    sys.stdout.buffer.write(reason.encode("utf-8", NAMES))
    sys.exit(REFUSED)
