"""Turns LaTeX between dollar signs into HTML while the site is built, so that readers need no script and no network.

KaTeX does the typesetting, run by an embedded JavaScript engine. A formula that KaTeX rejects is reported, with the
page that holds it, and shown as its source.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from py_mini_racer import MiniRacer

KATEX = Path(__file__).parent.parent / "assets" / "katex" / "katex.min.js"

# Code comes first, so that dollars in it are left alone. As in other Markdown tools, an inline formula begins and ends
# with something other than a space, and "$5 and $6" is none.
_PATTERN = re.compile(
    r"""
    (?P<code>(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`))
    | (?P<dollar>\\\$)
    | \$\$(?P<display>(?:(?!\n\s*\n).)+?)\$\$
    | (?<!\w)\$(?![\s$])(?P<inline>(?:\\.|[^$\\\n]|\n(?!\s*\n))+?)(?<!\s)\$(?![\d$])
    """,
    re.VERBOSE | re.DOTALL,
)


class FormulaError(ValueError):
    """KaTeX rejects a formula; the message says where in it."""


@cache
def _engine() -> MiniRacer:
    engine = MiniRacer()
    atexit.register(engine.close)  # left to the garbage collector, it can hang the exiting interpreter
    engine.eval(KATEX.read_text(encoding="utf-8"))
    engine.eval(
        "function typeset(latex, displayMode) {"
        "  try { return {html: katex.renderToString(latex, {displayMode, strict: 'ignore'})} }"
        "  catch (error) { return {error: error.message} } }"
    )
    return engine


@cache
def typeset(latex: str, display: bool = False) -> str:
    """The HTML of a formula, with MathML inside for screen readers.

    Args:
        latex: the formula, without dollar signs.
        display: whether it stands on a line of its own.

    Raises:
        FormulaError: KaTeX does not understand it.
    """
    result = _engine().call("typeset", latex.strip(), display)
    if "error" in result:
        raise FormulaError(result["error"])
    return f'<span class="formula" data-search-exclude>{result["html"]}</span>'


class FormulaExtension(Extension):
    """The Markdown extension.

    Args:
        report: is told of every formula that can't be typeset.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self.report = report

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers after fenced code (25) has been taken out of the text, and before raw HTML (20) is."""
        md.preprocessors.register(_Formulas(md, self.report), "formulas", 23)


class _Formulas(Preprocessor):
    def __init__(self, md: Markdown, report: Callable[[str], None]) -> None:
        super().__init__(md)
        self.report = report

    def run(self, lines: list[str]) -> list[str]:
        return _PATTERN.sub(self._replace, "\n".join(lines)).split("\n")

    def _replace(self, match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["dollar"]:
            return "&#36;"
        latex = match["display"] or match["inline"]
        try:
            html = typeset(latex, display=bool(match["display"]))
        except FormulaError as error:
            self.report(f"formula {match[0]!r}: {error}")
            html = f"<code>{escape(match[0])}</code>"
        return str(self.md.htmlStash.store(html))
