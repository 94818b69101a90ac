"""Finding the cases of a data set, and finding what is wrong with them before the work begins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import distributed

from monai_iunet.errors import InputError
from monai_iunet.io.channels import channel_files, group_channels, result_name
from monai_iunet.io.checks import DAMAGED, check_extent, check_not_constant, check_same_grid
from monai_iunet.io.files import NIFTI, check_folder, check_names, image_name
from monai_iunet.io.read import read_image

__all__ = ["check_cases", "check_images", "image_of", "images_to_segment", "read_case"]

logger = logging.getLogger(__name__)

Files = tuple[Path, ...]  # of an image: one, or one per channel


def check_cases(
    cases: Sequence[dict[str, Any]],
    num_classes: int,
    check: bool = True,
    skip_bad: bool = False,
    label_values: Sequence[int] | None = None,
    channels: int = 1,
) -> list[dict[str, Any]]:
    """Check that the cases of a data set can be learned from; all problems are listed together.

    Args:
        cases: dictionaries with "image", a path or one per channel, and "label".
        num_classes: labels are 0 to `num_classes - 1`.
        check: whether to look at all; every file is read.
        skip_bad: leave bad cases out, saying so, instead of stopping.
        label_values: the labels, where they are others.
        channels: of an image.

    Returns:
        The good cases.

    Raises:
        InputError: naming each bad case in a line, unless `skip_bad`; or if none is left.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> folder = Path(tempfile.mkdtemp())
        >>> data = np.arange(720).reshape(8, 9, 10).astype(np.float32)
        >>> nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / "image.nii.gz")
        >>> nibabel.save(nibabel.Nifti1Image((data > 300).astype(np.uint8), np.eye(4)), folder / "label.nii.gz")
        >>> case = {"image": str(folder / "image.nii.gz"), "label": str(folder / "label.nii.gz")}
        >>> check_cases([case], num_classes=2) == [case]
        True
    """
    if not check:
        return list(cases)
    values = range(num_classes) if label_values is None else label_values
    good = _without_bad(cases, lambda case: read_case(case, values, channels), skip_bad)
    if not good:
        raise InputError("There is no case to use. Check the data set's folder and its dataset.json.")
    return good


def check_images(
    cases: Sequence[dict[str, Any]],
    check: bool = True,
    skip_bad: bool = False,
    max_extent: float | None = None,
    channels: int = 1,
) -> list[dict[str, Any]]:
    """Check that images can be segmented; all problems are listed together.

    Args:
        cases: dictionaries with "image", a path or one per channel.
        check: whether to look at all; every file is read.
        skip_bad: leave bad images out, saying so, instead of stopping.
        max_extent: longest axis, in mm, of images that the network has learned from; None for any.
        channels: of an image.

    Returns:
        The good images.

    Raises:
        InputError: naming each bad image in a line, unless `skip_bad`.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> path = Path(tempfile.mkdtemp(), "scan.nii.gz")
        >>> nibabel.save(nibabel.Nifti1Image(np.random.rand(8, 9, 10), np.eye(4)), path)
        >>> len(check_images([{"image": str(path)}]))
        1
    """
    if not check:
        return list(cases)
    return _without_bad(cases, lambda case: _check_image(case, max_extent, channels), skip_bad)


def _without_bad(
    cases: Sequence[dict[str, Any]], check: Callable[[dict[str, Any]], object], skip_bad: bool
) -> list[dict[str, Any]]:
    """Return the cases for which a check raises no `InputError`; the messages of all others are listed together."""
    problems = {}
    for number, case in enumerate(cases):
        try:
            check(case)
        except InputError as error:
            problems[number] = str(error)
    listed = "\n".join(problems.values())
    if problems and not skip_bad:
        raise InputError(
            f"{len(problems)} of {len(cases)} cases cannot be used:\n{listed}\nMend them, or leave them out with "
            "--skip_bad_cases True."
        )
    if problems:
        logger.warning("%d of %d cases are left out:\n%s", len(problems), len(cases), listed)
    return [case for number, case in enumerate(cases) if number not in problems]


def _check_image(case: dict[str, Any], max_extent: float | None, channels: int) -> None:
    image = read_image(case["image"], channels=channels)
    check_not_constant(image, image_of(case))
    if max_extent is not None:
        check_extent(image, max_extent, image_of(case), "Crop it first, or use `monai-iunet segment`.")


def read_case(
    case: dict[str, Any], label_values: Sequence[int], channels: int = 1
) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """Read a case and check that it can be learned from.

    Args:
        case: with "image", a path or one per channel, and "label".
        label_values: what labels may be.
        channels: of the image.

    Returns:
        The image, with several channels 4D, and the labels.

    Raises:
        InputError: naming the file that cannot be used.
    """
    if not case.get("label"):
        raise InputError(f"{image_of(case)}: has no label.")
    image, label = read_image(case["image"], channels=channels), read_image(case["label"])
    check_not_constant(image, image_of(case))
    check_same_grid(case["label"], label, "its image", image)
    turned = ["".join(map(str, nibabel.aff2axcodes(part.affine))) for part in (image, label)]
    if turned[0] != turned[1]:  # both grids are all but the same, yet each would be turned to RAS by its own affine
        raise InputError(
            f"{case['label']}: its axes run to {turned[1]}, those of its image to {turned[0]}, since both are turned by"
            " some 45 degrees. Give the labels the affine of the image with nibabel: `label.set_sform(image.affine)`, "
            "`label.set_qform(image.affine)`."
        )
    values = np.unique(label.get_fdata(dtype=np.float32))
    wrong = [value for value in values if value not in label_values]
    if wrong:
        some = ", ".join(np.format_float_positional(value, trim="-") for value in wrong[:5])
        consecutive = list(label_values) == list(range(len(label_values)))
        known = f"0 to {len(label_values) - 1}" if consecutive else ", ".join(map(str, label_values))
        raise InputError(f"{case['label']}: has the values {some}, labels are {known}.")
    if len(values) < 2:
        raise InputError(f"{case['label']}: is empty, all voxels are {values[0]:g}.")
    return image, label


def image_of(case: Mapping[str, Any]) -> str:
    """Return the file of a case's image, or that of its first channel."""
    return str(case["image"][0] if isinstance(case["image"], list) else case["image"])


def images_to_segment(
    source: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    suffix: str = "_seg",
    skip_done: bool = True,
    channels: int = 1,
) -> list[dict[str, Any]]:
    """Find the images that are asked for and have no result yet.

    Args:
        source: an image, a folder of images (its subfolder `imagesTs`, if there is one), a list of either, or a JSON
            file: a list, or a dictionary whose section "test" is one. Paths in it are relative to it.
        output_dir: folder of the results; created if there is something to do.
        suffix: what a result's name has after that of its image.
        skip_done: whether to leave out images that have a result.
        channels: of an image; files NAME_0000, NAME_0001, ... are then channels of one, whose result is named NAME.

    Returns:
        Dictionaries with "image", a path or one per channel; in several processes those that the first one finds, since
        results may come while the others look.

    Raises:
        InputError: when there is no such image, two of them have the same name, a result is damaged or has another grid
            than its image, as that of another image of this name would, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> path = Path(tempfile.mkdtemp(), "scan.nii.gz")
        >>> nibabel.save(nibabel.Nifti1Image(np.random.rand(8, 9, 10), np.eye(4)), path)
        >>> [case["image"] == str(path) for case in images_to_segment(path.parent, path.parent / "results")]
        [True]
    """
    found = [files for part in _as_list(source) for files in _images(part)]
    alone = group_channels([files[0] for files in found if len(files) == 1], channels)
    images = [*alone, *(files for files in found if len(files) > 1)]
    if not images:
        raise InputError(f"{source}: no NIfTI image (.nii or .nii.gz) there. Name images or a folder of them.")
    names = [result_name(files[0], channels, NIFTI) for files in images]
    check_names(names)
    results = [Path(str(output_dir), f"{name}{suffix}.nii.gz") for name in names]
    written = {result.resolve() for result in results}
    are_made = [files[0].resolve() in written for files in images]
    if any(are_made):  # by a run before, in the folder of the images
        example = images[are_made.index(True)][0]
        logger.warning("Left out: %d images, such as %s, that are results of other ones", sum(are_made), example)
    pairs = [pair for pair, is_made in zip(zip(images, results), are_made) if not is_made]
    images, results = [files for files, _ in pairs], [result for _, result in pairs]
    done = {result: files for files, result in zip(images, results) if skip_done and result.exists()}
    for result, files in done.items():
        _check_result(result, files[0])
    left = _of_first_process([files for files, result in zip(images, results) if result not in done])
    if len(left) < len(images):
        logger.info(
            "%d of %d images have a result in %s and are left out", len(images) - len(left), len(images), output_dir
        )
    if left:
        check_folder(output_dir)
    return [{"image": str(files[0]) if len(files) == 1 else [str(path) for path in files]} for files in left]


def _check_result(result: Path, image: Path) -> None:
    """Check that a result that is there is readable, and on the grid of its image if that is readable too."""
    advice = "Remove it, name another output_dir, or pass --skip_done False."
    try:
        found: Any = nibabel.load(result)
    except DAMAGED as error:
        raise InputError(f"{result}: cannot be read, so its image is not done. {advice}") from error
    try:
        reference: Any = nibabel.load(image)
    except DAMAGED:
        return
    try:
        check_same_grid(str(result), found, str(image), reference)
    except InputError as error:
        raise InputError(f"{error} It is the result of another image of this name. {advice}") from None


def _of_first_process(images: list[Files]) -> list[Files]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return images
    on_gpu = distributed.get_backend() == "nccl"
    objects = [images]
    device = torch.device("cuda", distributed.get_node_local_rank(0)) if on_gpu else None
    distributed.broadcast_object_list(objects, device=device)
    return objects[0]


def _as_list(source: Any) -> list[Path]:
    # The command line makes a number of a folder that is named 2024.
    parts = [source] if isinstance(source, (str, Path, int, float)) else source
    return [Path(str(part)) for part in parts]


def _images(path: Path) -> list[Files]:
    """Return the files of each image that a path stands for."""
    if path.is_dir():
        folder = path / "imagesTs" if (path / "imagesTs").is_dir() else path
        # Files that begin with a dot are not images: macOS adds `._scan.nii.gz` to a copied `scan.nii.gz`.
        found = (file for file in folder.iterdir() if file.name.lower().endswith(NIFTI) and file.name[0] != ".")
        return [(file,) for file in sorted(found)]
    if path.suffix.lower() == ".json":
        listed = [tuple(path.parent / name for name in names) for names in _listed(path)]
        return [tuple(channel_files(names[0])) if len(names) == 1 else names for names in listed]
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    image_name(path)
    return [(path,)]


def _listed(path: Path) -> list[list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["test"] if isinstance(content, dict) else content
        images = [entry["image"] if isinstance(entry, dict) else entry for entry in entries]
        listed = [list(map(str, image)) if isinstance(image, list) else [str(image)] for image in images]
        if not all(listed):
            raise ValueError("an image has no file")
        return listed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: not a list of images. It must hold a list of paths, or {{"test": [...]}} as dataset.json does.'
        ) from error
