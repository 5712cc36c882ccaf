"""The table of ``mlreviews list``, and how its rows are chosen. Loads no typer, and rich only for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from mlreviews import catalogue
from mlreviews.catalogue import Technique
from mlreviews.cli.output import CommandError, note, print_columns, print_json, terminal

__all__ = ["Kind", "Status", "facts", "print_techniques"]


class Kind(StrEnum):
    """What a technique is."""

    ALGORITHM = "algorithm"
    PROCEDURE = "procedure"
    PHENOMENON = "phenomenon"


class Status(StrEnum):
    """How far a technique has come."""

    PLANNED = "planned"
    IMPLEMENTED = "implemented"
    REPRODUCED = "reproduced"


_STYLES = {Status.PLANNED: "dim", Status.IMPLEMENTED: "", Status.REPRODUCED: "green"}


def print_techniques(
    words: Sequence[str] = (),
    area: str | None = None,
    kind: Kind | None = None,
    status: Status | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Prints the techniques that meet all of the conditions.

    Args:
        words: each in the slug, name, title or arXiv id; upper and lower case are the same.
        area: the only one.
        kind: the only one.
        status: the only one; implemented includes reproduced.
        as_json: print JSON instead of a table.

    Raises:
        CommandError: there is no such area.
    """
    areas = catalogue.areas()
    if area is not None and area not in areas:
        raise CommandError(f"no area is called {area!r}{catalogue.nearest(area, areas)}", usage=True)
    found = [
        technique
        for technique in catalogue.techniques().values()
        if area in (None, technique.area)
        and kind in (None, technique.kind)
        and status in (None, technique.status, *([Status.IMPLEMENTED] if technique.implemented else []))
        and all(_mentions(technique, word) for word in words)
    ]
    if as_json:
        print_json([facts(technique) for technique in found])
    elif found:
        _print_list(found)
    else:
        note("no technique of the catalogue matches")


def _mentions(technique: Technique, word: str) -> bool:
    text = "\n".join((technique.slug, technique.short, technique.title, technique.arxiv))
    return word.lower() in text.lower()


def _print_list(found: list[Technique]) -> None:
    screen = terminal()
    statuses = [t.status for t in found]  # asks the disk
    columns = {
        "technique": [t.slug for t in found],
        "area": [t.area for t in found],
        "kind": [t.kind for t in found],
        "status": statuses,
        "arXiv": [t.arxiv for t in found],
        "name": [t.short for t in found],
    }
    groups: list[str] = []
    if screen:
        groups = columns.pop("area")
        if screen.width < 100:
            del columns["kind"]
    styles = [_STYLES[Status(status)] for status in statuses]
    print_columns(list(columns), list(zip(*columns.values(), strict=True)), styles, groups)
    if screen:
        count = Counter(statuses)
        screen.print(f"{len(found)} techniques: " + ", ".join(f"{count[s]} {s.value}" for s in Status))


def facts(technique: Technique) -> dict[str, object]:
    """What the catalogue and the files say of a technique, for JSON."""
    return {
        "slug": technique.slug,
        "area": technique.area,
        "short": technique.short,
        "title": technique.title,
        "kind": technique.kind,
        "arxiv": technique.arxiv,
        "reviewed": technique.reviewed,
        "status": technique.status,
        "tested": technique.tested,
        "kernels": list(technique.kernels),
    }
