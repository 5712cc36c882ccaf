"""What do random rewards do to a habit: with the clip, without it, and with a single epoch?

A policy that chooses between two strategies, in a table, trained by GRPO on groups of 16 with coins for rewards, in
many independent runs. The habit has a probability of 0.65, as code reasoning has in Qwen2.5-Math, or of 0.9. Its
answers are right with probability 0.6, the others with 0.3.
Quick: 1000 runs of 30 groups. Full: 10000 runs of 200 groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.spurious_rewards import random_reward, train_bandit
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2506.10947"
GOOD, BAD = 0.6, 0.3
EPOCHS, RATE = 8, 0.3
# Kinds of training: clip and epochs; the single epoch takes one step as long as the others' eight.
KINDS = {
    "clip 0.2, 8 epochs": (0.2, EPOCHS, RATE),
    "no clip, 8 epochs": (math.inf, EPOCHS, RATE),
    "1 epoch": (0.2, 1, EPOCHS * RATE),
}


def run(settings: Settings) -> Outcome:
    """Follows the habit's probability under coins."""
    runs, steps = (10_000, 200) if settings.full else (1000, 30)
    changes: dict[tuple[str, float], Tensor] = {}
    odds: dict[tuple[str, float], list[float]] = {}
    series: dict[str, list[float]] = {"groups": [float(i) for i in range(steps + 1)]}
    for prior in settings.track((0.65, 0.9), "priors"):
        for stream, (kind, (clip, epochs, rate)) in enumerate(KINDS.items()):
            habit = _habit(prior, runs, steps, clip, epochs, rate, settings.generator(stream))
            changes[kind, prior] = habit[-1] - prior
            # Single precision: a habit can round to 0 or 1.
            odds[kind, prior] = (habit[-1].logit(eps=1e-6) - math.log(prior / (1 - prior))).tolist()
            series[f"{kind}, {prior}"] = habit.mean(1).tolist()
    clipped, free, single = KINDS
    theory = f"{PAPER}, on the clip"
    claims = [
        measure(
            "Coins for rewards make a habit of 0.65 more frequent where the clip acts (change of probability)",
            theory,
            changes[clipped, 0.65].tolist(),
            at_least=0.0,
        ),
        measure("... and a habit of 0.9 (change)", theory, changes[clipped, 0.9].tolist(), at_least=0.0),
        measure("... at least in the habit's log-odds (change, nats)", theory, odds[clipped, 0.9], at_least=0.0),
        measure(
            "A single epoch, where all ratios are 1, has no expected effect on the log-odds (habit of 0.65, nats)",
            theory,
            odds[single, 0.65],
            at_least=-0.3,
            at_most=0.3,
        ),
        measure(
            "Eight epochs without the clip leave a habit of 0.9 where it is (change of probability)",
            theory,
            changes[free, 0.9].tolist(),
            at_least=-0.02,
            at_most=0.02,
        ),
        measure(
            "The clip makes a difference in favour of the habit (change with it minus without it, habit of 0.9)",
            theory,
            (changes[clipped, 0.9] - changes[free, 0.9]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Coins raise the accuracy by 0.1 or more where the habit of 0.65 is the better strategy (gain)",
            f"{PAPER}, experiments: 0.214 for Qwen2.5-Math-7B",
            ((GOOD - BAD) * changes[clipped, 0.65]).tolist(),
            at_least=0.1,
        ),
    ]
    return Outcome(claims, series)


def _habit(
    prior: float, runs: int, steps: int, clip: float, epochs: int, rate: float, generator: torch.Generator
) -> Tensor:
    """Probability of the habit, [steps + 1, runs]."""
    logits = torch.tensor([math.log(prior), math.log(1 - prior)]).repeat(runs, 1)
    history = train_bandit(
        logits,
        lambda arms: random_reward(arms, generator=generator),
        steps=steps,
        epochs=epochs,
        rate=rate,
        clip=clip,
        generator=generator,
    )
    return history[:, :, 0]


def draw(outcome: Outcome) -> Figure:
    """Mean probability of the habit under coins."""
    figure, axes = panels(2)
    for axis, prior in zip(axes, (0.65, 0.9), strict=True):
        for kind in KINDS:
            axis.plot(outcome.series["groups"], outcome.series[f"{kind}, {prior}"], label=kind)
        axis.axhline(prior, color="0.4", linestyle=":")
        axis.set(
            title=f"A habit of {prior}", xlabel="groups with random rewards", ylabel="mean probability of the habit"
        )
    axes[0].legend()
    return figure
