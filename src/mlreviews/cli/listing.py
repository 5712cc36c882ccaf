"""``mlreviews list`` and ``mlreviews show``: what the catalogue and the files of this installation say. No torch."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlreviews import catalogue
from mlreviews.catalogue import Technique
from mlreviews.cli.output import claims_table, console, note, path_text, print_json, provenance
from mlreviews.cli.overview import Kind, Status, facts, print_techniques

if TYPE_CHECKING:
    from rich.console import Console

    from mlreviews.catalogue.card import Card, PublicName
    from mlreviews.reproductions.protocol import Record

__all__ = ["complete_slug", "list_techniques", "show"]


def complete_slug(incomplete: str) -> list[str]:
    """The slugs that begin so, for the shell."""
    return [slug for slug in catalogue.techniques() if slug.startswith(incomplete)]


def list_techniques(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Words in the slug, name, title or arXiv id.")
    ] = None,
    area: Annotated[str | None, typer.Option(help="Only this area.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only this kind.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only this status; implemented includes reproduced.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the techniques of the catalogue."""
    print_techniques(words or [], area, kind, status, as_json=as_json)


def show(
    slug: Annotated[str, typer.Argument(help="The technique.", autocompletion=complete_slug)],
    out: Annotated[Path, typer.Option(help="Where your own results are.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a technique: equation, API, files, what of it holds."""
    from mlreviews.catalogue.card import public_names, read_card

    technique = catalogue.find(slug)
    card = read_card(technique.source_file) if technique.implemented else None
    names = public_names(technique.source_file) if technique.implemented else []
    reduced_by = _reduced_by(slug)
    record, record_file = _last_record(technique, out)
    if not as_json:
        screen = console()
        _print_facts(screen, technique, record_file)
        if card:
            _print_card(screen, technique, card, names, reduced_by)
        if record:
            screen.print("\nClaims", style="bold")
            screen.print(f"  {provenance(record)}\n", style="dim")
            screen.print(claims_table(record))
        return
    print_json(
        {
            **facts(technique),
            "files": {name: str(path) for name, path in _files(technique, record_file).items()},
            "import": technique.module if technique.implemented else None,
            "card": card
            and {
                "title": card.title,
                "sources": card.sources,
                "description": card.description,
                "sections": card.sections,
            },
            "api": [{"name": n.name, "signature": n.signature, "summary": n.summary} for n in names],
            "reduces_to": card.reductions if card else {},
            "reduced_to_by": reduced_by,
            "result": record and _result(record),
        }
    )


def _result(record: Record) -> object:
    import json

    stored = json.loads(record.to_json())
    del stored["slug"], stored["series"]
    return stored


def _files(technique: Technique, record_file: Path | None) -> dict[str, Path]:
    files = {
        "code": technique.source_file,
        "test": technique.test_file,
        "reproduction": technique.reproduction_file,
        "results": record_file,
    }
    return {name: path for name, path in files.items() if path and path.is_file()}


def _reduced_by(slug: str) -> dict[str, str]:
    """The techniques whose cards say that they reduce to this one, and when they do."""
    from mlreviews.catalogue.card import CardError, read_card

    found = {}
    for other in catalogue.techniques().values():
        if other.implemented and f"{slug}:" in other.source_file.read_text(encoding="utf-8"):
            try:
                reductions = read_card(other.source_file).reductions
            except CardError:  # reported where that technique is shown
                continue
            if slug in reductions:
                found[other.slug] = reductions[slug]
    return found


def _last_record(technique: Technique, out: Path) -> tuple[Record | None, Path | None]:
    """The newer of the user's own record and the one that is shipped."""
    from mlreviews.reproductions.protocol import Record, RecordError

    found = []
    for file in (technique.record_file, out / f"{technique.slug}.json"):
        if file.is_file():
            try:
                found.append((Record.read(file), file))
            except RecordError as problem:
                note(str(problem))
    return max(found, key=lambda pair: pair[0].started, default=(None, None))


def _print_facts(screen: Console, technique: Technique, record_file: Path | None) -> None:
    screen.print(f"{technique.slug}: {technique.short}", style="bold")
    facts = {
        "paper": technique.title,
        "arXiv": technique.arxiv and f"https://arxiv.org/abs/{technique.arxiv}",
        "area": f"{technique.area} ({technique.kind})",
        "reviewed": technique.reviewed,
        "status": technique.status,
        "kernels": ", ".join(technique.kernels),
        **{name: path_text(path) for name, path in _files(technique, record_file).items()},
    }
    for name, value in facts.items():
        if value:
            screen.print(f"  {name:13}{value}", soft_wrap=True)


def _print_card(
    screen: Console, technique: Technique, card: Card, names: list[PublicName], reduced_by: dict[str, str]
) -> None:
    screen.print(f"\n{card.title}", style="bold")
    for source in card.sources:
        screen.print(_wrapped(source, screen.width, "  "), style="dim")
    for paragraph in card.description.split("\n\n"):
        screen.print("\n" + _wrapped(paragraph, screen.width))
    for name, text in card.sections.items():
        _print_section(screen, name, text)
    if reduced_by:
        _print_section(screen, "Reduced to by", "\n".join(f"{slug}: {when}" for slug, when in reduced_by.items()))
    screen.print(f"\nfrom {technique.module.rpartition('.')[0]} import …", style="bold")
    for public in names:
        screen.print(f"  {public.signature}", style="cyan", soft_wrap=True)
        if public.summary:
            screen.print(f"      {public.summary}", soft_wrap=True)


def _print_section(screen: Console, name: str, text: str) -> None:
    """An equation as it stands; elsewhere an indented line goes on with the one above, and is filled up again."""
    screen.print(f"\n{name}", style="bold")
    if name == "Equation":
        screen.print(textwrap.indent(text, "  "), soft_wrap=True)
        return
    for entry in re.split(r"\n(?!\s)", text):
        screen.print(_wrapped(entry, screen.width, "  ", "      "))


def _wrapped(text: str, width: int, first: str = "", others: str | None = None) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width - 1,
        initial_indent=first,
        subsequent_indent=first if others is None else others,
        break_long_words=False,
        break_on_hyphens=False,
    )
