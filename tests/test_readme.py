"""Every Python example of the README and the guides runs, and every file they link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlreviews.catalogue import CHECKOUT

assert CHECKOUT is not None
GUIDES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]


def _blocks(guide: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: str(g.relative_to(CHECKOUT)))
def test_python_examples_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(_blocks(guide, "python"), 1):
        if "import" in code:  # a block without imports shows a form, it isn't a program
            exec(compile(code, f"{guide.name}, example {number}", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("guide", [g for g in GUIDES if g.parent == CHECKOUT], ids=lambda g: g.name)
def test_linked_files_exist(guide: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", guide.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (guide.parent / link).exists()] == []
