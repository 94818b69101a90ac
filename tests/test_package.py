"""The package as MONAI and Python see it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import monai
import pytest
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator

import monai_iunet

ARGUMENTS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8]}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def modules_of(package: object) -> list[object]:
    return [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if "__main__" not in module.name
    ]


def test_importing_the_package_is_light() -> None:
    loaded = run_python("import sys, monai_iunet; print([m for m in ('torch', 'monai', 'numpy') if m in sys.modules])")
    assert loaded == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in monai_iunet.__all__:
        assert getattr(monai_iunet, name).__name__ == name
        assert name in dir(monai_iunet)
    with pytest.raises(AttributeError, match="no attribute 'UNet'"):
        monai_iunet.UNet  # noqa: B018


@pytest.mark.parametrize(
    "imports", ["", pytest.param("import monai_iunet.networks; ", marks=pytest.mark.slow)], ids=["alone", "imported"]
)
def test_a_config_finds_the_networks(imports: str) -> None:
    # In a fresh interpreter: MONAI looks names up in the modules that are loaded.
    target = "SegIUNet" if imports else "monai_iunet.SegIUNet"
    code = (
        f"{imports}from monai.bundle import ConfigParser; "
        f"p = ConfigParser({{'network_def': {{'_target_': {target!r}, **{ARGUMENTS}}}}}); "
        "print(type(p.get_parsed_content('network_def')).__name__)"
    )
    assert run_python(code) == "SegIUNet"


@pytest.mark.long
def test_an_import_in_the_config_makes_the_bare_name_known() -> None:
    code = (
        "from monai.bundle import ConfigParser; "
        f"c = {{'network_def': {{'_target_': 'SegIUNet', **{ARGUMENTS}}}}}; "
        "c['imports'] = ['$import monai_iunet.networks']; "
        "print(type(ConfigParser(c).get_parsed_content('network_def')).__name__)"
    )
    assert run_python(code) == "SegIUNet"


def test_no_name_of_ours_is_also_one_of_monai() -> None:
    ours = {
        name: module.__name__
        for module in modules_of(monai_iunet)
        for name, thing in inspect.getmembers(module)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__
    }
    locator = ComponentLocator()
    theirs = locator._find_classes_or_functions([name for name in sys.modules if name.split(".")[0] == monai.__name__])
    assert len(ours) > 10
    assert len(theirs) > 1000
    assert not {name: (ours[name], theirs[name]) for name in ours if name in theirs}


def test_a_network_from_a_config_is_the_one_from_python() -> None:
    parser = ConfigParser({"network_def": {"_target_": "monai_iunet.SegIUNet", **ARGUMENTS}})
    assert str(parser.get_parsed_content("network_def")) == str(monai_iunet.SegIUNet(**ARGUMENTS))


@pytest.mark.parametrize("name", monai_iunet.__all__)
def test_public_names_have_an_example(name: str) -> None:
    assert ">>> " in (getattr(monai_iunet, name).__doc__ or "")


def test_the_index_of_the_package_names_all() -> None:
    index = (monai_iunet.__doc__ or "").split("## By task")[1].split("## The mathematics")[0]
    assert [name for name in monai_iunet.__all__ if f"`{name}`" not in index] == []
