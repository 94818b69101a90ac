"""The structure of the package: imports point one way, and configs name nothing but public names."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import monai_iunet
from monai_iunet.bundling.new_bundle import bundle_configs
from monai_iunet.bundling.task import TASKS, Task

PACKAGE = Path(monai_iunet.__file__).parent
# A folder or module at the top may import what stands before it, and nothing behind it.
ORDER = (
    "errors",
    "guides",
    "system",
    "io",
    "engine",
    "planning",
    "networks",
    "losses",
    "transforms",
    "inference",
    "visualization",
    "training",
    "segmentation",
    "bids",
    "bundling",
    "fitting",
    "interop",
    "benchmark",
    "cli",
)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("monai_iunet"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("monai_iunet.")}
    return found


@cache
def module_graph() -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    files = {
        ".".join(("monai_iunet", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "bundles" not in path.relative_to(PACKAGE).parts
    }
    graph = {}
    for module, path in files.items():
        found = imports_of(path)
        graph[module] = {name for name in files if any((import_ + ".").startswith(name + ".") for import_ in found)}
    return graph


def test_every_import_points_down() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    graph = module_graph()
    assert {module.split(".")[1] for module in graph} == set(ORDER)
    upward = [
        f"{module} -> {imported}"
        for module, imports in graph.items()
        for imported in imports
        if place[imported.split(".")[1]] > place[module.split(".")[1]]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    list(TopologicalSorter(module_graph()).static_order())


def test_an_upward_import_would_be_noticed(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from monai_iunet.cli import main\n    import monai_iunet.bundling.task\n")
    assert imports_of(file) == {"monai_iunet.cli.main", "monai_iunet.bundling.task"}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_configs_name_public_names_only(task: Task) -> None:
    text = json.dumps(bundle_configs(task))
    named = set(re.findall(r"monai_iunet\.([\w.]+)", text))
    assert named
    assert named <= set(monai_iunet.__all__)
