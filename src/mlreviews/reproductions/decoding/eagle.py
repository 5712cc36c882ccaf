"""Does a layer on the target's features guess better than a draft model of the same size, and a tree more than a chain?

The shipped target goes on with held-out Python text. EAGLE's layer and the shipped draft model have 0.3 million
parameters each; the draft has two blocks, EAGLE one, so that a guess of EAGLE's costs no more. What counts is how many
tokens a pass of the target gives. They have not been trained alike: the draft model on tens of times as much text, as
their ``training.json`` say, which is to be kept in mind where EAGLE's chain falls behind.
Quick: 4 seeds with 6 prompts of 192 bytes and 48 new bytes each. Full: 8 seeds with 32 prompts and 128 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.decoding import EagleDraft, eagle_generate, speculative_generate
from mlreviews.decoding.trees import RankTree
from mlreviews.models import GenerationResult, Sampler, TinyLM, generate, load_pretrained
from mlreviews.reproductions.drafters import eagle_accuracies
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2401.15077"
LENGTH, PROMPT = 5, 192
DEPTHS, RANKS = 8, 4


def held_out(settings: Settings, stream: int) -> Tensor:
    """Prompts of held-out Python text, [rows, PROMPT]."""
    rows = 32 if settings.full else 6
    batches = python_source().validation.batches(PROMPT - 1, rows, settings.generator(stream))
    return next(batches).to(settings.device)


def tokens_per_pass(found: GenerationResult) -> float:
    """New tokens for each pass of the target that verifies drafts, mean over the rows."""
    assert found.accepted is not None
    steps = (found.accepted >= 0).sum(0)
    return float(((found.lengths - 1) / steps).mean())


def features(model: TinyLM, text: Tensor) -> Tensor:
    """The last hidden states of a text."""
    states = model(text, hidden_states=True).hidden_states
    assert states is not None
    return states[-1]


def run(settings: Settings) -> Outcome:
    """Decodes with a draft model, a chain and a tree of EAGLE's, greedily and by sampling."""
    target = load_pretrained("python-target").to(settings.device).requires_grad_(False)
    draft = load_pretrained("python-draft").to(settings.device).requires_grad_(False)
    eagle = EagleDraft.load("python-eagle").to(settings.device).requires_grad_(False)
    new, seeds = (128, 8) if settings.full else (48, 4)
    chain, warm = RankTree.chain(LENGTH), Sampler(temperature=1.0)
    found: dict[str, list[float]] = {}
    same, right, right_draft = [], [], []
    for seed in settings.track(range(seeds), "seeds"):
        ids = held_out(settings, seed)
        plain = generate(target, ids, new)
        generator = settings.generator(100 + seed)
        runs = {
            "draft model": speculative_generate(target, draft, ids, new, draft_length=LENGTH),
            "EAGLE, chain": eagle_generate(target, eagle, ids, new, tree=chain),
            "EAGLE, tree": eagle_generate(target, eagle, ids, new),
            "draft model, sampled": speculative_generate(
                target, draft, ids, new, draft_length=LENGTH, sampler=warm, generator=generator
            ),
            "EAGLE, chain, sampled": eagle_generate(
                target, eagle, ids, new, tree=chain, sampler=warm, generator=generator
            ),
            "EAGLE, tree, sampled": eagle_generate(target, eagle, ids, new, sampler=warm, generator=generator),
        }
        same.append(float((runs["EAGLE, tree"].tokens == plain.tokens).all(1).double().mean()))
        for name, result in runs.items():
            found.setdefault(name, []).append(tokens_per_pass(result))
        text = torch.cat([ids, plain.tokens], 1)
        right.append(
            eagle_accuracies(
                eagle, target, text, features(target, text), start=PROMPT - 1, depth=DEPTHS, ranks=RANKS
            ).tolist()
        )
        guesses = draft(text).logits[:, PROMPT - 1 : -1].argmax(-1)
        right_draft.append(float((guesses == text[:, PROMPT:]).double().mean()))
    mean = torch.tensor(right).mean(0)
    series = {f"tokens per pass, {name}": values for name, values in found.items()}
    series |= {f"right at depth, rank {rank + 1}": mean[:, rank].tolist() for rank in range(RANKS)}
    series |= {"right, draft model": right_draft}

    def more(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    claims = [
        measure(
            "Greedy text with EAGLE's trees is that of plain decoding (part of the prompts)",
            f"{PAPER}, section 3",
            sum(same) / len(same),
            at_least=1.0,
        ),
        measure(
            f"A chain of {LENGTH} guesses on features gives more tokens per pass than a draft model's (difference)",
            f"{PAPER}, section 1",
            more("EAGLE, chain", "draft model"),
            at_least=0.0,
        ),
        measure(
            "... also when sampling at temperature 1",
            f"{PAPER}, section 1",
            more("EAGLE, chain, sampled", "draft model, sampled"),
            at_least=0.0,
        ),
        measure(
            "A tree gives more tokens per pass than a chain (difference; the paper's is 0.6 to 0.8)",
            f"{PAPER}, section 5",
            more("EAGLE, tree", "EAGLE, chain"),
            at_least=0.0,
        ),
        measure("Tokens per pass with the tree", f"{PAPER}, table 1: 3.2 to 4.5", found["EAGLE, tree"], at_least=3.2),
        measure(
            "Sampling at temperature 1 accepts fewer guesses than greedy decoding (tokens per pass, difference)",
            f"{PAPER}, table 1",
            more("EAGLE, tree", "EAGLE, tree, sampled"),
            at_least=0.0,
        ),
        measure(
            "Guesses on predicted features are right less often than on true ones (depth 1 less depth 5)",
            f"{PAPER}, table 2",
            [float(table[0][0] - table[4][0]) for table in right],
            at_least=0.0,
        ),
    ]
    return Outcome(claims, series)


def draw(outcome: Outcome) -> Figure:
    """Tokens per pass of each way, and how often guesses are right at each depth."""
    series = outcome.series
    drawn, (left, right) = panels(2)
    names = ["draft model", "EAGLE, chain", "EAGLE, tree"]
    for i, (suffix, label) in enumerate((("", "greedy"), (", sampled", "temperature 1"))):
        values = [series[f"tokens per pass, {name}{suffix}"] for name in names]
        left.bar(
            [x + 0.38 * i - 0.19 for x in range(len(names))],
            [sum(v) / len(v) for v in values],
            width=0.36,
            yerr=[[sum(v) / len(v) - min(v) for v in values], [max(v) - sum(v) / len(v) for v in values]],
            color=COLOURS[i],
            label=label,
        )
    left.set_xticks(range(len(names)), names)
    left.set(title="Tokens per pass of the target", ylabel="tokens, range over seeds")
    left.legend()
    bottom = [0.0] * DEPTHS
    for rank in range(RANKS):
        heights = series[f"right at depth, rank {rank + 1}"]
        right.bar(range(1, DEPTHS + 1), heights, bottom=bottom, color=COLOURS[rank], label=f"guess {rank + 1}")
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    plain = series["right, draft model"]
    right.axhline(sum(plain) / len(plain), color="black", linestyle="--", label="draft model, guess 1")
    right.set(title="How often guesses are right", xlabel="depth in the tree", ylabel="part of the places", ylim=(0, 1))
    right.legend(loc="lower left", framealpha=0.9, frameon=True)
    return drawn
