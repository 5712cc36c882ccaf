"""Do heads that guess side by side pay, compared with a draft model that guesses one after another?

The shipped target with its Medusa heads, trained with the target frozen (Medusa-1), goes on with held-out Python text.
Heads cost next to nothing: all of them are two products of matrices, where a draft model runs once for each guess.
Quick: 4 seeds with 6 prompts of 192 bytes and 48 new bytes each. Full: 8 seeds with 32 prompts and 128 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlreviews.decoding import (
    EagleDraft,
    MedusaHeads,
    TypicalAcceptance,
    eagle_generate,
    medusa_generate,
    speculative_generate,
)
from mlreviews.decoding.trees import RankTree
from mlreviews.models import Sampler, TinyLM, generate, load_pretrained
from mlreviews.reproductions.decoding.eagle import PROMPT, features, held_out, tokens_per_pass
from mlreviews.reproductions.drafters import medusa_accuracies
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2401.10774"
WIDTHS = (3, 2, 2)  # a full tree of 3 + 6 + 12 nodes


def full_tree() -> RankTree:
    """The Cartesian product of the best guesses of the first heads."""
    paths: list[tuple[int, ...]] = [()]
    nodes: list[tuple[int, ...]] = []
    for width in WIDTHS:
        paths = [(*path, rank) for path in paths for rank in range(width)]
        nodes += paths
    return RankTree(nodes)


def _likeliest(target: TinyLM, heads: MedusaHeads, nodes: int, settings: Settings) -> RankTree:
    """The best tree, by the accuracies on other prompts."""
    ids = held_out(settings, 50)
    text = torch.cat([ids, generate(target, ids, 48).tokens], 1)
    return RankTree.likeliest(medusa_accuracies(heads, text, features(target, text), start=PROMPT - 1), nodes)


def run(settings: Settings) -> Outcome:
    """Decodes with chains and trees of heads, a draft model and EAGLE, and by typical acceptance."""
    target = load_pretrained("python-target").to(settings.device).requires_grad_(False)
    draft = load_pretrained("python-draft").to(settings.device).requires_grad_(False)
    eagle = EagleDraft.load("python-eagle").to(settings.device).requires_grad_(False)
    heads = MedusaHeads.load("python-medusa").to(settings.device).requires_grad_(False)
    new, seeds = (128, 8) if settings.full else (48, 4)
    count = len(heads.bias)
    full, chain, warm = full_tree(), RankTree.chain(count), Sampler(temperature=1.0)
    found: dict[str, list[float]] = {}
    same, tables = [], []
    sparse = _likeliest(target, heads, len(full.choices), settings)
    for seed in settings.track(range(seeds), "seeds"):
        ids = held_out(settings, seed)
        plain = generate(target, ids, new)
        text = torch.cat([ids, plain.tokens], 1)
        tables.append(medusa_accuracies(heads, text, features(target, text), start=PROMPT - 1))
        generator = settings.generator(100 + seed)
        runs = {
            "draft model": speculative_generate(target, draft, ids, new, draft_length=count),
            "Medusa, chain": medusa_generate(target, heads, ids, new, tree=chain),
            "Medusa, full tree": medusa_generate(target, heads, ids, new, tree=full),
            "Medusa, sparse tree": medusa_generate(target, heads, ids, new, tree=sparse),
            "EAGLE, chain": eagle_generate(target, eagle, ids, new, tree=chain),
            "Medusa, sampled": medusa_generate(target, heads, ids, new, sampler=warm, generator=generator),
            "Medusa, typical": medusa_generate(target, heads, ids, new, typical=TypicalAcceptance()),
        }
        same.append(float((runs["Medusa, sparse tree"].tokens == plain.tokens).all(1).double().mean()))
        for name, result in runs.items():
            found.setdefault(name, []).append(tokens_per_pass(result))
    mean = torch.stack(tables).mean(0)
    series = {f"tokens per pass, {name}": values for name, values in found.items()}
    series |= {f"right, rank {rank + 1}": mean[:, rank].tolist() for rank in range(mean.shape[1])}

    def more(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    claims = [
        measure(
            "Greedy text with Medusa is that of plain decoding (part of the prompts)",
            f"{PAPER}, section 2.3.2",
            sum(same) / len(same),
            at_least=1.0,
        ),
        measure(
            "A later head is right less often (smallest fall of the best guess from a head to the next)",
            f"{PAPER}, section 2.2",
            [float((table[:-1, 0] - table[1:, 0]).min()) for table in tables],
            at_least=0.0,
        ),
        measure(
            "A chain of heads gives as many tokens per pass as a draft model that runs once a guess (difference)",
            "ours",
            more("Medusa, chain", "draft model"),
            at_least=0.0,
        ),
        measure(
            "... and a tree does",
            "ours",
            more("Medusa, sparse tree", "draft model"),
            at_least=0.0,
        ),
        measure(
            "EAGLE's chain of the same length gives more (difference)",
            "arXiv:2401.15077, section 1",
            more("EAGLE, chain", "Medusa, chain"),
            at_least=0.0,
        ),
        measure(
            f"A sparse tree by accuracies gives more than a full one of {len(full.choices)} nodes (difference)",
            f"{PAPER}, figure 6",
            more("Medusa, sparse tree", "Medusa, full tree"),
            at_least=0.0,
        ),
        measure(
            "Typical acceptance takes more tokens per pass than exact sampling at temperature 1 (difference)",
            f"{PAPER}, section 2.3.1",
            more("Medusa, typical", "Medusa, sampled"),
            at_least=0.0,
        ),
        measure(
            "Tokens per pass, greedily",
            f"{PAPER}, section 3.1: Medusa-1 is 2.2 times as fast",
            found["Medusa, sparse tree"],
            at_least=2.2,
        ),
    ]
    return Outcome(claims, series)


def draw(outcome: Outcome) -> Figure:
    """How often each head's guesses are right, and tokens per pass of each way."""
    series = outcome.series
    drawn, (left, right) = panels(2)
    heads = len(series["right, rank 1"])
    bottom = [0.0] * heads
    for rank in range(4):
        values = series[f"right, rank {rank + 1}"]
        left.bar(range(1, heads + 1), values, bottom=bottom, color=COLOURS[rank], label=f"guess {rank + 1}")
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    left.set(title="How often guesses are right", xlabel="head", ylabel="part of the places", ylim=(0, 1))
    left.legend()
    names = ["draft model", "EAGLE, chain", *(name for name in ALL if name.startswith("Medusa"))]
    for i, name in enumerate(names):
        values = series[f"tokens per pass, {name}"]
        mean = sum(values) / len(values)
        colour = COLOURS[1] if name.startswith("Medusa") else COLOURS[0]
        right.barh(i, mean, xerr=[[mean - min(values)], [max(values) - mean]], color=colour)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(title="Tokens per pass of the target", xlabel="tokens, range over seeds")
    return drawn


ALL = ("Medusa, chain", "Medusa, full tree", "Medusa, sparse tree", "Medusa, sampled", "Medusa, typical")
