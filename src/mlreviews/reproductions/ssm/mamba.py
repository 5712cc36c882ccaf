"""Does a state-space model have to choose by its input in order to copy selectively? And is theorem 1 what is trained?

Two blocks of Mamba learn to repeat the data tokens that are strewn among noise, with step size, B and C computed from
the input, and with the same three learned as constants; all else is equal: gates, convolution, widths, updates.
Theorem 1 is computed in float64, with the exact discretisation and with the simplified one of the authors' code.
Quick: 3 tokens among 20 positions, 3 seeds, 400 updates, half a minute. Full: 8 tokens of 14 kinds among 64, also with
the step size alone and with B and C alone, 2,500 updates, 3 seeds, a quarter of an hour and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import selective_copying
from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews.ssm.mamba import MambaBlock, zero_order_hold
from mlreviews_kernels.selective_scan import selective_scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2312.00752"
TESTS = 9  # in the course of a training
LENGTHS = (1, 2, 4)  # of the tests in the end, as multiples of the trained one


@dataclass(frozen=True)
class Task:
    """Selective copying of one size.

    Attributes:
        length: positions with noise and data.
        tokens: data tokens.
        vocab_size: ids, noise and mark among them.
    """

    length: int
    tokens: int
    vocab_size: int

    def draw(self, batch_size: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        size = {"length": self.length, "tokens": self.tokens, "vocab_size": self.vocab_size}
        inputs, targets = selective_copying(batch_size, **size, generator=generator)
        return inputs.to(device), targets.to(device)

    def longer(self, times: int) -> Task:
        """With more noise."""
        return Task(times * self.length, self.tokens, self.vocab_size)


class PartlySelective(MambaBlock):
    """A block that computes only some of Delta, B and C from the input; the others are learned constants.

    Args:
        d_model: size of input and output.
        chosen: which are computed.
        generator: draws the weights.
    """

    def __init__(self, d_model: int, chosen: tuple[str, ...], generator: torch.Generator) -> None:
        super().__init__(d_model, 8, generator=generator)
        self.chosen = chosen
        # Of the size that the computed ones have at first.
        self.fixed = nn.Parameter(torch.randn(2, self.d_state, generator=generator))

    def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `MambaBlock`."""
        delta, B, C = super().selection(u)
        if "delta" not in self.chosen:
            delta = torch.zeros_like(delta)
        if "B, C" not in self.chosen:
            B, C = (constant.expand_as(B) for constant in self.fixed)
        return delta, B, C


VARIANTS = {
    "all chosen by the input": ("delta", "B, C"),
    "none (time-invariant)": (),
    "step size alone": ("delta",),
    "B and C alone": ("B, C",),
}
SELECTIVE, INVARIANT, *_ = VARIANTS


def run(settings: Settings) -> Outcome:
    """Trains selective and time-invariant models on the same batches, and computes theorem 1."""
    task, updates, seeds, width = (Task(64, 8, 16), 2500, 3, 64) if settings.full else (Task(20, 3, 8), 400, 3, 24)
    variants = list(VARIANTS) if settings.full else [SELECTIVE, INVARIANT]
    curves: dict[str, list[list[float]]] = {name: [] for name in variants}
    longer: dict[str, list[list[float]]] = {name: [] for name in variants}
    runs = [(seed, name) for seed in range(seeds) for name in variants]
    for seed, name in settings.track(runs, "models"):
        generator = settings.generator(seed)
        blocks = [PartlySelective(width, VARIANTS[name], generator) for _ in range(2)]
        model = SequenceModel(task.vocab_size, width, blocks, generator=generator).to(settings.device)
        curves[name].append(train_copying(model, task, updates, 0.01, generator))
        longer[name].append([accuracy(model, task.longer(times), generator) for times in LENGTHS])
    final = {name: [row[0] for row in rows] for name, rows in longer.items()}
    exact, simplified, gates = _theorem_1(settings.generator(seeds))
    claims = [
        measure(
            f"A selective model copies {task.tokens} of {task.length} positions (accuracy)",
            f"{PAPER}, table 1",
            final[SELECTIVE],
            at_least=0.95,
        ),
        *(_behind(times, longer) for times in LENGTHS[:2]),
        *_theorem_claims(exact, simplified),
    ]
    series: dict[str, list[float]] = {"updates": [updates * (i + 1) / TESTS for i in range(TESTS)]}
    for name in variants:
        series[f"accuracy, {name}"] = torch.tensor(curves[name]).mean(0).tolist()
        series[f"accuracy at longer inputs, {name}"] = torch.tensor(longer[name]).mean(0).tolist()
    series["positions"] = [float(times * task.length) for times in LENGTHS]
    series["chance"] = [1 / (task.vocab_size - 2)]
    return Outcome(claims, series | gates)


def train_copying(
    model: nn.Module, task: Task, updates: int, rate: float, generator: torch.Generator, *, batch_size: int = 32
) -> list[float]:
    """AdamW with a rate that rises and falls; the test accuracies in the course of the training.

    Args:
        model: from ids to logits and a state.
        task: what is learned.
        updates: how many.
        rate: the highest step size.
        generator: draws the examples.
        batch_size: examples in an update.
    """
    device = next(model.parameters()).device.type
    tests = {round(updates * (i + 1) / TESTS) for i in range(TESTS)}

    def loss() -> Tensor:
        inputs, targets = task.draw(batch_size, generator, device)
        return nn.functional.cross_entropy(model(inputs)[0][:, -task.tokens :].flatten(0, 1), targets.flatten())

    trained = training(model, loss, updates, rate)
    return [accuracy(model, task, generator) for update, _ in trained if update in tests]


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, generator: torch.Generator) -> float:
    """Share of the data tokens that are right, over 256 fresh examples."""
    inputs, targets = task.draw(256, generator, next(model.parameters()).device.type)
    return float((model(inputs)[0][:, -task.tokens :].argmax(-1) == targets).double().mean())


def _behind(times: int, longer: dict[str, list[list[float]]]) -> Claim:
    """What it costs to have step size, B and C constant in time."""
    place = LENGTHS.index(times)
    where = "as in training" if times == 1 else f"{times} times as long as in training"
    gaps = [100 * (a[place] - b[place]) for a, b in zip(longer[SELECTIVE], longer[INVARIANT], strict=True)]
    return measure(
        f"With step size, B and C constant in time the same model is worse, on inputs {where} (accuracy lost)",
        f"{PAPER}, table 1",
        gaps,
        unit="percentage points",
        at_least=0,
    )


def _theorem_1(generator: torch.Generator) -> tuple[float, float, dict[str, list[float]]]:
    """Largest relative differences from h = (1 - g) h + g u, exact and simplified; and the gains over the gate."""
    shape = (1, 200, 50)
    s, u = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    A, ones = -torch.ones(shape[2], 1, dtype=torch.float64), torch.ones(*shape[:2], 1, dtype=torch.float64)
    delta = nn.functional.softplus(s)
    gain = zero_order_hold(delta, A)[1][..., 0]
    h, states = torch.zeros(shape[2], dtype=torch.float64), []
    for g, x in zip(torch.sigmoid(s[0]), u[0], strict=True):
        h = (1 - g) * h + g * x
        states.append(h)
    truth = torch.stack(states)[None]
    errors = [
        float((selective_scan(inputs, delta, A, ones, ones)[0] - truth).norm() / truth.norm())
        for inputs in (u * gain, u)
    ]
    line = torch.linspace(-6, 6, 61, dtype=torch.float64)
    gates = {"s": line.tolist(), "exact": torch.sigmoid(line).tolist()}
    return errors[0], errors[1], gates | {"simplified": nn.functional.softplus(line).tolist()}


def _theorem_claims(exact: float, simplified: float) -> list[Claim]:
    return [
        measure(
            "With N = 1, A = -1, B = C = 1 the exact discretisation is a gated leaky integrator (relative error)",
            f"{PAPER}, theorem 1",
            exact,
            at_most=1e-12,
        ),
        measure(
            "So is the discretisation of the authors' code, which takes the gain of an input for 1 (relative error)",
            f"{PAPER}, theorem 1",
            simplified,
            at_most=0.01,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Accuracy in the course of training, accuracy on longer inputs, and the two gains of theorem 1."""
    figure, (training, longer, gains) = panels(3)
    series = outcome.series
    prefix = "accuracy at longer inputs, "
    for name, colour in zip([n.removeprefix(prefix) for n in series if n.startswith(prefix)], COLOURS, strict=False):
        training.plot(series["updates"], series[f"accuracy, {name}"], color=colour, marker=".", label=name)
        longer.plot(series["positions"], series[prefix + name], color=colour, marker="o", label=name)
    for axis in (training, longer):
        axis.axhline(series["chance"][0], color="0.4", linestyle=":", linewidth=1, label="chance")
        axis.set_ylim(0, 1.03)
        axis.legend()
    training.set(title="Selective copying", xlabel="updates", ylabel="accuracy")
    longer.set(title="With more noise than in training", xlabel="positions", ylabel="accuracy", xscale="log")
    longer.set_xticks(series["positions"], [f"{p:g}" for p in series["positions"]])
    longer.minorticks_off()
    gains.plot(series["s"], series["exact"], label="exact: σ(s), a gate")
    gains.plot(series["s"], series["simplified"], "--", label="authors' code: softplus(s)")
    gains.set(title="Weight of an input in theorem 1", xlabel="s, before softplus", ylabel="weight")
    gains.legend()
    return figure
