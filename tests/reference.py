"""The site: the README, the guides, a page for each bundle and the reference: python -m tests.reference FOLDER.

MkDocs builds it, with the theme Material and mkdocstrings, from a copy of the pages in which all lies as in the
repository, so that links are the same in both.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import monai_iunet

ROOT = Path(__file__).parents[1]
GUIDES = "monai_iunet/guides"
# Title and pages of each part of the site.
NAVIGATION = {
    "Users": ["segment", "bids", "batches", "large_images", "programs", "container"],
    "Trainers": ["train", "memory", "nnunet"],
    "Engine builders": ["networks", "engine"],
    "Measured": ["benchmark", "whole_images", "comparison"],
}


def linked_files(page: Path) -> set[Path]:
    """Files of the repository that a page links, as pictures or otherwise."""
    targets = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    files = [(page.parent / target).resolve() for target in targets if not target.startswith("http")]
    return {file for file in files if file.is_file()}


def copy_pages(folder: Path) -> None:
    """Copy the pages, and all that they link, into a folder as they lie in the repository."""
    waiting = {ROOT / "README.md", *(ROOT / GUIDES).glob("*.md"), *ROOT.glob("bundles/*/docs/README.md")}
    done: set[Path] = set()
    while waiting:
        file = waiting.pop()
        done.add(file)
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        if file.suffix == ".md":
            waiting |= linked_files(file) - done


def write_reference(folder: Path) -> dict[str, str]:
    """Write a page with the public names of each folder of the package; return title and path of each."""
    pages = {"Index and mathematics": "reference/index.md"}
    (folder / "reference").mkdir()
    (folder / "reference" / "index.md").write_text("::: monai_iunet\n    options:\n      members: false\n")
    by_subject: dict[str, list[str]] = {}
    for name, module in monai_iunet._MODULES.items():
        by_subject.setdefault(module.split(".")[1], []).append(f"{module}.{name}")
    for subject, names in sorted(by_subject.items()):
        path = f"reference/{subject}.md"
        text = "\n".join(f"::: {name}\n" for name in sorted(names, key=lambda name: name.rpartition(".")[2].lower()))
        (folder / path).write_text(f"# {subject.capitalize()}\n\n{text}")
        pages[subject] = path
    return pages


def configuration(folder: Path, site: Path) -> dict[str, Any]:
    """The configuration of MkDocs for the pages in a folder."""
    home = ["README.md", {"Guides": f"{GUIDES}/index.md"}]
    guides = [{title: [f"{GUIDES}/{name}.md" for name in names]} for title, names in NAVIGATION.items()]
    bundles = [str(path.relative_to(folder)) for path in sorted(folder.glob("bundles/*/docs/README.md"))]
    reference = [{title: path} for title, path in write_reference(folder).items()]
    handler = {
        "paths": [str(ROOT)],
        "options": {
            "docstring_style": "google",
            "docstring_options": {"warnings": False},  # of arguments that only a base class has in its signature
            "extensions": ["tests.reference_examples"],
            "heading_level": 2,
            "show_root_heading": True,
            "show_source": False,
        },
    }
    return {
        "site_name": "monai_iunet",
        "docs_dir": str(folder),
        "site_dir": str(site.resolve()),
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.tabs", "navigation.top", "content.code.copy", "search.highlight"],
            "palette": [
                {"media": "(prefers-color-scheme: light)"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate"},
            ],
        },
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": handler}}}],
        "markdown_extensions": [
            "tables",
            "pymdownx.superfences",
            "pymdownx.highlight",
            {"pymdownx.arithmatex": {"generic": True}},
        ],
        "extra_javascript": ["https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"],
        "nav": [{"Home": home}, *guides, {"Bundles": bundles}, {"Reference": reference}],
        "validation": {"links": {"not_found": "info"}},  # links are tested, by tests/test_guides.py
    }


def build(site: Path) -> None:
    """Build the site into a folder; whatever MkDocs warns of is an error."""
    import yaml
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory() as temporary:
        pages = Path(temporary) / "pages"
        copy_pages(pages)
        file = Path(temporary) / "mkdocs.yml"
        file.write_text(yaml.safe_dump(configuration(pages, site)))
        build_site(load_config(str(file), strict=True))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
