import logging
from types import SimpleNamespace
from typing import Any

import hooks
import pytest
from hooks import figure, navigation, on_page_markdown, on_post_page, read_site, report_formula
from mkdocs.exceptions import PluginError
from pages import Site

from mlreviews.catalogue import Technique, techniques
from mlreviews.reproductions.protocol import Outcome, Record, measure


def _leaves(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(branch)]


def _page(path: str) -> Any:
    return SimpleNamespace(file=SimpleNamespace(src_uri=path))


def test_every_technique_is_in_the_navigation_once() -> None:
    site = Site(techniques(), {}, {})
    leaves = _leaves(navigation(site))
    assert len(leaves) == len(set(leaves))
    assert {f"techniques/{t.area}/{t.slug}.md" for t in techniques().values()} <= set(leaves)
    assert {f"techniques/{t.area}/index.md" for t in techniques().values()} <= set(leaves)


def test_the_site_is_read_from_the_files_that_exist() -> None:
    site = read_site()
    assert set(site.cards) == {slug for slug, t in techniques().items() if t.implemented}
    assert set(site.records) <= {slug for slug, t in techniques().items() if t.reproduced}


def test_a_broken_record_stops_the_build(fakes: dict[str, Technique], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "techniques", lambda: fakes)
    record = fakes["good-fake"].record_file
    record.parent.mkdir(parents=True)
    record.write_text("{")
    with pytest.raises(PluginError, match=r"good-fake\.json: not a record"):
        read_site()


def test_places_of_hand_written_pages_are_filled(fakes: dict[str, Technique]) -> None:
    config: Any = SimpleNamespace(extra={"site": Site(fakes, {}, {})})
    text = "a <!-- areas --> b <!-- gallery --> <!-- reductions --> <!-- kernels --> <!-- else -->"
    filled = on_page_markdown(text, _page("index.md"), config, None)  # type: ignore[arg-type]
    assert "(techniques/fakes/index.md)" in filled
    assert "No record" in filled
    assert filled.count("<!--") == 1
    below = on_page_markdown("<!-- areas -->", _page("techniques/index.md"), config, None)  # type: ignore[arg-type]
    assert "(./fakes/index.md)" in below


def test_broken_formulas_are_warned_of_with_their_page(caplog: pytest.LogCaptureFixture) -> None:
    config: Any = SimpleNamespace(extra={"site": Site({}, {}, {})})
    on_page_markdown("", _page("some/page.md"), config, None)  # type: ignore[arg-type]
    report_formula("formula '$x'")
    assert caplog.messages == ["some/page.md: formula '$x'"]
    assert caplog.records[0].name.startswith("mkdocs.")  # what mkdocs counts in strict builds
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("html", "warned"),
    [
        ('<script src="https://cdn.org/x.js"></script>', True),
        ("<link rel=stylesheet href=//fonts.org/x.css>", True),
        ('<img\n alt="a" src="http://x.org/y.png">', True),
        ('<a href="https://arxiv.org/abs/1234.56789">paper</a>', False),
        ('<script src="assets/x.js"></script><link href="../x.css"> // https://x.org', False),
    ],
)
def test_pages_that_load_from_another_host_are_warned_of(
    html: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert on_post_page(html, _page("page.md"), None) == html  # type: ignore[arg-type]
    assert bool(caplog.messages) == warned


def test_a_figure_is_drawn_once_and_again_when_its_record_changes(
    fakes: dict[str, Technique], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(hooks, "CACHE", tmp_path / "cache")
    technique = fakes["good-fake"]
    claim = measure("s", "us", 1.0, at_least=0)
    record = Record("good-fake", Outcome([claim], {"curve": [0.0, 1.0]}), False, 0, "cpu", 1.0, "2026", {}, {})
    technique.record_file.parent.mkdir(parents=True)
    technique.record_file.write_text(record.to_json())
    first = figure(technique, record)
    assert b"<svg" in first
    assert b"<text" not in first  # outlines
    drawn = list((tmp_path / "cache").iterdir())
    drawn[0].write_bytes(b"kept")
    assert figure(technique, record) == b"kept"
    technique.record_file.write_text(record.to_json() + "\n")
    assert figure(technique, record) == first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_figure_that_cannot_be_drawn_stops_the_build(
    fakes: dict[str, Technique], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(hooks, "CACHE", tmp_path / "cache")
    technique = fakes["undrawable-fake"]
    claim = measure("s", "us", 1.0, at_least=0)
    record = Record("undrawable-fake", Outcome([claim], {"curve": [0.0]}), False, 0, "cpu", 1.0, "2026", {}, {})
    technique.record_file.parent.mkdir(parents=True)
    technique.record_file.write_text(record.to_json())
    with pytest.raises(PluginError, match=r"undrawable-fake: its figure can't be drawn.*no such colour"):
        figure(technique, record)
    assert not (tmp_path / "cache").exists()
