"""``mlreviews reproduce``: runs reproductions, shows what was measured, and writes records and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sized
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlreviews import catalogue
from mlreviews.catalogue import Technique, UnknownTechniqueError
from mlreviews.cli.listing import complete_slug
from mlreviews.cli.output import CommandError, claims_table, console, error, path_text, provenance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from mlreviews.reproductions.protocol import Record

__all__ = ["reproduce"]


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="SLUG|AREA", help="Techniques, or areas.", autocompletion=complete_slug),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All reproductions.")] = False,
    full: Annotated[bool, typer.Option("--full/--quick", help="The paper's settings, or seconds of work.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Where tensors live: cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where records and figures go.")] = Path("results"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 unless all claims hold.")] = False,
) -> None:
    """Run the claims of papers and reviews, and say which hold."""
    chosen = _choose(names or [], everything)
    from mlreviews.reproductions.protocol import Settings
    from mlreviews.reproductions.runner import ReproductionError, reproduce_many

    screen = console()
    progress = _progress(screen)

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        known = len(items) if total is None and isinstance(items, Sized) else total
        task = progress.add_task(description, total=known)
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)

    settings = Settings(full=full, seed=seed, device=device, tracker=track)
    verdicts: Counter[str] = Counter()
    failed: list[str] = []
    try:
        with progress, closing(reproduce_many(chosen, settings, out, jobs)) as results:
            for technique, result in results if len(chosen) == 1 else track(results, "reproductions", len(chosen)):
                record = result if not isinstance(result, ReproductionError) else result.record
                if record:
                    _print_record(screen, technique, record)
                    verdicts.update(claim.verdict.value for claim in record.outcome.claims)
                if isinstance(result, ReproductionError):
                    failed.append(technique.slug)
                    error(str(result), result)
                else:
                    screen.print(f"written: {_written(technique, out)}\n", soft_wrap=True)
    except ReproductionError as problem:
        raise CommandError(str(problem)) from problem
    if len(chosen) > 1:
        found = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
        screen.print("; ".join([f"claims: {found or 'none'}", *([f"failed: {', '.join(failed)}"] if failed else [])]))
    if failed or (strict and verdicts.total() > verdicts["holds"]):
        raise typer.Exit(1)


def _choose(names: list[str], everything: bool) -> list[Technique]:
    """The techniques asked for, each once; of an area those that have a reproduction."""
    if everything == bool(names):
        raise CommandError("name techniques or areas, or give --all", usage=True)
    known, areas = catalogue.techniques(), catalogue.areas()
    chosen: dict[str, Technique] = {}
    for name in areas if everything else names:
        if name in known:
            chosen[name] = known[name]
        elif name in areas:
            chosen.update((t.slug, t) for t in areas[name] if t.reproduced)
        else:
            hint = catalogue.nearest(name, [*known, *areas])
            raise UnknownTechniqueError(f"no technique or area is called {name!r}{hint}")
    if not chosen:
        raise CommandError(f"nothing to run: no technique of {', '.join(names) or 'the catalogue'} has a reproduction")
    return list(chosen.values())


def _progress(screen: Console) -> Progress:
    """Bars on the terminal that the results go to, or else on standard error; none where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    where = screen if screen.is_terminal else console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=where, transient=True, disable=not where.is_terminal)


def _print_record(screen: Console, technique: Technique, record: Record) -> None:
    from rich.text import Text

    title = Text.assemble((f"{technique.slug}: {technique.short}", "bold"), "\n", (provenance(record), "dim"))
    screen.print(title, "", claims_table(record), "", sep="\n")


def _written(technique: Technique, out: Path) -> str:
    return ", ".join(path_text(out / f"{technique.slug}.{ending}") for ending in ("json", "svg", "png"))
