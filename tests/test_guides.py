"""The guides: links that lead somewhere, commands and options that exist, errors that name a guide."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from monai_iunet.cli import app
from monai_iunet.guides.read import FOLDER, guide_titles
from tests.reference import NAVIGATION, build
from tests.test_cli import call

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(FOLDER.glob("*.md")),
    # A recipe without weights has no pictures either.
    *(path.parents[1] / "docs" / "README.md" for path in sorted(ROOT.glob("bundles/*/models/model.pt"))),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def prose(path: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def command_lines() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            found += [(page.name, line) for line in block.splitlines() if "monai-iunet " in line]
    found += [("epilog", command.epilog or "") for command in COMMANDS.values()]
    words = [(page, shlex.split(line.partition("monai-iunet ")[2], comments=True)) for page, line in found]
    return [(page, line) for page, line in words if line and re.fullmatch(r"[a-z-]+", line[0])]


@pytest.mark.parametrize(("page", "line"), command_lines(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_and_options_exist(page: str, line: list[str]) -> None:
    if line[0] not in COMMANDS and page == "container.md":
        return  # the options of docker stand before the name of the image
    known = {
        option for parameter in COMMANDS[line[0]].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    options = [word.partition("=")[0] for word in line if re.match(r"--?[a-z]", word)]
    assert set(options) <= known | {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    code, printed, _ = call(name, "--help")
    assert code == 0
    assert f"Example: monai-iunet {name}" in " ".join(printed.split())


def test_without_arguments_there_are_three_examples() -> None:
    code, printed, _ = call()
    assert code == 0
    lines = [line.split() for line in printed.splitlines() if line.startswith("  monai-iunet ")]
    assert len(lines) == 3
    assert {line[1] for line in lines} <= set(COMMANDS)


def test_guides_are_listed_and_shown() -> None:
    code, printed, _ = call("guide")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == list(guide_titles())
    assert call("guide", "bids")[1] == (FOLDER / "bids.md").read_text(encoding="utf-8")
    code, _, error = call("guide", "nothing")
    assert code == 2
    assert "nothing: no guide. There is batches, " in error


def test_errors_name_a_guide_that_there_is() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "monai_iunet" / "cli").glob("*.py")]
    named = re.findall(r"\binput_errors\(\"(\w+)\"\)", "".join(sources))
    assert len(named) > 10
    assert set(named) <= set(guide_titles())
    assert call("segment", "x.nii.gz", "--bundle", "nothing")[2].endswith("Guide: monai-iunet guide segment.\n")


def test_the_site_has_every_guide() -> None:
    assert {name for names in NAVIGATION.values() for name in names} == set(guide_titles()) - {"index"}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build(tmp_path)
    assert "monai_iunet.planning" in (tmp_path / "reference" / "planning" / "index.html").read_text(encoding="utf-8")
    assert '"location"' in (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
