"""The facts of every reviewed technique, and what the files of this installation say of its state.

The facts (title, arXiv id, review date, kind) are in ``<area>.toml`` beside this file. Everything else is derived:
a technique is implemented when its module exists, tested when its test file does, reproduced when its reproduction
does, and has a kernel when its module imports ``mlreviews_kernels``. Nothing here imports torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

__all__ = [
    "KINDS",
    "CatalogueError",
    "Technique",
    "UnknownTechniqueError",
    "areas",
    "find",
    "load_catalogue",
    "read_area",
    "techniques",
]

KINDS = ("algorithm", "procedure", "phenomenon")
PACKAGE = Path(__file__).resolve().parent.parent
# The tests and benchmarks are beside the package in a checkout, and nowhere in an installed wheel.
CHECKOUT = PACKAGE.parent.parent if (PACKAGE.parent.parent / "pyproject.toml").is_file() else None

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FIELDS = {
    "short": re.compile(r".+"),
    "title": re.compile(r".+"),
    "kind": re.compile("|".join(KINDS)),
    "arxiv": re.compile(r"\d{4}\.\d{4,5}"),
    "reviewed": re.compile(r"\d{4}-\d{2}(-\d{2})?"),
}
_OPTIONAL = {"arxiv", "reviewed"}


class CatalogueError(ValueError):
    """A row of the catalogue is broken; the message names the file, the row and the field."""


class UnknownTechniqueError(LookupError):
    """No technique or area has this name; the message suggests the nearest ones."""


@dataclass(frozen=True)
class Technique:
    """One reviewed technique: the facts of its row, and the files that belong to it."""

    slug: str
    area: str
    short: str
    title: str
    kind: str
    arxiv: str = ""  # "" for a review of something that is not on arXiv
    reviewed: str = ""  # YYYY-MM-DD or YYYY-MM, "" where the day is unknown

    @property
    def module_name(self) -> str:
        """The slug as a Python name; one that begins with a digit gets an underscore in front."""
        name = self.slug.replace("-", "_")
        return f"_{name}" if name[0].isdigit() else name

    @property
    def module(self) -> str:
        """The dotted name under which the technique is imported."""
        return f"mlreviews.{self.area}.{self.module_name}"

    @property
    def reproduction(self) -> str:
        """The dotted name of its reproduction."""
        return f"mlreviews.reproductions.{self.area}.{self.module_name}"

    @property
    def source_file(self) -> Path:
        """Where its module is, or would be."""
        return PACKAGE / self.area / f"{self.module_name}.py"

    @property
    def reproduction_file(self) -> Path:
        """Where its reproduction is, or would be."""
        return PACKAGE / "reproductions" / self.area / f"{self.module_name}.py"

    @property
    def record_file(self) -> Path:
        """Where the record of its reproduction that is shipped is, or would be."""
        return PACKAGE / "reproductions" / "records" / f"{self.slug}.json"

    @property
    def test_file(self) -> Path | None:
        """Where its tests are, or would be; None when this is not a source checkout."""
        return CHECKOUT and CHECKOUT / "tests" / self.area / f"test_{self.module_name}.py"

    @property
    def implemented(self) -> bool:
        """Whether its module exists."""
        return self.source_file.is_file()

    @property
    def tested(self) -> bool | None:
        """Whether its test file exists; None when this is not a source checkout."""
        return self.test_file.is_file() if self.test_file else None

    @property
    def reproduced(self) -> bool:
        """Whether it has a reproduction."""
        return self.reproduction_file.is_file()

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernel cores that its module imports."""
        if not self.implemented:
            return ()
        text = self.source_file.read_text(encoding="utf-8")
        dotted = re.findall(r"^\s*(?:from|import) mlreviews_kernels\.(\w+)", text, re.MULTILINE)
        listed = re.findall(r"^\s*from mlreviews_kernels import (\([\w\s,]+|[\w ,]+)", text, re.MULTILINE)
        cores = {*dotted, *(name for names in listed for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", names))}
        return tuple(sorted(cores - {"BackendError", "backends", "use_backend"}))

    @property
    def status(self) -> str:
        """``planned``, ``implemented`` or ``reproduced`` (which includes implemented)."""
        if not self.implemented:
            return "planned"
        return "reproduced" if self.reproduced else "implemented"


def read_area(path: Path) -> list[Technique]:
    """Reads one area's file.

    Args:
        path: ``<area>.toml``; each table is a technique, named by its slug.

    Returns:
        The techniques in the order of the file.

    Raises:
        CatalogueError: a table is broken; file, slug and field are named.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path.name}: not valid TOML: {error}") from error
    return [_technique(path, slug, row) for slug, row in rows.items()]


def _technique(path: Path, slug: str, row: object) -> Technique:
    where = f"{path.name} [{slug}]"
    if not _SLUG.fullmatch(slug):
        raise CatalogueError(f"{where}: the slug must be lower-case words joined by hyphens")
    if not isinstance(row, dict):
        raise CatalogueError(f"{where}: expected a table of facts, got {row!r}")
    if unknown := sorted(row.keys() - _FIELDS.keys()):
        raise CatalogueError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
    for field, pattern in _FIELDS.items():
        if field not in row:
            if field not in _OPTIONAL:
                raise CatalogueError(f"{where}: the field {field!r} is missing")
        elif not (isinstance(row[field], str) and pattern.fullmatch(row[field])):
            raise CatalogueError(f"{where}: {field} = {row[field]!r} does not match {pattern.pattern}")
    return Technique(slug=slug, area=path.stem, **row)


def load_catalogue(folder: Path) -> dict[str, Technique]:
    """Reads all areas of a folder.

    Args:
        folder: holds the ``<area>.toml`` files.

    Returns:
        slug -> technique, areas in alphabetical order, each in the order of its file.

    Raises:
        CatalogueError: a row is broken, or a slug stands in two areas.
    """
    found: dict[str, Technique] = {}
    for path in sorted(folder.glob("*.toml")):
        for technique in read_area(path):
            if technique.slug in found:
                raise CatalogueError(f"{path.name} [{technique.slug}]: already in {found[technique.slug].area}.toml")
            found[technique.slug] = technique
    return found


@cache
def techniques() -> dict[str, Technique]:
    """The shipped catalogue: slug -> technique."""
    return load_catalogue(Path(__file__).parent)


def areas() -> dict[str, list[Technique]]:
    """Area -> its techniques."""
    grouped: dict[str, list[Technique]] = {}
    for technique in techniques().values():
        grouped.setdefault(technique.area, []).append(technique)
    return grouped


def find(slug: str) -> Technique:
    """The technique of this slug.

    Raises:
        UnknownTechniqueError: there is none; the nearest slugs are named.
    """
    if slug in techniques():
        return techniques()[slug]
    raise UnknownTechniqueError(f"no technique is called {slug!r}" + nearest(slug, techniques()))


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a, b?"`` with the known names that resemble this one, or an empty string."""
    close = get_close_matches(name.lower().replace("_", "-"), list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
