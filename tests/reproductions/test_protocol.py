from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlreviews.reproductions.protocol import Claim, Outcome, Record, RecordError, Settings, Verdict, measure

HOLDS, NOT, OPEN = Verdict.HOLDS, Verdict.DOES_NOT_HOLD, Verdict.INCONCLUSIVE


def claim(
    measured: float,
    interval: tuple[float, float] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Claim:
    return Claim("It is so.", "Anon.", measured, "", at_least, at_most, interval)


def record(*claims: Claim, **series: list[float]) -> Record:
    return Record(
        slug="lora",
        outcome=Outcome(claims, series),
        full=True,
        seed=3,
        device="cpu",
        seconds=1.23456,
        started="2026-01-02T03:04:05+00:00",
        versions={"torch": "2.6"},
        machine={"cores": 2, "processor": "Zuse Z3"},
    )


def test_importing_the_protocol_loads_no_torch() -> None:
    code = "import sys, mlreviews.reproductions.protocol; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


# Settings


def test_defaults_are_the_quick_settings() -> None:
    assert Settings() == Settings(full=False, seed=0, device="cpu")


def test_track_gives_the_items_to_the_tracker() -> None:
    seen = []

    def tracker(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
        seen.append((description, total))
        return items

    assert list(Settings().track(range(3), "silence")) == [0, 1, 2]
    assert list(Settings(tracker=tracker).track(iter("ab"), "letters", 2)) == ["a", "b"]
    assert list(Settings(tracker=tracker).track([1], "numbers")) == [1]
    assert seen == [("letters", 2), ("numbers", None)]


def test_generators_repeat_and_differ_between_seeds_and_streams() -> None:
    def draw(seed: int, stream: int) -> float:
        return float(torch.rand((), generator=Settings(seed=seed).generator(stream)))

    assert draw(1, 2) == draw(1, 2)
    assert Settings(seed=1).generator().initial_seed() == Settings(seed=1).generator(0).initial_seed()
    starts = {Settings(seed=a).generator(b).initial_seed() for a, b in itertools.product(range(30), range(40))}
    assert len(starts) == 30 * 40
    assert len({draw(a, b) for a, b in itertools.product(range(5), range(5))}) == 25
    assert Settings(seed=2**63 - 1).generator(7).device == torch.device("cpu")


def test_settings_are_the_same_whoever_watches() -> None:
    watched = Settings(seed=1, tracker=lambda items, description, total: items)
    assert watched == Settings(seed=1)
    assert repr(watched) == repr(Settings(seed=1))


@pytest.mark.parametrize("made", [Settings(), Outcome([], {}), measure("It is.", "Anon.", 1.0, at_least=0.0)])
def test_what_was_measured_can_not_be_changed(made: Any) -> None:
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


# Claims


@pytest.mark.parametrize(
    ("measured", "interval", "at_least", "at_most", "verdict"),
    [
        (2.0, None, 2.0, None, HOLDS),  # bounds are inclusive
        (1.9, None, 2.0, None, NOT),
        (2.0, None, None, 2.0, HOLDS),
        (2.1, None, None, 2.0, NOT),
        (2.0, None, 2.0, 2.0, HOLDS),
        (2.5, None, 2.0, 3.0, HOLDS),
        (3.5, None, 2.0, 3.0, NOT),
        (1.5, None, 2.0, 3.0, NOT),
        (2.5, (2.0, 3.0), 2.0, None, HOLDS),
        (2.5, (1.9, 3.1), 2.0, None, OPEN),
        (1.5, (1.0, 2.0), 2.0, None, OPEN),  # touches the bound
        (1.5, (1.1, 1.9), 2.0, None, NOT),
        (1.0, (0.5, 1.5), None, 1.5, HOLDS),
        (1.0, (0.5, 1.6), None, 1.5, OPEN),
        (2.0, (1.5, 2.5), None, 1.5, OPEN),
        (2.0, (1.6, 2.4), None, 1.5, NOT),
        (2.5, (1.9, 3.1), 2.0, 3.0, OPEN),  # wider than the bounds on both sides
        (2.5, (2.1, 2.9), 2.0, 3.0, HOLDS),
        (0.0, (0.0, 0.0), 0.0, 0.0, HOLDS),
    ],
)
def test_the_verdict_follows_from_interval_and_bounds(
    measured: float,
    interval: tuple[float, float] | None,
    at_least: float | None,
    at_most: float | None,
    verdict: Verdict,
) -> None:
    assert claim(measured, interval, at_least, at_most).verdict is verdict


@pytest.mark.parametrize(
    ("at_least", "at_most", "words"),
    [
        (3.0, None, "≥ 3"),
        (None, 0.00012345678, "≤ 0.0001235"),
        (0.05, 0.15, "0.05 to 0.15"),
        (1.0, 1.0, "= 1"),
        (0.0, None, "≥ 0"),
        (None, 0.0, "≤ 0"),
    ],
)
def test_the_criterion_in_words(at_least: float | None, at_most: float | None, words: str) -> None:
    assert claim(1.0, None, at_least, at_most).criterion == words


@pytest.mark.parametrize("n", [*range(3, 32)])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(5.0, 2.0, n)
    made = measure("It is five.", "Anon.", values.tolist(), at_least=0.0, unit="nats")
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert made.interval is not None
    assert sum(made.interval) == pytest.approx(low + high)
    assert made.interval[1] - made.interval[0] == pytest.approx(high - low, rel=3e-4)  # the table has four digits
    assert (made.measured, made.seeds, made.unit) == (pytest.approx(values.mean()), n, "nats")


@pytest.mark.parametrize("n", [32, 60, 1000])
def test_with_many_seeds_the_interval_is_never_too_narrow(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    made = measure("It is nothing.", "Anon.", values.tolist(), at_least=-9.0)
    assert made.interval is not None
    half = (made.interval[1] - made.interval[0]) / 2
    exact = stats.t.ppf(0.975, n - 1) * stats.sem(values)
    assert exact < half < 1.045 * exact


def test_a_wrong_claim_is_rarely_accepted() -> None:
    """The true mean lies just outside the bound; 2.5 % of 400 experiments may accept it, give or take four sigma."""
    draws = np.random.default_rng(0).normal(0.0, 1.0, (400, 5))
    accepted = sum(measure("It is above.", "Anon.", row, at_least=0.0).verdict is HOLDS for row in draws.tolist())
    assert accepted <= 400 * 0.025 + 4 * math.sqrt(400 * 0.025 * 0.975)


def test_one_number_has_no_interval() -> None:
    made = measure("It is one.", "Anon.", 1, at_most=2)
    assert (made.measured, made.interval, made.seeds, made.unit, made.at_most) == (1.0, None, 1, "", 2)
    assert isinstance(made.measured, float)


def test_equal_values_give_an_interval_of_no_width() -> None:
    made = measure("It is two.", "Anon.", [2.0, 2.0, 2.0], at_least=2.0, at_most=2.0)
    assert (made.interval, made.verdict) == ((2.0, 2.0), HOLDS)


@pytest.mark.parametrize("values", [math.nan, math.inf, -math.inf, [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_what_is_not_finite_is_no_measurement(values: float | list[float]) -> None:
    with pytest.raises(ValueError, match=r"claim 'It is so\.': measured .*, expected a finite number"):
        measure("It is so.", "Anon.", values, at_least=0.0)


def test_an_interval_must_be_finite() -> None:
    with pytest.raises(ValueError, match="measured inf, expected a finite number"):
        claim(1.0, (0.0, math.inf), at_least=0.0)


@pytest.mark.parametrize(("number", "values"), [(0, []), (1, [1.0]), (2, [1.0, 2.0])])
def test_too_few_seeds(number: int, values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"needs at least 3 seeds, got {number}"):
        measure("It is so.", "Anon.", values, at_least=0.0)


def test_a_claim_needs_bounds() -> None:
    with pytest.raises(ValueError, match="needs at_least, at_most or both"):
        measure("It is so.", "Anon.", 1.0)


@pytest.mark.parametrize(
    ("at_least", "at_most"), [(2.0, 1.0), (math.nan, None), (None, math.nan), (math.inf, None), (0.0, math.inf)]
)
def test_bounds_that_say_nothing(at_least: float | None, at_most: float | None) -> None:
    with pytest.raises(ValueError, match="no value is within the bounds"):
        claim(1.0, None, at_least, at_most)


# Records


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=9)


def ordered(ends: list[float]) -> tuple[float, float]:
    return min(ends), max(ends)


pairs = st.lists(finite, min_size=2, max_size=2).map(ordered)
# The arguments of claims: made within a strategy, a claim would draw from `random` for its run-time checks.
arguments = st.tuples(
    texts,
    texts,
    finite,
    texts,
    pairs,
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.none() | pairs,
    st.integers(1, 99),
)


@settings(max_examples=30)
@given(st.lists(arguments, max_size=3))
def test_claims_survive_the_round_trip_exactly(rows: list[Any]) -> None:
    made = [
        Claim(statement, source, value, unit, low if lower else None, high if upper else None, interval, seeds)
        for statement, source, value, unit, (low, high), (lower, upper), interval, seeds in rows
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(record(*made).to_json())
        file.flush()
        assert Record.read(Path(file.name)).outcome.claims == made


def test_everything_else_survives_too(tmp_path: Path) -> None:
    written = record(claim(1.0, at_least=0.0), loss=[1.23456789, math.nan, 3.0], empty=[], widths=[10.0])
    (tmp_path / "lora.json").write_text(written.to_json(), encoding="utf-8")
    read = Record.read(tmp_path / "lora.json")
    assert read.seconds == 1.23
    assert dataclasses.replace(read, seconds=1.23456, outcome=written.outcome) == written
    assert list(read.outcome.series) == ["loss", "empty", "widths"]
    loss = read.outcome.series["loss"]
    assert (loss[0], loss[2]) == (1.23457, 3.0)
    assert math.isnan(loss[1])
    assert read.outcome.series["empty"] == []


def test_records_are_strict_json_with_the_verdict_and_one_line_a_series() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    made = record(claim(1.0, at_least=2.0), a=[1.0, math.inf, -math.inf, math.nan, 1e30], b=[2.0])
    stored = json.loads(made.to_json(), parse_constant=refuse)
    assert stored["series"] == {"a": [1.0, None, None, None, 1e30], "b": [2.0]}
    assert stored["claims"][0]["verdict"] == "does not hold"
    assert '  "a": [1.0, null, null, null, 1e+30],\n  "b": [2.0]\n' in made.to_json()
    assert json.loads(record().to_json())["series"] == {}


def test_records_can_be_read_by_people() -> None:
    assert record().to_json().startswith('{\n "slug": "lora",\n "full": true,\n')
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(record(), seconds=math.nan).to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().seed = 1  # type: ignore[misc]


def test_records_keep_their_letters() -> None:
    assert "Größe ≤ 1" in record(Claim("Größe ≤ 1", "Anon.", 1.0, at_most=1.0)).to_json()


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("claims"),
        lambda stored: stored.pop("seed"),
        lambda stored: stored.update(extra=1),
        lambda stored: stored.update(claims=[{"statement": "half"}]),
        lambda stored: stored.update(series=[1]),
        lambda stored: stored["series"].update(loss=["x"]),
        lambda stored: stored["claims"][0].update(measured=3.0),
        lambda stored: stored["claims"][0].update(verdict="inconclusive"),
        lambda stored: stored["claims"][0].pop("interval"),
    ],
)
def test_damaged_records_are_refused(damage: Any, tmp_path: Path) -> None:
    stored = json.loads(record(claim(1.0, at_most=2.0), loss=[1.0]).to_json())
    damage(stored)
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(RecordError, match=r"lora\.json: not a record of a reproduction"):
        Record.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"lora"', "\xff"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"lora\.json"):
        Record.read(path)
    with pytest.raises(RecordError, match=r"missing\.json"):
        Record.read(tmp_path / "missing.json")


def test_a_verdict_that_was_written_by_hand_is_refused(tmp_path: Path) -> None:
    text = record(claim(1.0, at_least=2.0)).to_json()
    (tmp_path / "lora.json").write_text(text.replace('"does not hold"', '"holds"'))
    with pytest.raises(RecordError, match=r"claim 'It is so\.': verdict 'holds' does not follow"):
        Record.read(tmp_path / "lora.json")
