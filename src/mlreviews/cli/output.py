"""What all commands share: the console, tables that can be read in 80 columns and in a pipe, and errors."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlreviews.reproductions.protocol import Claim, Record

__all__ = [
    "CommandError",
    "claims_table",
    "console",
    "error",
    "note",
    "path_text",
    "print_columns",
    "print_json",
    "provenance",
    "show_tracebacks",
    "terminal",
]

_tracebacks = False  # an option of the whole command, which every part of it would have to hand on
_VERDICT_STYLES = {"holds": "green", "does not hold": "bold red", "inconclusive": "yellow"}


class CommandError(Exception):
    """A command can't do what it was asked to; the message is all that the user sees.

    Args:
        message: one line.
        usage: the request itself was wrong, which has an exit code of its own.
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


def console(*, stderr: bool = False) -> Console:
    """Where to print. Square brackets are text (shapes such as ``[batch, time]``), not markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def terminal() -> Console | None:
    """Where to print, if that is a terminal; None for a pipe or a file, which need not wait for rich to load."""
    if not (sys.stdout.isatty() or {"FORCE_COLOR", "TTY_COMPATIBLE"} & os.environ.keys()):
        return None
    screen = console()
    return screen if screen.is_terminal else None


def show_tracebacks(wanted: bool) -> None:
    """Says whether `error` prints tracebacks from now on."""
    global _tracebacks
    _tracebacks = wanted


def error(message: str, problem: BaseException | None = None) -> None:
    """Prints a line on standard error, below the traceback of the problem where tracebacks are wanted."""
    if _tracebacks and problem is not None:
        traceback.print_exception(problem, file=sys.stderr)
    print(f"Error: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Prints a line on standard error that is worth knowing, though the command succeeds."""
    print(message, file=sys.stderr)


def print_json(value: object) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def path_text(path: Path) -> str:
    """The path as seen from the current folder, where it is below that."""
    return os.fspath(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else os.fspath(path)


def print_columns(
    headers: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str], groups: Sequence[str] = ()
) -> None:
    """Prints rows as aligned columns, one line each; a terminal cuts what doesn't fit, nothing is cut in a pipe.

    Args:
        headers: a word per column.
        rows: a cell per column.
        styles: how each row looks on a terminal.
        groups: the group of each row; its name is printed where a new one begins.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [(line(headers), "bold")]
    for i, (row, style) in enumerate(zip(rows, styles, strict=True)):
        if groups and (i == 0 or groups[i] != groups[i - 1]):
            lines.append((groups[i], "bold cyan"))
        lines.append((line(row), style))
    screen = terminal()
    if screen is None:
        print(*(text for text, _ in lines), sep="\n")
        return
    from rich.text import Text

    screen.print(Text("\n").join(Text(text, style) for text, style in lines), no_wrap=True, overflow="ellipsis")


def claims_table(record: Record) -> Table:
    """The claims of a record with what was measured, the bounds, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="bold")
    grid.add_column("claim", ratio=1)
    for header in ("measured", "criterion", "verdict"):
        grid.add_column(header, no_wrap=True)
    for claim in record.outcome.claims:
        statement = Text.assemble(claim.statement, "\n", (claim.source, "dim"))
        verdict = claim.verdict.value
        grid.add_row(statement, _measured(claim), claim.criterion, Text(verdict, _VERDICT_STYLES[verdict]))
    return grid


def _measured(claim: Claim) -> str:
    value = f"{claim.measured:.4g} {claim.unit}".rstrip()
    if claim.interval is None:
        return value
    low, high = claim.interval
    return f"{value}\n{low:.4g} … {high:.4g}\n(95 %, {claim.seeds} seeds)"


def provenance(record: Record) -> str:
    """When and how a record was made, in one line."""
    how = f"{'full' if record.full else 'quick'} settings, seed {record.seed}, {record.device}"
    return f"{how}, {record.seconds:.1f} s, {record.started[:10]}, torch {record.versions.get('torch', 'unknown')}"
