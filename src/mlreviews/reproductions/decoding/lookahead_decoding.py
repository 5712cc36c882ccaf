"""How many passes does lookahead decoding save, with how large a window, and what of it comes from the prompt?

The shipped model of Python source continues held-out files. Everything is decoded greedily with a cache, so that all
ways have to write the same text; counted are the tokens of a pass. Jacobi decoding is the first alternative, the
n-grams of the prompt without a window the second.
Quick: 3 groups of 3 prompts, 48 tokens each. Full: 5 groups of 20 prompts, 200 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.decoding.jacobi_decoding import jacobi_decode
from mlreviews.decoding.lookahead_decoding import lookahead_decode
from mlreviews.models import GenerationResult, TinyLM, generate, load_pretrained
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2402.02057"
WINDOWS = (1, 2, 4, 8, 16)
NGRAM = 5
PROMPT = 128

Decoder = Callable[[Tensor], GenerationResult]


def run(settings: Settings) -> Outcome:
    """Counts the tokens of a pass for each way of decoding, and compares the texts."""
    groups, prompts, new = (5, 20, 200) if settings.full else (3, 3, 48)
    model = load_pretrained("python-target").to(settings.device)
    ways = _ways(model, new, settings)
    found: dict[str, list[float]] = {name: [] for name in ways}
    same = total = 0
    for group in settings.track(range(groups), "groups of prompts"):
        windows = python_source().validation.batches(PROMPT, prompts, settings.generator(group), within_documents=True)
        ids = next(windows)[:, :PROMPT].to(settings.device)
        texts = [generate(model, row[None], new).tokens for row in ids]
        for name, way in ways.items():
            results = [way(row[None]) for row in ids]
            found[name].append(prompts * new / sum(result.target_calls for result in results))
            same += sum(torch.equal(result.tokens, text) for result, text in zip(results, texts, strict=True))
            total += prompts
    by_window = [found[f"window {window}"] for window in WINDOWS]
    best, least = by_window[-1], by_window[0]
    claims = [
        measure(
            "All ways write the text of plain greedy decoding (share of texts)",
            f"{PAPER}, section 3",
            same / total,
            at_least=1,
        ),
        measure(
            "Jacobi decoding hardly saves passes (tokens a pass)",
            f"{PAPER}, section 2; the review: under 1.1 times",
            found["Jacobi"],
            at_most=1.2,
        ),
        measure(
            f"Lookahead decoding with a window of {WINDOWS[-1]} and without the prompt's n-grams does (tokens a pass)",
            f"{PAPER}, figure 5",
            best,
            at_least=1.5,
        ),
        measure(
            "Tokens a pass grow with the logarithm of the window: each doubling adds some (mean gain of a doubling)",
            f"{PAPER}, section 4",
            [(b - a) / math.log2(WINDOWS[-1] / WINDOWS[0]) for a, b in zip(least, best, strict=True)],
            at_least=0.02,
        ),
        measure(
            "The prompt's n-grams help beside the window (tokens a pass gained)",
            f"{PAPER}, ablation study",
            [a - b for a, b in zip(found["window and prompt"], best, strict=True)],
            at_least=0,
        ),
        measure(
            "The window helps beside the prompt's n-grams (tokens a pass gained over a window of 1)",
            f"{PAPER}, ablation study",
            [a - b for a, b in zip(found["window and prompt"], found["prompt"], strict=True)],
            at_least=0,
        ),
    ]
    series = {f"tokens a pass, {name}": values for name, values in found.items()}
    series["windows"] = [float(window) for window in WINDOWS]
    return Outcome(claims, series)


def _ways(model: TinyLM, new: int, settings: Settings) -> dict[str, Decoder]:
    def look(window: int, prompt_ngrams: bool) -> Decoder:
        return lambda ids: lookahead_decode(
            model,
            ids,
            new,
            window=window,
            ngram=NGRAM,
            guesses=max(window, 4),
            prompt_ngrams=prompt_ngrams,
            generator=settings.generator(1000),
        )

    ways: dict[str, Decoder] = {
        "Jacobi": lambda ids: jacobi_decode(model, ids, new, generator=settings.generator(1000))
    }
    ways |= {f"window {window}": look(window, False) for window in WINDOWS}
    return ways | {"prompt": look(1, True), "window and prompt": look(WINDOWS[-1], True)}


def draw(outcome: Outcome) -> Figure:
    """Tokens of a pass by the window's size, beside the other ways."""
    figure, (axis,) = panels(1, width=6)
    series = {name: list(values) for name, values in outcome.series.items()}
    windows = series["windows"]
    rows = torch.tensor([series[f"tokens a pass, window {window:.0f}"] for window in windows])
    axis.plot(windows, rows.mean(1), marker="o", label="lookahead, pool from its window alone")
    axis.fill_between(windows, rows.amin(1), rows.amax(1), alpha=0.2, color="C0", linewidth=0)
    for name, label, colour in (
        ("window and prompt", "... and the prompt's n-grams, widest window", "C2"),
        ("prompt", "... and the prompt's n-grams, window of 1", "C1"),
        ("Jacobi", "Jacobi, blocks of 16", "C6"),
    ):
        values = series[f"tokens a pass, {name}"]
        axis.axhline(sum(values) / len(values), color=colour, linestyle="--", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(windows, [f"{window:.0f}" for window in windows])
    axis.set(title="Greedy decoding of Python source", xlabel="columns of the window", ylabel="tokens a pass")
    axis.set_ylim(0.9, 1.45 * axis.get_ylim()[1])
    axis.legend(loc="upper left")
    return figure
