from pathlib import Path

import pytest

from mlreviews.catalogue import Technique, areas
from mlreviews.catalogue.readme import BEGIN, COMMAND, END, ReadmeError, areas_table, main, with_table


class _Fixed(Technique):
    """A technique whose status does not come from files: its kind says it."""

    @property
    def implemented(self) -> bool:
        return self.kind != "planned"

    @property
    def reproduced(self) -> bool:
        return self.kind == "reproduced"


def _area(name: str, *states: str) -> list[Technique]:
    return [_Fixed(f"t{i}", name, "T", "Title", state) for i, state in enumerate(states)]


def test_a_row_counts_what_exists_and_the_last_row_sums() -> None:
    table = areas_table(
        {"graph": _area("graph", "planned", "implemented", "reproduced"), "rl": _area("rl", "reproduced", "planned")}
    )
    assert table.splitlines() == [
        "| area | techniques | implemented | with reproduction |",
        "|---|--:|--:|--:|",
        "| graph | 3 | 2 | 1 |",
        "| rl | 2 | 1 | 1 |",
        "| **total** | **5** | **3** | **2** |",
    ]


def test_the_shipped_catalogue_has_a_row_per_area() -> None:
    lines = areas_table(areas()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:-1]] == list(areas())
    assert lines[-1].split("|")[2].strip() == f"**{sum(map(len, areas().values()))}**"


def test_only_what_stands_between_the_markers_changes() -> None:
    text = f"before \\1\n{BEGIN}\nold\ntable\n{END}\nafter\n"
    assert with_table(text, r"a \g<0> | b") == f"before \\1\n{BEGIN}\na \\g<0> | b\n{END}\nafter\n"
    assert with_table(with_table(text, "t"), "t") == with_table(text, "t")


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_markers_that_are_missing_repeated_or_swapped_are_an_error(text: str) -> None:
    with pytest.raises(ReadmeError, match="expected one line"):
        with_table(text, "t")


def test_update_writes_and_check_then_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Größe\n{BEGIN}\n{END}\n", encoding="utf-8")
    assert main(["--check"], readme) == 1
    assert capsys.readouterr().err == f"README.md: its table of areas is not up to date; run '{COMMAND}'\n"
    assert readme.read_text(encoding="utf-8") == f"# Größe\n{BEGIN}\n{END}\n"
    assert main([], readme) == 0
    assert readme.read_text(encoding="utf-8") == f"# Größe\n{BEGIN}\n{areas_table(areas())}\n{END}\n"
    assert main(["--check"], readme) == 0
    assert capsys.readouterr().err == ""


def test_an_up_to_date_file_is_not_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{areas_table(areas())}\n{END}\n", encoding="utf-8")
    before = readme.stat().st_mtime_ns
    assert main([], readme) == 0
    assert readme.stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_readme_without_markers_or_without_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    readme = tmp_path / "README.md"
    assert main(arguments, readme) == 1
    assert capsys.readouterr().err == "README.md: No such file or directory\n"
    readme.write_text("nothing here")
    assert main(arguments, readme) == 1
    assert capsys.readouterr().err.startswith("README.md: expected one line <!-- areas:begin -->")
    assert readme.read_text() == "nothing here"


def test_an_installation_without_a_checkout_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlreviews.catalogue.readme.CHECKOUT", None)
    assert main(["--check"]) == 1
    assert "no source checkout" in capsys.readouterr().err


def test_by_default_it_is_the_readme_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mlreviews.catalogue.readme.CHECKOUT", tmp_path)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    assert main([]) == 0
    assert "**total**" in (tmp_path / "README.md").read_text()
