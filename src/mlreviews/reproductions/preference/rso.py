"""Do rejection samples follow the optimal policy, and do pairs of them train a better one?

A bandit of 200 answers with known probabilities and rewards. The law of accepted answers is compared with the optimum,
for growing pools of candidates. Then a log-linear policy, which can't represent the reward exactly, is trained by DPO
on pairs of answers of three kinds: as drawn, by rejection sampling, and the best of each pool.
Quick: 20 problems, fifteen seconds. Full: 60 problems and ten times the draws.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.rso import first_round_pairs, optimal_policy, rejection_sample
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2309.06657"
ANSWERS, FEATURES, BETA = 200, 12, 0.5
POOLS = (8, 16, 32, 64, 128, 256)
KINDS = {"as drawn": float("inf"), "rejection sampling": BETA, "best of the pool": 0.0}


def run(settings: Settings) -> Outcome:
    """Measures laws of accepted answers, and the value of the policies that are trained on them."""
    problems, draws = (60, 20000) if settings.full else (20, 2000)
    laws = {"1 sample": [_distance(pool, 1, draws, settings) for pool in POOLS]}
    laws["8 samples"] = [_distance(pool, 8, draws, settings) for pool in POOLS]
    values: dict[str, list[float]] = {name: [] for name in KINDS}
    for problem in settings.track(range(problems), "problems"):
        for name, beta in KINDS.items():
            values[name].append(_trained(beta, settings.generator(problem)))
    # what as many exact draws from the optimum would be off by
    reference, rewards = _small(settings)
    optimum = optimal_policy(reference, rewards, BETA)
    exact = torch.bincount(
        torch.multinomial(optimum, draws, replacement=True, generator=settings.generator(7)), minlength=8
    )
    noise = float((exact / draws - optimum).abs().sum() / 2)
    gain = {name: [v - d for v, d in zip(values[name], values["as drawn"], strict=True)] for name in KINDS}
    claims = [
        measure(
            "One sample of a pool of 64 follows the optimal policy (total variation beyond that of exact draws)",
            f"{PAPER}, section 3.2",
            laws["1 sample"][POOLS.index(64)] - noise,
            at_most=0.03,
        ),
        measure(
            "Eight of 64 still come near (total variation beyond that of exact draws)",
            f"{PAPER}, section 3.2",
            laws["8 samples"][POOLS.index(64)] - noise,
            at_most=0.1,
        ),
        measure(
            "Eight of 8 are the fine-tuned policy's own answers (total variation from it)",
            "equation 3 of the card",
            _distance(8, 8, draws, settings, from_reference=True) - noise,
            at_most=0.03,
        ),
        measure(
            "DPO on rejection samples ends at a better policy than on answers as drawn (gain in reward minus KL)",
            f"{PAPER}, table 1",
            gain["rejection sampling"],
            at_least=0,
        ),
        measure(
            "... and at a better one than on the best of each pool (difference in reward minus KL)",
            f"{PAPER}, section 3.2",
            [a - b for a, b in zip(values["rejection sampling"], values["best of the pool"], strict=True)],
            at_least=0,
        ),
    ]
    series = {"pool": [float(pool) for pool in POOLS]} | {f"distance, {name}": row for name, row in laws.items()}
    series |= {"distance, exact draws": [noise] * len(POOLS)} | {f"value, {name}": row for name, row in values.items()}
    return Outcome(claims, series)


def _small(settings: Settings) -> tuple[Tensor, Tensor]:
    """Log-probabilities and rewards of 8 answers, for laws that can be counted."""
    generator = settings.generator(99)
    reference = torch.randn(8, dtype=torch.float64, generator=generator).log_softmax(0)
    return reference, 0.5 * torch.randn(8, dtype=torch.float64, generator=generator)


def _distance(pool: int, samples: int, draws: int, settings: Settings, *, from_reference: bool = False) -> float:
    """Total variation of the law of accepted answers from the optimum, by counting."""
    reference, rewards = _small(settings)
    generator = settings.generator(pool * 100 + samples)
    counts = torch.zeros(8)
    for _ in range(draws // samples):
        candidates = torch.multinomial(reference.exp(), pool, replacement=True, generator=generator)
        kept = candidates[rejection_sample(rewards[candidates], samples, BETA, generator=generator)]
        counts += torch.bincount(kept, minlength=8)
    target = reference.exp() if from_reference else optimal_policy(reference, rewards, BETA)
    return float((counts / counts.sum() - target).abs().sum() / 2)


def _trained(beta: float, generator: torch.Generator) -> float:
    """Reward minus beta times KL of the log-linear policy that DPO fits to 8 of 64 answers, 100 times over."""
    features = torch.randn(ANSWERS, FEATURES, dtype=torch.float64, generator=generator) / FEATURES**0.5
    start = torch.randn(FEATURES, dtype=torch.float64, generator=generator)
    rewards = features @ torch.randn(FEATURES, dtype=torch.float64, generator=generator)
    rewards += 0.5 * features.prod(1).sign() + 0.5 * (features[:, 0] > 0.3)  # what no log-linear policy can tell
    reference = (features @ start).log_softmax(0)
    better, worse = [], []
    for _ in range(100):
        candidates = torch.multinomial(reference.exp(), 64, replacement=True, generator=generator)
        kept = candidates[rejection_sample(rewards[candidates], 8, beta, generator=generator)]
        coins = torch.rand(8, generator=generator, dtype=torch.float64)
        wins = coins < (rewards[kept] - rewards[kept].roll(-1)).sigmoid()  # against the next one
        pairs = torch.tensor(first_round_pairs(8, partial(_wins, wins)))
        better += kept[pairs[:, 0]].tolist()
        worse += kept[pairs[:, 1]].tolist()
    weights = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logps = (features @ weights).log_softmax(0)
        loss = dpo_loss(logps[better], logps[worse], reference[better], reference[worse], beta=BETA).losses.mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    logps = (features @ weights.detach()).log_softmax(0)
    return float((logps.exp() * (rewards - BETA * (logps - reference))).sum())


def _wins(wins: Tensor, first: int, second: int) -> bool:
    return bool(wins[first])


def draw(outcome: Outcome) -> Figure:
    """Distance of the law from the optimum, and the gain of policies trained on each kind of pairs."""
    figure, (law, value) = panels(2)
    series = outcome.series
    for name in ("1 sample", "8 samples"):
        law.loglog(series["pool"], series[f"distance, {name}"], marker="o", markersize=4, label=f"{name} kept")
    law.loglog(series["pool"], series["distance, exact draws"], color="0.4", linestyle=":", label="exact draws")
    law.set(title="Law of the accepted answers", xlabel="candidates", ylabel="total variation from the optimum")
    law.legend()
    for place, name in enumerate(KINDS):
        gains = [v - d for v, d in zip(series[f"value, {name}"], series["value, as drawn"], strict=True)]
        value.plot([place] * len(gains), gains, "o", alpha=0.5, markersize=4)
        mean = sum(gains) / len(gains)
        value.plot([place - 0.15, place + 0.15], [mean, mean], color="0.2")
    value.axhline(0, color="0.4", linestyle=":", linewidth=1)
    value.set_xticks(range(len(KINDS)), list(KINDS))
    value.set(title="DPO on pairs of these", ylabel="reward − β KL, gain over as drawn")
    return figure
