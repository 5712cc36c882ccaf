"""Reads a technique's card and public names from its source, without importing it (and so without torch).

The card is the module's docstring: a title line, ``Paper:`` or ``Source:`` lines, a description, and the sections
Equation, Symbols, Defaults, Deviations and Reduces to, each an indented block.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SECTIONS", "Card", "CardError", "PublicName", "parse_card", "public_names", "read_card"]

SECTIONS = ("Equation", "Symbols", "Defaults", "Deviations", "Reduces to")
_NONE = {"none", "none."}
_SOURCE = re.compile(r"^(?:Paper|Source): (.+(?:\n[ \t]+\S.*)*)", re.MULTILINE)


class CardError(ValueError):
    """A card lacks a part or has one that can't be read; the message says which."""


@dataclass(frozen=True)
class Card:
    """A technique's docstring in parts.

    Attributes:
        title: the first line.
        sources: the ``Paper:`` and ``Source:`` lines, without that word.
        description: what it does, in Markdown.
        sections: section name -> its text, unindented.
    """

    title: str
    sources: tuple[str, ...]
    description: str
    sections: dict[str, str]

    @property
    def reductions(self) -> dict[str, str]:
        """What the technique reduces to: target -> the setting under which it does."""
        return {} if self.is_none("Reduces to") else entries(self.sections["Reduces to"])

    def is_none(self, section: str) -> bool:
        """Whether the section says that there is nothing."""
        return self.sections[section].strip().lower() in _NONE


@dataclass(frozen=True)
class PublicName:
    """A name that a module exports: its signature as written, and the first line of its docstring."""

    name: str
    signature: str
    summary: str


def parse_card(docstring: str) -> Card:
    """Splits a module docstring into its parts.

    Args:
        docstring: the text, with its indentation cleaned (as ``inspect.getdoc`` gives it).

    Raises:
        CardError: a part is missing, empty, unknown or there twice.
    """
    title, _, rest = docstring.strip().partition("\n")
    parts = re.split(r"^([A-Z][A-Za-z ]+):[ \t]*\n(?=[ \t]+\S)", rest, flags=re.MULTILINE)
    head = textwrap.dedent(parts[0]).strip()
    sections: dict[str, str] = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if name in sections:
            raise CardError(f"the card has two sections '{name}:'")
        sections[name] = textwrap.dedent(text).strip()
    if missing := [name for name in SECTIONS if not sections.get(name)]:
        raise CardError(f"the card has no section '{missing[0]}:' with an indented text below it")
    if unknown := sorted(sections.keys() - set(SECTIONS)):
        raise CardError(f"the card has an unknown section '{unknown[0]}:'; the sections are {', '.join(SECTIONS)}")
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if outside := re.search(r"^\S.*", text, re.MULTILINE):
            raise CardError(f"{outside[0]!r} is not indented, though it stands in the section '{name}:'")
    paragraphs = re.split(r"\n\s*\n", head)
    sources = tuple(" ".join(source.split()) for source in _SOURCE.findall(head))
    if not sources:
        raise CardError("the card names no 'Paper:' or 'Source:'")
    if other := [rest for p in paragraphs if _SOURCE.search(p) and (rest := _SOURCE.sub("", p).strip())]:
        raise CardError(f"{other[0]!r} stands among the 'Paper:' and 'Source:' lines, and is none")
    description = "\n\n".join(p for p in paragraphs if not _SOURCE.search(p))
    if not title.endswith(".") or not description:
        raise CardError("the card needs a first line that ends with a full stop, and a description")
    return Card(title, sources, description, sections)


def entries(text: str) -> dict[str, str]:
    """Reads ``name: text`` lines, where an indented line goes on with the one above."""
    found: dict[str, str] = {}
    name = ""
    for line in filter(str.strip, text.splitlines()):
        if line[0].isspace() and name:
            found[name] += " " + line.strip()
            continue
        name, colon, meaning = line.partition(": ")
        if not colon:
            raise CardError(f"expected 'name: text', got {line!r}")
        found[name] = meaning.strip()
    return found


def read_card(source_file: Path) -> Card:
    """Reads the card of a module.

    Raises:
        CardError: the card is missing or broken; the file is named.
    """
    try:
        return parse_card(ast.get_docstring(_parse(source_file)) or "")
    except CardError as error:
        raise CardError(f"{source_file.name}: {error}") from None


def _parse(source_file: Path) -> ast.Module:
    try:
        return ast.parse(source_file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise CardError(f"line {error.lineno}: {error.msg}") from error


def public_names(source_file: Path) -> list[PublicName]:
    """The names in a module's ``__all__``, in that order, with signature and summary."""
    tree = _parse(source_file)
    assignments = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "__all__" not in assignments:
        return []
    names: list[str] = ast.literal_eval(assignments["__all__"])
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return [_public_name(name, defined.get(name)) for name in names]


def _public_name(name: str, node: ast.FunctionDef | ast.ClassDef | None) -> PublicName:
    if node is None:
        return PublicName(name, name, "")
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return PublicName(name, f"{name}({ast.unparse(node.args)}){returns}", summary)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init:
        arguments = re.sub(r"^self(, )?", "", ast.unparse(init.args))
    elif any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        arguments = ", ".join(ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign))
    else:
        arguments = ""
    return PublicName(name, f"class {name}({arguments})", summary)
