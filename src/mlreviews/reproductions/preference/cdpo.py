"""Are critical tokens found, by rollouts and by contrast, and does blaming them alone train a better policy than DPO?

Answers of 6 tokens to 20 prompts. Each prompt has a token of its own that makes every answer wrong; without it an
answer is right in 9 of 10 cases. Policies are tables (prompt, position, token), so that their success is known exactly.
Each prompt has 64 sampled answers, as in the paper: the two contrasted models are their frequencies, and 4 pairs are
trained on.
Quick: 8 data sets, ten seconds. Full: 40.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.cdpo import contrastive_token_scores, critical_dpo_loss, find_critical_token
from mlreviews.preference.logps import token_logps
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2411.19943"
PROMPTS, TIME, VOCAB, LUCK = 20, 6, 8, 0.9
SAMPLES, PAIRS, STEPS = 64, 4, 60


def run(settings: Settings) -> Outcome:
    """Measures how often the planted token is found, and the success of policies along their training."""
    runs = 40 if settings.full else 8
    by_rollouts, by_contrast = [], []
    curves: dict[str, list[list[float]]] = {"DPO": [], "cDPO": []}
    travels: dict[str, list[list[float]]] = {"DPO": [], "cDPO": []}
    for number in settings.track(range(runs), "data sets"):
        generator = settings.generator(number)
        base = torch.randn(PROMPTS, TIME, VOCAB, dtype=torch.float64, generator=generator)
        planted = torch.randint(VOCAB, (PROMPTS,), generator=generator)
        base[torch.arange(PROMPTS), :, planted] = -0.5
        answers, right = _sampled(base, planted, generator)
        models = [_frequencies(answers, kept) for kept in (right, ~right)]
        chosen, rejected = _pairs(right, generator)
        prompt = torch.arange(PROMPTS).repeat_interleave(PAIRS)
        bad = answers[prompt, rejected]
        scores = contrastive_token_scores(models[0][prompt], models[1][prompt], bad)
        found, blamed = _identified(base, planted, prompt, bad, scores, generator)
        by_rollouts.append(found)
        by_contrast.append(blamed)
        for name, given in (("DPO", torch.zeros_like(scores)), ("cDPO", scores)):
            curve, moved = _trained(base, planted, prompt, answers[prompt, chosen], bad, given)
            curves[name].append(curve)
            travels[name].append(moved)
    final = {name: [curve[-1] for curve in found] for name, found in curves.items()}
    # the success of cDPO at the step at which it has gone as far from the base policy as DPO has at the end
    level = [
        next(value for value, far in zip(curve, travel, strict=True) if far >= end[-1] or far == travel[-1])
        for curve, travel, end in zip(curves["cDPO"], travels["cDPO"], travels["DPO"], strict=True)
    ]
    claims = [
        measure(
            "Rollouts find the planted token of wrong answers that have one (share)",
            f"{PAPER}, section 2",
            by_rollouts,
            at_least=0.95,
        ),
        measure(
            "The contrastive score is lowest at a planted token (share of such answers)",
            f"{PAPER}, section 3",
            by_contrast,
            at_least=0.9,
        ),
        measure(
            "DPO on the pairs raises the share of right answers (gain)",
            f"{PAPER}, table 1",
            [curve[-1] - curve[0] for curve in curves["DPO"]],
            at_least=0,
        ),
        measure(
            "cDPO raises it further in as many steps (cDPO minus DPO)",
            f"{PAPER}, table 1",
            [c - d for c, d in zip(final["cDPO"], final["DPO"], strict=True)],
            at_least=0,
        ),
        measure(
            "... and at the same divergence from the base policy (cDPO minus DPO)",
            f"{PAPER}, table 1",
            [c - d for c, d in zip(level, final["DPO"], strict=True)],
            at_least=0,
        ),
    ]
    series = {"step": [float(step) for step in range(STEPS + 1)]}
    series |= {f"success, {name}": torch.tensor(found).mean(0).tolist() for name, found in curves.items()}
    series |= {f"divergence, {name}": torch.tensor(found).mean(0).tolist() for name, found in travels.items()}
    return Outcome(claims, series)


def _sampled(base: Tensor, planted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers [prompt, sample, time] of the base policy, and which of them are right."""
    laws = base.softmax(-1).flatten(0, 1)
    draws = torch.multinomial(laws, SAMPLES, replacement=True, generator=generator)
    answers = draws.view(PROMPTS, TIME, SAMPLES).mT
    lucky = torch.rand(PROMPTS, SAMPLES, generator=generator) < LUCK
    return answers, lucky & (answers != planted[:, None, None]).all(-1)


def _frequencies(answers: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities [prompt, time, token] of the tokens of some of the answers, each counted once more."""
    counts = torch.nn.functional.one_hot(answers, VOCAB).double() * kept[..., None, None]
    return (counts.sum(1) + 1).log()


def _pairs(right: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of a right and of a wrong answer for each pair; prompts one after another."""
    chosen, rejected = (
        torch.multinomial(kept.double() + 1e-12, PAIRS, replacement=True, generator=generator).flatten()
        for kept in (right, ~right)
    )
    return chosen, rejected


def _identified(
    base: Tensor, planted: Tensor, prompt: Tensor, bad: Tensor, scores: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """Shares of wrong answers with a planted token that rollouts and the lowest score point at."""
    laws = base.softmax(-1)
    found = blamed = count = 0
    for row, (number, answer) in enumerate(zip(prompt.tolist(), bad.tolist(), strict=True)):
        token = int(planted[number])
        if token not in answer:
            continue
        avoided = (1 - laws[number, :, token]).tolist()

        def rollout(prefix: Sequence[int], samples: int, token: int = token, avoided: list[float] = avoided) -> int:
            if token in prefix:
                return 0
            chance = LUCK
            for value in avoided[len(prefix) :]:
                chance *= value
            return int((torch.rand(samples, generator=generator) < chance).sum())

        count += 1
        found += find_critical_token(answer, rollout) == answer.index(token)
        blamed += answer[int(scores[row].argmin())] == token
    return found / count, blamed / count


def _trained(
    base: Tensor, planted: Tensor, prompt: Tensor, good: Tensor, bad: Tensor, scores: Tensor
) -> tuple[list[float], list[float]]:
    """Success before and after each step of Adam on all pairs, and the divergence from the base policy."""
    mask = torch.ones_like(good, dtype=torch.bool)
    reference = [token_logps(base[prompt], answers) for answers in (good, bad)]
    logits = base.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.02)
    curve, travel = [_success(base, planted)], [0.0]
    before = base.log_softmax(-1)
    for _ in range(STEPS):
        policy = [token_logps(logits[prompt], answers) for answers in (good, bad)]
        loss = critical_dpo_loss(policy[0], policy[1], reference[0], reference[1], mask, mask, scores).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(_success(logits.detach(), planted))
        after = logits.detach().log_softmax(-1)
        travel.append(float((after.exp() * (after - before)).sum((1, 2)).mean()))
    return curve, travel


def _success(logits: Tensor, planted: Tensor) -> float:
    """Mean probability of a right answer, exactly."""
    law = logits.softmax(-1)[torch.arange(PROMPTS), :, planted]
    return float(LUCK * (1 - law).prod(1).mean())


def draw(outcome: Outcome) -> Figure:
    """Success along the training, by steps and by the divergence from the base policy."""
    figure, (steps, travel) = panels(2)
    series = outcome.series
    for name in ("DPO", "cDPO"):
        steps.plot(series["step"], series[f"success, {name}"], label=name)
        travel.plot(series[f"divergence, {name}"], series[f"success, {name}"], label=name)
    for axis in (steps, travel):
        axis.axhline(LUCK, color="0.4", linestyle=":", linewidth=1, label="no critical token at all")
        axis.set_ylabel("share of right answers")
    steps.set(title="Training on the same pairs", xlabel="step")
    steps.legend()
    travel.set(title="For the distance travelled", xlabel="KL from the base policy (nats)")
    return figure
