"""Bundles on the disk: those that come with the package, their folders and the facts in their metadata."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_iunet.errors import InputError
from monai_iunet.io.text import first_line
from monai_iunet.io.weights import weights_file

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["DEFAULT_BUNDLE", "bundle_facts", "bundle_folder", "installed_bundles", "parsed_content", "read_config"]

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = "iunet_hippocampus_mri_segmentation"


def installed_bundles() -> dict[str, Path]:
    """Return name and folder of each bundle in the installed package, or beside it in a checkout; those with weights.

    Example:
        >>> sorted(installed_bundles())
        ['iunet_brain_mri_segmentation', 'iunet_headneck_ct_segmentation', 'iunet_hippocampus_mri_segmentation']
    """
    package = Path(__file__).parents[1]
    for parent in (package, package.parent):
        metadata = sorted((parent / "bundles").glob("*/configs/metadata.json"))
        if metadata:
            folders = [path.parents[1] for path in metadata]
            return {folder.name: folder for folder in folders if weights_file(folder).is_file()}
    return {}


def bundle_folder(bundle: str | Path | None = None) -> Path:
    """Return the folder of a bundle.

    Of text, installed names come first: a folder of such a name needs a separator, as "./headneck". A `Path` is a
    folder. Of a folder that did not come with the package, the log says that it can run code.

    Args:
        bundle: the name of an installed bundle, a part of it that only one has, such as "headneck", or a folder; None
            for the hippocampus bundle.

    Raises:
        InputError: when there is no such bundle.

    Example:
        >>> bundle_folder("headneck").name
        'iunet_headneck_ct_segmentation'
    """
    name = DEFAULT_BUNDLE if bundle is None else str(bundle)
    installed = installed_bundles()
    # A Path has lost the "./" that a user may have written.
    is_path = isinstance(bundle, Path) or os.sep in name or (os.altsep or os.sep) in name
    fitting = [] if is_path or not name else [candidate for candidate in installed if name in candidate]
    fitting = [name] if name in fitting else fitting
    if len(fitting) == 1:
        if Path(name).is_dir():
            logger.warning("%s: the installed bundle %s is used; write ./%s for the folder.", name, fitting[0], name)
        return installed[fitting[0]]
    if name and not fitting and Path(name).is_dir():
        if Path(name).resolve() not in [folder.resolve() for folder in installed.values()]:
            logger.warning(
                "%s: a folder, whose configs can run any code on this machine. Use bundles of people you trust.",
                name,
            )
        return Path(name)
    raise InputError(
        f"{name or 'an empty name'}: neither a bundle folder nor the name of one bundle that is installed "
        f"({', '.join(installed) or 'there is none: install the package again'})."
    )


def bundle_facts(bundle: str | Path) -> dict[str, Any]:
    """Return the main facts of a bundle from its metadata.

    Args:
        bundle: a folder or a name, see `bundle_folder`.

    Returns:
        "task", "modality", "classes" (a list), "dice" (mean over the validation cases) and "training_mib" (a step's
        memory beside parameters and gradients); the last two are None where they have not been measured.

    Raises:
        InputError: when there is no such bundle, or its metadata cannot be read.

    Example:
        >>> bundle_facts("hippocampus")["classes"]
        ['anterior hippocampus', 'posterior hippocampus']
    """
    folder = bundle if isinstance(bundle, Path) else bundle_folder(bundle)
    path = folder / "configs" / "metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        formats, resources = metadata["network_data_format"], metadata.get("resources", {})
        return {
            "task": metadata["task"],
            "modality": formats["inputs"]["image"]["modality"],
            "classes": [name for value, name in formats["outputs"]["pred"]["channel_def"].items() if int(value) > 0],
            "dice": metadata["eval_metrics"].get("mean_dice"),
            "training_mib": resources.get("training_step_mib_beside_parameters_and_gradients"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the metadata of a segmentation bundle. Name another bundle.") from error


def read_config(path: Path) -> ConfigParser:
    """Read a config of a bundle.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    try:
        parser.read_config(path)
        dict(parser.get())
    except Exception as error:  # whatever a damaged file brings about
        raise InputError(f"{path}: not a config ({first_line(error)}). Copy the bundle again.") from error
    return parser


def parsed_content(parser: ConfigParser, name: str) -> Any:
    """Return what an entry of a config describes.

    Raises:
        InputError: when a file of the user is the cause of what goes wrong, which MONAI reports as an error of its own.
    """
    try:
        return parser.get_parsed_content(name)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        raise
