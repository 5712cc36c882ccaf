"""Is the acceptance rate what the overlap of draft and target predicts, and do the tokens per pass follow from it?

The shipped target goes on with held-out Python text, the shipped draft model proposes k tokens at a time. Sampling is
at temperature 1. The overlap, sum min(p, q), is computed at the very places at which drafted tokens were tested.
Quick: 5 seeds with 12 prompts of 128 bytes and 48 new bytes each. Full: 10 seeds with 64 prompts and 192 bytes.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.decoding import PromptLookup, acceptance_probability, expected_tokens, speculative_generate
from mlreviews.models import GenerationResult, Sampler, TinyLM, generate, load_pretrained
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2211.17192"
PROMPT, LENGTHS = 128, (1, 2, 4, 8)
WARM = Sampler(temperature=1.0)


def held_out(settings: Settings, stream: int) -> Tensor:
    """Prompts of held-out Python text, [rows, PROMPT]."""
    rows = 64 if settings.full else 12
    windows = python_source().validation.batches(PROMPT, rows, settings.generator(stream), within_documents=True)
    return next(windows)[:, :PROMPT].to(settings.device)


def tokens_per_pass(found: GenerationResult, *, cut: bool = False) -> float:
    """New tokens for each pass of the target; steps with shorter drafts, as the budget cuts them, count on request."""
    assert found.accepted is not None
    assert found.drafted is not None
    steps = found.drafted >= (0 if cut else found.drafted.max())
    return float((found.accepted[steps] + 1).double().mean())


@torch.no_grad()
def tested(target: TinyLM, draft: TinyLM, ids: Tensor, found: GenerationResult) -> tuple[float, float]:
    """Of the drafted tokens that were tested: the part that was accepted, and the mean overlap at their places."""
    assert found.accepted is not None
    assert found.drafted is not None
    text = torch.cat([ids, found.tokens], 1)
    p, q = (WARM.probabilities(model(text).logits[:, ids.shape[1] - 1 : -1]) for model in (target, draft))
    overlap = acceptance_probability(p, q)
    accepted, expected, count = 0, 0.0, 0
    for row in range(len(ids)):
        place = 0
        for taken, offered in zip(found.accepted[:, row].tolist(), found.drafted[:, row].tolist(), strict=True):
            if taken < 0:
                break
            tries = min(taken + 1, offered)
            expected += float(overlap[row, place : place + tries].sum())
            accepted, count, place = accepted + taken, count + tries, place + taken + 1
    return accepted / count, expected / count


@torch.no_grad()
def surprise(target: TinyLM, ids: Tensor, tokens: Tensor) -> float:
    """Mean nats a token of a continuation under the target."""
    logits = target(torch.cat([ids, tokens], 1)).logits[:, ids.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


def run(settings: Settings) -> Outcome:
    """Decodes with drafts of several lengths, by lookup, and plainly."""
    target, draft = (
        load_pretrained(f"python-{name}").to(settings.device).requires_grad_(False) for name in ("target", "draft")
    )
    new, seeds = (192, 10) if settings.full else (48, 5)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for seed in settings.track(range(seeds), "seeds"):
        ids = held_out(settings, seed)
        rates, overlaps = [], []
        for length in LENGTHS:
            result = speculative_generate(
                target,
                draft,
                ids,
                new,
                draft_length=length,
                sampler=WARM,
                generator=settings.generator(100 * length + seed),
            )
            note(f"tokens per pass, k = {length}", tokens_per_pass(result))
            rate, overlap = tested(target, draft, ids, result)
            rates.append(rate)
            overlaps.append(overlap)
        note("acceptance rate", statistics.fmean(rates))
        note("overlap", statistics.fmean(overlaps))
        for length in LENGTHS:
            note(f"formula, k = {length}", expected_tokens(found["acceptance rate"][-1], length))
        generator = settings.generator(1000 + seed)
        note("surprise, speculative", surprise(target, ids, result.tokens))
        for name, model in (("plain", target), ("draft alone", draft)):
            drawn = generate(model, ids, new, sampler=WARM, generator=generator)
            note(f"surprise, {name}", surprise(target, ids, drawn.tokens))
        plain = generate(target, ids, new)
        greedy = speculative_generate(target, draft, ids, new, draft_length=4)
        lookup = speculative_generate(target, PromptLookup(), ids, new, draft_length=8)
        note("tokens per pass, greedy, k = 4", tokens_per_pass(greedy))
        note("tokens per pass, prompt lookup", tokens_per_pass(lookup, cut=True))
        same = [(one.tokens == plain.tokens).all(1).double().mean() for one in (greedy, lookup)]
        note("same greedy text", float(torch.stack(same).mean()))

    def less(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    def ratio(length: int) -> list[float]:
        pairs = zip(found[f"tokens per pass, k = {length}"], found[f"formula, k = {length}"], strict=True)
        return [a / b for a, b in pairs]

    claims = [
        measure(
            "Drafted tokens are accepted as often as the overlap of draft and target says (rate less sum min(p, q))",
            f"{PAPER}, theorem 3.5",
            less("acceptance rate", "overlap"),
            at_least=-0.02,
            at_most=0.02,
        ),
        measure(
            "Tokens per pass with drafts of 4 are those of eq. (4) (measured / predicted)",
            f"{PAPER}, eq. (1) there",
            ratio(4),
            at_least=0.95,
            at_most=1.05,
        ),
        measure(
            "... also with drafts of 8, though acceptance isn't independent from token to token",
            f"{PAPER}, eq. (1) there",
            ratio(8),
            at_least=0.95,
            at_most=1.05,
        ),
        measure(
            "Greedy text is that of plain decoding (part of the prompts)",
            f"{PAPER}, section 2.2",
            sum(found["same greedy text"]) / seeds,
            at_least=1.0,
        ),
        measure(
            "Drawn text is as likely under the target as text that the target drew itself (difference)",
            f"{PAPER}, appendix A.1",
            less("surprise, speculative", "surprise, plain"),
            unit="nats a byte",
            at_least=-0.1,
            at_most=0.1,
        ),
        measure(
            "... while text that the draft model drew is less likely (difference)",
            "ours",
            less("surprise, draft alone", "surprise, plain"),
            unit="nats a byte",
            at_least=0.1,
        ),
        measure(
            "Looking the draft up in the text, without a model, gives at least 1.5 tokens per pass",
            "prompt lookup decoding's README: 2 to 4 times as fast where the output repeats the input",
            found["tokens per pass, prompt lookup"],
            at_least=1.5,
        ),
    ]
    return Outcome(claims, {"lengths": list(map(float, LENGTHS)), **found})


def draw(outcome: Outcome) -> Figure:
    """Tokens per pass over the draft's length, and acceptance over overlap."""
    figure, (tokens, rates) = panels(2)
    series = outcome.series
    lengths = [int(k) for k in series["lengths"]]
    for name, label, style in (("tokens per pass", "measured", "o"), ("formula", "eq. (4)", "")):
        means = [statistics.fmean(series[f"{name}, k = {k}"]) for k in lengths]
        tokens.plot(lengths, means, marker=style, linestyle="" if style else "-", label=label)
    tokens.axhline(
        statistics.fmean(series["tokens per pass, prompt lookup"]),
        color="C2",
        linestyle=":",
        label="prompt lookup, greedy",
    )
    tokens.set(title="Tokens per pass of the target", xlabel="drafted tokens k", ylabel="tokens", xticks=lengths)
    tokens.set_ylim(bottom=1)
    ends = [min(series["overlap"]) - 0.02, max(series["overlap"]) + 0.02]
    rates.plot(ends, ends, color="C6", linewidth=1, label="equal")
    rates.plot(series["overlap"], series["acceptance rate"], marker="o", linestyle="", label="one seed each")
    rates.set(title="Acceptance, temperature 1", xlabel=r"mean of $\sum\,\min(p, q)$", ylabel="accepted of tested")
    for axis in (tokens, rates):
        axis.legend()
    return figure
