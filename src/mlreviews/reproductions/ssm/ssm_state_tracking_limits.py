"""Can one layer keep track of a state? Products in A5, sums modulo 60, and parity, by kinds of recurrence.

Each layer reads one-hot elements and is trained to say the product so far at every position, first of 2 elements, then
of 3, 4, 8 and 16. When it has been trained on a length, it is tested on the last position of that length; in the end
also on four times the longest. All kinds share the readout of the layer's output: layer norm, then a linear map plus a
network with one hidden layer. So a failure is not for want of a nonlinear readout, nor, where the short lengths are
learned, for want of training. Quick: 3 seeds; the RNN only with given weights, as it learns neither problem in so few
updates. Full: 5 seeds, also A4 x Z5 and the RNN, all kinds on all groups, six times the updates on four times the
data; hours.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mlreviews.datasets import group_table, group_word_problem
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.ssm.ssm_state_tracking_limits import (
    RNNSSM,
    InputDependentSSM,
    word_problem_rnn,
    word_problem_ssm,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2404.08819"
NEGATIVE = "arXiv:2411.12537"
DIAGONAL = "arXiv:2603.01959"
LENGTHS = (2, 3, 4, 8, 16)  # of the sequences, one after another in the training
SHORTEST, LONGEST = LENGTHS[0], LENGTHS[-1]
TESTED = 4 * LONGEST
WIDTH = 64
LEARNT = 0.9  # the paper's threshold

Kind = Literal["full", "diag", "positive", "fixed", "RNN"]
KINDS: tuple[Kind, ...] = ("full", "diag", "positive", "fixed", "RNN")
GROUPS = ("A5", "A4xZ5", "Z60", "Z2")


class Task(NamedTuple):
    """The trainings on one group.

    Attributes:
        group: as for `group_table`.
        kinds: of layers.
        first: updates at the shortest length; all products of two elements have to be learned there.
        further: updates at each other length.
        rate: the highest step size, the best of three (one seed, shortest length).
    """

    group: str
    kinds: tuple[Kind, ...]
    first: int
    further: int
    rate: float


QUICK = (
    Task("A5", ("full",), 220, 50, 0.03),
    Task("A5", ("diag",), 280, 35, 0.035),
    Task("Z60", ("diag",), 190, 35, 0.035),
    Task("Z2", ("diag", "positive", "fixed"), 40, 40, 0.01),
)
FULL = tuple(Task(group, KINDS, 1500, 300, 0.01) for group in GROUPS)


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
        if kind in ("diag", "positive"):
            # The usual size of weights is for inputs of norm order ** 0.5. With one-hot ones of norm 1 all elements
            # would begin with nearly the same diagonal, and not even products of two would be learned.
            self.layer.get_parameter("transition.weight").data *= order**0.5
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
    """Trains every kind on every group, seed by seed, and takes the accuracy at the end of each length."""
    seeds, tokens = (5, 2048) if settings.full else (3, 512)
    plan = FULL if settings.full else QUICK
    jobs = [(task, kind, seed) for task in plan for kind in task.kinds for seed in range(seeds)]
    found: dict[tuple[str, Kind], list[list[float]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it does
    try:
        for task, kind, seed in settings.track(jobs, "trainings"):
            found.setdefault((task.group, kind), []).append(_train(kind, task, tokens, settings, seed))
    finally:
        torch.set_num_threads(threads)
    series: dict[str, list[float]] = {"length": [float(length) for length in (*LENGTHS, TESTED)]}
    for (group, kind), runs in found.items():
        series[f"accuracy, {group}, {kind}"] = torch.tensor(runs).mean(0).tolist()
    return Outcome(_exact_claims(settings) + _claims(found), series)


def _train(kind: Kind, task: Task, tokens: int, settings: Settings, seed: int) -> list[float]:
    """AdamW on fresh sequences, with a rate that falls to 0; the accuracy at the end of each length, and of TESTED."""
    generator = settings.generator(seed)
    order = len(group_table(task.group))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model = _Tracker(kind, order).to(settings.device)

    def loss_and_hits(time: int, batch: int) -> tuple[Tensor, Tensor]:
        drawn, products = (
            x.to(settings.device) for x in group_word_problem(task.group, time, batch, generator=generator)
        )
        logits = model(drawn)
        return nn.functional.cross_entropy(logits.flatten(0, 1), products.flatten()), logits.argmax(-1) == products

    @torch.no_grad()
    def accuracy(time: int) -> float:
        return float(loss_and_hits(time, 500)[1][:, -1].double().mean())

    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    schedule = [length for i, length in enumerate(LENGTHS) for _ in range(task.further if i else task.first)]
    accuracies = []
    for update, time in enumerate(schedule):
        optimiser.param_groups[0]["lr"] = task.rate * min(1, (update + 1) / 20) * (1 - update / len(schedule))
        optimiser.zero_grad()
        loss_and_hits(time, tokens // time)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if schedule[update : update + 2] != [time, time]:
            accuracies.append(accuracy(time))
    return [*accuracies, accuracy(TESTED)]


def _exact_claims(settings: Settings) -> list[Claim]:
    """Accuracy of the two layers whose weights are written down, at length 1000."""
    claims = []
    for group, layer, what in (
        ("A5", word_problem_ssm("A5"), "Permutation matrices as transitions give all products of 1000 elements of A5"),
        ("Z3xZ4xZ5", word_problem_ssm("Z3xZ4xZ5"), "... and all sums of as many modulo 60, as Z3 x Z4 x Z5"),
        ("A5", word_problem_rnn("A5"), "25 ReLU units in a recurrence give the products in A5"),
    ):
        tokens, products = group_word_problem(group, 1000, 10, generator=settings.generator(1000))
        with torch.no_grad():
            right = layer(nn.functional.one_hot(tokens, 60).float())[0].argmax(-1) == products
        theorem = "theorem 5.1" if isinstance(layer, RNNSSM) else "theorem 5.2"
        accuracy = float(right.double().mean())
        claims.append(measure(f"{what}, untrained (accuracy)", f"{PAPER}, {theorem}", accuracy, at_least=1))
    return claims


def _claims(found: dict[tuple[str, Kind], list[list[float]]]) -> list[Claim]:
    def claim(
        statement: str, source: str, group: str, kind: Kind, length: int,
        *, at_least: float | None = None, at_most: float | None = None,
    ) -> Claim:  # fmt: skip
        place = (*LENGTHS, TESTED).index(length)
        values = [accuracies[place] for accuracies in found[group, kind]]
        return measure(f"{statement} (accuracy at {length})", source, values, at_least=at_least, at_most=at_most)

    learns, fails, near_chance = (
        partial(claim, at_least=LEARNT),
        partial(claim, at_most=0.5),
        partial(claim, at_most=0.6),
    )
    experiments = f"{PAPER}, section 6"
    claims = [
        learns("A5: one layer with an input-dependent matrix learns it", experiments, "A5", "full", LONGEST),
        learns("... and goes on beyond the training, as the exact layer does", "ours", "A5", "full", TESTED),
        learns("A5: a diagonal one learns products of two", experiments, "A5", "diag", SHORTEST),
        fails("... but not of more", f"{experiments}; {DIAGONAL}", "A5", "diag", LONGEST),
        learns("Z60, which commutes: a real diagonal learns sums of two", "ours", "Z60", "diag", SHORTEST),
        fails("... but not of more: it has to be complex", f"{NEGATIVE}, theorem 2", "Z60", "diag", LONGEST),
        learns("Parity: a diagonal with entries in (-1, 1) learns it", NEGATIVE, "Z2", "diag", LONGEST),
        learns("... and goes on beyond the training", NEGATIVE, "Z2", "diag", TESTED),
    ]
    limits: tuple[tuple[Kind, str, str], ...] = (
        ("positive", "a diagonal with entries in (0, 1)", f"{NEGATIVE}, theorem 1"),
        ("fixed", "a diagonal that is the same for all inputs", "arXiv:2405.17394"),
    )
    for kind, name, source in limits:
        claims.append(learns(f"Parity: {name} learns that of two", "ours", "Z2", kind, SHORTEST))
        claims.append(near_chance("... but not of more", source, "Z2", kind, LONGEST))
    if ("A5", "RNN") in found:
        claims += [
            learns(f"{name}: one layer of an RNN learns it", f"{PAPER}, section 6", group, "RNN", LONGEST)
            for name, group in (("A5", "A5"), ("Parity", "Z2"))
        ]
    return claims


def draw(outcome: Outcome) -> Figure:
    """Accuracy at the last position against the length for each group: one line a kind."""
    series = outcome.series
    groups = [group for group in GROUPS if any(f", {group}, " in name for name in series)]
    figure, axes = panels(len(groups), width=4.3, height=3.4)
    colours = dict(zip(KINDS, COLOURS, strict=False))
    titles = {"A5": "A5 (not solvable)", "A4xZ5": "A4 × Z5 (solvable)", "Z60": "Z60 (abelian)", "Z2": "Parity (Z2)"}
    for axis, group in zip(axes, groups, strict=True):
        for kind in KINDS:
            if f"accuracy, {group}, {kind}" in series:
                values = series[f"accuracy, {group}, {kind}"]
                axis.plot(series["length"], values, color=colours[kind], marker="o", markersize=4, label=kind)
        axis.axvspan(LONGEST * 2**0.5, TESTED * 2**0.5, color="0.9", label="not trained on")
        axis.axhline(1 / len(group_table(group)), color="0.4", linestyle=":", linewidth=1, label="chance")
        axis.set(title=titles[group], xlabel="elements", xscale="log", ylim=(-0.03, 1.03))
        axis.set_xticks(series["length"], [f"{length:g}" for length in series["length"]])
        axis.minorticks_off()
        axis.legend(title="one layer", loc="lower left" if group == "Z2" else "center")
    axes[0].set_ylabel("accuracy of the last product")
    return figure
