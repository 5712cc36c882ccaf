from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mlreviews.catalogue import Technique
from mlreviews.cli.commands import app
from mlreviews.reproductions import runner
from mlreviews.reproductions.protocol import Outcome, Record, Settings, measure

Fakes = dict[str, Technique]


def run(*arguments: str, terminal: bool = False) -> Result:
    variables = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"} | ({"FORCE_COLOR": "1"} if terminal else {})
    return CliRunner().invoke(app, arguments, env=variables)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Settings, Path]]:
    """Reproductions take no time here: what they are asked for is noted, and a claim that depends on the seed given."""
    noted: list[tuple[str, Settings, Path]] = []

    def reproduce(technique: Technique, settings: Settings, out: Path) -> Record:
        noted.append((technique.slug, settings, out))
        claims = [
            measure(f"The claim of {technique.slug}.", "Anon.", float(settings.seed), at_least=1.0, unit="nats"),
            measure("It is open.", "Anon.", [0.0, 1.0, 2.0], at_most=1.0 if settings.seed == 2 else 9.0),
        ]
        outcome, how = Outcome(claims, {}), (settings.full, settings.seed, "cpu", 1.0, "2026-01-01")
        return Record(technique.slug, outcome, *how, versions={"torch": "2.6"}, machine={"cores": 2})

    monkeypatch.setattr(runner, "reproduce", reproduce)
    return noted


def test_one_technique(fakes: Fakes) -> None:
    result = run("reproduce", "good-fake")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    assert text.startswith("good-fake: Good\nquick settings, seed 0, cpu, ")
    assert re.search(r"^The value is at least minus a thousand\. +0\.\d+ nats +≥ -1000 +holds *$", text, re.MULTILINE)
    assert re.search(r"^Anon\., section 1 +-?\d\.\d+ … \d\.\d+ *$", text, re.MULTILINE)
    names = [os.path.join("results", f"good-fake.{ending}") for ending in ("json", "svg", "png")]
    assert text.endswith(f"\nwritten: {', '.join(names)}\n\n")
    assert sorted(file.name for file in Path("results").iterdir()) == [
        "good-fake.json",
        "good-fake.png",
        "good-fake.svg",
    ]
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_options_reach_the_experiment(fakes: Fakes, calls: list[tuple[str, Settings, Path]]) -> None:
    assert run("reproduce", "good-fake", "--full", "--seed", "3", "--out", "there").exit_code == 0
    ((slug, settings, out),) = calls
    assert (slug, out) == ("good-fake", Path("there"))
    assert settings == Settings(full=True, seed=3, device="cpu")
    run("reproduce", "good-fake", "--quick")
    assert calls[1][1:] == (Settings(full=False, seed=0, device="cpu"), Path("results"))


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (("good-fake", "false-fake", "good-fake"), ["good-fake", "false-fake"]),
        (("fakes", "good-fake"), "fakes"),
        (("--all",), "fakes"),
        (("written-fake", "good-fake"), ["written-fake", "good-fake"]),  # named: its error is worth seeing
    ],
)
def test_what_is_chosen(
    fakes: Fakes, calls: list[tuple[str, Settings, Path]], arguments: tuple[str, ...], chosen: list[str] | str
) -> None:
    result = run("reproduce", *arguments, "--seed", "1")
    expected = [slug for slug, t in fakes.items() if t.reproduced] if chosen == "fakes" else chosen
    assert [slug for slug, _, _ in calls] == expected
    assert f"\nclaims: {2 * len(expected)} holds\n" in result.stdout


def test_what_can_not_be_run(fakes: Fakes) -> None:
    for arguments, message, code in (
        (("good-fke",), "no technique or area is called 'good-fke'; did you mean good-fake", 2),
        (("other",), "no technique or area is called 'other'; did you mean others?", 2),
        ((), "name techniques or areas, or give --all", 2),
        (("good-fake", "--all"), "name techniques or areas, or give --all", 2),
        (("others",), "nothing to run: no technique of others has a reproduction", 1),
        (("written-fake",), "written-fake is implemented: it has no reproduction", 1),
        (("2nd-planned-fake",), "2nd-planned-fake is planned: it has no reproduction", 1),
        (("good-fake", "--device", "abacus"), "device 'abacus' can't be used: Expected one of cpu", 1),
    ):
        result = run("reproduce", *arguments)
        assert (result.exit_code, result.stdout) == (code, ""), arguments
        assert result.stderr.startswith(f"Error: {message}")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options", [("--jobs", "0"), ("--jobs", "two"), ("--seed", "-1"), ("--seed", "x"), ("--quickly",), ("--out",)]
)
def test_bad_options(fakes: Fakes, calls: list[tuple[str, Settings, Path]], options: tuple[str, ...]) -> None:
    result = run("reproduce", "good-fake", *options)
    assert (result.exit_code, result.stdout, calls) == (2, "", [])
    assert options[0] in result.stderr


def test_a_claim_that_does_not_hold_is_a_result(fakes: Fakes, calls: list[tuple[str, Settings, Path]]) -> None:
    result = run("reproduce", "good-fake")  # seed 0: the first claim does not hold
    assert (result.exit_code, result.stderr) == (0, "")
    assert "does not hold" in result.stdout


@pytest.mark.parametrize(("seed", "code"), [(0, 1), (1, 0), (2, 1)])  # does not hold, all hold, inconclusive
def test_strict(fakes: Fakes, calls: list[tuple[str, Settings, Path]], seed: int, code: int) -> None:
    assert run("reproduce", "good-fake", "--strict", "--seed", str(seed)).exit_code == code
    assert run("reproduce", "good-fake", "false-fake", "--strict", "--seed", str(seed)).exit_code == code


def test_failures_are_one_line_each_and_stop_nothing(fakes: Fakes) -> None:
    result = run("reproduce", "failing-fake", "undrawable-fake", "good-fake")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: failing-fake: the experiment failed: ValueError: the data are bent"
    assert lines[1].startswith("Error: undrawable-fake: its results can't be drawn and written to results: ValueError")
    assert len(lines) == 2
    assert "undrawable-fake: Undrawable\n" in result.stdout  # what was measured is shown
    assert result.stdout.endswith("\n\nclaims: 2 holds; failed: failing-fake, undrawable-fake\n")
    assert result.stdout.count("written:") == 1


def test_debug_shows_the_traceback(fakes: Fakes) -> None:
    result = run("--debug", "reproduce", "failing-fake")
    assert result.exit_code == 1
    assert "raise ValueError('the data are bent" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: failing-fake: the experiment failed")
    assert "Traceback" not in run("reproduce", "failing-fake").stderr


def test_an_output_folder_that_is_a_file(fakes: Fakes) -> None:
    Path("results").write_text("mine")
    result = run("reproduce", "good-fake", "false-fake")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: can't write to the output folder results: it is not a folder\n"
    assert Path("results").read_text() == "mine"


def test_a_folder_without_permission(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    result = run("reproduce", "good-fake")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: can't write to the output folder results: Permission denied\n"


def test_ctrl_c(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "reproduce", interrupted)
    result = run("reproduce", "good-fake", "false-fake")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_progress_on_a_terminal_only(fakes: Fakes) -> None:
    assert "measuring" in run("reproduce", "good-fake", terminal=True).stdout
    result = run("reproduce", "good-fake", "false-fake", terminal=True)
    assert "reproductions" in result.stdout
    assert "claims: 1 does not hold, 1 holds\n" in result.stdout
    assert "measuring" not in run("reproduce", "good-fake").output


def test_the_tracker_counts_what_it_is_given(
    fakes: Fakes, calls: list[tuple[str, Settings, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.progress import Progress

    totals: dict[str, float | None] = {}
    add, advance = Progress.add_task, Progress.advance
    steps = []

    def noted(self: Progress, description: str, total: float | None = None) -> int:
        totals[description] = total
        return add(self, description, total=total)

    def stepped(self: Progress, task: int, step: float = 1) -> None:
        steps.append(task)
        advance(self, task, step)

    monkeypatch.setattr(Progress, "add_task", noted)
    monkeypatch.setattr(Progress, "advance", stepped)
    run("reproduce", "good-fake", "--seed", "1")
    track = calls[0][1].track
    assert list(track([5, 6, 7], "list")) == [5, 6, 7]
    assert list(track(iter("ab"), "iterator")) == ["a", "b"]
    assert list(track(iter("ab"), "said", 2)) == ["a", "b"]
    assert list(track([1], "other", 9)) == [1]
    assert totals == {"list": 3, "iterator": None, "said": 2, "other": 9}
    assert len(steps) == 3 + 2 + 2 + 1
