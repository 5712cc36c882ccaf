"""Does a policy learn to think from judgements of its answers, and do answers grow under a judge who likes long ones?

A question has two parts of three values each, and its answer is their sum modulo 3. A step of the policy, in tables,
sees one part: the thought (one of six) sees the first, the answer sees the second and the thought. The first part is
0 in half of all questions, so answers given at once are right with probability 1/2 at most, and the policy starts as
one that prefers those. What a thought should mean nobody tells it; at first thoughts are random, and they disturb. An
answer also has a length of 1 to 5, and the judge adds a tenth for each unit of it, and noise of 0.3.
Outputs are drawn to 32 questions in each iteration, 8 to a question; accuracies and lengths of the policies are exact.
An earlier toy was given up: policies that are linear at each step and were to learn "exclusive or" stayed, with and
without thoughts, at the 3/4 that are within reach at once (24 runs of up to 150 iterations).
Quick: 24 runs of 80 iterations. Full: 200 runs of 400 iterations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.tpo import length_controlled_scores
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.10630"
VALUES, THOUGHTS, LENGTHS = 3, 6, 5
QUESTIONS, GROUP, BETA = 32, 8, 0.1
UPDATES, RATE, BIAS, NOISE = 4, 0.02, 0.1, 0.3
FIRST_PART = torch.tensor([0.5, 0.25, 0.25])
RIGHT = (torch.arange(VALUES)[:, None] + torch.arange(VALUES)) % VALUES  # by both parts
DIRECT, THINKING, CONTROLLED = "direct", "TPO, rho 0", "TPO, rho 0.5"


class Output(NamedTuple):
    """Questions and what policies wrote, [runs, outputs] each."""

    first: Tensor
    second: Tensor
    thought: Tensor
    answer: Tensor
    length: Tensor


class Policies:
    """Independent policies that think (or not), answer and choose a length; all tables hold logits.

    Attributes:
        thought: [runs, first part, thoughts].
        answer: [runs, second part, answers].
        heard: [runs, thoughts, second part, answers], added to those; 0 where thoughts are not listened to.
        length: [runs, lengths].
    """

    def __init__(self, runs: int, thinking: bool, generator: torch.Generator) -> None:
        self.thinking, self.row = thinking, torch.arange(runs)[:, None]
        self.thought = torch.randn(runs, VALUES, THOUGHTS, generator=generator)
        self.heard = torch.randn(runs, THOUGHTS, VALUES, VALUES, generator=generator) * thinking
        self.answer = (2 * torch.eye(VALUES)).repeat(runs, 1, 1)
        self.length = torch.zeros(runs, LENGTHS)
        self.parameters = [self.answer, self.length, *([self.thought, self.heard] if thinking else [])]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def draw(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Output:
        """Outputs to questions, [runs, outputs]."""

        def drawn(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(first.shape)

        with torch.no_grad():
            thought = drawn(self.thought[self.row, first])
            answer = drawn(self.answer[self.row, second] + self.heard[self.row, thought, second])
            length = torch.multinomial(self.length.softmax(1), first.shape[1], True, generator=generator)
        return Output(first, second, thought, answer, length)

    def logps(self, output: Output) -> Tensor:
        """Log-probabilities of outputs, [runs, outputs]."""
        first, second, thought, answer, length = output
        odds = self.answer[self.row, second] + self.heard[self.row, thought, second]
        found = _logp(odds, answer) + self.length.log_softmax(1).gather(1, length)
        return found + _logp(self.thought[self.row, first], thought) if self.thinking else found

    def accuracy(self, exchanged: bool = False) -> Tensor:
        """Exact, [runs]; on request of answers that follow the thought on another question, drawn by itself."""
        with torch.no_grad():
            thought = self.thought.softmax(-1)
            if exchanged:
                thought = (FIRST_PART[:, None] * thought).sum(1, keepdim=True).expand_as(thought)
            answer = (self.answer[:, None] + self.heard).softmax(-1)
            chance = torch.einsum("rft,rtsa->rfsa", thought, answer)
            right = chance.gather(-1, RIGHT.expand(len(chance), -1, -1)[..., None])[..., 0]
            return (right.mean(2) * FIRST_PART).sum(1)

    def mean_length(self) -> Tensor:
        """Exact, [runs], in in units."""
        return (self.length.detach().softmax(1) * torch.arange(1.0, LENGTHS + 1)).sum(1)


def _logp(logits: Tensor, index: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def run(settings: Settings) -> Outcome:
    """Trains policies that answer at once, and that think, without and with control of the length."""
    runs, iterations = (200, 400) if settings.full else (24, 80)
    series = {"iterations": [float(i) for i in range(iterations + 1)]}
    accuracy: dict[str, Tensor] = {}
    length: dict[str, Tensor] = {}
    exchanged = torch.zeros(runs)
    for kind in settings.track((DIRECT, THINKING, CONTROLLED), "trainings"):
        generator = settings.generator()
        policies = Policies(runs, kind != DIRECT, generator)
        curves = [(policies.accuracy(), policies.mean_length())]
        optimiser = torch.optim.Adam(policies.parameters, lr=RATE)
        for _ in range(iterations):
            _iterate(policies, optimiser, 0.5 if kind == CONTROLLED else 0.0, generator)
            curves.append((policies.accuracy(), policies.mean_length()))
        accuracy[kind], length[kind] = (torch.stack(curve) for curve in zip(*curves, strict=True))
        if kind == THINKING:
            exchanged = policies.accuracy(exchanged=True)
        series[f"accuracy, {kind}"] = accuracy[kind].mean(1).tolist()
        series[f"length, {kind}"] = length[kind].mean(1).tolist()
    experiments = f"{PAPER}, experiments"
    claims = [
        measure(
            "Before any training, thinking makes answers worse (accuracy, difference to answers given at once)",
            experiments,
            (accuracy[THINKING][0] - accuracy[DIRECT][0]).tolist(),
            at_most=0.0,
        ),
        measure(
            "After TPO, thinking makes them better than DPO makes answers given at once (difference)",
            experiments,
            (accuracy[THINKING][-1] - accuracy[DIRECT][-1]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and better than any answers given at once can be (accuracy)",
            experiments,
            accuracy[THINKING][-1].tolist(),
            at_least=0.5,
        ),
        measure(
            "It is the thoughts, which nobody judged: those on another question do not do (loss of accuracy)",
            f"{PAPER}, section 2",
            (accuracy[THINKING][-1] - exchanged).tolist(),
            at_least=0.05,
        ),
        measure(
            "Under a judge who likes length, answers grow (ratio of the last to the first mean length)",
            f"{PAPER}, on length control",
            (length[THINKING][-1] / length[THINKING][0]).tolist(),
            at_least=1.0,
        ),
        measure(
            "Length control of 0.5 makes them shorter than none (length ratio)",
            f"{PAPER}, on length control",
            (length[CONTROLLED][-1] / length[THINKING][-1]).tolist(),
            at_most=1.0,
        ),
        measure(
            "... and not longer than they were at first (length ratio)",
            f"{PAPER}, on length control",
            (length[CONTROLLED][-1] / length[CONTROLLED][0]).tolist(),
            at_most=1.0,
        ),
        measure(
            "... at no more than three points of accuracy (difference)",
            f"{PAPER}, on length control",
            (accuracy[CONTROLLED][-1] - accuracy[THINKING][-1]).tolist(),
            at_least=-0.03,
        ),
    ]
    return Outcome(claims, series)


def _iterate(policies: Policies, optimiser: torch.optim.Optimizer, rho: float, generator: torch.Generator) -> None:
    """Outputs to new questions, pairs of the best and the worst, and steps on their DPO loss."""
    runs = len(policies.answer)
    first = torch.multinomial(FIRST_PART.expand(runs, -1), QUESTIONS, True, generator=generator)
    second = torch.randint(VALUES, (runs, QUESTIONS), generator=generator)
    output = policies.draw(first.repeat_interleave(GROUP, 1), second.repeat_interleave(GROUP, 1), generator)
    judged = (output.answer == RIGHT[output.first, output.second]) + BIAS * output.length
    judged = judged + NOISE * torch.randn(judged.shape, generator=generator)
    groups = (runs, QUESTIONS, GROUP)
    scores = length_controlled_scores(judged.view(groups), output.length.float().view(groups), rho)
    start = GROUP * torch.arange(QUESTIONS)
    places = [start + place for place in (scores.argmax(-1), scores.argmin(-1))]
    pairs = [Output(*(x.gather(1, place) for x in output)) for place in places]
    with torch.no_grad():
        reference = [policies.logps(side).flatten() for side in pairs]
    for _ in range(UPDATES):
        losses = dpo_loss(*(policies.logps(side).flatten() for side in pairs), *reference, beta=BETA).losses
        optimiser.zero_grad()
        losses.view(runs, -1).mean(1).sum().backward()  # runs don't share anything
        optimiser.step()


def draw(outcome: Outcome) -> Figure:
    """Accuracy and length over the iterations."""
    figure, axes = panels(2)
    for name, axis in zip(("accuracy", "length"), axes, strict=True):
        for kind in (DIRECT, THINKING, CONTROLLED):
            axis.plot(outcome.series["iterations"], outcome.series[f"{name}, {kind}"], label=kind)
    axes[0].axhline(0.5, color="0.4", linestyle=":")
    end = (outcome.series["iterations"][-1], 0.5)
    axes[0].annotate("best answers given at once", end, (0, 4), textcoords="offset points", ha="right", color="0.3")
    axes[0].set(title="Accuracy", xlabel="iterations", ylabel="probability of the right answer")
    axes[1].set(title="Length of answers", xlabel="iterations", ylabel="units")
    axes[0].legend()
    return figure
