"""Is the drafter's confidence a good guess of acceptance, and do trees grown by it beat a tree that is fixed?

The shipped target and EAGLE layer go on with held-out Python text. Trees have the same number of nodes: the shape of
EAGLE's authors, the shape that is likeliest on average for this pair, and shapes grown for each context.
Quick: 4 seeds with 6 prompts of 192 bytes and 48 new bytes each. Full: 8 seeds with 32 prompts and 128 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlreviews.decoding import EagleDraft, eagle2_generate, eagle_generate
from mlreviews.decoding.eagle import EAGLE_TREE
from mlreviews.decoding.trees import RankTree
from mlreviews.models import TinyLM, generate, load_pretrained
from mlreviews.reproductions.decoding.eagle import PROMPT, features, held_out, tokens_per_pass
from mlreviews.reproductions.drafters import eagle_accuracies
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2406.16858"
NODES, TOP_K, DEPTH, BINS = 25, 5, 8, 10


def run(settings: Settings) -> Outcome:
    """Decodes with each kind of tree, and counts how often guesses of each confidence are right."""
    target = load_pretrained("python-target").to(settings.device).requires_grad_(False)
    eagle = EagleDraft.load("python-eagle").to(settings.device).requires_grad_(False)
    new, seeds = (128, 8) if settings.full else (48, 4)
    found: dict[str, list[float]] = {}
    same, gaps = [], []
    counts, rights, sums = (torch.zeros(BINS, dtype=torch.float64) for _ in range(3))
    best = _likeliest(target, eagle, settings)
    for seed in settings.track(range(seeds), "seeds"):
        ids = held_out(settings, seed)
        plain = generate(target, ids, new)
        runs = {
            "the authors' tree": eagle_generate(target, eagle, ids, new, tree=EAGLE_TREE),
            "likeliest fixed tree": eagle_generate(target, eagle, ids, new, tree=best),
            "dynamic, same height": eagle2_generate(target, eagle, ids, new, top_k=TOP_K, depth=5, total_tokens=NODES),
            "dynamic": eagle2_generate(target, eagle, ids, new, top_k=TOP_K, depth=DEPTH, total_tokens=NODES),
        }
        same.append(float((runs["dynamic"].tokens == plain.tokens).all(1).double().mean()))
        for name, result in runs.items():
            found.setdefault(name, []).append(tokens_per_pass(result))
        text = torch.cat([ids, plain.tokens], 1)
        predicted, _ = eagle(features(target, text)[:, :-1], target.embed_tokens(text[:, 1:]))
        law = target.lm_head(predicted[:, PROMPT - 1 : -1]).softmax(-1).double()
        place = (law * BINS).long().clamp(max=BINS - 1).flatten().cpu()
        right = torch.nn.functional.one_hot(text[:, PROMPT + 1 :], law.shape[-1]).double().flatten().cpu()
        one = [torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, x) for x in _counted(law, right)]
        for total, part in zip((counts, rights, sums), one, strict=True):
            total += part
        gaps.append(float((one[1] - one[2])[1:].abs().sum() / one[0][1:].sum()))
    series = {f"tokens per pass, {name}": values for name, values in found.items()}
    series |= {"confidence": (sums / counts).tolist(), "acceptance": (rights / counts).tolist()}

    def more(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    claims = [
        measure(
            "Greedy text with dynamic trees is that of plain decoding (part of the prompts)",
            f"{PAPER}, section 4",
            sum(same) / len(same),
            at_least=1.0,
        ),
        measure(
            "The drafter's confidence is the rate of acceptance (mean gap over bins above 0.1, by guesses)",
            f"{PAPER}, figure 6",
            gaps,
            at_most=0.1,
        ),
        measure(
            f"Dynamic trees of {NODES} nodes give more tokens per pass than the authors' fixed tree (difference)",
            f"{PAPER}, table 1",
            more("dynamic", "the authors' tree"),
            at_least=0.0,
        ),
        measure(
            "... also at the same height",
            f"{PAPER}, table 3",
            more("dynamic, same height", "the authors' tree"),
            at_least=0.0,
        ),
        measure(
            "... and more than the best fixed tree for this pair, of 8 levels as they have",
            "ours",
            more("dynamic", "likeliest fixed tree"),
            at_least=0.0,
        ),
        measure(
            "They give 20 % more tokens per pass than EAGLE's tree (ratio)",
            f"{PAPER}, abstract: 20 % to 40 % faster",
            [a / b for a, b in zip(found["dynamic"], found["the authors' tree"], strict=True)],
            at_least=1.2,
        ),
    ]
    return Outcome(claims, series)


def _likeliest(target: TinyLM, eagle: EagleDraft, settings: Settings) -> RankTree:
    """The best fixed tree, by the accuracies on other prompts."""
    ids = held_out(settings, 50)
    text = torch.cat([ids, generate(target, ids, 48).tokens], 1)
    table = eagle_accuracies(eagle, target, text, features(target, text), start=PROMPT - 1, depth=DEPTH)
    return RankTree.likeliest(table, NODES)


def _counted(law: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
    """What each guess adds to its bin: 1, whether it is right, and its confidence."""
    flat = law.flatten().cpu()
    return [torch.ones_like(flat), right, flat]


def draw(outcome: Outcome) -> Figure:
    """Acceptance against confidence, and tokens per pass of each kind of tree."""
    series = outcome.series
    drawn, (left, right) = panels(2)
    left.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="equal")
    left.plot(series["confidence"], series["acceptance"], marker="o", label="measured")
    left.set(
        title="Confidence and acceptance", xlabel="probability by the drafter", ylabel="right, part of the guesses"
    )
    left.legend()
    names = ["the authors' tree", "likeliest fixed tree", "dynamic, same height", "dynamic"]
    for i, name in enumerate(names):
        values = series[f"tokens per pass, {name}"]
        mean = sum(values) / len(values)
        right.barh(i, mean, xerr=[[mean - min(values)], [max(values) - mean]], color=COLOURS[i])
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(title=f"Trees of {NODES} nodes", xlabel="tokens per pass of the target, range over seeds")
    return drawn
