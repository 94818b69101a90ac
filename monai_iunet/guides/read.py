"""Reading of the guides, the Markdown pages of this folder."""

from __future__ import annotations

from pathlib import Path

from monai_iunet.errors import InputError

__all__ = ["guide_titles", "read_guide"]

FOLDER = Path(__file__).parent


def guide_titles() -> dict[str, str]:
    """Return the title of each guide by its name.

    Example:
        >>> guide_titles()["segment"]
        'Segment images'
    """
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(FOLDER.glob("*.md"))
    }


def read_guide(name: str) -> str:
    """Return the text of a guide, in Markdown.

    Raises:
        InputError: when there is no such guide.

    Example:
        >>> read_guide("bids").partition("\\n")[0]
        '# BIDS'
    """
    if name not in guide_titles():
        raise InputError(f"{name}: no guide. There is {', '.join(guide_titles())}.")
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")
