"""What MkDocs calls while it builds the site: adds the generated pages, the navigation and the formulas."""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import matplotlib
from formulas import FormulaExtension
from markup import copy_of, repository_links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pages import Site, area_name, kernel_cores, shipped_models, source_files

from mlreviews.catalogue import PACKAGE, Technique, techniques
from mlreviews.catalogue.card import CardError, read_card
from mlreviews.reproductions import figures
from mlreviews.reproductions.protocol import Record, RecordError
from mlreviews_kernels.backends import cores

LOG = logging.getLogger("mkdocs.hooks.mlreviews")
ROOT = PACKAGE.parent.parent
CACHE = ROOT / ".cache" / "docs"

_EXTERNAL = re.compile(r"<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*[\"' =](?:https?:)?//[^>]*>")
_current_page = ""


def read_site() -> Site:
    """Reads the catalogue, the cards and the records.

    Raises:
        PluginError: a card or a record is broken.
    """
    catalogue = techniques()
    try:
        cards = {slug: read_card(t.source_file) for slug, t in catalogue.items() if t.implemented}
        records = {
            slug: Record.read(t.record_file)
            for slug, t in catalogue.items()
            if t.reproduced and t.record_file.is_file()
        }
    except (CardError, RecordError) as error:
        raise PluginError(str(error)) from error
    return Site(catalogue, cards, records)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Sets the navigation, and adds formulas to Markdown."""
    site = read_site()
    config.extra["site"] = site
    config.nav = navigation(site)
    config.markdown_extensions.append(FormulaExtension(report_formula))
    return config


def report_formula(problem: str) -> None:
    """Warns of a broken formula, which stops a strict build."""
    LOG.warning("%s: %s", _current_page, problem)


def navigation(site: Site) -> list[Any]:
    """The tree of pages."""
    areas: list[Any] = [
        {
            area_name(area): [
                f"techniques/{area}/index.md",
                *({t.short: f"techniques/{area}/{t.slug}.md"} for t in members),
            ]
        }
        for area, members in site.areas.items()
    ]
    return [
        {"Home": ["index.md", "getting-started.md", "models.md", "kernels-and-backends.md", "contributing.md"]},
        {"Techniques": ["techniques/index.md", *areas]},
        {"Reproductions": ["gallery.md", "reproductions.md"]},
        {"Map of reductions": "reductions.md"},
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, the figures, and copies of the source files that pages link to."""
    site: Site = config.extra["site"]

    def add(path: str, **content: Any) -> None:
        files.append(File.generated(config, path, **content))

    contributing, linked = repository_links((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT)
    add("contributing.md", content=contributing)
    for area, members in site.areas.items():
        add(f"techniques/{area}/index.md", content=site.area_page(area))
        for technique in members:
            add(f"techniques/{area}/{technique.slug}.md", content=site.technique_page(technique))
            linked += source_files(technique).values()
    for path in dict.fromkeys(linked):
        add(copy_of(path), abs_src_path=str(path))
    for slug, record in site.records.items():
        technique = site.techniques[slug]
        add(f"techniques/{technique.area}/{slug}.svg", content=figure(technique, record))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills the places that the hand-written pages leave for generated tables."""
    global _current_page
    _current_page = page.file.src_uri
    site: Site = config.extra["site"]
    base = "." if page.file.src_uri.startswith("techniques/") else "techniques"
    for place, fill in {
        "<!-- areas -->": site.areas_table,
        "<!-- gallery -->": site.gallery,
        "<!-- reductions -->": site.reductions_map,
        "<!-- kernels -->": lambda _: kernel_cores(cores()),
        "<!-- models -->": lambda _: shipped_models(ROOT / "src/mlreviews/models/pretrained"),
    }.items():
        if place in markdown:
            markdown = markdown.replace(place, fill(base))
    return markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warns of a page that would load something from another host."""
    for tag in _EXTERNAL.findall(output):
        LOG.warning("%s: loads something from another host: %s", page.file.src_uri, tag)
    return output


def figure(technique: Technique, record: Record) -> bytes:
    """Draws the figure of a record as SVG, or takes it from the cache where nothing that it depends on has changed."""
    assert figures.__file__ is not None
    sources = [technique.record_file, technique.reproduction_file, Path(figures.__file__)]
    key = hashlib.sha256(matplotlib.__version__.encode())
    for path in sources:
        key.update(path.read_bytes())
    kept = CACHE / f"{technique.slug}-{key.hexdigest()[:16]}.svg"
    if kept.is_file():
        return kept.read_bytes()
    image = io.BytesIO()
    try:
        # Letters as outlines: the figure then looks the same whatever fonts a reader has.
        with figures.style(), matplotlib.rc_context({"svg.fonttype": "path"}):
            drawn = importlib.import_module(technique.reproduction).draw(record.outcome)
            drawn.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    except Exception as error:
        raise PluginError(f"{technique.slug}: its figure can't be drawn from its record: {error!r}") from error
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{technique.slug}-????????????????.svg"):
        old.unlink()
    kept.write_bytes(image.getvalue())
    return image.getvalue()
