import re

import pytest
from formulas import KATEX, FormulaError, FormulaExtension, typeset
from markdown import Markdown


def _convert(text: str) -> tuple[str, list[str]]:
    """The HTML, with each formula replaced by its LaTeX in angle quotes, and what was reported."""
    reports: list[str] = []
    extensions = ["tables", "pymdownx.superfences", FormulaExtension(reports.append)]
    html = Markdown(extensions=extensions).convert(text)
    formula = re.compile(
        r'<span class="formula".*?<annotation [^>]*>(.*?)</annotation>.*?(?=</p>|</td>|</li>|~|$)', re.S
    )
    return formula.sub(r"«\1»", html), reports


def test_every_font_of_the_style_sheet_is_there_and_no_other_host_is_named() -> None:
    css = (KATEX.parent / "katex.min.css").read_text(encoding="utf-8")
    assert {f"fonts/{file.name}" for file in (KATEX.parent / "fonts").iterdir()} == set(
        re.findall(r"url\((.*?)\)", css)
    )
    assert "//" not in css
    assert "MIT" in (KATEX.parent / "LICENSE").read_text(encoding="utf-8")


def test_the_style_sheet_has_the_classes_that_the_script_writes() -> None:
    css = (KATEX.parent / "katex.min.css").read_text(encoding="utf-8")
    html = typeset(r"\hat{\theta} = \frac{1}{n} \sqrt{x} \tag{3}", display=True)
    assert {"katex-display", "katex-html", "katex-tag", "mfrac"} <= set(re.findall(r"[\w-]+", html))
    assert all(f".{name}" in css for name in ("katex-display", "katex-html", "katex-tag", "mfrac"))


def test_display_formulas_show_their_number_and_carry_mathml() -> None:
    html = typeset(r"y = W x \tag{12}", display=True)
    assert 'class="katex-display"' in html
    assert "".join(re.findall(r">([^<>]+)<", html.partition('class="katex-tag"')[2])) == "(12)"
    assert "<math " in html
    assert 'class="katex-display"' not in typeset("x")


@pytest.mark.parametrize(
    "latex",
    [
        r"\begin{aligned} h_t &= \bar{A}_t h_{t-1} \\ y_t &= C_t^\top h_t \end{aligned}",
        r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}",
        r"f(x) = \begin{cases} x & \text{if } x \ge 0 \\ 0 & \text{otherwise} \end{cases}",
        r"\operatorname*{arg\,min}_{\theta \in \mathbb{R}^d} \lVert y - X \theta \rVert_2^2",
        r"\mathbb{E}_{x \sim \mathcal{D}}\left[ \log \frac{\pi_\theta(x)}{\pi_{\mathrm{ref}}(x)} \right]",
    ],
)
def test_what_papers_write_is_understood(latex: str) -> None:
    assert "katex-error" not in typeset(latex, display=True)


def test_an_unknown_command_is_an_error_that_names_it() -> None:
    with pytest.raises(FormulaError, match=r"Undefined control sequence: \\foo"):
        typeset(r"x + \foo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("where $a_i * b_i$ and $c_i * d_i$~.", "<p>where «a_i * b_i»"),
        ("so\n$$ x\n> 3 \\tag{1} $$\nis", "<p>so\n«x\n&gt; 3 \\tag{1}»"),
        ("- $$ a < b $$", "«a &lt; b»"),
        ("$a\nb$", "«a\nb»"),
        ("| a | b |\n|---|---|\n| $|x|$ | y |", "<td>«|x|»</td>\n<td>y</td>"),
    ],
)
def test_formulas_are_found(text: str, expected: str) -> None:
    html, reports = _convert(text)
    assert expected in html
    assert reports == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it costs $5 or $6", "$5 or $6"),
        ("a US$ b$ c", "a US$ b$ c"),
        (r"\$x\$", "&#36;x&#36;"),
        ("`$x$` and ``a `$x$` b``", "<code>$x$</code> and <code>a `$x$` b</code>"),
        ("one $a\n\nb$ two", "<p>one $a</p>\n<p>b$ two</p>"),
        ("$ x $", "$ x $"),
    ],
)
def test_other_dollars_are_left_alone(text: str, expected: str) -> None:
    html, reports = _convert(text)
    assert expected in html
    assert "«" not in html
    assert reports == []


def test_dollars_in_fenced_code_are_left_alone() -> None:
    html, reports = _convert("```bash\necho $HOME $PATH$\n```\n\n- item\n\n    ```\n    $x$\n    ```")
    assert "formula" not in html
    assert reports == []


def test_a_broken_formula_is_reported_and_shown_as_its_source() -> None:
    html, reports = _convert(r"see $\foo{<b>}$ and $x$")
    assert r"<code>$\foo{&lt;b&gt;}$</code>" in html
    assert len(reports) == 1
    assert reports[0].startswith(r"formula '$\\foo{<b>}$': KaTeX parse error")
