"""Do judges keep a policy from the answers that a reward model overrates, and which of CGPO's losses learns most?

Bandits with 32 answers to each of 8 prompts, softmax policies in tables, so that every policy's true reward is exact.
Three answers to each prompt are the worst ones, but a reward model gives them 6 more than they are worth; and its
scores of different prompts differ by an offset, as those of reward models do. A judge rejects these three. All methods
draw 4 answers to each prompt a step, and each has the one of three learning rates that is best by what it is trained
on; in a first run it was chosen by the true reward, which nobody who trains a policy sees, and which stops early where
the reward is wrong. The known good answer to a prompt is the best of four drawn among those that the judge admits.
Quick: 24 bandits, 200 steps. Full: 30 bandits, 800 steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.cgpo import calibrated_rewards, codpo_loss, crpg_rewards, crraft_loss
from mlreviews.preference.rloo import reinforce_loss, rloo_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2409.20370"
PROMPTS, ANSWERS, EXPLOITS, SAMPLES = 8, 32, 3, 4
RATES = (0.02, 0.06, 0.2)
RLOO, CRPG, CODPO, CRRAFT = "RLOO, no judge", "CRPG", "CODPO", "CRRAFT"
RAW, CAPPED, LEAKY = "CRPG, rewards not calibrated", "CRPG, K = 2", "CRPG, judge misses one of three"
METHODS = (RLOO, CRPG, CODPO, CRRAFT, RAW, CAPPED, LEAKY)


class Bandits:
    """Rewards and verdicts, [runs, PROMPTS, ANSWERS] each; the first EXPLOITS answers are the overrated ones.

    Args:
        runs: how many independent bandits.
        generator: draws all of it.
    """

    def __init__(self, runs: int, generator: torch.Generator) -> None:
        shape = (runs, PROMPTS, ANSWERS)
        self.true = torch.randn(shape, generator=generator).sort(-1).values
        self.rewards = self.true + 3 * torch.randn(runs, PROMPTS, 1, generator=generator)
        self.rewards[..., :EXPLOITS] += 6
        self.kept = (torch.arange(ANSWERS) >= EXPLOITS).expand(shape)
        # Sorted by truth, the best of four has the largest number.
        best = torch.randint(EXPLOITS, ANSWERS, (runs, PROMPTS, 4), generator=generator).amax(-1, keepdim=True)
        self.known = self.rewards.gather(-1, best)

    def admitted(self, method: str) -> Tensor:
        """The verdicts that a method's judge gives."""
        return self.kept | (torch.arange(ANSWERS) == 0) if method == LEAKY else self.kept

    def signal(self, method: str) -> Tensor:
        """What a method is trained on."""
        if method == RLOO:
            return self.rewards
        return self.admitted(method) * (self.rewards if method == RAW else (self.rewards - self.known).sigmoid())


def run(settings: Settings) -> Outcome:
    """Trains all methods and looks at true rewards and at the mass of the overrated answers."""
    runs, steps = (30, 800) if settings.full else (24, 200)
    bandits = Bandits(runs, settings.generator())
    scores, masses, divergence = {}, {}, {}
    for method in settings.track(METHODS, "methods"):
        policies = _train(method, bandits, steps, settings.generator(1))
        best = int((policies[:, -1] * bandits.signal(method)).sum(-1).mean((1, 2)).argmax())
        start, top = bandits.true.mean((1, 2)), bandits.true[..., -1].mean(1)
        scores[method] = ((policies[best] * bandits.true).sum(-1).mean(-1) - start) / (top - start)
        masses[method] = policies[best, ..., :EXPLOITS].sum(-1).mean(-1)
        final = policies[best, -1]
        divergence[method] = math.log(ANSWERS) + torch.special.xlogy(final, final).sum(-1).mean(-1)
    last = {method: value[-1] for method, value in scores.items()}
    claims = [
        measure(
            "Without a judge the policy ends at answers that the reward model overrates (their mass)",
            f"{PAPER}, experiments: PPO",
            masses[RLOO][-1].tolist(),
            at_least=0.5,
        )
    ]
    claims += [
        measure(
            f"With a judge that rejects them, {method} gives them up (their mass; 0.094 at first)",
            f"{PAPER}, section 4.1",
            masses[method][-1].tolist(),
            at_most=0.05,
        )
        for method in (CRPG, CODPO, CRRAFT)
    ]
    claims += [
        measure(
            "CRRAFT, which only makes good answers likelier, learns at least 0.9 of what CRPG does (ratio of rewards)",
            "review: works surprisingly well",
            (last[CRRAFT] / last[CRPG]).tolist(),
            at_least=0.9,
        ),
        measure(
            "Calibrated rewards teach CRPG more than those of the reward model as they are (difference in true reward)",
            f"{PAPER}, on calibration",
            (last[CRPG] - last[RAW]).tolist(),
            at_least=0.0,
        ),
        measure(
            "With K = 2 nats, CRPG's policy stays that near to the reference (divergence, nats)",
            f"{PAPER}, section 4.1",
            divergence[CAPPED].tolist(),
            at_most=2.0,
        ),
        measure(
            "A judge that misses one of three overrated answers helps little: their mass is still above one half",
            "ours",
            masses[LEAKY][-1].tolist(),
            at_least=0.5,
        ),
    ]
    series = {"steps": [float(i) for i in range(steps + 1)]}
    for method in METHODS:
        series[method] = scores[method].mean(1).tolist()
        series[f"{method}, mass"] = masses[method].mean(1).tolist()
    return Outcome(claims, series)


def _train(method: str, bandits: Bandits, steps: int, generator: torch.Generator) -> Tensor:
    """Policies after each step, [rates, steps + 1, runs, PROMPTS, ANSWERS]."""
    shape = bandits.true.shape
    tables = [torch.zeros(shape, requires_grad=True) for _ in RATES]
    optimiser = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in zip(tables, RATES, strict=True)])
    seen = (bandits.rewards, bandits.admitted(method), bandits.known.expand(-1, -1, SAMPLES))
    wide = [x.repeat(len(RATES), 1, 1) for x in seen]
    history = []
    for _ in range(steps):
        logp = torch.cat(tables).log_softmax(-1)
        chances = logp.detach().exp()
        history.append(chances)
        drawn = torch.multinomial(chances.flatten(0, 1), SAMPLES, replacement=True, generator=generator)
        drawn = drawn.view(*logp.shape[:2], SAMPLES)
        found = (logp.gather(2, drawn), wide[0].gather(2, drawn), wide[1].gather(2, drawn), wide[2])
        optimiser.zero_grad()
        _loss(method, *(x.flatten() for x in found)).backward()
        optimiser.step()
    history.append(torch.cat(tables).detach().softmax(-1))
    return torch.stack(history).unflatten(1, (len(RATES), -1)).transpose(0, 1)


def _loss(method: str, logps: Tensor, rewards: Tensor, kept: Tensor, known: Tensor) -> Tensor:
    """A method's loss for the answers of all bandits at once; the reference is the uniform policy."""
    reference = torch.full_like(logps, -math.log(ANSWERS))
    groups = len(logps) // SAMPLES
    if method == RLOO:
        return rloo_loss(logps, rewards, SAMPLES).loss
    calibrated = rewards if method == RAW else calibrated_rewards(rewards, known)
    if method == CODPO:
        lengths = torch.ones_like(logps, dtype=torch.int64)
        return codpo_loss(logps, reference, lengths, calibrated, kept, SAMPLES, normaliser=groups).loss
    if method == CRRAFT:
        return crraft_loss(logps, reference, calibrated, kept, SAMPLES, normaliser=groups).loss
    kl_max = 2.0 if method == CAPPED else math.inf
    shaped = crpg_rewards(logps, reference, calibrated, kept, kl_max=kl_max).view(-1, PROMPTS * SAMPLES)
    # The baseline is the mean over the batch of one bandit.
    return reinforce_loss(logps, (shaped - shaped.mean(1, keepdim=True)).flatten()).loss


def draw(outcome: Outcome) -> Figure:
    """True reward, and mass of the overrated answers, during training."""
    figure, (left, right) = panels(2, width=5.2, height=4.0)
    for method in METHODS:
        left.plot(outcome.series["steps"], outcome.series[method], label=method)
        right.plot(outcome.series["steps"], outcome.series[f"{method}, mass"], label=method)
    left.set(title="True reward", xlabel="steps", ylabel="true reward (0: start, 1: best)")
    right.set(title="Answers that the reward model overrates", xlabel="steps", ylabel="mean probability")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
