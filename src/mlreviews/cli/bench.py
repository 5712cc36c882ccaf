"""``mlreviews bench``: the benchmark scripts of a source checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlreviews import catalogue
from mlreviews.cli.output import CommandError, print_columns

__all__ = ["bench"]


def bench(
    name: Annotated[str | None, typer.Argument(help="The benchmark; without it they are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the benchmark.")] = None,
) -> None:
    """List the benchmarks, or run one.

    What follows the name goes to the benchmark, but --help only after a --.
    """
    scripts = _scripts()
    if name is None:
        rows = [(known, _summary(script)) for known, script in scripts.items()]
        print_columns(("benchmark", "what it measures"), rows, [""] * len(rows))
        return
    key = name.removesuffix(".py").removeprefix("bench_")
    if key not in scripts:
        raise CommandError(f"no benchmark is called {name!r}{catalogue.nearest(key, scripts)}", usage=True)
    import subprocess

    code = subprocess.run([sys.executable, scripts[key], *(arguments or [])], check=False).returncode
    raise typer.Exit(code if code >= 0 else 128 - code)  # a signal's number, as shells count


def _scripts() -> dict[str, Path]:
    if catalogue.CHECKOUT is None:
        raise CommandError("the benchmarks are in the source checkout, and this is an installed package")
    files = sorted((catalogue.CHECKOUT / "benchmarks").glob("bench_*.py"))
    if not files:
        raise CommandError(f"there is no benchmark in {catalogue.CHECKOUT / 'benchmarks'}")
    return {file.stem.removeprefix("bench_"): file for file in files}


def _summary(script: Path) -> str:
    import ast

    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
