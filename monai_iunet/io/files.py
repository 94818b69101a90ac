"""Names of image files, folders for results, and writing that leaves each file whole or not there at all."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from monai_iunet.errors import InputError

__all__ = [
    "NIFTI",
    "SUFFIXES",
    "check_folder",
    "check_names",
    "check_target",
    "check_whole_folder",
    "describe_file",
    "files_digest",
    "files_in",
    "hold_folder",
    "image_name",
    "is_as_before",
    "whole_folder",
    "write_atomically",
    "write_text",
]

logger = logging.getLogger(__name__)

NIFTI = (".nii.gz", ".nii")
SIMPLEITK = (".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
SUFFIXES = NIFTI + SIMPLEITK
DETACHED = (".nhdr", ".mhd")  # headers whose data lie in other files
LARGEST_DETACHED_HEADER = 2**20  # bytes


def image_name(path: str | os.PathLike[str], suffixes: Sequence[str] = NIFTI) -> str:
    """Return the name of a file without folder and suffix.

    Raises:
        InputError: when the name has none of the suffixes.

    Example:
        >>> image_name("folder/scan.nii.gz")
        'scan'
    """
    name = Path(path).name
    for suffix in suffixes:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    raise InputError(
        f"{path}: not the name of an image that can be read ({', '.join(suffixes)}). Convert the image to NIfTI first."
    )


def check_names(names: Sequence[str]) -> None:
    """Check that results named after images do not overwrite each other.

    Raises:
        InputError: when a name occurs twice.
    """
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise InputError(
            f"Several images have the name {', '.join(repeated)}: results would overwrite each other. Rename."
        )


def check_target(path: Path, source: str | os.PathLike[str], targets: dict[Path, str]) -> None:
    """Check that a result replaces neither its image nor the result of another one, and note whose it is.

    Args:
        path: file of the result.
        source: file of the image.
        targets: files that were written, each with that of its image; is changed.

    Raises:
        InputError: when it would.
    """
    other = targets.setdefault(path, str(source))
    if other != str(source):
        raise InputError(f"{source} and {other}: the result of both would be {path}. Rename one, or use two folders.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"{path}: the result would replace its image. Name another folder, or a suffix.")


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder, or check that files can be written into it.

    Raises:
        InputError: when it cannot, or ~ stands for the home folder, which only a shell knows.
    """
    path = Path(str(path))  # the command line of MONAI makes a number of a folder that is named 2024
    _check_written_out(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another output folder.") from error
    return path


def _check_written_out(path: Path) -> None:
    if "~" in path.parts or os.path.expanduser(path) != str(path):  # ~ or ~user
        name = next(part for part in path.parts if part.startswith("~"))
        raise InputError(f"{path}: a folder of the name {name} would be made. Write the path of your home folder out.")


def check_whole_folder(path: Path) -> Path:
    """Check that `whole_folder` can make a folder, and return where it does: beside its place, or within.

    Raises:
        InputError: when it cannot.
    """
    _check_written_out(path)
    place = Path(os.path.realpath(path))  # of a link, what it leads to
    stays = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    return check_folder(place if stays else place.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder under a temporary name beside it, and rename it when it is complete; of a failure nothing is left.

    A folder that cannot be replaced, as the root of a disk or one in a folder of others, is filled with it, files last.

    Args:
        path: of the folder, which is not there or empty.

    Yields:
        The folder to write into.

    Raises:
        InputError: when it cannot be created.
        OSError: when there is something in it meanwhile.
    """
    where, place = check_whole_folder(path), Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=where) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        yield made
        if where == place:
            for part in sorted(made.iterdir(), key=Path.is_file):
                part.rename(place / part.name)
            return
        if place.exists():
            place.rmdir()  # which is empty
        made.rename(place)


@contextlib.contextmanager
def hold_folder(path: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold a folder against other processes that would hold it, until the block or the process ends.

    A process that is started within the block without `close_fds` holds it too, and goes on to if it outlives this one.
    Windows, and disks that know no locks, hold nothing.

    Args:
        path: the folder.
        patience: seconds to wait, since children of a process that was killed may outlive it for a moment.

    Raises:
        InputError: when another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor, end = os.open(path, os.O_RDONLY), time.monotonic() + patience
    os.set_inheritable(descriptor, True)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise InputError(
                        f"{path}: another process works in this folder. Wait until it ends, or name another --output."
                    ) from error
                time.sleep(0.2)
                continue
            except OSError:
                logger.debug("%s: cannot be locked", path, exc_info=True)
            break
        yield
    finally:
        os.close(descriptor)


def files_in(path: Path) -> list[Path]:
    """Return the files that an image is read from.

    Args:
        path: a folder, of which it is all files but hidden ones, in the order of their names; a header of NRRD or
            MetaImage beside its data, which follow; another file, which is alone, whether it is there or not.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return [path, *_data_files(path)] if path.name.lower().endswith(DETACHED) and path.is_file() else [path]


def _data_files(header: Path) -> list[Path]:
    """Return the files beside a header of NRRD or MetaImage that hold its data, as far as they are there.

    Sources: the specifications of NRRD ("data file") and of MetaImage ("ElementDataFile"): a name, a pattern for
    numbered files, or a list that ends the header.
    """
    with header.open("rb") as file:
        lines = os.fsdecode(file.read(LARGEST_DETACHED_HEADER).replace(b"\0", b"")).splitlines()
    for number, line in enumerate(lines):
        field = re.match(r"\s*(?:data ?file\s*:|ElementDataFile\s*=)\s*(.+?)\s*$", line, re.IGNORECASE)
        if field is None:
            continue
        word = field[1].split()[0]
        names = [name.strip() for name in lines[number + 1 :]] if word == "LIST" else [field[1]]
        if word != "LIST" and "%" in word:
            numbered = re.sub(r"%\d*d", "*", glob.escape(word))
            return sorted(map(Path, glob.glob(os.path.join(glob.escape(str(header.parent)), numbered))))
        return [header.parent / name for name in names if name and (header.parent / name).is_file()]
    return []


def files_digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> list[int | str]:
    """Return size, time of modification and SHA-256 of a file, by which `is_as_before` knows it."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, files_digest([path])]


def is_as_before(path: Path, before: Sequence[int | str]) -> bool:
    """Return whether a file is what `describe_file` described; of one that was touched or copied, its digest tells.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = path.write_text("a")
        >>> before = describe_file(path)
        >>> os.utime(path, (0, 0))
        >>> is_as_before(path, before)
        True
    """
    if not path.is_file() or path.stat().st_size != before[0]:
        return False
    return path.stat().st_mtime_ns == before[1] or files_digest([path]) == before[2]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside `path`, and rename it when it is complete and on the disk.

    Args:
        path: file to write; an old one is replaced.
        write: writes into the file that it is given.
    """
    # Of a name with dots the rest is left out, or it would end as the name of a record that others read.
    suffix = next((known for known in NIFTI if path.name.endswith(known)), path.suffix)
    # Absolute, since nibabel looks for a folder of the name ~user elsewhere.
    temporary = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        # Created here, so that it has the permissions of any new file of the user.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        _sync(temporary, os.O_RDWR)  # Windows syncs what may be written only
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)  # a full disk does not say which file it has no room for
        raise
    with contextlib.suppress(OSError):  # not every system opens folders
        _sync(path.parent, os.O_RDONLY)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all; of names of files that are not UTF-8, `?` is left."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
