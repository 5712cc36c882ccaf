"""Does DPO find the optimal policy from preferences alone, and where does it need its family?

A bandit of 12 answers, whose preferences are taken with their exact probabilities instead of being sampled. Policies
are tables, trained to convergence, and compared with the optimum that a known reward has.
Quick: 10 problems, ten seconds. Full: 40 problems.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.dpo import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss, smoothed_dpo_loss
from mlreviews.preference.losses import PreferenceLoss
from mlreviews.preference.rso import optimal_policy
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPO = "arXiv:2305.18290"
IPO = "arXiv:2310.12036"
ROBUST = "arXiv:2403.00409"
ANSWERS, BETA = 12, 0.5
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
Loss = Callable[..., PreferenceLoss]


def run(settings: Settings) -> Outcome:
    """Measures distances from the optimum, with and without flipped labels, and margins under certain preferences."""
    problems = 40 if settings.full else 10
    draws = torch.stack(
        [torch.randn(2, ANSWERS, dtype=torch.float64, generator=settings.generator(p)) for p in range(problems)]
    )
    reference, rewards = draws[:, 0].log_softmax(1), draws[:, 1]
    optimum = optimal_policy(reference, rewards, BETA)
    chance = (rewards[:, :, None] - rewards[:, None]).sigmoid()
    distances: dict[str, list[list[float]]] = {"DPO": [], "cDPO": [], "robust DPO": []}
    for flip in settings.track(FLIPS, "rates of flips"):
        seen = (1 - flip) * chance + flip * chance.mT
        for name, found in distances.items():
            loss: Loss = dpo_loss
            if name == "cDPO":
                loss = partial(smoothed_dpo_loss, label_smoothing=flip)
            elif name == "robust DPO":
                loss = partial(robust_dpo_loss, label_smoothing=flip)
            policy = _fit(partial(loss, beta=BETA), reference, seen).exp()
            found.append(((policy - optimum).abs().sum(1) / 2).tolist())
    margins = {name: _certain(loss) for name, loss in _FAMILY.items()}
    clean = distances["DPO"][0]
    noisy = {name: rows[FLIPS.index(0.3)] for name, rows in distances.items()}
    claims = [
        measure(
            "DPO on exact preferences ends at the policy that is optimal for their reward (total variation)",
            f"{DPO}, theorem 1",
            clean,
            at_most=1e-3,
        ),
        measure(
            "With 30 % of the labels flipped it does not (total variation)",
            f"{ROBUST}, section 3",
            noisy["DPO"],
            at_least=0.05,
        ),
        measure(
            "Robust DPO with the right rate of flips does (total variation)",
            f"{ROBUST}, lemma 3.1",
            noisy["robust DPO"],
            at_most=1e-3,
        ),
        measure(
            "Conservative DPO is further from it than plain DPO (ratio of the distances)",
            f"{ROBUST}, section 3",
            [a / b for a, b in zip(noisy["cDPO"], noisy["DPO"], strict=True)],
            at_least=1,
        ),
        measure(
            "Under a certain preference the margin of DPO has no limit (growth from step 125 to 500)",
            f"{IPO}, section 4.2",
            margins["DPO"][-1] / margins["DPO"][len(margins["DPO"]) // 4],
            at_least=1.1,
        ),
        measure(
            "IPO's margin ends where it is set to, at 1 / (2 beta) (ratio)",
            f"{IPO}, section 5",
            margins["IPO"][-1] * 2 * BETA,
            at_least=0.99,
            at_most=1.01,
        ),
    ]
    series = {"rate of flips": list(FLIPS)}
    series |= {f"distance, {name}": torch.tensor(rows).mean(1).tolist() for name, rows in distances.items()}
    series["step"] = [float(step) for step in range(0, STEPS + 1, 5)]
    series |= {f"margin, {name}": values for name, values in margins.items()}
    return Outcome(claims, series)


STEPS = 500
_FAMILY: dict[str, Loss] = {
    "DPO": dpo_loss,
    "cDPO": partial(smoothed_dpo_loss, label_smoothing=0.1),
    "hinge": hinge_loss,
    "IPO": ipo_loss,
}


def _fit(loss: Loss, reference: Tensor, chance: Tensor) -> Tensor:
    """Log-probabilities of the tables that minimise the expected loss over all pairs, by L-BFGS.

    Args:
        loss: of pairs.
        reference: [problems, answers], log-probabilities.
        chance: [problems, answers, answers], how often the row's answer is preferred to the column's.
    """
    first, second = torch.triu_indices(ANSWERS, ANSWERS, 1)
    # a pair is seen either way round, as often as its preference comes out so
    better, worse = torch.cat([first, second]), torch.cat([second, first])
    weights = chance[:, better, worse].flatten()
    ref = reference[:, better].flatten(), reference[:, worse].flatten()
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=150, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logps = logits.log_softmax(1)
        value = (weights * loss(logps[:, better].flatten(), logps[:, worse].flatten(), *ref).losses).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().log_softmax(1)


def _certain(loss: Loss) -> list[float]:
    """Margin of log ratios of the only pair of two answers, one always preferred, at every 5th step of Adam."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = torch.full((2,), 0.5, dtype=torch.float64).log()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    margins = []
    for step in range(STEPS + 1):
        logps = logits.log_softmax(0)
        if step % 5 == 0:
            margins.append(float((logps[0] - logps[1]).detach()))
        found = loss(logps[:1], logps[1:], reference[:1], reference[1:], beta=BETA)
        optimiser.zero_grad()
        found.losses.sum().backward()
        optimiser.step()
    return margins


def draw(outcome: Outcome) -> Figure:
    """Distance from the optimum against the rate of flips, and margins over the steps."""
    figure, (noise, growth) = panels(2)
    series = outcome.series
    for name in ("DPO", "cDPO", "robust DPO"):
        noise.plot(series["rate of flips"], series[f"distance, {name}"], marker="o", markersize=4, label=name)
    noise.set(title="Flipped labels", xlabel="rate of flips", ylabel="total variation from the optimum")
    noise.legend()
    for name in _FAMILY:
        growth.plot(series["step"], series[f"margin, {name}"], label=name)
    growth.set(title="A certain preference", xlabel="step", ylabel="margin of log ratios (nats)")
    growth.legend()
    return figure
