r"""SymDPO: preference pairs over demonstrations with symbols for answers: only the context tells what is right.

Paper: SymDPO: Boosting In-Context Learning of Large Multimodal Models with Symbol Demonstration Direct Preference
    Optimization (arXiv:2411.11909).

A multimodal model that is shown examples (image, question, answer) before a query tends to ignore their images and to
answer from the pattern of the texts, or from what it knows. SymDPO replaces the answers of the examples by symbols that
mean nothing, one symbol for each answer. The preferred answer to the query is the symbol of its true answer, which can
only be read off the demonstration with the matching image; the rejected one is the word itself, or another symbol. DPO
then trains on such pairs.

Equation:
    $$ D = \bigl((I_1, Q_1, s(A_1)), \dots, (I_n, Q_n, s(A_n))\bigr), \qquad
       y_w = s(A_q), \qquad y_l \in \{A_q\} \cup \{s(A_i) : A_i \ne A_q\} \tag{1} $$

Symbols:
    I, Q, A: image, question and answer of a demonstration; any objects as images.
    s: an injective map from the answers of one prompt to symbols, drawn anew for each prompt.
    I_q, Q_q, A_q: the query and its true answer.

Defaults:
    beta: 0.1 in the loss (the authors' training script): ``dpo_loss(..., beta=0.1)``.

Deviations:
    1. The authors' mix of data configurations is not released with their code. Here are its parts: symbols for all
       demonstrations, questions kept or dropped, and either kind of rejected answer.

Reduces to:
    none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ["Demonstration", "SymbolPair", "assign_symbols", "symbol_against_symbol", "symbol_against_word"]


@dataclass(frozen=True)
class Demonstration:
    """An image with a question and its answer.

    Attributes:
        image: whatever the model takes as an image.
        question: "" where it was dropped.
        answer: a word, or the symbol in its place.
    """

    image: object
    question: str
    answer: str


@dataclass(frozen=True)
class SymbolPair:
    """A prompt of demonstrations and a query, with a preferred and a rejected answer.

    Attributes:
        demonstrations: with symbols for answers.
        image: of the query.
        question: of the query.
        chosen: the symbol of the true answer.
        rejected: a wrong answer to this prompt.
    """

    demonstrations: tuple[Demonstration, ...]
    image: object
    question: str
    chosen: str
    rejected: str


def assign_symbols(
    answers: Sequence[str], symbols: Sequence[str], *, generator: torch.Generator | None = None
) -> dict[str, str]:
    """A symbol of its own for each answer, at random.

    Args:
        answers: of the demonstrations; equal ones share a symbol.
        symbols: different strings that mean nothing and contain none of the answers.
        generator: of the draw.

    Raises:
        ValueError: fewer symbols than answers, equal symbols, or a symbol that is one of the answers.
    """
    distinct = list(dict.fromkeys(answers))
    if len(set(symbols)) < len(symbols):
        raise ValueError("symbols: expected different ones, got some twice")
    if len(symbols) < len(distinct):
        raise ValueError(f"symbols: expected at least {len(distinct)}, one for each answer, got {len(symbols)}")
    if shared := set(symbols) & set(distinct):
        raise ValueError(f"symbols: expected none of the answers, got {sorted(shared)}")
    order = torch.randperm(len(symbols), generator=generator).tolist()
    return {answer: symbols[place] for answer, place in zip(distinct, order, strict=False)}


def symbol_against_word(
    demonstrations: Sequence[Demonstration],
    query: Demonstration,
    symbols: Sequence[str],
    *,
    drop_questions: bool = False,
    generator: torch.Generator | None = None,
) -> SymbolPair:
    """A pair, eq. (1), that rejects the true word: what the model knows must give way to what the context says.

    Args:
        demonstrations: with words for answers, one of them the query's answer.
        query: with its true answer.
        symbols: to draw from (see `assign_symbols`).
        drop_questions: leave the demonstrations' questions out, so that their images are all there is to go by.
        generator: of the draw.

    Raises:
        ValueError: no demonstration has the query's answer, or symbols that don't do.
    """
    shown, mapping = _symbolized(demonstrations, query, symbols, drop_questions, generator)
    return SymbolPair(shown, query.image, query.question, mapping[query.answer], query.answer)


def symbol_against_symbol(
    demonstrations: Sequence[Demonstration],
    query: Demonstration,
    symbols: Sequence[str],
    *,
    drop_questions: bool = False,
    generator: torch.Generator | None = None,
) -> SymbolPair:
    """A pair, eq. (1), that rejects the symbol of another answer: copying some symbol from the context is not enough.

    Args:
        demonstrations: with words for answers, one of them the query's answer, and one with another.
        query: with its true answer.
        symbols: to draw from (see `assign_symbols`).
        drop_questions: leave the demonstrations' questions out.
        generator: of the draws.

    Raises:
        ValueError: no demonstration has the query's answer, none has another one, or symbols that don't do.
    """
    shown, mapping = _symbolized(demonstrations, query, symbols, drop_questions, generator)
    others = [symbol for answer, symbol in mapping.items() if answer != query.answer]
    if not others:
        raise ValueError("demonstrations: expected one with another answer than the query's")
    other = others[int(torch.randint(len(others), (), generator=generator))]
    return SymbolPair(shown, query.image, query.question, mapping[query.answer], other)


def _symbolized(
    demonstrations: Sequence[Demonstration],
    query: Demonstration,
    symbols: Sequence[str],
    drop_questions: bool,
    generator: torch.Generator | None,
) -> tuple[tuple[Demonstration, ...], dict[str, str]]:
    mapping = assign_symbols([demo.answer for demo in demonstrations], symbols, generator=generator)
    if query.answer not in mapping:
        raise ValueError(f"demonstrations: expected one with the query's answer {query.answer!r}")
    return tuple(
        replace(demo, answer=mapping[demo.answer], question="" if drop_questions else demo.question)
        for demo in demonstrations
    ), mapping
