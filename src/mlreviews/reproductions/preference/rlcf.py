"""Does a checklist for each prompt teach what a reward model with one scale for all prompts does not?

An answer has six properties or lacks them. A prompt asks for some of them, with an importance each; a policy has each
property with a probability that depends on the prompt through weights that all prompts share, so that satisfaction
rates on new prompts are exact. A noisy judge scores each property from 0 to 100, and hardly sees the two that a program
can check. The reward model knows how important a property is on average over prompts, has noise of its own, and is
wrong about the last property: it likes answers without it, as such models like long ones. The policy is trained by DPO
on pairs of its own answers to 200 prompts; the reward model labels the pairs where its scores differ most, as many.
Properties never exclude each other here, so that a policy which has all of them at once is right for every prompt.
Quick: 24 policies. Full: 200 policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.rlcf import checklist_score, largest_gaps
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2507.18624"
ITEMS, PROMPTS, KEEP, BETA, STEPS, TEMPERATURE = 6, 200, 0.4, 0.1, 100, 1.3
CHECKED = 2  # the first of the properties, which a program can check
SAMPLES = 25
RLCF, PLAIN, ANY, REWARD = "RLCF", "RLCF without programs", "RLCF, 40 % at random", "reward model"
METHODS = (RLCF, PLAIN, ANY, REWARD)


class Pairs(NamedTuple):
    """What policies are trained on.

    Attributes:
        prompts: [runs, PROMPTS, ITEMS], importance of each property, 0 where it isn't asked for.
        answers: [runs, PROMPTS, 2, ITEMS], 1 where an answer has the property.
        start: [runs, ITEMS], log odds of the properties before the training.
    """

    prompts: Tensor
    answers: Tensor
    start: Tensor


def run(settings: Settings) -> Outcome:
    """Trains policies on labels by checklists and by a reward model, and looks at new prompts."""
    runs = 200 if settings.full else 24
    generator = settings.generator()
    start = 0.5 * torch.randn(runs, ITEMS, generator=generator)
    chance = (start / TEMPERATURE).sigmoid()[:, None, None].expand(-1, PROMPTS, 2, -1)
    pairs = Pairs(_prompts(runs, generator), torch.bernoulli(chance, generator=generator), start)
    new = _prompts(runs, generator)
    taste = torch.tensor([1.0] * (ITEMS - 1) + [-1.0]) * pairs.prompts.mean((0, 1))

    scores = _judged(pairs.answers, SAMPLES, settings.generator(1))
    programs = scores.clone()
    programs[..., :CHECKED] = (scores[..., :CHECKED] + 100 * pairs.answers[..., :CHECKED]) / 2
    reward = (pairs.answers * taste).sum(-1)
    reward = reward + 0.5 * taste.norm() * torch.randn(reward.shape, generator=settings.generator(2))

    totals = {RLCF: _totals(programs, pairs), PLAIN: _totals(scores, pairs), ANY: _totals(programs, pairs)}
    gaps = {method: _gaps(s, totals[method]) for method, s in ((RLCF, programs), (PLAIN, scores))}
    gaps[ANY] = torch.rand(runs, PROMPTS, generator=settings.generator(3))
    totals[REWARD], gaps[REWARD] = reward, (reward[..., 0] - reward[..., 1]).abs()

    before = start.sigmoid()[:, None].expand(-1, PROMPTS, -1)
    after = {}
    for method in settings.track(METHODS, "methods"):
        after[method] = _train(pairs, totals[method], gaps[method], new)
    asked, gained, met = new > 0, {}, {"before": _rate(before, new)}
    for method, probabilities in after.items():
        change = torch.where(asked, probabilities - before, 0.0).sum(1) / asked.sum(1)
        gained[method] = change  # [runs, ITEMS], over the prompts that ask for the property
        met[method] = _rate(probabilities, new)
    proxy = ((after[REWARD] - before) * taste).sum(-1).mean(1)
    alone = _totals(_judged(pairs.answers, 1, settings.generator(4)), pairs)
    truth = _totals(100 * pairs.answers, pairs)
    claims = [
        measure(
            "Checklists raise every property on prompts that ask for it (smallest gain of six, in rate)",
            f"{PAPER}, experiments",
            gained[RLCF].amin(1).tolist(),
            at_least=0.0,
        ),
        measure(
            "DPO on the reward model's labels raises its reward (gain, in points of importance)",
            f"{PAPER}, on reward models",
            proxy.tolist(),
            at_least=0.0,
        ),
        measure(
            "... and lowers the property that it is wrong about, also where prompts ask for it (change of rate)",
            f"{PAPER}, on reward models",
            gained[REWARD][:, -1].tolist(),
            at_most=0.0,
        ),
        measure(
            "Checklists meet more of what new prompts ask for, weighted (difference to the reward model, in rate)",
            f"{PAPER}, experiments",
            (met[RLCF] - met[REWARD]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... also of the five properties that the reward model is right about (difference in mean gain)",
            "ours: does a list for each prompt pay where no wish excludes another?",
            (gained[RLCF] - gained[REWARD])[:, :-1].mean(1).tolist(),
            at_least=0.0,
        ),
        measure(
            "Programs help with what the judge hardly sees (difference in gain of two properties)",
            f"{PAPER}, on verifiers",
            (gained[RLCF] - gained[PLAIN])[:, :CHECKED].mean(1).tolist(),
            at_least=0.0,
        ),
        measure(
            "The 40 % of pairs that differ most in a requirement teach more than 40 % at random (weighted rate)",
            f"{PAPER}, on the choice of pairs",
            (met[RLCF] - met[ANY]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Asking the judge 25 times labels more pairs rightly than asking once (difference in share, no programs)",
            f"{PAPER}, on the judge",
            (_agreement(totals[PLAIN], truth) - _agreement(alone, truth)).tolist(),
            at_least=0.0,
        ),
    ]
    series = {f"{method}, gain": gained[method].mean(0).tolist() for method in METHODS}
    series |= {f"{name}, met": [float(value.mean())] for name, value in met.items()}
    return Outcome(claims, series)


def _prompts(runs: int, generator: torch.Generator) -> Tensor:
    """Importance of the properties to prompts, [runs, PROMPTS, ITEMS]: 20 to 100, or 0 for half of them."""
    shape = (runs, PROMPTS, ITEMS)
    weights = 20 + 80 * torch.rand(shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(-1)
    return torch.where(order < ITEMS // 2, weights, 0.0)


def _judged(answers: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Mean scores: right but for noise, or for the properties that programs can check, hardly more than noise."""
    means = 25 + 50 * answers
    means[..., :CHECKED] = 45 + 10 * answers[..., :CHECKED]
    scores = torch.zeros_like(means)
    for _ in range(samples):
        scores += (means + 30 * torch.randn(means.shape, generator=generator)).clamp(0, 100)
    return scores / samples


def _totals(scores: Tensor, pairs: Pairs) -> Tensor:
    """Weighted scores, [runs, PROMPTS, 2]."""
    return checklist_score(scores, pairs.prompts[:, :, None].expand_as(scores))


def _gaps(scores: Tensor, totals: Tensor) -> Tensor:
    """Largest difference in favour of the preferred answer in one property, [runs, PROMPTS]."""
    sign = (totals[..., 0] - totals[..., 1]).sign()
    return (sign[..., None] * (scores[:, :, 0] - scores[:, :, 1])).amax(-1)


def _agreement(totals: Tensor, truth: Tensor) -> Tensor:
    """Share of pairs in the right order, of those that have one, [runs]."""
    decided = truth[..., 0] != truth[..., 1]
    right = (totals[..., 0] > totals[..., 1]) == (truth[..., 0] > truth[..., 1])
    return (right & decided).sum(1) / decided.sum(1)


def _rate(probabilities: Tensor, prompts: Tensor) -> Tensor:
    """Expected weighted share of what prompts ask for, [runs]."""
    return checklist_score(probabilities, prompts).mean(1)


def _train(pairs: Pairs, totals: Tensor, gaps: Tensor, new: Tensor) -> Tensor:
    """Probabilities of the properties on new prompts, [runs, PROMPTS, ITEMS], after DPO on the pairs kept."""
    kept = torch.stack([largest_gaps(g, KEEP) for g in gaps])
    best = totals.argmax(-1)
    first = pairs.answers.gather(2, best[..., None, None].expand(-1, -1, 1, ITEMS))[:, :, 0]
    second = pairs.answers.sum(2) - first
    prompts, chosen, rejected = (
        x.gather(1, kept[..., None].expand(-1, -1, ITEMS)) for x in (pairs.prompts, first, second)
    )
    weight = torch.zeros(len(kept), ITEMS + 1, ITEMS, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.03)

    def odds(prompts: Tensor) -> Tensor:
        """Log odds of the properties, [runs, prompts, ITEMS]."""
        asked = torch.cat([(prompts > 0).float(), torch.ones_like(prompts[..., :1])], -1)
        return pairs.start[:, None] + asked @ weight

    def logps(answers: Tensor, odds: Tensor) -> Tensor:
        return logsigmoid((2 * answers - 1) * odds).sum(-1).flatten()

    reference = pairs.start[:, None].expand_as(prompts)
    known = [logps(answers, reference) for answers in (chosen, rejected)]
    for _ in range(STEPS):
        optimiser.zero_grad()
        now = odds(prompts)
        dpo_loss(logps(chosen, now), logps(rejected, now), *known, beta=BETA).losses.sum().backward()
        optimiser.step()
    return odds(new).sigmoid().detach()


def draw(outcome: Outcome) -> Figure:
    """Gain of each property, and what is met of new prompts' lists."""
    figure, (left, right) = panels(2, width=5.4, height=3.8)
    width = 0.8 / len(METHODS)
    for i, method in enumerate(METHODS):
        at = [item + (i - (len(METHODS) - 1) / 2) * width for item in range(ITEMS)]
        left.bar(at, outcome.series[f"{method}, gain"], width=width, label=method)
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set_xticks(range(ITEMS), [str(item + 1) for item in range(ITEMS)])
    left.set(
        title="Where a prompt asks for a property",
        xlabel="property (a program checks 1 and 2, the reward model dislikes 6)",
        ylabel="gain in rate",
    )
    left.legend()
    bars = ("before", *METHODS)
    right.barh(bars, [outcome.series[f"{name}, met"][0] for name in bars], color=("0.6", *COLOURS[: len(METHODS)]))
    right.invert_yaxis()
    right.set(title="What new prompts ask for", xlabel="weighted share that is met")
    return figure
