import re
from pathlib import Path

import pytest
from formulas import FormulaExtension
from markdown import Markdown
from markup import cell, prose, repository_links, table
from pages import Site, area_name, area_summary, kernel_cores
from results import claims_table, command, measured, verdict, verdicts

from mlreviews.catalogue import Technique
from mlreviews.catalogue.card import read_card
from mlreviews.reproductions.protocol import Claim, Outcome, Record, Verdict, measure
from mlreviews_kernels.backends import Core

CLAIMS = [
    measure("The value | is small.", "arXiv:2401.00001, table 2", [0.5, 0.25, 0.75], at_most=2.0, unit="nats"),
    measure("It is large.", "the review", 12345.678, at_least=1e6),
    measure("It is one.", "the review", [0.5, 1.5, 1.0], at_least=0.9, at_most=1.1),
    measure("It is always one.", "the review", [1.0, 1.0, 1.0], at_least=1, at_most=1),
]


def _record(slug: str, full: bool = False, seed: int = 0, device: str = "cpu") -> Record:
    return Record(
        slug=slug,
        outcome=Outcome(CLAIMS, {"curve": [0.0, 1.0]}),
        full=full,
        seed=seed,
        device=device,
        seconds=3.25,
        started="2026-01-02T03:04:05+00:00",
        versions={"mlreviews": "0.1.0", "torch": "2.13.0"},
        machine={"system": "Linux", "cores": 2},
    )


@pytest.fixture
def site(fakes: dict[str, Technique]) -> Site:
    """The fakes, with cards of what is implemented and a record of one."""
    cards = {slug: read_card(t.source_file) for slug, t in fakes.items() if t.implemented}
    return Site(fakes, cards, {"good-fake": _record("good-fake")})


def _html(markdown: str) -> str:
    reports: list[str] = []
    extensions = ["tables", "admonition", "attr_list", "md_in_html", "def_list", "meta", "pymdownx.superfences"]
    html = Markdown(extensions=[*extensions, FormulaExtension(reports.append)]).convert(markdown)
    assert reports == []
    return html


def test_a_planned_technique_has_the_facts_and_says_that_it_is_planned(site: Site) -> None:
    page = site.technique_page(site.techniques["2nd-planned-fake"])
    assert page.startswith(
        "---\ntitle: 'Planned [b]'\ndescription: 'A Technique That Is Only Planned'\nstatus: planned\n---"
    )
    assert "# Planned [b]\n" in page
    assert "| Paper | A Technique That Is Only Planned |" in page
    assert "| Reviewed | 2024-03 |" in page
    assert "| Kind | algorithm |" in page
    assert "| Status | planned |" in page
    assert "not implemented yet" in page
    assert ":::" not in page
    assert "##" not in page
    assert "Code" not in page


def test_titles_are_quoted_for_yaml(fakes: dict[str, Technique]) -> None:
    planned = fakes["2nd-planned-fake"]
    awkward = Technique(planned.slug, planned.area, "It's: a #1", "Title", "algorithm")
    assert Site({planned.slug: awkward}, {}, {}).technique_page(awkward).startswith("---\ntitle: 'It''s: a #1'\n")


def test_an_implemented_technique_shows_its_card(site: Site) -> None:
    page = site.technique_page(site.techniques["written-fake"])
    assert "status: planned" not in page
    assert "*Written: a made-up technique.*" in page
    assert "It multiplies a tensor by\ntwo." in page
    assert "| Paper | A Claim That Holds ([arXiv:2401.00001](https://arxiv.org/abs/2401.00001)). |" in page
    assert "## Equation\n\n$$ y = 2 x \\tag{1} $$" in page
    assert "| `x` | [batch, features], the input. |" in page
    assert "## Defaults\n\nNone." in page
    assert "## Deviations\n\nNone." in page
    assert "## Reduces to\n\n- [Good](../fakes/good-fake.md): with a factor of two, always." in page
    assert "```python\nfrom mlreviews.others import double\n```" in page
    assert "::: mlreviews.others.written_fake.double" in page
    assert "## Reproduction" not in page
    html = _html(page)
    assert 'class="katex-display"' in html
    assert '<a href="https://arxiv.org/abs/2401.00001">' in html


def test_names_outside_the_catalogue_are_code(site: Site) -> None:
    assert site.link("torch.nn.Linear", "..") == "`torch.nn.Linear`"
    assert site.link("good-fake", "techniques") == "[Good](techniques/fakes/good-fake.md)"


def test_a_technique_lists_what_it_is_a_special_case_of(site: Site) -> None:
    page = site.technique_page(site.techniques["good-fake"])
    assert "## A special case of\n\n- [Written](../others/written-fake.md): with a factor of two, always." in page


def test_source_files_are_linked_as_copies(site: Site) -> None:
    page = site.technique_page(site.techniques["good-fake"])
    name = "source/mlreviews/fakes/good_fake.py"
    assert f"| Code | [`{name}`](../../files/{name}.txt) |" in page
    assert "| Reproduction | [`source/mlreviews/reproductions/fakes/good_fake.py`]" in page
    assert "| Tests |" not in page


def test_a_recorded_technique_shows_figure_claims_and_how_to_run_it(site: Site) -> None:
    page = site.technique_page(site.techniques["good-fake"])
    assert "](good-fake.svg){ .figure }" in page
    assert "```bash\nmlreviews reproduce good-fake\n```" in page
    assert "| Run | 2026-01-02, 3.2 s on cpu |" in page
    assert "| Versions | mlreviews 0.1.0, torch 2.13.0 |" in page
    assert "| Machine | Linux, cores 2 |" in page
    html = _html(page)
    assert html.count('class="verdict') == len(CLAIMS)
    assert "The value | is small." in html


def test_a_reproduction_without_a_record_says_how_to_make_one(site: Site) -> None:
    page = site.technique_page(site.techniques["false-fake"])
    assert "No record of a run is packaged yet" in page
    assert "```bash\nmlreviews reproduce false-fake\n```" in page
    assert ".svg" not in page


def test_every_fake_page_is_valid_markdown_with_one_heading(site: Site) -> None:
    for technique in site.techniques.values():
        assert _html(site.technique_page(technique)).count("<h1") == 1


def test_areas_list_what_is_implemented_first_with_what_was_found(site: Site) -> None:
    page = site.area_page("fakes")
    rows = re.findall(r"^\| \[(.*?)\]\(", page, re.MULTILINE)
    assert rows[-1] == "Planned [b]"
    assert len(rows) == 8
    assert "8 techniques, 7 implemented, 7 with a reproduction." in page
    assert re.search(r"\| \[Good\]\(good-fake\.md\) \| A made-up technique\. \| algorithm \| <span", page)
    assert "| [False](false-fake.md) | A made-up technique. | phenomenon | reproduced |" in page
    assert "| A Technique That Is Only Planned | algorithm | planned |" in page


def test_the_table_of_areas_links_and_sums(site: Site) -> None:
    assert site.areas_table("techniques").splitlines()[2:] == [
        "| [Fakes](techniques/fakes/index.md) | 8 | 7 | 7 |",
        "| [Others](techniques/others/index.md) | 1 | 1 | 0 |",
        "| **Total** | **9** | **8** | **7** |",
    ]


def test_the_gallery_has_a_tile_per_record(site: Site) -> None:
    html = _html(site.gallery("techniques"))
    assert "1 reproductions with 4 claims" in html
    assert '<img alt="Good" src="techniques/fakes/good-fake.svg" />' in html
    assert html.count("<li>") == 1
    assert "2 hold" in html
    assert Site(site.techniques, site.cards, {}).gallery("techniques").startswith("No record")


def test_the_map_has_a_box_per_name_and_a_row_per_reduction(site: Site) -> None:
    text = site.reductions_map("techniques")
    assert 'href="techniques/fakes/good-fake.html"' in text
    assert "| [Written](techniques/others/written-fake.md) | [Good](techniques/fakes/good-fake.md) |" in text
    assert text.count('class="arrow"') == len(site.reductions)
    assert Site(site.techniques, {}, {}).reductions_map("techniques") == "No card names a reduction yet."


def test_names_of_areas() -> None:
    assert area_name("rl") == "RL"
    assert area_name("attention") == "Attention"
    assert area_summary("generalization").startswith("Why models that can memorise")
    assert area_summary("no-such-area") == ""


def test_arxiv_ids_become_links() -> None:
    assert prose("See arXiv:2401.00001, table 2.") == (
        "See [arXiv:2401.00001](https://arxiv.org/abs/2401.00001), table 2."
    )


def test_bars_and_line_ends_in_a_cell() -> None:
    assert cell("a | b\n  c $|x|$ |") == r"a \| b c $|x|$ \|"
    html = _html(table(["name", ">n"], [["p(a | b) and $p(a | b)$", "3"]]))
    assert "p(a | b) and" in html
    assert html.count("<td") == 2
    assert re.search(r'<td style="text-align: right;">3</td>', html)


@pytest.mark.parametrize(
    ("value", "mark", "words"),
    [
        (Verdict.HOLDS, "✓", "holds"),
        (Verdict.DOES_NOT_HOLD, "✗", "does not hold"),
        (Verdict.INCONCLUSIVE, "?", "inconclusive"),
    ],
)
def test_a_verdict_has_a_mark_and_words(value: Verdict, mark: str, words: str) -> None:
    text = re.sub(r"<[^>]+>", "", verdict(value))
    assert text == f"{mark} {words}"


def test_verdicts_are_counted() -> None:
    text = re.sub(r"<[^>]+>", "", verdicts(CLAIMS))
    assert text == "✓ 2 hold ✗ 1 does not hold ? 1 inconclusive"
    assert re.sub(r"<[^>]+>", "", verdicts([CLAIMS[1]] * 2)) == "✗ 2 do not hold"


def test_measured_values_have_unit_and_interval() -> None:
    low, high = CLAIMS[0].interval or (0, 0)
    assert measured(CLAIMS[0]) == f"0.5 nats<br><small>95 %: {low:.4g} to {high:.4g}, 3 seeds</small>"
    assert measured(CLAIMS[1]) == "1.235e+04"
    assert measured(CLAIMS[3]) == "1<br><small>in each of 3 seeds</small>"


def test_the_claims_table_has_statement_source_criterion_and_verdict() -> None:
    rows = claims_table(CLAIMS).splitlines()[2:]
    assert len(rows) == len(CLAIMS)
    assert r"The value \| is small.<br><small>[arXiv:2401.00001](https://arxiv.org/abs/2401.00001), table 2" in rows[0]
    assert "| ≤ 2 nats |" in rows[0]
    assert "| 0.9 to 1.1 |" in rows[2]


def test_a_claim_with_a_formula_stays_one_cell() -> None:
    claim = Claim("For $|x| < 1$ it holds", "us", 1.0, at_least=0.0)
    assert _html(claims_table([claim])).count("<td") == 4


def test_the_command_is_the_one_that_was_run() -> None:
    assert command(_record("a")) == "mlreviews reproduce a"
    assert (
        command(_record("a", full=True, seed=3, device="cuda")) == "mlreviews reproduce a --full --seed 3 --device cuda"
    )


def test_links_of_the_repository_become_links_of_the_site(fakes: dict[str, Technique], tmp_path: Path) -> None:
    code = tmp_path / "source" / "mlreviews" / "fakes" / "good_fake.py"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").touch()
    text = "[a](source/mlreviews/fakes/good_fake.py) [b](docs/page.md#x) [c](https://x.org/y) [d](gone.md) [e](#here)"
    changed, linked = repository_links(text, tmp_path)
    assert changed == (
        "[a](files/source/mlreviews/fakes/good_fake.py.txt) [b](page.md#x) [c](https://x.org/y) [d](gone.md) [e](#here)"
    )
    assert linked == [code]


def test_kernel_cores_and_their_backends() -> None:
    cores = [Core("linear_scan", frozenset({"reference.py", "gpu.py"}))]
    assert "| `linear_scan` | reference, triton |" in kernel_cores(cores)
    assert kernel_cores([]).startswith("No core")
