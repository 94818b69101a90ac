"""A module for 3D Slicer: the description that Slicer makes a dialog of, and the program that it runs.

Slicer asks a program for `--xml`, then runs it with files of the volumes that the user chose (the command-line modules
of Slicer; schema: commontk.org, "CTK XML schema for command line modules"). The program is a short script that
runs in the environment in which this package is installed, so nothing is installed into Slicer.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import monai_iunet
from monai_iunet.errors import InputError
from monai_iunet.io.bundles import DEFAULT_BUNDLE, bundle_folder, installed_bundles
from monai_iunet.io.files import NIFTI, check_folder, check_target, write_atomically, write_text

__all__ = ["module_description", "run_module", "write_module"]

NAME = "SegmentIUNet"
# Slicer sets variables for a Python of its own, PYTHONHOME among them, with which no other starts: -E passes over them.
SCRIPT = """#!{python} -E
# Segments the volume that 3D Slicer hands over; written by "monai-iunet slicer".
{code}"""
# Where the system would not find the interpreter, whose path ends at a space, or is cut.
SHELL_SCRIPT = """#!/bin/sh
# Segments the volume that 3D Slicer hands over; written by "monai-iunet slicer".
exec {python} -E -c {code} "$@"
"""
CODE = """import runpy, sys
sys.path[:] = filter(None, sys.path)
if {folder!r} not in sys.path:
    sys.path.insert(0, {folder!r})
runpy.run_module("monai_iunet.interop.slicer", run_name="__main__")
"""
LONGEST_INTERPRETER = 122  # characters, of a line that Linux cut after 127
BATCH = '@"{python}" -E -m monai_iunet.interop.slicer %*\n'


def module_description() -> str:
    """Return the description of the module as XML, with the bundles that are installed.

    Example:
        >>> module_description().splitlines()[2].strip()
        '<category>Segmentation</category>'
    """
    root = ElementTree.Element("executable")
    texts = {
        "category": "Segmentation",
        "title": "Segment by iUNet",
        "description": "Segments a volume with a bundle of monai_iunet. For research only, not a medical device.",
        "version": version("monai-iunet"),
        "license": "Apache-2.0",
        "contributor": "The monai_iunet developers",
    }
    for name, text in texts.items():
        ElementTree.SubElement(root, name).text = text
    files = _group(root, "Volumes", "What is segmented, and where the labels go.")
    _parameter(files, "image", "image", "Image", "Volume to segment.", index=0, channel="input")
    labels = _parameter(files, "image", "labels", "Labels", "Label map to write.", index=1, channel="output")
    labels.set("type", "label")
    options = _group(root, "Options", "How it is segmented.")
    bundles = list(installed_bundles()) or [DEFAULT_BUNDLE]
    default = DEFAULT_BUNDLE if DEFAULT_BUNDLE in bundles else bundles[0]
    choice = _parameter(options, "string-enumeration", "bundle", "Bundle", "What is segmented.", default=default)
    for bundle in bundles:
        ElementTree.SubElement(choice, "element").text = bundle
    text = "Segment the left-right mirror image: for crops of the other side."
    _parameter(options, "boolean", "mirror", "Mirror", text, default="false")
    _parameter(options, "string", "device", "Device", "auto, cpu, cuda, cuda:1, ...", default="auto")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _group(root: ElementTree.Element, label: str, description: str) -> ElementTree.Element:
    group = ElementTree.SubElement(root, "parameters")
    ElementTree.SubElement(group, "label").text = label
    ElementTree.SubElement(group, "description").text = description
    return group


def _parameter(
    group: ElementTree.Element,
    kind: str,
    name: str,
    label: str,
    description: str,
    index: int | None = None,
    channel: str | None = None,
    default: str | None = None,
) -> ElementTree.Element:
    """Add a parameter; the schema prescribes the order of its elements."""
    parameter = ElementTree.SubElement(group, kind)
    place = ("longflag", f"--{name}") if index is None else ("index", str(index))
    texts = [("name", name), place, ("description", description), ("label", label)]
    texts += [("default", default)] if default is not None else []
    texts += [("channel", channel)] if channel is not None else []
    for title, text in texts:
        ElementTree.SubElement(parameter, title).text = text
    return parameter


def run_module(arguments: Sequence[str]) -> int:
    """Do what Slicer asks for: print the description for `--xml`, or segment a volume.

    Returns:
        Exit status; what is wrong is said in a line on the standard error, which Slicer shows.
    """
    parser = argparse.ArgumentParser(NAME, description="Segments the volume that 3D Slicer hands over.")
    parser.add_argument("--xml", action="store_true", help="print the description of the module")
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("labels", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    if options.xml:
        sys.stdout.write(module_description())
        return 0
    try:
        if options.image is None or options.labels is None:
            raise InputError("A volume and a file for its labels are needed.")
        _segment(options)
    except (InputError, OSError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


def _segment(options: argparse.Namespace) -> None:
    """Segment a file into a file of labels, and tell Slicer how far it is."""
    # Imported here, since Slicer asks every program for its description when it starts.
    from monai_iunet.io.read import read_image
    from monai_iunet.segmentation.files import write_nifti, write_simpleitk
    from monai_iunet.segmentation.segmenter import BundleSegmenter

    check_target(options.labels, options.image, {})
    _progress("start", 0)
    device = None if options.device == "auto" else options.device
    segmenter = BundleSegmenter(bundle_folder(options.bundle), device)
    image = read_image(options.image, channels=segmenter.channels)
    _progress("progress", 0.1)
    segmentation = segmenter.segment(image, str(options.image), options.mirror)
    _progress("progress", 0.9)
    doubts = segmentation.doubts()
    if doubts:
        sys.stderr.write(f"Warning: {options.image}: {doubts}\n")
    # In NIfTI, SimpleITK writes neither shear nor both forms of the image.
    write = write_nifti if options.labels.name.endswith(NIFTI) else write_simpleitk
    write_atomically(options.labels, partial(write, segmentation))
    _progress("end", 1)


def _progress(step: str, part: float) -> None:
    """Write what Slicer reads of a module that runs."""
    texts = {
        "start": "<filter-start><filter-name>monai_iunet</filter-name></filter-start>",
        "progress": f"<filter-progress>{part}</filter-progress>",
        "end": "<filter-end><filter-name>monai_iunet</filter-name></filter-end>",
    }
    sys.stdout.write(texts[step] + "\n")
    sys.stdout.flush()


def write_module(folder: Path) -> Path:
    """Write the program that Slicer runs, for the environment in which this package is installed.

    Args:
        folder: to add to the module paths of Slicer; created if need be.

    Returns:
        The program; one that is there is replaced.

    Raises:
        InputError: when the folder cannot be written.
    """
    check_folder(folder)
    windows = os.name == "nt"
    path = folder / (f"{NAME}.bat" if windows else NAME)
    python, script = sys.executable, BATCH if windows else SCRIPT
    code = CODE.format(folder=str(Path(monai_iunet.__file__).resolve().parents[1]))
    if not windows and (len(os.fsencode(python)) > LONGEST_INTERPRETER or any(map(str.isspace, python))):
        python, code, script = shlex.quote(python), shlex.quote(code), SHELL_SCRIPT
    write_text(path, script.format(python=python, code=code))
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.exit(run_module(sys.argv[1:]))
