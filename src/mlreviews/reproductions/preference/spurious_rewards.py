"""What do random rewards do to a habit: with the clip, without it, and with a single epoch?

A policy that chooses between two strategies, in a table, trained by GRPO on groups of 16 with coins for rewards, in
many independent runs. The habit has a probability of 0.65, as code reasoning has in Qwen2.5-Math, or of 0.9. Its
answers are right with probability 0.6, the others with 0.3.

And what do they do to a language model? The small shipped model of Python source finishes lines and is rewarded for
lines that parse, or by coins; both are trained on the same prompts, with one update from each batch, and measured on
held-out files, before and after. The step size was chosen after trials with another seed, the bound on what coins do
after a first run: it was 0, where no effect is never told from a small one.
Quick: 1000 runs of 30 groups; 4 trainings of each kind with 8 steps. Full: 10000 runs of 200 groups; 10 trainings with
60 steps of the larger model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import load_pretrained
from mlreviews.preference.rewards import line_parses
from mlreviews.preference.spurious_rewards import random_reward, train_bandit
from mlreviews.reproductions.completed_lines import Skill, line_prompts, practise, skill
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from mlreviews.models import TinyLM

PAPER = "arXiv:2506.10947"
GOOD, BAD = 0.6, 0.3
EPOCHS, RATE = 8, 0.3
REWARDS = ("lines that parse", "coins")
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
    before, after = _language_models(settings)
    gain = {r: [float(s.parses.mean() - before.parses.mean()) for s in skills] for r, skills in after.items()}
    cost = {r: [float(s.bits.mean() - before.bits.mean()) for s in skills] for r, skills in after.items()}
    verified, coins = REWARDS
    claims += [
        measure(
            "A language model rewarded for lines that parse writes more of them on held-out files (change of share)",
            f"{PAPER}, ground-truth rewards",
            gain[verified],
            at_least=0.0,
        ),
        measure(
            "... and coins teach it nothing, as other families than Qwen2.5 (change of share)",
            f"{PAPER}, on OLMo and Llama",
            gain[coins],
            at_most=0.05,
        ),
        measure(
            "The reward makes the difference (change minus that by coins)",
            "ours: control",
            [a - b for a, b in zip(gain[verified], gain[coins], strict=True)],
            at_least=0.0,
        ),
        measure(
            "Coins cost plain text about as much as the true reward does (rise of its cross-entropy, ratio of means)",
            "ours",
            sum(cost[coins]) / sum(cost[verified]),
            at_least=0.5,
            at_most=2.0,
        ),
    ]
    series["parses, before"] = [float(before.parses.mean())]
    series["bits per byte, before"] = [float(before.bits.mean())]
    for reward, skills in after.items():
        series[f"parses, {reward}"] = [float(s.parses.mean()) for s in skills]
        series[f"bits per byte, {reward}"] = [float(s.bits.mean()) for s in skills]
        series[f"length, {reward}"] = [float(s.lengths.mean()) for s in skills]
    return Outcome(claims, series)


def _language_models(settings: Settings) -> tuple[Skill, dict[str, list[Skill]]]:
    """What the model can do before, and after each training with either reward."""
    name, trainings, steps, held = ("python-target", 10, 60, 1024) if settings.full else ("python-draft", 4, 8, 256)
    corpus = python_source()
    prompts = line_prompts(corpus.validation, held, settings.seed)

    def measured(model: TinyLM) -> Skill:
        return skill(model, prompts, corpus.validation, settings.generator(500))

    after: dict[str, list[Skill]] = {reward: [] for reward in REWARDS}
    for training in settings.track(range(trainings), "language models"):
        practised = line_prompts(corpus.train, 400, 1000 * settings.seed + training)
        coins = _coins(settings.generator(700 + training))
        for kind, reward in zip(REWARDS, (line_parses, coins), strict=True):
            policy = load_pretrained(name).to(settings.device)
            practise(
                policy,
                practised,
                reward,
                steps=steps,
                rate=1e-4 if settings.full else 3e-4,
                batch=4,
                group_size=8,
                generator=settings.generator(501 + training),
            )
            after[kind].append(measured(policy))
    return measured(load_pretrained(name).to(settings.device)), after


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


def _coins(generator: torch.Generator) -> Callable[[str, str], float]:
    return lambda prompt, answer: float(random_reward(torch.zeros(1), generator=generator))


def draw(outcome: Outcome) -> Figure:
    """Mean probability of the habit under coins, and what language models learn and unlearn."""
    figure, axes = panels(2, rows=2)
    for axis, prior in zip(axes, (0.65, 0.9), strict=False):
        for kind in KINDS:
            axis.plot(outcome.series["groups"], outcome.series[f"{kind}, {prior}"], label=kind)
        axis.axhline(prior, color="0.4", linestyle=":")
        axis.set(
            title=f"A habit of {prior}", xlabel="groups with random rewards", ylabel="mean probability of the habit"
        )
    axes[0].legend()
    titles = {"parses": "Lines that parse, held-out files", "bits per byte": "Plain text, held-out files"}
    for axis, (name, title) in zip(axes[2:], titles.items(), strict=True):
        for place, reward in enumerate(REWARDS):
            values = outcome.series[f"{name}, {reward}"]
            axis.plot([place] * len(values), values, marker="o", linestyle="", label=f"after, rewards: {reward}")
        axis.axhline(outcome.series[f"{name}, before"][0], color="0.4", linestyle=":", label="before")
        axis.set(title=title, ylabel="share of lines" if name == "parses" else "bits per byte", xlim=(-0.7, 1.7))
        axis.set_xticks([0, 1], REWARDS)
    axes[2].legend(fontsize=8)
    return figure
