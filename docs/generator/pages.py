"""The Markdown of all generated pages, from the catalogue, the cards and the records of reproductions.

Pages lie at ``techniques/<area>/<slug>.md``; a link is written relative to the page it stands on.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markup import attribute, copy_of, prose, quoted, repository_path, table
from reductions import Box, Reduction, draw
from results import claims_table, command, provenance, verdicts

from mlreviews import catalogue
from mlreviews.catalogue import Technique
from mlreviews.catalogue.card import SECTIONS, Card, CardError, entries, public_names
from mlreviews.reproductions.protocol import Record
from mlreviews_kernels.backends import Core

AREAS = {"peft": "PEFT", "rl": "RL", "ssm": "State-space models", "timeseries": "Time series", "optim": "Optimisers"}


def area_name(area: str) -> str:
    """How an area is called in headings."""
    return AREAS.get(area, area.capitalize())


def area_summary(area: str) -> str:
    """What an area is about: the docstring of its package, or "" where there is none yet."""
    package = catalogue.PACKAGE / area / "__init__.py"
    text = (ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or "") if package.is_file() else ""
    return re.sub(r"^Area [\w-]+: (\w)", lambda match: match[1].upper(), text)


def docstring_of(source_file: Path, function: str = "") -> str:
    """The docstring of a file, or of a function in it, without importing it; "" where there is none."""
    tree = ast.parse(source_file.read_text(encoding="utf-8"))
    nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function] if function else [tree]
    return (ast.get_docstring(nodes[0]) or "") if nodes else ""


class Site:
    """Everything that the pages are made of.

    Args:
        techniques: slug -> technique.
        cards: slug -> card, of the implemented ones.
        records: slug -> packaged record, where there is one.
    """

    def __init__(
        self, techniques: Mapping[str, Technique], cards: Mapping[str, Card], records: Mapping[str, Record]
    ) -> None:
        self.techniques = techniques
        self.cards = cards
        self.records = records
        self.reductions = [
            Reduction(slug, target, setting)
            for slug, card in cards.items()
            for target, setting in card.reductions.items()
        ]
        self.areas: dict[str, list[Technique]] = defaultdict(list)
        for technique in techniques.values():
            self.areas[technique.area].append(technique)
        for members in self.areas.values():
            members.sort(key=lambda t: not t.implemented)

    def link(self, name: str, base: str) -> str:
        """A link to the technique of this slug, or the name as code where it is none.

        Args:
            name: a slug, or the name of something outside the catalogue.
            base: the folder ``techniques`` as seen from the page, such as ``..``.
        """
        if name not in self.techniques:
            return f"`{name}`"
        technique = self.techniques[name]
        return f"[{technique.short}]({base}/{technique.area}/{name}.md)"

    def technique_page(self, technique: Technique) -> str:
        """The page of a technique."""
        card = self.cards.get(technique.slug)
        parts = [_front_matter(technique), f"# {technique.short}"]
        if card:
            parts += [f"*{prose(card.title)}*", prose(card.description)]
        parts += [self._facts(technique)]
        if card:
            parts += self._card(card)
        else:
            parts += [
                '!!! note "Planned"',
                "    The paper is reviewed, the technique is not implemented yet. "
                "[Contributing](../../contributing.md) tells how to add one.",
            ]
        parts += self._reduced_by(technique)
        if technique.reproduced:
            parts += self._reproduction(technique)
        if card:
            parts += _interface(technique)
        return "\n\n".join(parts) + "\n"

    def _facts(self, technique: Technique) -> str:
        card = self.cards.get(technique.slug)
        papers = card.sources if card else (_paper(technique),)
        rows = [
            ["Papers" if len(papers) > 1 else "Paper", "<br>".join(map(prose, papers))],
            ["Reviewed", technique.reviewed],
            ["Area", f"[{area_name(technique.area)}](index.md)"],
            ["Kind", technique.kind],
            ["Status", technique.status],
            ["Kernels", ", ".join(f"`{name}`" for name in technique.kernels)],
            ["Import", f"`{technique.module}`" if technique.implemented else ""],
            *([name, _file_link(path, "../..")] for name, path in source_files(technique).items()),
        ]
        return table(["", ""], (row for row in rows if row[1]))

    def _card(self, card: Card) -> list[str]:
        parts = []
        for section in SECTIONS:
            text = card.sections[section]
            if section == "Reduces to" and not card.is_none(section):
                text = "\n".join(f"- {self.link(to, '..')}: {prose(when)}" for to, when in card.reductions.items())
            elif section == "Symbols":
                text = _named(text, ["Symbol", "Shape and meaning"])
            elif section == "Defaults":
                text = _named(text, ["Name", "Value and source"])
            else:
                text = prose(text)
            parts += [f"## {section}", text.capitalize() if card.is_none(section) else text]
        return parts

    def _reduced_by(self, technique: Technique) -> list[str]:
        found = [r for r in self.reductions if r.target == technique.slug]
        if not found:
            return []
        lines = [f"- {self.link(r.source, '..')}: {prose(r.setting)}" for r in found]
        return ["## A special case of", "\n".join(lines)]

    def _reproduction(self, technique: Technique) -> list[str]:
        parts = ["## Reproduction", prose(docstring_of(technique.reproduction_file))]
        record = self.records.get(technique.slug)
        if record is None:
            run = f"mlreviews reproduce {technique.slug}"
            return [*parts, "No record of a run is packaged yet. To run it:", f"```bash\n{run}\n```"]
        caption = docstring_of(technique.reproduction_file, "draw") or technique.short
        return [
            *parts,
            f"![{attribute(caption)}]({technique.slug}.svg){{ .figure }}",
            claims_table(record.outcome.claims),
            "To run it again (`--full` takes the larger settings, where there are any):",
            f"```bash\n{command(record)}\n```",
            provenance(record),
        ]

    def area_page(self, area: str) -> str:
        """The index of an area."""
        rows = [
            [
                f"[{t.short}]({t.slug}.md)",
                self._what(t),
                t.kind,
                self._state(t),
            ]
            for t in self.areas[area]
        ]
        lead = f"{area_summary(area)}\n\n{self._counts(self.areas[area])}".strip()
        head = f"---\nsearch:\n  boost: 0.3\n---\n\n# {area_name(area)}"
        return f"{head}\n\n{lead}\n\n{table(['Technique', 'What it is', 'Kind', 'State'], rows)}\n"

    def _what(self, technique: Technique) -> str:
        """What comes after the name in the card's title, or the paper's title where there is no card."""
        card = self.cards.get(technique.slug)
        text = card.title.partition(": ")[2] or card.title if card else technique.title
        return prose(text[0].upper() + text[1:])

    def _state(self, technique: Technique) -> str:
        record = self.records.get(technique.slug)
        return verdicts(record.outcome.claims) if record else technique.status

    def _counts(self, members: Sequence[Technique]) -> str:
        implemented = sum(t.implemented for t in members)
        reproduced = sum(t.status == "reproduced" for t in members)
        return f"{len(members)} techniques, {implemented} implemented, {reproduced} with a reproduction."

    def areas_table(self, base: str) -> str:
        """The table of areas, with links.

        Args:
            base: the folder ``techniques`` as seen from the page.
        """
        rows = [
            [
                f"[{area_name(area)}]({base}/{area}/index.md)",
                str(len(members)),
                str(sum(t.implemented for t in members)),
                str(sum(t.status == "reproduced" for t in members)),
            ]
            for area, members in self.areas.items()
        ]
        total = [f"**{sum(int(row[i]) for row in rows)}**" for i in (1, 2, 3)]
        headers = ["Area", ">Techniques", ">Implemented", ">Reproduced"]
        return table(headers, [*rows, ["**Total**", *total]])

    def gallery(self, base: str) -> str:
        """The figures of all records, as a grid of links.

        Args:
            base: the folder ``techniques`` as seen from the page.
        """
        tiles = []
        for slug, record in self.records.items():
            technique = self.techniques[slug]
            page = f"{base}/{technique.area}/{slug}"
            caption = docstring_of(technique.reproduction_file, "draw") or technique.short
            tiles.append(
                f"-   [![{attribute(caption)}]({page}.svg)]({page}.md)\n\n"
                f"    **[{technique.short}]({page}.md)**<br>{caption}\n\n    {verdicts(record.outcome.claims)}"
            )
        if not tiles:
            return "No record of a reproduction is packaged yet."
        claims = [claim for record in self.records.values() for claim in record.outcome.claims]
        summary = f"{len(tiles)} reproductions with {len(claims)} claims: {verdicts(claims)}"
        return f'{summary}\n\n<div class="gallery" markdown>\n\n' + "\n\n".join(tiles) + "\n\n</div>"

    def reductions_map(self, base: str) -> str:
        """The map of reductions and the table of its arrows.

        Args:
            base: the folder ``techniques`` as seen from the page.
        """
        if not self.reductions:
            return "No card names a reduction yet."
        names = sorted({name for r in self.reductions for name in (r.source, r.target)})
        svg = draw(self.reductions, {name: self._map_box(name, base) for name in names})
        rows = [[self.link(r.source, base), self.link(r.target, base), prose(r.setting)] for r in self.reductions]
        tabulated = table(["Technique", "is exactly", "when"], rows)
        return f'<div class="map" tabindex="0">{svg}</div>\n\n## As a table\n\n{tabulated}'

    def _map_box(self, name: str, base: str) -> Box:
        if name not in self.techniques:
            return Box(name, "", "", "outside")
        technique = self.techniques[name]
        state = "" if technique.implemented else ", planned"
        # Raw HTML is not rewritten, so the link is to the built page.
        href = f"{base}/{technique.area}/{name}.html"
        kind = "implemented" if technique.implemented else "planned"
        return Box(technique.short, f"{area_name(technique.area)}{state}", href, kind)


def _paper(technique: Technique) -> str:
    return f"{technique.title} (arXiv:{technique.arxiv})" if technique.arxiv else technique.title


def _front_matter(technique: Technique) -> str:
    status = "" if technique.implemented else "\nstatus: planned"
    return f"---\ntitle: {quoted(technique.short)}\ndescription: {quoted(technique.title)}{status}\n---"


def source_files(technique: Technique) -> dict[str, Path]:
    """The files of a technique that exist."""
    files = {
        "Code": technique.source_file,
        "Tests": technique.test_file,
        "Reproduction": technique.reproduction_file,
    }
    return {name: path for name, path in files.items() if path and path.is_file()}


def shipped_models(folder: Path) -> str:
    """The table of the trained language models, from the records of their training.

    Args:
        folder: that holds a folder for each.
    """
    rows = []
    for path in sorted(folder.glob("*/training.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "validation_bits_per_byte" in record:
            config = record["recipe"]["config"]
            rows.append(
                [
                    f"`{path.parent.name}`",
                    f"{config['layers']} blocks of {config['d_model']}",
                    f"{record['parameters']:,}",
                    f"{record['bytes_of_text']:,}",
                    f"{record['validation_bits_per_byte']:.3f}",
                ]
            )
    return table(["Name", "Size", ">Parameters", ">Bytes trained on", ">Validation, bits per byte"], rows)


def kernel_cores(cores: Iterable[Core]) -> str:
    """The kernel cores and their backends."""
    rows = [[f"`{core.name}`", ", ".join(core.backends)] for core in cores]
    return table(["Core", "Backends"], rows) if rows else "No core is part of this version yet."


def _file_link(path: Path, root: str) -> str:
    return f"[`{repository_path(path)}`]({root}/{copy_of(path)})"


def _named(text: str, headers: Sequence[str]) -> str:
    """Lines ``name: meaning`` as a table; text of another form as it is."""
    try:
        found = entries(text)
    except CardError:
        return prose(text)
    return table(headers, ([name if "$" in name else f"`{name}`", prose(value)] for name, value in found.items()))


def _interface(technique: Technique) -> list[str]:
    names = [public.name for public in public_names(technique.source_file)]
    example = f"```python\nfrom mlreviews.{technique.area} import {names[0]}\n```"
    return ["## Interface", example, *(f"::: {technique.module}.{name}" for name in names)]
