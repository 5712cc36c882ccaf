"""What does training for the best of N samples do to a policy, against training for one?

Questions of two kinds that look the same: two of 12 ways to answer work, each for one kind only (60 and 40 of 100
questions). A policy of one table is trained by the exact gradient of pass@N, and by samples with the weights of both
estimators; and by maximum likelihood, plain and BoN-aware, on expert answers.
Quick: 12 runs of the sampled training. Full: 40 runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.bon_aware_sft import (
    bon_distribution,
    bon_tilt,
    centred_pass_weights,
    pass_weights,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2412.15287"
WAYS, N, GROUP = 12, 8, 16
KINDS = torch.tensor([0.6, 0.4])  # way 0 solves the first kind, way 1 the second, and no other way any
SAMPLED = {"N = 1": (1, pass_weights), "N = 8, passes": (N, pass_weights), "N = 8, centred": (N, centred_pass_weights)}


def run(settings: Settings) -> Outcome:
    """Trains policies for one sample and for eight, and compares what they pass with each number of samples."""
    runs, steps = (40, 1200) if settings.full else (12, 400)
    exact = {n: _exact(n, steps) for n in (1, N)}
    budgets = [2**i for i in range(6)]
    series = {"samples": [float(b) for b in budgets]}
    series |= {f"exact gradient, N = {n}": [float(_passes(p, b)) for b in budgets] for n, p in exact.items()}
    sampled = {}
    for name in settings.track(SAMPLED, "estimators"):
        sampled[name] = _sampled(name, runs, steps, settings.generator())
        series[f"sampled, {name}"] = [float(_passes(sampled[name], b).mean()) for b in budgets]
    plain, aware = (_likelihood(n, steps) for n in (1, N))
    entropy = {n: float(-(p * p.log()).sum()) for n, p in exact.items()}
    one, passes, centred = (_passes(p, N) for p in sampled.values())
    claims = [
        measure(
            "Trained for the best of 8, a policy keeps more entropy than trained for one (exact gradient, difference)",
            f"{PAPER}, experiments",
            entropy[N] - entropy[1],
            at_least=0.1,
            unit="nats",
        ),
        measure(
            "... passes more with 8 samples (difference)",
            f"{PAPER}, experiments",
            float(_passes(exact[N], N) - _passes(exact[1], N)),
            at_least=0.05,
        ),
        measure(
            "... and pays for it with one (difference)",
            f"{PAPER}, experiments",
            float(_passes(exact[N], 1) - _passes(exact[1], 1)),
            at_most=0.0,
        ),
        measure(
            "The same from samples, weighted without bias (passes with 8 samples, N = 8 minus N = 1)",
            f"{PAPER}, on reinforcement learning",
            (passes - one).tolist(),
            at_least=0.0,
        ),
        measure(
            "Failures as a baseline do not hurt (passes with 8 samples, centred minus passes alone)",
            f"{PAPER}, on reinforcement learning",
            (centred - passes).tolist(),
            at_least=-0.02,
        ),
        measure(
            "BoN-aware likelihood passes at least as much with 8 samples as plain likelihood (difference)",
            f"{PAPER}, experiments",
            float(_chosen_right(aware) - _chosen_right(plain)),
            at_least=0.0,
        ),
        measure(
            "The tilted policy is close to the exact best of 8 (total variation, 12 answers, no ties)",
            f"{PAPER}, on the variational approximation",
            _approximation(settings.generator(1)),
            at_most=0.1,
        ),
    ]
    return Outcome(claims, series)


def _passes(policies: Tensor, n: int) -> Tensor:
    """Share of questions with at least one right answer among n draws, exactly."""
    return (KINDS * (1 - (1 - policies[..., :2]) ** n)).sum(-1)


def _exact(n: int, steps: int) -> Tensor:
    logits = torch.zeros(WAYS, requires_grad=True)
    _descend(logits, lambda: -_passes(logits.softmax(0), n), steps)
    return logits.detach().softmax(0)


def _sampled(name: str, runs: int, steps: int, generator: torch.Generator) -> Tensor:
    """Policies [runs, ways] after training on four questions of 16 answers a step."""
    n, weights = SAMPLED[name]
    logits = torch.zeros(runs, WAYS, requires_grad=True)

    def loss() -> Tensor:
        logp = logits.log_softmax(-1)
        drawn = torch.multinomial(logp.detach().exp(), 4 * GROUP, replacement=True, generator=generator)
        kinds = (torch.rand(runs, 4, generator=generator) < KINDS[1]).long().repeat_interleave(GROUP, 1)
        verdicts = (drawn == kinds).float().flatten()
        return -(weights(verdicts, GROUP, n) * logp.gather(1, drawn).flatten()).sum() / drawn.shape[1]

    _descend(logits, loss, steps)
    return logits.detach().softmax(-1)


def _likelihood(n: int, steps: int) -> Tensor:
    """A policy trained on expert answers: of the right way in nine cases of ten, of any in the tenth; exact means."""
    logits = torch.zeros(WAYS, requires_grad=True)
    right = torch.eye(WAYS)[:2]
    experts = 0.9 * right + 0.1 / WAYS
    tilt = bon_tilt(n)

    def loss() -> Tensor:
        policy = logits.softmax(0)
        # A right answer beats or equals every other, a wrong one equals the wrong ones.
        wins = torch.where(right > 0, 1.0, 1 - policy[:2, None])
        log_z = (policy * (tilt * wins).exp()).sum(1).log()
        likelihood = (experts * (policy.log() + tilt * wins)).sum(1) - log_z
        return -(KINDS * likelihood).sum()

    _descend(logits, loss, steps)
    return logits.detach().softmax(0)


def _chosen_right(policy: Tensor) -> Tensor:
    """Chance that the best of eight draws by the true verdict is right."""
    verdicts = torch.eye(WAYS)[:2]
    chosen = bon_distribution(policy.expand(2, -1), verdicts, N)
    return (KINDS * (chosen * verdicts).sum(-1)).sum()


def _approximation(generator: torch.Generator) -> float:
    """Total variation between the tilted policy and the exact best of eight, for a random policy and random scores."""
    policy = torch.randn(WAYS, dtype=torch.float64, generator=generator).softmax(0)
    scores = torch.randn(WAYS, dtype=torch.float64, generator=generator)
    wins = ((scores[:, None] >= scores) * policy).sum(1)
    tilted = policy * (bon_tilt(N) * wins).exp()
    return float((tilted / tilted.sum() - bon_distribution(policy, scores, N)).abs().sum() / 2)


def _descend(parameter: Tensor, loss: Callable[[], Tensor], steps: int) -> None:
    optimiser = torch.optim.Adam([parameter], lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def draw(outcome: Outcome) -> Figure:
    """What is passed with each number of samples."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    for name, values in outcome.series.items():
        if name != "samples":
            style = "-" if name.startswith("exact") else "--"
            axis.semilogx(outcome.series["samples"], values, style, base=2, marker="o", markersize=4, label=name)
    axis.set(title="Trained for one sample or for eight", xlabel="samples drawn", ylabel="share of questions passed")
    axis.set_ylim(0.1, 1.05)
    axis.legend()
    return figure
