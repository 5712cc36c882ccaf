"""The commands and their options, as typer reads them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import mlreviews
from mlreviews.catalogue import CatalogueError, UnknownTechniqueError
from mlreviews.catalogue.card import CardError
from mlreviews.cli import bench, doctor, listing, reproduce
from mlreviews.cli.output import CommandError, error, show_tracebacks

__all__ = ["app"]


class _Commands(typer.core.TyperGroup):
    """Turns the errors that are expected into one line and an exit code; ``--debug`` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (CatalogueError, CardError, UnknownTechniqueError, CommandError) as problem:
            error(str(problem), problem)
            usage = isinstance(problem, UnknownTechniqueError) or getattr(problem, "usage", False)
            raise typer.Exit(2 if usage else 1) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("list")(listing.list_techniques)
app.command("show")(listing.show)
app.command("reproduce")(reproduce.reproduce)
app.command("bench", context_settings={"ignore_unknown_options": True})(bench.bench)
app.command("doctor")(doctor.doctor)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"mlreviews {mlreviews.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Every technique of a long series of paper reviews: what it is, and whether its claims hold."""
    show_tracebacks(debug)
