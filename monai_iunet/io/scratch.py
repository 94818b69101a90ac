"""Large arrays in temporary files, which the system need not keep in memory."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["scratch_array"]

LARGEST_IN_MEMORY = 256 * 2**20  # bytes


def scratch_array(shape: Sequence[int], dtype: DTypeLike, largest_in_memory: int = LARGEST_IN_MEMORY) -> np.ndarray:
    """Return an array of zeros in the order of a NIfTI file, the first axis fastest.

    A large one lies in a temporary file without a name, which is gone with the array or with the process, however that
    ends. Its place on the disk is taken at once, because a disk that fills later would end the process.

    Args:
        shape: of the array.
        dtype: of its values.
        largest_in_memory: bytes up to which it is an ordinary array.

    Raises:
        OSError: when there is no room in the folder of temporary files.

    Example:
        >>> scratch_array((2, 3), np.uint8, largest_in_memory=1).sum()
        np.uint64(0)
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= largest_in_memory:
        return np.zeros(shape, dtype, order="F")
    with tempfile.TemporaryFile(prefix="monai_iunet") as file:
        try:
            _fill(file.fileno(), size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            message = f"{size / 2**30:.1f} GiB do not fit. Make room there, or set TMPDIR to another folder"
            raise OSError(error.errno, message, tempfile.gettempdir()) from error
        return np.memmap(file, dtype, "r+", shape=tuple(shape), order="F")


def _fill(descriptor: int, size: int) -> None:
    """Take room on the disk for a file of zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        os.write(descriptor, zeros[: size - start])
