"""Small pieces of Markdown: tables, links, and text made safe for the place where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mlreviews import catalogue


def prose(text: str) -> str:
    """Text of a card as Markdown, with the arXiv ids as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    # Vertical bars inside a formula are taken out of the text before the table is read.
    parts = re.split(r"(\$[^$]+\$)", " ".join(text.split()))
    return "".join(part if part.startswith("$") else part.replace("|", r"\|") for part in parts)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; headers that begin with ``>`` stand over right-aligned columns."""
    rule = ["--:" if header.startswith(">") else "---" for header in headers]
    names = [header.removeprefix(">") for header in headers]
    lines = [names, rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quoted(text: str) -> str:
    """Text as a string of YAML."""
    return "'" + text.replace("'", "''") + "'"


def attribute(text: str) -> str:
    """Text for the square brackets of an image."""
    return escape(" ".join(text.split()), quote=False).replace("[", "(").replace("]", ")")


def copy_of(path: Path) -> str:
    """Where the site has its copy of a source file; browsers show text where they would download Python."""
    return f"files/{repository_path(path)}.txt"


def repository_path(path: Path) -> str:
    """The path from the root of the repository."""
    return path.relative_to(catalogue.PACKAGE.parent.parent).as_posix()


def repository_links(markdown: str, root: Path) -> tuple[str, list[Path]]:
    """Makes links of a file in the root of the repository into links of a page in the root of the site.

    Args:
        markdown: its text, with links relative to the root.
        root: of the repository.

    Returns:
        The text, with links to pages of the site or to copies of the files; and the files that must be copied.
    """
    linked: list[Path] = []

    def target(match: re.Match[str]) -> str:
        path = root / match[1]
        if not path.is_file():
            return match[0]
        if match[1].startswith("docs/"):
            return f"]({match[1].removeprefix('docs/')}"
        linked.append(path)
        return f"]({copy_of(path)}"

    return re.sub(r"\]\(([^)#:]+)", target, markdown), linked
