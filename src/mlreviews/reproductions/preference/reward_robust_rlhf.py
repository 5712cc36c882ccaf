"""How much of the true reward is left when the best of n answers is taken by the robust reward of several heads?

Prompts and answers are vectors. The true reward prefers one direction for each prompt and punishes size. A reward model
that is linear in 64 random ReLU features is trained on 100 noisy comparisons; five heads with a mean and a standard
deviation each, linear in the same features, then learn its rewards of the same answers, every answer one head at a
time. Answers to choose from are spread wider than those of the training data.
Quick: 24 problems. Full: 200 problems.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.regularised_rm_ensembles import bt_reward_loss
from mlreviews.preference.reward_robust_rlhf import (
    GaussianRewards,
    assign_heads,
    brme_loss,
    gaussian_rewards,
    robust_reward,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2409.15360"
HEADS, FEATURES, PAIRS, PROMPT, ANSWER = 5, 64, 100, 3, 5
BUDGETS = (4, 16, 64, 256)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(settings: Settings) -> Outcome:
    """Trains a reward model and the heads on it, and takes the best of n by each reward."""
    problems = 200 if settings.full else 24
    generator = settings.generator()
    turn = torch.randn(problems, PROMPT, ANSWER, generator=generator)
    inner = torch.randn(problems, PROMPT + ANSWER + 1, FEATURES, generator=generator) / 3

    def truth(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ turn).tanh() * y).sum(-1) - 0.3 * y.square().sum(-1)

    def features(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(torch.cat([x, y, torch.ones_like(x[..., :1])], -1) @ inner) / FEATURES**0.5

    x = torch.randn(problems, PAIRS, PROMPT, generator=generator)
    pair = torch.randn(2, problems, PAIRS, ANSWER, generator=generator)
    first = torch.rand(problems, PAIRS, generator=generator) < (truth(x, pair[0]) - truth(x, pair[1])).sigmoid()
    chosen, rejected = torch.where(first[..., None], pair, pair.flip(0))
    seen = torch.cat([features(x, chosen), features(x, rejected)], 1)
    standard = _bradley_terry(seen, generator)
    start = torch.randn(HEADS, problems, FEATURES, 2, generator=generator)
    heads = _heads(start, seen, (seen @ standard)[..., 0], generator)

    prompts = torch.randn(problems, 8, 1, PROMPT, generator=generator).expand(-1, -1, BUDGETS[-1], -1).flatten(1, 2)

    def judged(spread: float) -> tuple[Tensor, Tensor, GaussianRewards]:
        """Of new answers: true rewards, the reward model's, and those of the heads."""
        y = spread * torch.randn(problems, 8 * BUDGETS[-1], ANSWER, generator=generator)
        h = features(prompts, y)
        return truth(prompts, y), (h @ standard)[..., 0], gaussian_rewards(h @ heads)

    _, near, near_heads = judged(1.0)
    gold, single, far = judged(1.5)
    _, outside, outside_heads = judged(2.5)
    rewards = {f"robust, λ = {share:g}": robust_reward(*far, share) for share in SHARES}
    rewards["reward model"] = single
    left = {name: torch.stack([_share(gold, r, n) for n in BUDGETS]) for name, r in rewards.items()}
    final = {name: value[-1] for name, value in left.items()}
    doubt = outside_heads.sigma[0], (outside_heads.mu[0] - outside).abs()
    claims = [
        measure(
            "The heads differ more on answers unlike the training data (spread of rewards, 2.5 times as wide / alike)",
            f"{PAPER}, uncertainty",
            (_disagreement(outside_heads, outside) / _disagreement(near_heads, near)).tolist(),
            at_least=1.0,
        ),
        measure(
            "The best of 256 by the robust reward (λ = 0.5) keeps more of the true reward than by the reward model",
            f"{PAPER}, experiments",
            (final["robust, λ = 0.5"] - final["reward model"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and more than by the nominal reward, the surest head's (λ = 1)",
            f"{PAPER}, experiments",
            (final["robust, λ = 0.5"] - final["robust, λ = 1"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and more than by the lowest head (λ = 0)",
            f"{PAPER}, on λ",
            (final["robust, λ = 0.5"] - final["robust, λ = 0"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "A head's σ says where it is off: correlation with the distance of its mean from what it was to learn",
            f"{PAPER}, uncertainty",
            _correlation(*doubt).tolist(),
            at_least=0.0,
        ),
        measure(
            "The squared error drives σ towards 0 (mean over training answers, after / before)",
            "ours: the expected loss is least at σ = 0",
            (
                gaussian_rewards(seen @ heads).sigma.mean((0, 2)) / gaussian_rewards(seen @ start).sigma.mean((0, 2))
            ).tolist(),
            at_most=0.5,
        ),
    ]
    series = {name: value.mean(1).tolist() for name, value in left.items()}
    return Outcome(claims, {"n": [float(n) for n in BUDGETS], "share": list(SHARES)} | series)


def _bradley_terry(seen: Tensor, generator: torch.Generator) -> Tensor:
    """Weights [problems, FEATURES, 1] of a reward; the first half of the answers are preferred to the second."""
    weight = torch.randn(len(seen), FEATURES, 1, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.05)
    for _ in range(150):
        rewards = (seen @ weight)[..., 0]
        optimiser.zero_grad()
        loss = bt_reward_loss(rewards[:, :PAIRS].flatten(), rewards[:, PAIRS:].flatten()).losses
        (loss.sum() / PAIRS).backward()
        optimiser.step()
    return weight.detach()


def _heads(start: Tensor, seen: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """Weights [HEADS, problems, FEATURES, 2], trained on the reference's rewards of the answers."""
    weight = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.05)
    for _ in range(200):
        outputs = gaussian_rewards(seen @ weight)
        chosen = assign_heads(reference.numel(), HEADS, generator=generator)
        losses = brme_loss(
            outputs.mu.flatten(1), outputs.sigma.flatten(1), chosen, reference.flatten(), generator=generator
        )
        optimiser.zero_grad()
        (losses.sum() / PAIRS).backward()
        optimiser.step()
    return weight.detach()


def _disagreement(heads: GaussianRewards, reference: Tensor) -> Tensor:
    """Standard deviation over heads, as a share of that of rewards over answers, [problems]."""
    return heads.mu.var(0).mean(1).sqrt() / reference.std(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def _share(truth: Tensor, reward: Tensor, n: int) -> Tensor:
    """True reward of what a reward takes from the first n answers, [problems]: 0 for a random one, 1 for the best."""
    truth, reward = (r.view(len(r), -1, BUDGETS[-1])[..., :n] for r in (truth, reward))
    taken = truth.gather(-1, reward.argmax(-1, keepdim=True))[..., 0].mean(1)
    middle = truth.mean((1, 2))
    return (taken - middle) / (truth.amax(-1).mean(1) - middle)


def draw(outcome: Outcome) -> Figure:
    """What is left of the true reward, against the number of answers and against lambda."""
    figure, (left, right) = panels(2)
    series = outcome.series
    for name in ("reward model", "robust, λ = 0", "robust, λ = 0.5", "robust, λ = 1"):
        left.semilogx(series["n"], series[name], base=2, marker="o", label=name)
    left.set(title="Best of n", xlabel="answers to choose from", ylabel="true reward (1: best answer)")
    left.legend()
    right.plot(series["share"], [series[f"robust, λ = {s:g}"][-1] for s in series["share"]], marker="o", label="robust")
    right.axhline(series["reward model"][-1], color="C1", linestyle=":", label="reward model")
    right.set(
        title=f"Best of {BUDGETS[-1]}", xlabel="λ (0: lowest head, 1: surest)", ylabel="true reward (1: best answer)"
    )
    right.legend()
    return figure
