from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mlreviews import catalogue
from mlreviews.catalogue import KINDS, Technique
from mlreviews.cli import listing
from mlreviews.cli.commands import app
from mlreviews.reproductions.protocol import Outcome, Record, measure

Fakes = dict[str, Technique]


def run(*arguments: str, width: int = 80, terminal: bool = False) -> Result:
    variables = {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "xterm"} | ({"FORCE_COLOR": "1"} if terminal else {})
    return CliRunner().invoke(app, arguments, env=variables)


def on_terminal(*arguments: str, width: int = 80) -> list[str]:
    """What a terminal shows, without bold and dim."""
    return re.sub(r"\x1b\[[0-9;]*m", "", run(*arguments, width=width, terminal=True).stdout).splitlines()


def slugs(*arguments: str) -> list[str]:
    result = run("list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [row["slug"] for row in json.loads(result.stdout)]


def record(slug: str, started: str = "2026-01-01T00:00:00+00:00", value: float = 3.0) -> Record:
    claim = measure("It is [large].", "Anon., figure 1", [value, value + 1, value + 2], at_least=100.0, unit="nats")
    exact = measure("It is small.", "Anon., figure 2", 0.5, at_most=1.0)
    return Record(
        slug, Outcome([claim, exact], {"curve": [1.0]}), True, 7, "cpu", 12.345, started, {"torch": "2.6"}, {"cores": 2}
    )


def store(path: Path, made: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_json(), encoding="utf-8")


# list


def test_all_techniques_in_the_order_of_the_catalogue(fakes: Fakes) -> None:
    assert slugs() == list(fakes)
    assert slugs()[-1] == "written-fake"


def test_the_real_catalogue_is_listed_too() -> None:
    assert slugs() == list(catalogue.techniques())
    assert slugs("--area", "peft") == [t.slug for t in catalogue.areas()["peft"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--area", "others"), ["written-fake"]),
        (("--kind", "phenomenon"), ["false-fake"]),
        (("--kind", "algorithm"), ["good-fake", "2nd-planned-fake", "written-fake"]),
        (("--status", "planned"), ["2nd-planned-fake"]),
        (("--status", "implemented", "--kind", "algorithm"), ["good-fake", "written-fake"]),
        (("--status", "reproduced", "--kind", "algorithm"), ["good-fake"]),
        (("slow",), ["slow-fake", "slow-too-fake"]),  # slug
        (("SLOW, TOO",), ["slow-too-fake"]),  # name, in any case
        (("that is only",), ["2nd-planned-fake"]),  # title
        (("2402.0",), ["written-fake"]),  # arXiv id
        (("claim", "not"), ["false-fake"]),  # all words
        (("claim", "abacus"), []),
        (("slow", "--area", "others"), []),
    ],
)
def test_filters(fakes: Fakes, arguments: tuple[str, ...], expected: list[str]) -> None:
    assert slugs(*arguments) == expected


def test_the_facts_as_json(fakes: Fakes) -> None:
    rows = json.loads(run("list", "--json").stdout)
    assert rows[0] == {
        "slug": "good-fake",
        "area": "fakes",
        "short": "Good",
        "title": "A Claim That Holds",
        "kind": "algorithm",
        "arxiv": "2401.00001",
        "reviewed": "2024-01-02",
        "status": "reproduced",
        "tested": None,
        "kernels": [],
    }


def test_in_a_pipe_each_technique_is_one_whole_line(fakes: Fakes) -> None:
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["technique", "area", "kind", "status", "arXiv", "name"]
    assert lines[1] == "good-fake         fakes   algorithm   reproduced   2401.00001  Good"
    assert lines[8] == "2nd-planned-fake  fakes   algorithm   planned                  Planned [b]"
    assert lines[9].split() == ["written-fake", "others", "algorithm", "implemented", "2402.00002", "Written"]
    assert len(lines) == 10
    assert run("list", width=20).stdout.splitlines() == lines


@pytest.mark.parametrize("width", [40, 80, 99])
def test_a_narrow_terminal_shows_areas_as_headings(fakes: Fakes, width: int) -> None:
    lines = on_terminal("list", width=width)
    assert max(map(len, lines[:-1])) <= width
    assert lines[0].split()[:3] == ["technique", "status", "arXiv"]
    assert (lines[1], lines[10]) == ("fakes", "others")
    assert lines[2].startswith("good-fake         reproduced")
    assert lines[-1] == "9 techniques: 1 planned, 1 implemented, 7 reproduced" or width == 40
    assert "\x1b[3" not in run("list", width=width, terminal=True).stdout  # NO_COLOR


def test_a_wide_terminal_shows_the_kind(fakes: Fakes) -> None:
    lines = on_terminal("list", width=100)
    assert lines[0].split() == ["technique", "kind", "status", "arXiv", "name"]


def test_the_real_list_can_be_read_in_80_columns() -> None:
    """Slug, status and arXiv id are never cut."""
    lines = on_terminal("list")
    assert max(map(len, lines)) <= 80
    for technique in catalogue.techniques().values():
        (line,) = [line for line in lines if line.split()[:1] == [technique.slug] and len(line.split()) > 2]
        assert technique.status in line
        assert technique.arxiv in line


def test_no_match_is_said(fakes: Fakes) -> None:
    result = run("list", "abacus")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no technique of the catalogue matches\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--area", "fake"), "Error: no area is called 'fake'; did you mean fakes?\n"),
        (("--area", "xyz"), "Error: no area is called 'xyz'\n"),
        (("--kind", "theorem"), "theorem"),
        (("--status", "done"), "done"),
        (("--colour",), "--colour"),
    ],
)
def test_bad_filters(fakes: Fakes, arguments: tuple[str, ...], message: str) -> None:
    result = run("list", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_kinds_are_those_of_the_catalogue() -> None:
    assert tuple(listing.Kind) == KINDS
    assert {t.status for t in catalogue.techniques().values()} <= set(listing.Status)


def test_the_shell_completes_slugs(fakes: Fakes) -> None:
    assert listing.complete_slug("slow") == ["slow-fake", "slow-too-fake"]


# show


def test_show_says_everything(fakes: Fakes) -> None:
    store(Path("results/good-fake.json"), record("good-fake"))
    result = run("show", "good-fake")
    assert result.exit_code == 0
    text = result.stdout
    assert text.startswith("good-fake: Good\n  paper        A Claim That Holds\n")
    for part in (
        "  arXiv        https://arxiv.org/abs/2401.00001\n",
        "  area         fakes (algorithm)\n",
        "  reviewed     2024-01-02\n",
        "  status       reproduced\n",
        f"  code         {fakes['good-fake'].source_file}\n",
        f"  reproduction {fakes['good-fake'].reproduction_file}\n",
        f"  results      {os.path.join('results', 'good-fake.json')}\n",
        "\nGood: a made-up technique.\n  A Claim That Holds (arXiv:2401.00001).\n\nIt multiplies a tensor by two.\n",
        "\nEquation\n  $$ y = 2 x \\tag{1} $$\n",
        "\nSymbols\n  x: [batch, features], the input.\n",
        "\nReduces to\n  none.\n",
        "\nReduced to by\n  written-fake: with a factor of two, always.\n",
        "\nfrom mlreviews.fakes import …\n  double(x: ",
        "\n      Multiplies by two.\n",
        "\nClaims\n  full settings, seed 7, cpu, 12.3 s, 2026-01-01, torch 2.6\n",
        "It is [large].",
    ):
        assert part in text
    assert "test  " not in text  # not a source checkout
    assert "kernels" not in text


def test_the_claims_table(fakes: Fakes) -> None:
    store(Path("results/good-fake.json"), record("good-fake", value=3.0))
    lines = run("show", "good-fake").stdout.split("\nClaims\n")[1].splitlines()
    assert lines[2].split() == ["claim", "measured", "criterion", "verdict"]
    assert lines[4].split() == ["It", "is", "[large].", "4", "nats", "≥", "100", "does", "not", "hold"]
    assert lines[5].split() == ["Anon.,", "figure", "1", "1.516", "…", "6.484"]  # 4 ± 4.303 / √3
    assert lines[6].split() == ["(95", "%,", "3", "seeds)"]
    assert lines[8].split() == ["It", "is", "small.", "0.5", "≤", "1", "holds"]
    assert max(map(len, lines)) <= 80


def test_show_as_json(fakes: Fakes) -> None:
    store(Path("results/good-fake.json"), record("good-fake"))
    shown = json.loads(run("show", "good-fake", "--json").stdout)
    assert shown["status"] == "reproduced"
    assert shown["import"] == "mlreviews.fakes.good_fake"
    assert shown["files"] == {
        "code": str(fakes["good-fake"].source_file),
        "reproduction": str(fakes["good-fake"].reproduction_file),
        "results": os.path.join("results", "good-fake.json"),
    }
    assert shown["card"]["title"] == "Good: a made-up technique."
    assert shown["card"]["sources"] == ["A Claim That Holds (arXiv:2401.00001)."]
    assert shown["card"]["sections"]["Deviations"] == "none."
    assert (shown["reduces_to"], list(shown["reduced_to_by"])) == ({}, ["written-fake"])
    assert [(row["name"], row["summary"]) for row in shown["api"]] == [("double", "Multiplies by two.")]
    assert shown["result"]["seed"] == 7
    assert shown["result"]["claims"][0]["verdict"] == "does not hold"
    assert not {"series", "slug"} & shown["result"].keys()


def test_show_a_planned_technique(fakes: Fakes) -> None:
    result = run("show", "2nd-planned-fake")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "2nd-planned-fake: Planned [b]",
        "  paper        A Technique That Is Only Planned",
        "  area         fakes (algorithm)",
        "  reviewed     2024-03",
        "  status       planned",
    ]
    shown = json.loads(run("show", "2nd-planned-fake", "--json").stdout)
    assert (shown["card"], shown["api"], shown["reduces_to"], shown["result"]) == (None, [], {}, None)
    assert (shown["import"], shown["files"], shown["reduced_to_by"]) == (None, {}, {})


def test_the_newest_record_is_shown(fakes: Fakes) -> None:
    def measured() -> float:
        shown = json.loads(run("show", "good-fake", "--json", "--out", "mine").stdout)
        return float(shown["result"]["claims"][0]["measured"])

    shipped, own = fakes["good-fake"].record_file, Path("mine/good-fake.json")
    store(shipped, record("good-fake", "2026-01-02T00:00:00+00:00", 10.0))
    assert measured() == 11.0
    store(own, record("good-fake", "2026-01-01T23:59:59+00:00", 20.0))
    assert measured() == 11.0
    store(own, record("good-fake", "2026-01-02T00:00:01+00:00", 20.0))
    assert measured() == 21.0


def test_a_damaged_record_is_named_and_the_rest_shown(fakes: Fakes) -> None:
    store(fakes["good-fake"].record_file, record("good-fake"))
    Path("results").mkdir()
    Path("results/good-fake.json").write_text("{")
    result = run("show", "good-fake")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"{os.path.join('results', 'good-fake.json')}: not a record")
    assert "It is [large]." in result.stdout


def test_a_broken_card(fakes: Fakes) -> None:
    path = fakes["good-fake"].source_file
    path.write_text(path.read_text().replace("Symbols:", "Symbol:"))
    result = run("show", "good-fake")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: good_fake.py: the card has no section 'Symbols:' with an indented text below it\n"
    # Another's broken card is no reason not to show this one.
    path = fakes["written-fake"].source_file
    path.write_text(path.read_text().replace("Symbols:", "Symbol:"))
    assert "Reduced to by" not in run("show", "false-fake").stdout
    assert run("show", "false-fake").exit_code == 0


def test_unknown_slugs(fakes: Fakes) -> None:
    result = run("show", "god-fake")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: no technique is called 'god-fake'; did you mean good-fake, slow-fake, dying-fake?\n"


def test_a_broken_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peft.toml").write_text('[lora]\nshort = "LoRA"\ntitle = "LoRA"\nkind = "trick"\n')
    monkeypatch.setattr(catalogue, "techniques", lambda: catalogue.load_catalogue(tmp_path))
    for arguments in (("list",), ("show", "lora"), ("reproduce", "lora")):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert (
            result.stderr == "Error: peft.toml [lora]: kind = 'trick' does not match algorithm|procedure|phenomenon\n"
        )
    result = run("--debug", "list")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "Error: peft.toml [lora]" in result.stderr.splitlines()[-1]
