"""Can one layer keep track of a state? Products in A5, sums modulo 60, and parity, by five kinds of recurrence.

Each layer reads one-hot elements and is trained to say the product so far at every position, first of 2 elements, then
of 4, 8 and 16; it is tested on four times that length. All kinds share the readout of the layer's output: layer norm,
then a linear map plus a network with one hidden layer. So a failure is not for want of a nonlinear readout.
Quick: 3 seeds; A5 by the layers "full", "diag" and the RNN only; a minute to a minute and a half on one core.
In so few updates the RNN learns neither problem; what it can express is shown by the layer with given weights.
Full: 5 seeds, also A4 x Z5, all kinds on all groups, ten times the updates on four times the data; hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.ssm.ssm_state_tracking_limits import (
    RNNSSM,
    InputDependentSSM,
    group_table,
    group_word_problem,
    word_problem_rnn,
    word_problem_ssm,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2404.08819"
NEGATIVE = "arXiv:2411.12537"
TRAINED = 16  # elements in the longest sequences of the training
TESTED = 4 * TRAINED
# Share of the updates -> length. All at length 16 from the start, none of the kinds learns A5 in so few updates.
CURRICULUM = ((0.4, 2), (0.55, 4), (0.7, 8), (1.0, TRAINED))
WIDTH = 64
LEARNT = 0.9  # the paper's threshold

Kind = Literal["full", "diag", "positive", "fixed", "RNN"]
KINDS: tuple[Kind, ...] = ("full", "diag", "positive", "fixed", "RNN")
NAMES: dict[Kind, str] = {
    "full": "an input-dependent matrix",
    "diag": "a diagonal with entries in (-1, 1)",
    "positive": "a diagonal with entries in (0, 1)",
    "fixed": "a diagonal that is the same for all inputs",
    "RNN": "an RNN",
}
# Tried with one seed: 0.01 and 0.02 for "full" on A5 and "diag" on parity, 0.001 to 0.02 for the RNN on parity, where
# the best was taken; "positive" and "fixed" have that of "diag".
RATES: dict[Kind, float] = {"full": 0.02, "diag": 0.01, "positive": 0.01, "fixed": 0.01, "RNN": 0.01}
QUICK: tuple[tuple[str, tuple[Kind, ...], int], ...] = (
    ("A5", ("full", "diag", "RNN"), 300),
    ("Z60", ("full", "diag"), 250),
    ("Z2", KINDS, 300),
)


class _Tracker(nn.Module):
    """One layer on one-hot elements, and a readout that is linear at first."""

    def __init__(self, kind: Kind, order: int) -> None:
        super().__init__()
        self.order = order
        # On A5 the diagonal layers and the RNN have more weights with a state of 128 than the full one with 16.
        self.layer = (
            RNNSSM(order, 128, WIDTH)
            if kind == "RNN"
            else InputDependentSSM(order, 16 if kind == "full" else 128, WIDTH, kind)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.direct = nn.Linear(WIDTH, order)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, order)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layer(nn.functional.one_hot(tokens, self.order).to(self.out.weight.dtype))
        y = self.norm(y)
        return self.direct(y) + self.out(torch.relu(self.hidden(y)))


def run(settings: Settings) -> Outcome:
    """Trains every kind on every group, seed by seed, and takes the accuracy at each position."""
    plan = tuple((group, KINDS, 4000) for group in ("A5", "A4xZ5", "Z60", "Z2")) if settings.full else QUICK
    seeds, tokens = (5, 2048) if settings.full else (3, 512)
    jobs = [(group, kind, updates, seed) for group, kinds, updates in plan for kind in kinds for seed in range(seeds)]
    found: dict[tuple[str, Kind], list[Tensor]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it does
    try:
        for group, kind, updates, seed in settings.track(jobs, "trainings"):
            accuracy = _train(kind, group, updates, tokens, settings, seed)
            found.setdefault((group, kind), []).append(accuracy)
    finally:
        torch.set_num_threads(threads)
    claims = _exact_claims(settings) + _claims(found)
    series: dict[str, list[float]] = {"position": [float(t) for t in range(1, TESTED + 1)]}
    for (group, kind), runs in found.items():
        series[f"accuracy, {group}, {kind}"] = torch.stack(runs).mean(0).tolist()
    return Outcome(claims, series)


def _train(kind: Kind, group: str, updates: int, tokens: int, settings: Settings, seed: int) -> Tensor:
    """AdamW on fresh sequences, with a rate that falls to 0; returns the accuracy at each position, [TESTED]."""
    generator = settings.generator(seed)
    order = len(group_table(group))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model = _Tracker(kind, order).to(settings.device)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for update in range(updates):
        done = update / updates
        time = next(length for share, length in CURRICULUM if done < share)
        optimiser.param_groups[0]["lr"] = RATES[kind] * min(1, (update + 1) / 20) * (1 - done)
        drawn, products = group_word_problem(group, time, tokens // time, generator=generator)
        logits = model(drawn.to(settings.device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), products.flatten().to(settings.device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        drawn, products = group_word_problem(group, TESTED, 250, generator=generator)
        right = model(drawn.to(settings.device)).argmax(-1).cpu() == products
    return right.double().mean(0)


def _exact_claims(settings: Settings) -> list[Claim]:
    """Accuracy of the two layers whose weights are written down, at length 1000."""
    tokens, products = group_word_problem("A5", 1000, 10, generator=settings.generator(1000))
    x = nn.functional.one_hot(tokens, 60).float()
    claims = []
    for name, layer in (
        ("Permutation matrices as transitions", word_problem_ssm("A5")),
        ("... and so do 25 ReLU units in a recurrence", word_problem_rnn("A5")),
    ):
        with torch.no_grad():
            right = (layer(x)[0].argmax(-1) == products).double().mean()
        verb = "" if name.startswith("...") else " give all products of 1000 elements of A5, untrained"
        claims.append(measure(f"{name}{verb} (accuracy)", f"{PAPER}, section 5", float(right), at_least=1))
    return claims


def _claims(found: dict[tuple[str, Kind], list[Tensor]]) -> list[Claim]:
    def at(group: str, kind: Kind, position: int) -> list[float]:
        return [float(accuracy[position - 1]) for accuracy in found[group, kind]]

    claims = [
        measure(
            f"A5: one layer with an input-dependent matrix learns products of {TRAINED} (accuracy)",
            f"{PAPER}, section 6",
            at("A5", "full", TRAINED),
            at_least=LEARNT,
        ),
        measure(
            f"... and gets those of {TESTED}, four times the length of the training (accuracy)",
            "the exact layer has no limit; ours",
            at("A5", "full", TESTED),
            at_least=LEARNT,
        ),
        measure(
            f"A5: one layer with a diagonal one does not (accuracy at {TRAINED})",
            f"{PAPER}, section 6; arXiv:2603.01959",
            at("A5", "diag", TRAINED),
            at_most=0.5,
        ),
        measure(
            f"A5: one layer of an RNN learns it as well (accuracy at {TRAINED})",
            f"{PAPER}, section 6",
            at("A5", "RNN", TRAINED),
            at_least=LEARNT,
        ),
        measure(
            f"Z60, which commutes: the input-dependent matrix learns sums of {TRAINED} (accuracy)",
            f"{PAPER}, section 6",
            at("Z60", "full", TRAINED),
            at_least=LEARNT,
        ),
        measure(
            f"... and a real diagonal does not: even modulo 3, counting takes complex entries (accuracy at {TRAINED})",
            f"{NEGATIVE}, theorem 2",
            at("Z60", "diag", TRAINED),
            at_most=0.5,
        ),
    ]
    learning: tuple[Kind, ...] = ("full", "diag", "RNN")
    for kind in learning:
        claims.append(
            measure(
                f"Parity: {NAMES[kind]} learns it (accuracy at {TRAINED})",
                NEGATIVE if kind == "diag" else f"{PAPER}, section 5",
                at("Z2", kind, TRAINED),
                at_least=LEARNT,
            )
        )
    failing: tuple[tuple[Kind, int], ...] = (("positive", TRAINED), ("fixed", TRAINED), ("fixed", TESTED))
    for kind, position in failing:
        claims.append(
            measure(
                f"Parity: {NAMES[kind]} does not (accuracy at {position}, chance is 0.5)",
                f"{NEGATIVE}, theorem 1" if kind == "positive" else f"{PAPER}, section 4",
                at("Z2", kind, position),
                at_most=0.6,
            )
        )
    return claims


def draw(outcome: Outcome) -> Figure:
    """Accuracy against position for each group: one line a kind, the length of the training marked."""
    series = outcome.series
    groups = [group for group in ("A5", "A4xZ5", "Z60", "Z2") if any(f", {group}, " in name for name in series)]
    figure, axes = panels(len(groups), width=4.3, height=3.4)
    colours = dict(zip(KINDS, COLOURS, strict=False))
    titles = {"A5": "A5 (not solvable)", "A4xZ5": "A4 × Z5 (solvable)", "Z60": "Z60 (abelian)", "Z2": "Parity (Z2)"}
    for axis, group in zip(axes, groups, strict=True):
        for kind in KINDS:
            if f"accuracy, {group}, {kind}" in series:
                axis.plot(series["position"], series[f"accuracy, {group}, {kind}"], color=colours[kind], label=kind)
        axis.axvline(TRAINED, color="0.4", linestyle=":")
        axis.set(title=titles[group], xlabel="position", ylim=(-0.03, 1.03))
        axis.legend(title="one layer")
    axes[0].set_ylabel("accuracy of the product so far")
    return figure
