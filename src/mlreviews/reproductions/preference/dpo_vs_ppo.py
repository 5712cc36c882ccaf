"""What do DPO and PPO do with answers that the preference data do not cover?

First the counter-example of the paper, exactly. Then policies over 8 answers that share 5 features, trained on all
pairs of 4 of them; the other 4 are bad, and unlikely at first. DPO moves them along; PPO is trained by its exact
gradient, with the true reward or with a reward model that has learnt from the same pairs through features of its own.
DPO-Iter goes on half-way with pairs as its policy draws them, judged by the true reward.
Quick: 24 problems. Full: 200 problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.dpo_vs_ppo import dpo_optimal_policy, kl_optimal_policy
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2404.10719"
ANSWERS, COVERED, FEATURES, BETA = 8, 4, 5, 0.5
REWARDS = torch.tensor([3.0, 2.0, 1.0, 0.0, -2.0, -2.0, -2.0, -2.0])
PAIRS = torch.combinations(torch.arange(COVERED), 2)  # the first is the better one
METHODS = ("DPO", "DPO-Iter", "PPO, learnt reward", "PPO, true reward")


def run(settings: Settings) -> Outcome:
    """Measures the counter-example, then the mass of uncovered answers after training."""
    problems = 200 if settings.full else 24
    losses, masses = _counter_example()
    distance = _convergence(settings.generator())
    generator = settings.generator(1)
    features = torch.randn(problems, ANSWERS, FEATURES, generator=generator)
    other = torch.randn(problems, ANSWERS, FEATURES, generator=generator)
    prior = torch.log(torch.tensor([0.24] * COVERED + [0.01] * (ANSWERS - COVERED))).expand(problems, -1)
    steps = 300
    learnt = _learn_reward(other, steps)
    curves = dict(zip(METHODS[:2], _dpo(features, prior, steps), strict=True))
    curves |= {
        method: _ppo(features, prior, rewards, steps)
        for method, rewards in zip(METHODS[2:], (learnt, REWARDS.expand(problems, -1)), strict=True)
    }
    final = {method: curve[-1] for method, curve in curves.items()}
    claims = [
        measure(
            "Policies with 0.01 and 0.98 on an answer outside of the data have the same DPO loss of 1e-6 (difference)",
            f"{PAPER}, section 4",
            abs(losses[1] - losses[0]),
            at_most=1e-9,
            unit="nats",
        ),
        measure(
            "PPO's exact gradient leads to the one policy of the closed form from any start (largest difference)",
            f"{PAPER}, theorem 4.1",
            distance,
            at_most=1e-3,
        ),
        measure(
            "DPO gives answers outside of the data more mass than the reference's 0.04 (mean mass)",
            f"{PAPER}, section 4",
            final["DPO"].tolist(),
            at_least=0.04,
        ),
        measure(
            "PPO with the true reward gives them less (mean mass)",
            f"{PAPER}, section 4",
            final["PPO, true reward"].tolist(),
            at_most=0.04,
        ),
        measure(
            "PPO with a reward learnt from the same pairs gives them less than DPO (difference in mass)",
            f"{PAPER}, section 4",
            (final["DPO"] - final["PPO, learnt reward"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Iterating DPO on its own answers takes the mass from them (difference in mass)",
            f"{PAPER}, on DPO-Iter",
            (final["DPO"] - final["DPO-Iter"]).tolist(),
            at_least=0.0,
        ),
    ]
    series = {"steps": [float(i) for i in range(steps + 1)]}
    series |= {method: curve.mean(1).tolist() for method, curve in curves.items()}
    series |= {"DPO loss of the counter-example": losses, "mass outside": masses}
    return Outcome(claims, series)


def _counter_example() -> tuple[list[float], list[float]]:
    """DPO losses of two policies over three answers, and their masses outside of the pair."""
    reference = torch.tensor([0.5, 0.45, 0.05], dtype=torch.float64)
    policies = [dpo_optimal_policy(reference, 1e-6, mass, 1.0) for mass in (0.01, 0.98)]
    old = reference.log()[:, None]
    losses = [float(dpo_loss(p.log()[:1], p.log()[1:2], old[0], old[1], beta=1.0).losses) for p in policies]
    return losses, [float(p[2]) for p in policies]


def _convergence(generator: torch.Generator) -> float:
    """Largest difference in probability between exact-gradient PPO from ten starts and the closed form."""
    reference = torch.tensor([[0.5, 0.45, 0.05]]).expand(10, -1)
    rewards = torch.tensor([[1.0, 0.0, 0.5]]).expand(10, -1)
    logits = torch.randn(10, 3, generator=generator).requires_grad_()
    for _ in _descend(logits, lambda: _ppo_objective(logits, reference.log(), rewards), 600):
        pass
    best = kl_optimal_policy(reference, rewards, BETA)
    return float((logits.detach().softmax(-1) - best).abs().max())


def _ppo_objective(logits: Tensor, prior: Tensor, rewards: Tensor) -> Tensor:
    """Minus the exact expected reward with the KL penalty, summed over problems."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * (rewards - BETA * (logp - prior.log_softmax(-1)))).sum()


def _pair_loss(logp: Tensor, old: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """DPO's loss, weighted over pairs of each problem; problems don't share anything."""
    good, bad = pairs.unbind(-1)
    columns = (logp[:, good], logp[:, bad], old[:, good], old[:, bad])
    losses = dpo_loss(*(c.flatten() for c in columns), beta=BETA).losses.view(len(logp), -1)
    return (losses * weights).sum()


def _dpo(features: Tensor, prior: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mass outside of the data for DPO, and for DPO that goes over to its own pairs half-way, [steps + 1, problems]."""
    everything = torch.combinations(torch.arange(ANSWERS), 2)
    decided = everything[REWARDS[everything[:, 0]] > REWARDS[everything[:, 1]]]
    old = prior.log_softmax(-1)
    even = torch.full((len(prior), len(PAIRS)), 1 / len(PAIRS))

    def masses(switch: int) -> Tensor:
        weight = torch.zeros(len(features), FEATURES, 1, requires_grad=True)
        found = [_outside(prior)]

        def loss() -> Tensor:
            logp = (prior + (features @ weight)[..., 0]).log_softmax(-1)
            if len(found) <= switch:
                return _pair_loss(logp, old, even, PAIRS)
            chance = logp.detach().exp()
            drawn = chance[:, decided[:, 0]] * chance[:, decided[:, 1]]  # how often the policy draws the pair
            return _pair_loss(logp, old, drawn / drawn.sum(1, keepdim=True), decided)

        for _ in _descend(weight, loss, steps):
            found.append(_outside(prior + (features @ weight.detach())[..., 0]))
        return torch.stack(found)

    return masses(steps), masses(steps // 2)


def _learn_reward(features: Tensor, steps: int) -> Tensor:
    """Bradley-Terry rewards of all answers from the pairs, linear in features, with the margins that DPO gets."""
    weight = torch.zeros(len(features), FEATURES, 1, requires_grad=True)
    flat = torch.zeros(len(features), ANSWERS)

    def loss() -> Tensor:  # a reward is beta times DPO's log-ratio
        return _pair_loss((features @ weight)[..., 0], flat, torch.full((len(flat), len(PAIRS)), 1 / len(PAIRS)), PAIRS)

    for _ in _descend(weight, loss, steps):
        pass
    return BETA * (features @ weight.detach())[..., 0]


def _ppo(features: Tensor, prior: Tensor, rewards: Tensor, steps: int) -> Tensor:
    """Mass outside of the data, [steps + 1, problems]."""
    weight = torch.zeros(len(features), FEATURES, 1, requires_grad=True)
    masses = [_outside(prior)]
    for _ in _descend(weight, lambda: _ppo_objective(prior + (features @ weight)[..., 0], prior, rewards), steps):
        masses.append(_outside(prior + (features @ weight.detach())[..., 0]))
    return torch.stack(masses)


def _outside(logits: Tensor) -> Tensor:
    return logits.softmax(-1)[:, COVERED:].sum(1)


def _descend(parameter: Tensor, loss: Callable[[], Tensor], steps: int, rate: float = 0.03) -> Iterator[int]:
    """Adam on a loss that sums over independent problems, a step each time it is asked."""
    optimiser = torch.optim.Adam([parameter], lr=rate)
    for step in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        yield step


def draw(outcome: Outcome) -> Figure:
    """Mass of the answers that the data do not cover."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    for method in METHODS:
        axis.plot(outcome.series["steps"], outcome.series[method], label=method)
    axis.axhline(0.04, color="0.4", linestyle=":")
    axis.annotate("reference", (0, 0.04), xytext=(4, 3), textcoords="offset points", color="0.3")
    axis.set(title="Answers outside of the data", xlabel="steps", ylabel="mean probability")
    axis.legend()
    return figure
