"""What does a cache of the documents save, and are the answers the same as those of reading everything again?

A small language model that has seen some of Python's source reads files of it as documents, and goes on from lines of
other files as queries. It can't answer questions, so quality, where the paper compares with retrieval by BERTScore, is
not measured here: what is, are the tokens and the time that a query takes, against reading all documents again, and
against reading one of eight, as retrieval does that always finds the right one and costs nothing itself. What is left
of the documents with the cache is attention to all of them for every token, and copying them when a token is appended.
Quick: up to 4,096 tokens of documents, 3 sets of queries, half a minute. Full: up to 32,768 tokens and 5 sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.attention.cag import CacheAugmentedGenerator, CascadeAttention
from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2412.15605"
QUERY, ANSWER, QUERIES, DOCUMENTS = 24, 16, 3, 8
CACHED, AGAIN, ONE = "cached", "all read again", "one of eight read again"


def run(settings: Settings) -> Outcome:
    """Times queries with and without the cache, and compares answers and tokens."""
    lengths = [2**k for k in range(9, 16 if settings.full else 13)]
    seeds = 5 if settings.full else 3
    config = TinyLMConfig(d_model=64, layers=2, heads=4, kv_heads=2)
    generator = settings.generator()
    model = TinyLM(config, generator=generator).to(settings.device)
    windows = python_source().train.batches(96, 8, generator)

    def loss() -> Tensor:
        return next_token_loss(lambda ids: model(ids)[:2], next(windows).to(settings.device))

    for _ in training(model, loss, 60, 5e-3):
        pass
    model.eval()
    cascade = TinyLM(config, CascadeAttention, generator=torch.Generator()).to(settings.device)
    cascade.load_state_dict(model.state_dict())
    seconds: dict[str, list[list[float]]] = {CACHED: [], AGAIN: [], ONE: []}
    tokens: dict[str, list[float]] = {CACHED: [], AGAIN: []}
    equal, reordered = [], []
    for length in settings.track(lengths, "lengths"):
        for times in seconds.values():
            times.append([])
        for seed in range(seeds):
            documents, queries = _texts(length, settings.generator(1 + seed), settings.device)
            cached = CacheAugmentedGenerator(model, documents)
            _each(cached, queries[:1])  # reads the documents
            read = cached.forwarded
            answers, spent = _timed(partial(_each, cached, queries), settings)
            seconds[CACHED][-1].append(spent / QUERIES)
            if not seed:
                tokens[CACHED].append((cached.forwarded - read) / QUERIES)
            backwards = _each(cached, queries[::-1])[::-1]
            again, spent, forwarded = _again(model, documents, queries, settings)
            seconds[AGAIN][-1].append(spent / QUERIES)
            if not seed:
                tokens[AGAIN].append(forwarded / QUERIES)
            seconds[ONE][-1].append(_again(model, documents[:1], queries, settings)[1] / QUERIES)
            equal.append(_agreement(answers, again))
            reordered.append(_agreement(answers, backwards))
    shared = _batches(model, cascade, documents, queries * 4, settings)
    longest = [a / c for a, c in zip(seconds[AGAIN][-1], seconds[CACHED][-1], strict=True)]
    claims = [
        measure(
            "Answers are those of reading documents and query together (share of tokens)",
            f"{PAPER}, equation 2",
            min(equal),
            at_least=1,
        ),
        measure(
            "... and don't depend on the order of the queries (share of tokens)",
            f"{PAPER}, cache reset",
            min(reordered),
            at_least=1,
        ),
        measure(
            "A query forwards its own tokens and the answer's, whatever the length of the documents (tokens)",
            f"{PAPER}, section 2",
            max(tokens[CACHED]),
            at_least=QUERY + ANSWER,
            at_most=QUERY + ANSWER,
        ),
        measure(
            f"An answer takes less time than with the documents read again (times, {lengths[-1]:,} tokens)",
            f"{PAPER}, table of generation times",
            longest,
            at_least=2,
        ),
        measure(
            f"The longer the documents, the more is saved (gain at {lengths[-1]:,} tokens over that at {lengths[0]:,})",
            f"{PAPER}, table of generation times",
            [g / (a / c) for g, a, c in zip(longest, seconds[AGAIN][0], seconds[CACHED][0], strict=True)],
            at_least=1.2,
        ),
        measure(
            "... and it takes less time than reading one of eight documents again (times)",
            f"{PAPER}, section 1; review of 2025-05-20",
            [a / c for a, c in zip(seconds[ONE][-1], seconds[CACHED][-1], strict=True)],
            at_least=1,
        ),
        measure(
            "Twelve queries at a time: attention to one shared cache is quicker than to copies (times)",
            "equation 2 of the card",
            shared,
            at_least=1,
        ),
    ]
    series = {"tokens of the documents": [float(n) for n in lengths]}
    for name, runs in seconds.items():
        series[f"seconds a query, {name}"] = [sum(times) / len(times) for times in runs]
    series |= {f"tokens a query, {name}": counts for name, counts in tokens.items()}
    return Outcome(claims, series | {"gain by sharing": shared})


def _texts(length: int, generator: torch.Generator, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Documents of that many tokens together, and queries, all from the validation files."""
    text = python_source().validation
    documents = next(text.batches(length // DOCUMENTS - 1, DOCUMENTS, generator)).to(device)
    queries = next(text.batches(QUERY - 1, QUERIES, generator)).to(device)
    return list(documents), list(queries)


def _each(cached: CacheAugmentedGenerator, queries: list[Tensor]) -> list[Tensor]:
    """One answer after another, each behind the documents alone."""
    answers = []
    for query in queries:
        answers.append(cached.generate(query, ANSWER))
        cached.reset()
    return answers


def _again(
    model: TinyLM, documents: list[Tensor], queries: list[Tensor], settings: Settings
) -> tuple[list[Tensor], float, int]:
    """Answers, seconds and forwarded tokens where every query is read with the documents in front of it."""
    readers = [CacheAugmentedGenerator(model, [torch.cat([*documents, query[:-1]])]) for query in queries]

    def answers() -> list[Tensor]:
        return [reader.generate(query[-1:], ANSWER) for reader, query in zip(readers, queries, strict=True)]

    found, spent = _timed(answers, settings)
    return found, spent, sum(reader.forwarded for reader in readers)


def _batches(
    model: TinyLM, cascade: TinyLM, documents: list[Tensor], queries: list[Tensor], settings: Settings
) -> list[float]:
    """How many times as quick a batch of queries is with one shared cache, in three turns."""
    both = [CacheAugmentedGenerator(kind, documents) for kind in (model, cascade)]
    gains = []
    for turn in range(4):
        spent = [_timed(partial(reader.answer, queries, ANSWER), settings)[1] for reader in both]
        if turn:  # the first one reads the documents
            gains.append(spent[0] / spent[1])
    return gains


def _agreement(one: list[Tensor], other: list[Tensor]) -> float:
    return float((torch.stack(one) == torch.stack(other)).double().mean())


def _timed(step: Callable[[], list[Tensor]], settings: Settings) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    found = step()
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def draw(outcome: Outcome) -> Figure:
    """Time and tokens of a query against the length of the documents."""
    figure, (seconds, tokens) = panels(2)
    series = outcome.series
    lengths = series["tokens of the documents"]
    for name in (AGAIN, ONE, CACHED):
        milliseconds = [1e3 * value for value in series[f"seconds a query, {name}"]]
        seconds.loglog(lengths, milliseconds, marker="o", label=name)
    for name, colour in ((AGAIN, "C0"), (CACHED, "C2")):
        tokens.loglog(lengths, series[f"tokens a query, {name}"], marker="o", color=colour, label=name)
    seconds.set(title="Time of a query and its answer", ylabel="milliseconds")
    tokens.set(title="What goes through the model", ylabel="tokens a query")
    for axis in (seconds, tokens):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of the documents")
        axis.legend()
    return figure
