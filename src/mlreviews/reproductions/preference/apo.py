"""Where does DPO lower the likelihood of the preferred answer, and do the anchors of APO prevent it?

Two settings: log-linear policies over 40 answers, where pairs are close neighbours in feature space and all
probabilities are known; and the shipped byte model, fine-tuned on lines of Python against copies with two letters
exchanged, which are pairs as CLAIR makes them.
Quick: 20 problems and 3 fine-tunings a loss, half a minute. Full: 100 and 10.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import load_pretrained
from mlreviews.preference.apo import apo_down_loss, apo_zero_loss
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.logps import sequence_logps
from mlreviews.preference.losses import PreferenceLoss
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.06266"
LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "DPO": dpo_loss,
    "APO-zero": apo_zero_loss,
    "APO-down": apo_down_loss,
}
Changes = dict[str, list[tuple[float, float]]]
PROMPT, ANSWER = 48, 24


def run(settings: Settings) -> Outcome:
    """Measures how the log-likelihoods of both answers change under each loss."""
    problems, tunings = (100, 10) if settings.full else (20, 3)
    toy: Changes = {name: [] for name in LOSSES}
    text: Changes = {name: [] for name in LOSSES}
    for problem in settings.track(range(problems), "log-linear policies"):
        for name, loss in LOSSES.items():
            toy[name].append(_log_linear(loss, settings.generator(problem)))
    for tuning in settings.track(range(tunings), "fine-tunings of a byte model"):
        for name, loss in LOSSES.items():
            text[name].append(_byte_model(loss, settings.generator(1000 + tuning)))
    claims = []
    for found, where in ((toy, "log-linear policies"), (text, "a byte model")):
        chosen = {name: [c for c, _ in values] for name, values in found.items()}
        rejected = {name: [r for _, r in values] for name, values in found.items()}
        claims += [
            measure(
                f"DPO lowers the likelihood of the preferred answer, {where} (change)",
                f"{PAPER}, section 2",
                chosen["DPO"],
                at_most=0,
                unit="nats",
            ),
            measure(
                f"APO-zero raises it, {where} (change)",
                f"{PAPER}, section 4",
                chosen["APO-zero"],
                at_least=0,
                unit="nats",
            ),
            measure(
                f"APO-down lowers it, {where} (change)",
                f"{PAPER}, section 4",
                chosen["APO-down"],
                at_most=0,
                unit="nats",
            ),
            measure(
                f"... and the rejected one further, {where} (change of the margin)",
                f"{PAPER}, section 4",
                [c - r for c, r in zip(chosen["APO-down"], rejected["APO-down"], strict=True)],
                at_least=0,
                unit="nats",
            ),
        ]
    series = {}
    for setting, found in (("toy", toy), ("text", text)):
        for name, values in found.items():
            series[f"{setting}, {name}, chosen"] = [c for c, _ in values]
            series[f"{setting}, {name}, rejected"] = [r for _, r in values]
    return Outcome(claims, series)


def _log_linear(loss: Callable[..., PreferenceLoss], generator: torch.Generator) -> tuple[float, float]:
    """Mean change of the log-likelihood of chosen and rejected answers, over 5 pairs of neighbours."""
    features = torch.nn.functional.normalize(torch.randn(40, 10, dtype=torch.float64, generator=generator), dim=1)
    start = torch.randn(10, dtype=torch.float64, generator=generator)
    chosen = torch.randperm(40, generator=generator)[:5]
    # the answer most like the chosen one, itself excepted
    likeness = (features @ features.T).fill_diagonal_(-1)
    rejected = likeness[chosen].argmax(1)
    reference = (features @ start).log_softmax(0)
    weights = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=0.05)
    for _ in range(200):
        logps = (features @ weights).log_softmax(0)
        found = loss(logps[chosen], logps[rejected], reference[chosen], reference[rejected], beta=0.5)
        optimiser.zero_grad()
        found.losses.mean().backward()
        optimiser.step()
    change = (features @ weights.detach()).log_softmax(0) - reference
    return float(change[chosen].mean()), float(change[rejected].mean())


def _byte_model(loss: Callable[..., PreferenceLoss], generator: torch.Generator) -> tuple[float, float]:
    """Mean change of the log-likelihood of 8 pairs of texts, after 20 steps of fine-tuning on them."""
    policy = load_pretrained("python-draft").train()
    reference = copy.deepcopy(policy).requires_grad_(False)
    windows = next(python_source().validation.batches(PROMPT + ANSWER - 1, 8, generator))
    pairs = torch.cat([windows, _revised(windows, generator)])
    mask = (torch.arange(1, pairs.shape[1]) >= PROMPT).expand(len(pairs), -1)

    def logps(model: torch.nn.Module) -> Tensor:
        return sequence_logps(model(pairs[:, :-1]).logits, pairs[:, 1:], mask)

    before = logps(reference)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)
    for _ in range(20):
        found = loss(*logps(policy).chunk(2), *before.chunk(2), beta=0.1)
        optimiser.zero_grad()
        found.losses.mean().backward()
        optimiser.step()
    with torch.no_grad():
        chosen, rejected = (logps(policy) - before).chunk(2)
    return float(chosen.mean()), float(rejected.mean())


def _revised(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Copies in whose answers the first two neighbouring bytes that differ, from a random place on, are exchanged."""
    copies = windows.clone()
    length = windows.shape[1]
    for row in copies:
        first = PROMPT + int(torch.randint(ANSWER // 2, (), generator=generator))
        place = next((i for i in range(first, length - 1) if row[i] != row[i + 1]), length - 2)
        row[place], row[place + 1] = row[place + 1].clone(), row[place].clone()
    return copies


def draw(outcome: Outcome) -> Figure:
    """Changes of both log-likelihoods, a point a problem."""
    figure, axes = panels(2)
    titles = ("Log-linear policies, similar answers", "Byte model, one pair of letters exchanged")
    for axis, setting, title in zip(axes, ("toy", "text"), titles, strict=True):
        for place, name in enumerate(LOSSES):
            for offset, which in ((-0.15, "chosen"), (0.15, "rejected")):
                values = outcome.series[f"{setting}, {name}, {which}"]
                colour = COLOURS[0] if which == "chosen" else COLOURS[1]
                axis.plot([place + offset] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
                mean = sum(values) / len(values)
                label = which if place == 0 else None
                axis.plot([place + offset - 0.1, place + offset + 0.1], [mean, mean], color=colour, label=label)
        axis.axhline(0, color="0.4", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(LOSSES)), list(LOSSES))
        axis.set(title=title, ylabel="change of log-likelihood (nats)")
    axes[0].legend()
    return figure
