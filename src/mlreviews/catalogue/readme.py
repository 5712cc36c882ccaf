"""The README's table of areas: ``python -m mlreviews.catalogue.readme`` writes it, ``--check`` only compares.

The table stands between two marker lines, and everything in it is counted from the catalogue and the files that exist.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlreviews.catalogue import CHECKOUT, Technique, areas

__all__ = ["ReadmeError", "areas_table", "main", "with_table"]

BEGIN, END = "<!-- areas:begin -->", "<!-- areas:end -->"
COMMAND = "python -m mlreviews.catalogue.readme"


class ReadmeError(ValueError):
    """The README has no place for the table; the message says what is missing."""


def areas_table(grouped: Mapping[str, Sequence[Technique]]) -> str:
    """The table in Markdown: a row for each area, and the totals.

    Args:
        grouped: area -> its techniques.
    """
    rows = [(area, *_counts(members)) for area, members in grouped.items()]
    total = [f"**{sum(column)}**" for column in zip(*(row[1:] for row in rows), strict=True)]
    lines = ["| area | techniques | implemented | with reproduction |", "|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in [*rows, ("**total**", *total)]]
    return "\n".join(lines)


def _counts(members: Sequence[Technique]) -> tuple[int, int, int]:
    return len(members), sum(t.implemented for t in members), sum(t.status == "reproduced" for t in members)


def with_table(text: str, table: str) -> str:
    """The text with the table between the markers instead of what stood there.

    Raises:
        ReadmeError: the text doesn't hold each marker once, the beginning before the end.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReadmeError(f"expected one line {BEGIN} and after it one line {END}")
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None, readme: Path | None = None) -> int:
    """Brings the table up to date, or says whether it is.

    Args:
        arguments: of the command line; ``--check`` changes nothing.
        readme: the file; that of the checkout by default.

    Returns:
        The exit code: 1 when there is no README, no place in it, or with ``--check`` an old table.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description="Update the table of areas in README.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args(arguments).check
    readme = readme or (CHECKOUT and CHECKOUT / "README.md")
    if readme is None:
        print("README.md: this installation of mlreviews is no source checkout, so it has none", file=sys.stderr)
        return 1
    try:
        before = readme.read_text(encoding="utf-8")
        after = with_table(before, areas_table(areas()))
        if before != after and not check:
            readme.write_text(after, encoding="utf-8")
    except (OSError, ReadmeError) as error:
        print(f"{readme.name}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    if before != after and check:
        print(f"{readme.name}: its table of areas is not up to date; run '{COMMAND}'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
