"""The command line: ``mlreviews list | show | reproduce | bench | doctor``.

Each command is a module of this package. What is slow to import (torch, matplotlib) is imported by the commands that
need it, when they run. That goes for typer too, which takes longer to load than the whole catalogue to list.
"""

from __future__ import annotations

import errno
import io
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ≥ gets a question mark
    try:
        try:
            _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except OSError as problem:
        from mlreviews.cli.output import error

        # What is still buffered would be tried again, and complained about, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if problem.errno != errno.EPIPE:  # a reader that has gone away (``| head``) needs no message
            error(f"{problem.filename or 'the output'}: {problem.strerror}", problem)
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    """Runs a command; a list without options, which is asked for most, without typer."""
    if arguments[:1] == ["list"] and not any(argument.startswith("-") for argument in arguments):
        from mlreviews.catalogue import CatalogueError
        from mlreviews.cli.output import error
        from mlreviews.cli.overview import print_techniques

        try:
            print_techniques(arguments[1:])
        except CatalogueError as problem:
            error(str(problem))
            sys.exit(1)
    else:
        from mlreviews.cli.commands import app

        app()
