"""Does the draft's entropy tell whether its tokens will be accepted, and do drafts that end by it beat fixed ones?

The shipped target goes on with held-out Python text, the shipped draft model proposes. A draft is worth the tokens that
it gains for its cost: a pass of the draft model counts as 1/6 of one of the target, the ratio of their blocks.
Quick: 5 seeds with 12 prompts of 128 bytes and 48 new bytes each. Full: 10 seeds with 64 prompts and 192 bytes.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.decoding import (
    SVIPPolicy,
    acceptance_bound,
    acceptance_probability,
    draft_entropy,
    speculative_generate,
)
from mlreviews.models import GenerationResult, Sampler, TinyLM, load_pretrained
from mlreviews.reproductions.decoding.speculative_decoding import held_out
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2411.18462"
COST, LENGTHS, BINS = 1 / 6, (2, 4, 6, 8), 8


def worth(found: GenerationResult) -> float:
    """Tokens for the time of a pass of the target, over all rows by themselves."""
    assert found.drafted is not None
    passes = float((found.drafted >= 0).sum())
    drafted = float(found.drafted.clamp(min=0).sum())
    return float(found.lengths.sum()) / (passes + COST * drafted)


@torch.no_grad()
def places(target: TinyLM, draft: TinyLM, text: Tensor, start: int) -> dict[str, Tensor]:
    """Of each place of a text [batch, time] from `start` on: entropy, cross-entropy, acceptance, and its bound."""
    p, q = (model(text).logits[:, start - 1 : -1].flatten(0, 1).double() for model in (target, draft))
    laws = p.softmax(-1), q.softmax(-1)
    cross = -(laws[1] * p.log_softmax(-1)).sum(-1)
    return {
        "entropy": draft_entropy(q),
        "cross": cross,
        "acceptance": acceptance_probability(*laws),
        "bound": acceptance_bound(*laws),
    }


def run(settings: Settings) -> Outcome:
    """Decodes with fixed drafts and with SVIP's, and looks at entropy and acceptance along the text."""
    target, draft = (
        load_pretrained(f"python-{name}").to(settings.device).requires_grad_(False) for name in ("target", "draft")
    )
    policy = SVIPPolicy()
    new, seeds = (192, 10) if settings.full else (48, 5)
    found: dict[str, list[float]] = {}
    seen: list[dict[str, Tensor]] = []
    for seed in settings.track(range(seeds), "seeds"):
        ids = held_out(settings, seed)
        for kind, sampler in (("greedy", Sampler()), ("sampled", Sampler(temperature=1.0))):
            ways = {f"fixed {k}": (k, None) for k in LENGTHS}
            for name, (length, stop) in {**ways, "SVIP": (policy.max_len, policy.should_stop)}.items():
                result = speculative_generate(
                    target,
                    draft,
                    ids,
                    new,
                    draft_length=length,
                    sampler=sampler,
                    stop_drafting=stop,
                    generator=settings.generator(100 + seed),
                )
                found.setdefault(f"worth, {kind}, {name}", []).append(worth(result))
                found.setdefault(f"accepted part of the draft, {kind}, {name}", []).append(result.acceptance_rate)
        seen.append(places(target, draft, torch.cat([ids, result.tokens], 1), ids.shape[1]))
    found["correlation"] = [
        float(torch.corrcoef(torch.stack([one["entropy"].sqrt(), one["acceptance"]]))[0, 1]) for one in seen
    ]
    found["gamma"] = [float(one["cross"].mean() / one["entropy"].mean()) for one in seen]
    together = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
    above = float((together["acceptance"] >= together["bound"] - 1e-9).double().mean())
    edges = together["entropy"].quantile(torch.linspace(0, 1, BINS + 1, dtype=torch.float64))
    for low, high in pairwise(edges.tolist()):
        here = (together["entropy"] >= low) & (together["entropy"] <= high)
        for name in ("entropy", "acceptance", "bound"):
            found.setdefault(f"binned {name}", []).append(float(together[name][here].mean()))
    found["binned estimate"] = [1 - (policy.c * h) ** 0.5 for h in found["binned entropy"]]

    def gained(kind: str) -> list[float]:
        best = max(LENGTHS, key=lambda k: statistics.fmean(found[f"worth, {kind}, fixed {k}"]))
        pairs = zip(found[f"worth, {kind}, SVIP"], found[f"worth, {kind}, fixed {best}"], strict=True)
        return [a / b for a, b in pairs]

    claims = [
        measure(
            "Acceptance is nowhere below the bound by Pinsker's inequality (part of the places)",
            f"{PAPER}, section 3",
            above,
            at_least=1.0,
        ),
        measure(
            "The root of the draft's entropy and the acceptance probability go against each other (correlation)",
            f"{PAPER}, section 3",
            found["correlation"],
            at_most=-0.5,
        ),
        measure(
            "The cross-entropy is the draft's entropy times a factor of about 1.3",
            f"{PAPER}, section 3 and the authors' code",
            found["gamma"],
            at_least=1.0,
            at_most=1.6,
        ),
        measure(
            "Greedy: SVIP is worth more than the best fixed length (tokens for the time, ratio)",
            f"{PAPER}, tables 1 and 2: up to 1.2",
            gained("greedy"),
            at_least=1.0,
        ),
        measure(
            "Sampled: SVIP is worth more than the best fixed length (tokens for the time, ratio)",
            f"{PAPER}, tables 1 and 2: up to 1.2",
            gained("sampled"),
            at_least=1.0,
        ),
        measure(
            "More of a draft is accepted than with 4 tokens always (accepted part, difference)",
            f"{PAPER}, section 4",
            [
                a - b
                for a, b in zip(
                    found["accepted part of the draft, sampled, SVIP"],
                    found["accepted part of the draft, sampled, fixed 4"],
                    strict=True,
                )
            ],
            at_least=0.0,
        ),
    ]
    return Outcome(claims, {"lengths": list(map(float, LENGTHS)), **found})


def draw(outcome: Outcome) -> Figure:
    """Acceptance over entropy, and what fixed lengths and SVIP are worth."""
    figure, (acceptance, worths) = panels(2)
    series = outcome.series
    for name, label in (("acceptance", "measured"), ("bound", "bound, eq. (1)"), ("estimate", "estimate, eq. (2)")):
        acceptance.plot(series["binned entropy"], series[f"binned {name}"], marker="o", label=label)
    acceptance.set(title="Acceptance", xlabel="entropy of the draft (nats)", ylabel="probability", ylim=(0, 1.05))
    lengths = [int(k) for k in series["lengths"]]
    for i, kind in enumerate(("greedy", "sampled")):
        means = [statistics.fmean(series[f"worth, {kind}, fixed {k}"]) for k in lengths]
        worths.plot(lengths, means, marker="o", color=f"C{i}", label=f"fixed, {kind}")
        worths.axhline(
            statistics.fmean(series[f"worth, {kind}, SVIP"]), color=f"C{i}", linestyle="--", label=f"SVIP, {kind}"
        )
    worths.set(
        title="Worth of a draft", xlabel="drafted tokens", ylabel="tokens per time of a target pass", xticks=lengths
    )
    worths.set_ylim(1, worths.get_ylim()[1] + 0.4)
    for axis in (acceptance, worths):
        axis.legend()
    return figure
