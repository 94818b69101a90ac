"""Images of several channels: one NIfTI file with the channels last, or a file per channel, such as NAME_0000."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel

from monai_iunet.errors import InputError
from monai_iunet.io.files import SUFFIXES, image_name

__all__ = ["CHANNEL_FILES", "channel_files", "first_channel", "group_channels", "result_name"]

CHANNEL_FILES = "one 4D NIfTI file with the channels last, or a file per channel, NAME_0000, NAME_0001, ..."


def first_channel(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """Return an image of one channel as it is, and of an image with several, the channels last, the first one.

    Example:
        >>> import numpy
        >>> first_channel(nibabel.Nifti1Image(numpy.zeros((4, 5, 6, 2)), numpy.eye(4))).shape
        (4, 5, 6)
    """
    return image if image.ndim == 3 else image.slicer[..., 0]


def channel_files(path: Path) -> list[Path]:
    """Return the files of an image that a `dataset.json` names: NAME is short for NAME_0000, NAME_0001, ... in nnU-Net.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a_0000.nii.gz").touch()
        >>> [path.name for path in channel_files(folder / "a.nii.gz")]
        ['a_0000.nii.gz']
    """
    if path.exists() or not path.name.lower().endswith(SUFFIXES):
        return [path]
    name = image_name(path, SUFFIXES)
    suffix = path.name[len(name) :]
    found = sorted(path.parent.glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9]{glob.escape(suffix)}"))
    all_there = [file.name for file in found] == [f"{name}_{number:04}{suffix}" for number in range(len(found))]
    return found if found and all_there else [path]


def group_channels(paths: Sequence[Path], channels: int) -> list[tuple[Path, ...]]:
    """Put files together that are channels of one image: NAME_0000, NAME_0001, ... in the same folder.

    Args:
        paths: of files; one whose name does not end so, or that stands alone, is an image by itself.
        channels: of an image; files of images of one are never put together.

    Returns:
        Files of each image, in the order of the first ones.

    Raises:
        InputError: when a channel of an image is missing, or there in two formats.

    Example:
        >>> names = ("a_0000.nii.gz", "b.nii.gz", "a_0001.nii.gz")
        >>> [[path.name for path in files] for files in group_channels([Path(name) for name in names], 2)]
        [['a_0000.nii.gz', 'a_0001.nii.gz'], ['b.nii.gz']]
    """
    images: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in paths:
        match = None
        if channels > 1 and path.name.lower().endswith(SUFFIXES):
            match = re.fullmatch(r"(.+)_(\d{4})", image_name(path, SUFFIXES))
        key, number = ((path.parent, match[1]), int(match[2])) if match else ((path, ""), 0)
        first = images.setdefault(key, {}).setdefault(number, path)
        if first != path:
            raise InputError(f"{path}: is there as {first.name} too. Leave one of them out.")
    for (folder, name), files in images.items():
        if len(files) > 1 and sorted(files) != list(range(channels)):
            raise InputError(
                f"{folder / name}: has the channels {', '.join(map(str, sorted(files)))}, 0 to {channels - 1} are "
                f"needed: {CHANNEL_FILES}"
            )
    return [tuple(files[number] for number in sorted(files)) for files in images.values()]


def result_name(image: str | Path, channels: int = 1, suffixes: Sequence[str] = SUFFIXES) -> str:
    """Return the name after which results of an image are named.

    Args:
        image: its file, or that of its first channel.
        channels: of the image.
        suffixes: that its file may have.

    Raises:
        InputError: when the file has none of the suffixes of images.

    Example:
        >>> result_name("case_0000.nii.gz"), result_name("case_0000.nii.gz", channels=2)
        ('case_0000', 'case')
    """
    name = image_name(image, suffixes)
    return name.removesuffix("_0000") if channels > 1 else name
