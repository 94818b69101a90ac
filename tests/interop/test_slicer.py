"""The module for 3D Slicer: its description by the schema, and its program as Slicer runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import SimpleITK

from monai_iunet import installed_bundles
from monai_iunet.interop.slicer import module_description, run_module, write_module
from monai_iunet.io.read import read_image
from tests.test_cli import call, save

# Order of the elements by the schema; what stands in brackets there is optional.
OF_EXECUTABLES = ["category", "title", "description", "version", "license", "contributor", "parameters", "parameters"]
OF_PARAMETERS = ["name", "longflag", "index", "description", "label", "default", "channel", "element"]


def test_the_description_follows_the_schema() -> None:
    root = ElementTree.fromstring(module_description())
    assert root.tag == "executable"
    assert [child.tag for child in root] == OF_EXECUTABLES
    names = []
    for group in root.findall("parameters"):
        assert [child.tag for child in group][:2] == ["label", "description"]
        assert len(group) > 2
        for parameter in list(group)[2:]:
            assert parameter.tag in {"image", "string-enumeration", "boolean", "string"}
            tags = [child.tag for child in parameter]
            order = [OF_PARAMETERS.index(tag) for tag in tags]
            assert order == sorted(order)
            assert {"name", "description", "label"} <= set(tags)
            assert ("longflag" in tags) != ("index" in tags)
            assert all((child.text or "").strip() for child in parameter)
            names.append(parameter.findtext("name") or "")
            assert names[-1].isidentifier()
    assert len(set(names)) == len(names)
    image, labels = root.findall(".//image")
    assert [image.findtext("channel"), labels.findtext("channel")] == ["input", "output"]
    assert labels.get("type") == "label"
    choice = root.find(".//string-enumeration")
    assert choice is not None
    assert [element.text for element in choice.findall("element")] == list(installed_bundles())
    assert choice.findtext("default") in installed_bundles()


def test_every_option_of_the_description_is_one_of_the_program(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    root = ElementTree.fromstring(module_description())
    words = []
    for parameter in (
        child for group in root.findall("parameters") for child in group if child.find("name") is not None
    ):
        flag = parameter.findtext("longflag")
        if flag is not None:
            words += [flag] if parameter.tag == "boolean" else [flag, parameter.findtext("default") or ""]
    image, labels = save(tmp_path / "image.nii.gz"), tmp_path / "labels.nrrd"
    assert run_module([*words, str(image), str(labels)]) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines()[0].startswith("<filter-start>")
    assert printed.splitlines()[-1].startswith("<filter-end>")
    assert SimpleITK.ReadImage(labels).GetSize() == (35, 50, 36)


def test_the_program_describes_itself(tmp_path: Path) -> None:
    code, printed, _ = call("slicer", tmp_path / "modules")
    program = Path(printed.splitlines()[0])
    assert code == 0
    assert "." not in program.name  # by which Slicer knows programs, except on Windows
    described = subprocess.run([program, "--xml"], capture_output=True, text=True, check=True).stdout
    assert described == module_description() == call("--xml")[1]


@pytest.mark.slow
def test_slicer_runs_the_program(tmp_path: Path) -> None:
    program = write_module(tmp_path / "modules")
    data = np.random.default_rng(0).random((35, 50, 36), dtype=np.float32)
    image = SimpleITK.GetImageFromArray(data)
    image.SetOrigin((1, 2, 3))
    SimpleITK.WriteImage(image, tmp_path / "image.nrrd")
    words = [program, "--bundle", "hippocampus", "--device", "cpu", tmp_path / "image.nrrd", tmp_path / "labels.nrrd"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    labels = SimpleITK.ReadImage(tmp_path / "labels.nrrd")
    assert labels.GetSize() == image.GetSize()
    np.testing.assert_allclose(labels.GetOrigin(), image.GetOrigin())
    assert labels.GetPixelIDValue() == SimpleITK.sitkUInt8


def test_what_is_wrong_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run_module([str(tmp_path / "no.nrrd"), str(tmp_path / "labels.nrrd")]) == 2
    assert capfd.readouterr().err == f"Error: {tmp_path / 'no.nrrd'}: no such file. Check the path.\n"
    assert run_module([]) == 2
    capfd.readouterr()
    for device in ("cuda:99", "gpu"):
        assert run_module(["--device", device, str(save(tmp_path / "a.nii.gz")), str(tmp_path / "labels.nrrd")]) == 2
        assert capfd.readouterr().err == f"Error: device {device}: not available here. Use cpu.\n"
    assert not (tmp_path / "labels.nrrd").exists()


@pytest.mark.parametrize("name", ["labels.nii.gz", "labels.nrrd"])
def test_labels_of_a_sheared_volume_lie_on_its_grid(name: str, tmp_path: Path) -> None:
    affine = np.array([[1, 0.3, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    image, labels = save(tmp_path / "a.nii.gz", affine=affine), tmp_path / name
    assert run_module(["--device", "cpu", str(image), str(labels)]) == 0
    np.testing.assert_allclose(read_image(labels).affine, affine, atol=1e-6)


def test_labels_do_not_replace_the_volume(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    image = save(tmp_path / "a.nii.gz")
    before = image.read_bytes()
    assert run_module(["--device", "cpu", str(image), str(image)]) == 2
    printed = capfd.readouterr()
    assert printed.err == f"Error: {image}: the result would replace its image. Name another folder, or a suffix.\n"
    assert image.read_bytes() == before


def test_labels_that_cannot_be_written_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    labels = tmp_path / "labels.xyz"
    assert run_module(["--device", "cpu", str(save(tmp_path / "a.nii.gz")), str(labels)]) == 2
    printed = capfd.readouterr()
    assert printed.err.splitlines()[-1].endswith(f"cannot be written by SimpleITK, as on a full disk: '{labels}'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz"]


def test_the_program_is_written_for_this_environment(tmp_path: Path) -> None:
    assert write_module(tmp_path).read_text().splitlines()[0] == f"#!{sys.executable} -E"


@pytest.mark.parametrize("name", ["env", "my env"])
def test_the_program_runs_among_the_variables_of_slicer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slicer sets them for its own Python, and no other starts with them."""
    if " " in name:
        python = tmp_path / name / "python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
    program = write_module(tmp_path / "modules")
    for variable in ("PYTHONHOME", "PYTHONPATH"):
        monkeypatch.setenv(variable, "/opt/Slicer/lib/Python")
    described = subprocess.run([program, "--xml"], capture_output=True, text=True, check=False)
    assert (described.returncode, described.stdout) == (0, module_description()), described.stderr


@pytest.mark.parametrize("name", ["my environment's $HOME", pytest.param("a" * 130, marks=pytest.mark.long)])
@pytest.mark.long
def test_the_environment_may_have_any_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "monai_iunet.py").write_text("raise SystemExit('of the working directory')")
    monkeypatch.setattr(sys, "executable", str(python))
    program = write_module(tmp_path / "modules")
    found = subprocess.run([program, "--xml"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout == module_description()
    refused = subprocess.run(
        [program, "no such.nrrd", "labels.nrrd"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (refused.returncode, refused.stderr) == (2, "Error: no such.nrrd: no such file. Check the path.\n")
