from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mlreviews.preference import (
    Demonstration,
    SymbolPair,
    assign_symbols,
    symbol_against_symbol,
    symbol_against_word,
)
from tests.contracts.families import Sample

DEMOS = [Demonstration(i, f"what is {i}?", answer) for i, answer in enumerate(["cat", "dog", "cat", "bus"])]
QUERY = Demonstration("q", "and this?", "dog")
SYMBOLS = ["@1", "#2", "%3", "&4", "*5"]


def numbered(make: Callable[..., object]) -> Callable[..., list[int]]:
    """The symbols of what is drawn, as numbers: strings aren't compared."""

    def drawn(*args: object, generator: torch.Generator) -> list[int]:
        found = make(*args, generator=generator)
        if isinstance(found, SymbolPair):
            symbols = [found.chosen, *(demo.answer for demo in found.demonstrations)]
        else:
            assert isinstance(found, dict)
            symbols = list(found.values())
        return [SYMBOLS.index(symbol) for symbol in symbols]

    return drawn


CONTRACT = {
    "assign_symbols": lambda: Sample(numbered(assign_symbols), (["cat", "dog"], SYMBOLS)),
    "symbol_against_word": lambda: Sample(numbered(symbol_against_word), (DEMOS, QUERY, SYMBOLS)),
    "symbol_against_symbol": lambda: Sample(numbered(symbol_against_symbol), (DEMOS, QUERY, SYMBOLS)),
}

Make = Callable[..., SymbolPair]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [symbol_against_word, symbol_against_symbol])
def test_one_symbol_an_answer_and_the_right_one_preferred(make: Make) -> None:
    used = set()
    for seed in range(12):
        pair = make(DEMOS, QUERY, SYMBOLS, generator=draw(seed))
        shown = [demo.answer for demo in pair.demonstrations]
        assert shown[0] == shown[2]
        assert len(set(shown)) == 3
        assert set(shown) <= set(SYMBOLS)
        assert pair.chosen == shown[1]
        assert [(demo.image, demo.question) for demo in pair.demonstrations] == [(d.image, d.question) for d in DEMOS]
        assert (pair.image, pair.question) == ("q", "and this?")
        used.add(pair.chosen)
    assert len(used) > 2  # no symbol comes to mean "dog"


def test_what_is_rejected() -> None:
    assert symbol_against_word(DEMOS, QUERY, SYMBOLS, generator=draw(0)).rejected == "dog"
    pairs = [symbol_against_symbol(DEMOS, QUERY, SYMBOLS, generator=draw(seed)) for seed in range(20)]
    for pair in pairs:
        assert pair.rejected in {pair.demonstrations[0].answer, pair.demonstrations[3].answer}
        assert pair.rejected != pair.chosen
    assert {pair.rejected == pair.demonstrations[0].answer for pair in pairs} == {True, False}
    assert len({*pairs, *pairs}) > 10  # pairs that say the same are one


@pytest.mark.parametrize("make", [symbol_against_word, symbol_against_symbol])
def test_questions_can_be_dropped_from_the_demonstrations(make: Make) -> None:
    pair = make(DEMOS, QUERY, SYMBOLS, drop_questions=True, generator=draw(1))
    assert {demo.question for demo in pair.demonstrations} == {""}
    assert pair.question == "and this?"
    assert pair.demonstrations[1].answer == pair.chosen


def test_symbols_are_as_many_as_answers_at_least() -> None:
    found = assign_symbols(["a", "b", "a"], ["x", "y"], generator=draw(0))
    assert sorted(found) == ["a", "b"]
    assert sorted(found.values()) == ["x", "y"]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="symbols: expected at least 3"):
        symbol_against_word(DEMOS, QUERY, SYMBOLS[:2])
    with pytest.raises(ValueError, match="symbols: expected different"):
        assign_symbols(["a"], ["x", "x"])
    with pytest.raises(ValueError, match=r"symbols: expected none of the answers, got \['a'\]"):
        assign_symbols(["a"], ["x", "a"])
    with pytest.raises(ValueError, match="query's answer 'dog'"):
        symbol_against_word(DEMOS[2:], QUERY, SYMBOLS)
    with pytest.raises(ValueError, match="another answer"):
        symbol_against_symbol(DEMOS[1:2], QUERY, SYMBOLS)
