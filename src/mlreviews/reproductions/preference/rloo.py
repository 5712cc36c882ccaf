"""How noisy are the gradients of REINFORCE and RLOO, and what do they and RAFT learn from clean and noisy rewards?

Bandits with 32 answers to each of 8 prompts, softmax policies in tables: the gradient's mean and variance are exact for
REINFORCE and come from many groups for RLOO, and every policy's reward is exact. Rewards have an offset, as those of a
reward model. All methods see the same number of answers; each has its best of three learning rates.
Quick: 24 bandits, 150 steps. Full: 30 bandits, 600 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.rloo import RunningBaseline, raft_loss, reinforce_loss, rloo_advantages, rloo_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2402.14740"
PROMPTS, ANSWERS, SAMPLES = 8, 32, 4
RATES = (0.02, 0.06, 0.2)
NOISES = (0.0, 1.0, 3.0)
METHODS = ("RLOO, k = 4", "RLOO, k = 2", "REINFORCE, running mean", "REINFORCE, no baseline", "RAFT, k = 4")


def run(settings: Settings) -> Outcome:
    """Measures variances at the first policy, then trains all methods at three levels of noise."""
    runs, steps = (30, 600) if settings.full else (24, 150)
    rewards = 2 + torch.randn(runs, PROMPTS, ANSWERS, generator=settings.generator())
    variances = _variances(rewards.double(), settings.generator(1))
    curves: dict[str, Tensor] = {}
    final: dict[tuple[str, float], Tensor] = {}
    for method in settings.track(METHODS, "methods"):
        best = 0
        for noise in NOISES:
            scores = _train(method, rewards, noise, steps, settings.generator(2))
            if noise == 0:
                best = int(scores[:, :, -1].mean(1).argmax())
                curves[method] = scores[best]
            final[method, noise] = scores[best, :, -1]
    rloo, raft = METHODS[0], METHODS[4]
    loss = {m: final[m, 0.0] - final[m, NOISES[-1]] for m in (rloo, raft)}
    claims = [
        measure(
            "RLOO's gradient varies less than REINFORCE's without a baseline (variance, k = 4 / plain)",
            f"{PAPER}, on RLOO",
            (variances["RLOO, k = 4"] / variances["REINFORCE, no baseline"]).tolist(),
            at_most=1.0,
        ),
        measure(
            "Three other answers instead of the known mean cost a third of variance, k / (k - 1) (variance ratio)",
            "equation 3 of the card",
            (variances["RLOO, k = 4"] / variances["REINFORCE, known mean"]).tolist(),
            at_least=1.25,
            at_most=1.45,
        ),
        measure(
            "RLOO with k = 4 learns more than REINFORCE with the running mean (difference in reward)",
            f"{PAPER}, experiments",
            (final[rloo, 0.0] - final[METHODS[2], 0.0]).tolist(),
            at_least=0.0,
        ),
        measure(
            "RLOO with k = 4 learns more than with k = 2 (difference in reward)",
            f"{PAPER}, experiments",
            (final[rloo, 0.0] - final[METHODS[1], 0.0]).tolist(),
            at_least=0.0,
        ),
        measure(
            "RLOO with k = 4 learns more than RAFT from the same answers (difference in reward)",
            f"{PAPER}, experiments",
            (final[rloo, 0.0] - final[raft, 0.0]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Noise of standard deviation 3 in the rewards costs RAFT more than RLOO (difference in lost reward)",
            f"{PAPER}, on noisy rewards",
            (loss[raft] - loss[rloo]).tolist(),
            at_least=0.0,
        ),
    ]
    series = {"steps": [float(i) for i in range(steps + 1)]}
    series |= {method: curves[method].mean(0).tolist() for method in METHODS}
    series |= {"noise": list(NOISES)}
    series |= {f"{method}, final": [float(final[method, noise].mean()) for noise in NOISES] for method in METHODS}
    return Outcome(claims, series)


def _variances(rewards: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Total variance, times the number of answers, of gradient estimates at the uniform policy: name -> [runs].

    One prompt of each bandit. At the uniform policy the gradient of log pi(y) has the squared norm 1 - 1/n for every y.
    """
    rewards = rewards[:, 0]
    n = rewards.shape[1]
    squared = 1 - 1 / n
    exact = (rewards - rewards.mean(1, keepdim=True)) / n
    bias = exact.square().sum(1)
    found = {
        "REINFORCE, no baseline": rewards.square().mean(1) * squared - bias,
        "REINFORCE, known mean": rewards.var(1, correction=0) * squared - bias,
    }
    groups = 10_000
    for k in (2, 4):
        drawn = torch.randint(n, (len(rewards), groups * k), generator=generator)
        advantages = torch.stack([rloo_advantages(r[y], k) for r, y in zip(rewards, drawn, strict=True)])
        # sum_i A_i (one-hot(y_i) - 1/n) / k, and the A_i of a group sum to zero
        estimate = torch.zeros(len(rewards), groups, n, dtype=rewards.dtype)
        estimate.scatter_add_(2, drawn.view(-1, groups, k), advantages.view(-1, groups, k) / k)
        found[f"RLOO, k = {k}"] = k * estimate.var(1).sum(1)
    return found


def _train(method: str, rewards: Tensor, noise: float, steps: int, generator: torch.Generator) -> Tensor:
    """Exact rewards of the policies, 1 for the best answer of every prompt and 0 for the first policy.

    Returns:
        [rates, runs, steps + 1].
    """
    runs = len(rewards)
    logits = [torch.zeros(runs, PROMPTS, ANSWERS, requires_grad=True) for _ in RATES]
    optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(logits, RATES, strict=True)])
    wide = rewards.repeat(len(RATES), 1, 1)
    start = wide.mean((1, 2))
    scale = wide.amax(2).mean(1) - start
    baselines = [RunningBaseline()] * len(wide)
    scores = []
    for _ in range(steps):
        policy = torch.cat(logits)
        logp = policy.log_softmax(-1)
        scores.append(((logp.detach().exp() * wide).sum(-1).mean(1) - start) / scale)
        drawn = torch.multinomial(
            logp.detach().exp().flatten(0, 1), SAMPLES, replacement=True, generator=generator
        ).view(*policy.shape[:2], SAMPLES)
        seq_logps = logp.gather(2, drawn).flatten()
        verdicts = wide.gather(2, drawn)
        verdicts = verdicts + noise * torch.randn(verdicts.shape, generator=generator)
        optimiser.zero_grad()
        if method == METHODS[2]:
            shift = torch.tensor([b.mean for b in baselines])[:, None, None]
            loss = reinforce_loss(seq_logps, (verdicts - shift).flatten()).loss
            baselines = [b.update(v.flatten()) for b, v in zip(baselines, verdicts, strict=True)]
        elif method == METHODS[3]:
            loss = reinforce_loss(seq_logps, verdicts.flatten()).loss
        elif method == METHODS[4]:
            loss = raft_loss(seq_logps, verdicts.flatten(), SAMPLES).loss
        else:
            loss = rloo_loss(seq_logps, verdicts.flatten(), 2 if method == METHODS[1] else SAMPLES).loss
        loss.backward()
        optimiser.step()
    final = torch.cat(logits).detach().softmax(-1)
    scores.append(((final * wide).sum(-1).mean(1) - start) / scale)
    return torch.stack(scores, 1).view(len(RATES), runs, -1)


def draw(outcome: Outcome) -> Figure:
    """Reward during training, and after training from noisy rewards."""
    figure, (left, right) = panels(2)
    for method in METHODS:
        left.plot(outcome.series["steps"], outcome.series[method], label=method)
        right.plot(outcome.series["noise"], outcome.series[f"{method}, final"], marker="o", label=method)
    left.set(title="Four answers a prompt and step", xlabel="steps", ylabel="reward (0: start, 1: best)")
    right.set(title="From noisy rewards", xlabel="standard deviation of the noise", ylabel="reward after training")
    left.legend()
    return figure
