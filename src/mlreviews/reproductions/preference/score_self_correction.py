"""Does a model learn to correct its answers from two stages and a bonus, and what does each of them do?

Questions of four kinds have four possible answers, one of which is right with probability 0.5, 0.3, 0.15 or 0.05 by its
rank in the kind. With the first attempt before it a model sees a sign of its correctness, which is true 4 times in 5:
at best 0.5 of first attempts are right, and 0.65 of the second ones. One small network gives both attempts. At the
start its first attempts are half guesses, and its second ones repeat the first 9 times in 10. Accuracies are exact.
Quick: 16 networks, 300 steps with 16 pairs of attempts at each kind. Full: 60 networks, 1500 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.score_self_correction import score_first_stage_loss, score_second_stage_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2409.12917"
KINDS = ANSWERS = 4
SIGN, HIDDEN, GROUP, RATE, EVERY = 0.8, 32, 16, 3e-3, 10
# Being right, by kind and answer: the ranks are shifted from kind to kind.
RIGHT = torch.stack([torch.tensor([0.5, 0.3, 0.15, 0.05]).roll(kind) for kind in range(KINDS)])
# Share of the steps that is stage I, alpha and gamma.
METHODS = {
    "SCoRe": (0.5, 10.0, 0.0),
    "without bonus": (0.5, 0.0, 0.0),
    "without stage I": (0.0, 10.0, 0.0),
    "without either": (0.0, 0.0, 0.0),
    "SCoRe, gamma = 1": (0.5, 10.0, 1.0),
}


def run(settings: Settings) -> Outcome:
    """Trains the same networks by each method."""
    runs, steps = (60, 1500) if settings.full else (16, 300)
    start = _start(runs, settings.generator())
    histories = {
        method: _train(start, steps, *choice, settings.generator(1))
        for method, choice in settings.track(METHODS.items(), "methods")
    }
    first, second, changed = (
        {method: history[:, i] for method, history in histories.items()} for i in range(3)
    )  # [points, runs]
    gain = {method: (second[method] - first[method])[-1] for method in METHODS}
    before, middle = (histories["SCoRe"][i] for i in (0, steps // 2 // EVERY))
    claims = [
        measure(
            "Stage I leaves the first attempts as they were (change of accuracy)",
            f"{PAPER}, section 5.1",
            (middle[0] - before[0]).tolist(),
            at_least=-0.02,
            at_most=0.02,
        ),
        measure(
            "... while the second ones improve (change of accuracy)",
            f"{PAPER}, section 5.1",
            (middle[1] - before[1]).tolist(),
            at_least=0.0,
        ),
        measure(
            "After stage II the second attempts are better than the first ones (gain in accuracy)",
            f"{PAPER}, table 2: 0.044",
            gain["SCoRe"].tolist(),
            at_least=0.0,
        ),
        measure(
            "... by more than without the bonus (difference of gains)",
            f"{PAPER}, table 4",
            (gain["SCoRe"] - gain["without bonus"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and than without stage I (difference of gains)",
            f"{PAPER}, table 4",
            (gain["SCoRe"] - gain["without stage I"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Its second attempts are better than those without the bonus (difference in accuracy)",
            f"{PAPER}, table 4",
            (second["SCoRe"] - second["without bonus"])[-1].tolist(),
            at_least=0.0,
        ),
        measure(
            "Plain reinforcement learning on both attempts falls back to repeating the first one (answers changed)",
            f"{PAPER}, section 4",
            changed["without either"][-1].tolist(),
            at_most=0.1,
        ),
        measure(
            "The likelihood of corrections alone gains less than SCoRe (difference of gains)",
            f"{PAPER}, table 1, Pair-SFT",
            (gain["SCoRe"] - _pair_sft_gain(start)).tolist(),
            at_least=0.0,
        ),
        measure(
            "Credited with the bonus, first attempts get worse than they were (change of accuracy, gamma = 1)",
            "eq. (2) of the card, ours",
            (first["SCoRe, gamma = 1"][-1] - before[0]).tolist(),
            at_most=0.0,
        ),
    ]
    series = {"steps": [float(i) for i in range(0, steps + 1, EVERY)]}
    for method in METHODS:
        series[f"first, {method}"] = first[method].mean(1).tolist()
        series[f"second, {method}"] = second[method].mean(1).tolist()
        series[f"changed, {method}"] = changed[method].mean(1).tolist()
    return Outcome(claims, series)


def _inputs() -> Tensor:
    """[situations, features]: first attempts at each kind, then second ones by kind, first attempt and sign."""
    kinds, answers, signs = torch.eye(KINDS), torch.eye(ANSWERS), torch.eye(2)
    first = [torch.cat([torch.ones(1), k, torch.zeros(ANSWERS + 2)]) for k in kinds]
    second = [torch.cat([torch.zeros(1), k, a, s]) for k in kinds for a in answers for s in signs]
    return torch.stack(first + second)


INPUTS = _inputs()


def _policy(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of first [runs, kinds, answers] and second attempts [runs, kinds, answers, signs, answers]."""
    into, out = weights
    logp = ((INPUTS @ into).tanh() @ out).log_softmax(-1)
    return logp[:, :KINDS], logp[:, KINDS:].view(-1, KINDS, ANSWERS, 2, ANSWERS)


def _start(runs: int, generator: torch.Generator) -> list[Tensor]:
    """Networks that answer as described, by likelihood."""
    into = torch.randn(runs, INPUTS.shape[1], HIDDEN, generator=generator)
    out = torch.randn(runs, HIDDEN, ANSWERS, generator=generator) / HIDDEN**0.5
    weights = [into.requires_grad_(), out.requires_grad_()]
    first = (RIGHT + 1 / ANSWERS) / 2
    second = 0.9 * torch.eye(ANSWERS) + 0.1 / ANSWERS  # by first attempt, whatever kind and sign
    optimiser = torch.optim.Adam(weights, lr=0.01)
    for _ in range(300):
        one, two = _policy(weights)
        loss = -(first * one).sum() - (second[:, None] * two).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [w.detach() for w in weights]


def _train(
    start: list[Tensor], steps: int, share: float, alpha: float, gamma: float, generator: torch.Generator
) -> Tensor:
    """Accuracies of both attempts and the share of answers changed, [points, 3, runs]."""
    weights = [w.clone().requires_grad_() for w in start]
    runs = len(start[0])
    reference = _policy(start)
    optimiser = torch.optim.Adam(weights, lr=RATE)
    history = []
    for step in range(steps):
        one, two = _policy(weights)
        if step % EVERY == 0:
            history.append(_measures(one.detach().exp(), two.detach().exp()))
        # Attempts at one kind in one run stand together.
        run = torch.arange(runs).repeat_interleave(KINDS * GROUP)
        kind = torch.arange(KINDS).repeat_interleave(GROUP).repeat(runs)
        right = _draw(RIGHT[kind], generator)
        y1 = _draw(one.detach()[run, kind].exp(), generator)
        true = torch.rand(len(run), generator=generator) < SIGN
        sign = ((y1 == right) == true).long()
        y2 = _draw(two.detach()[run, kind, y1, sign].exp(), generator)
        at, again = (run, kind, y1), (run, kind, y1, sign, y2)
        logps = one[at], two[again], reference[0][at], reference[1][again]
        r1, r2 = (y1 == right).float(), (y2 == right).float()
        normaliser = KINDS * GROUP  # a run's own mean: runs don't share anything
        if step < share * steps:
            loss = score_first_stage_loss(*logps, r2, GROUP, gamma=gamma, normaliser=normaliser).loss
        else:
            loss = score_second_stage_loss(*logps, r1, r2, GROUP, alpha=alpha, gamma=gamma, normaliser=normaliser).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    history.append(_measures(*(x.detach().exp() for x in _policy(weights))))
    return torch.stack(history)


def _draw(chances: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def _measures(first: Tensor, second: Tensor) -> Tensor:
    """Exact accuracies and share of answers changed, [3, runs], from probabilities."""
    same = torch.eye(ANSWERS)
    sign = torch.stack([SIGN + (1 - 2 * SIGN) * same, 1 - SIGN + (2 * SIGN - 1) * same], -1)  # [y1, right, sign]
    pair = torch.einsum("rky,ka,yas,rkysz->rkaysz", first, RIGHT, sign, second) / KINDS
    right = torch.einsum("rky,ky->r", first, RIGHT) / KINDS
    return torch.stack([right, torch.einsum("rkaysa->r", pair), 1 - torch.einsum("rkaysy->r", pair)])


def _pair_sft_gain(start: list[Tensor]) -> Tensor:
    """Gain of the most likely second attempts, in pairs of the model's wrong first ones with right answers, [runs]."""
    first = _policy(start)[0].exp()
    second = RIGHT[:, None, None, :] * (1 - torch.eye(ANSWERS))[None, :, None, :]  # right, given that y1 is not
    second = (second / second.sum(-1, keepdim=True)).expand(KINDS, ANSWERS, 2, ANSWERS)
    accuracy = _measures(first, second.expand(len(first), *second.shape))
    return accuracy[1] - accuracy[0]


def draw(outcome: Outcome) -> Figure:
    """Accuracies of both attempts, and how many answers are changed."""
    figure, axes = panels(3)
    for axis, (name, title) in zip(
        axes, {"first": "First attempt", "second": "Second attempt", "changed": "Answers changed"}.items(), strict=True
    ):
        for method in METHODS:
            axis.plot(outcome.series["steps"], outcome.series[f"{name}, {method}"], label=method)
        axis.axvline(outcome.series["steps"][-1] / 2, color="0.4", linestyle=":")
        axis.set(title=title, xlabel="steps", ylabel="share changed" if name == "changed" else "share correct")
    axes[2].legend(loc="upper left")
    return figure
