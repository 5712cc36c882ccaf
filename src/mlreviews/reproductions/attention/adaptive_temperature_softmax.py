"""Does attention disperse as sets grow, and does a temperature that depends on its entropy mend it without training?

A head of attention learns to name the class of the item with the highest priority, from sets of up to 16 items; it is
then asked about sets of up to 16,384. The softmax is exchanged afterwards: for the paper's adaptive one, and for one
with a polynomial that is fitted to this model on sets that it gets wrong. On text, language models trained on pieces
of 128 bytes read pieces of 512.
Quick: 5 seeds, 600 updates on 128 sets, tested on 256 sets of each size; 3 language models, 100 updates. A minute.
Full: 10,000 updates, 1,024 sets; 1,500 updates of the language models. About half an hour.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.adaptive_temperature_softmax import (
    AdaptiveTemperatureAttention,
    adaptive_softmax,
    fit_temperature_polynomial,
    softmax_entropy,
)
from mlreviews.common.layers import linear
from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import bits_per_byte, next_token_loss, training
from mlreviews_kernels.adaptive_temperature_attention import COEFFICIENTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.01104"
CLASSES, WIDTH = 10, 32
SIZES = (16, 64, 256, 1024, 4096, 16384)
SOFTMAXES = ("softmax", "adaptive", "adaptive, own fit")


class MaxRetrieval(nn.Module):
    """Items [batch, n, 1 + classes] and a query [batch, 1] to logits of the class of the item of highest priority."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def network(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                linear(inputs, WIDTH, generator=generator), nn.GELU(), linear(WIDTH, outputs, generator=generator)
            )

        self.items, self.query, self.predict = network(1 + CLASSES, WIDTH), network(1, WIDTH), network(WIDTH, CLASSES)
        self.keys = linear(WIDTH, WIDTH, bias=False, generator=generator)
        self.values = linear(WIDTH, WIDTH, bias=False, generator=generator)

    def logits_and_values(self, items: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attention logits [batch, n] and values [batch, n, width]."""
        embedded = self.items(items)
        logits = torch.einsum("bnd,bd->bn", self.keys(embedded), self.query(query)) / WIDTH**0.5
        return logits, self.values(embedded)

    def forward(
        self, items: Tensor, query: Tensor, softmax: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)
    ) -> Tensor:
        """Class logits [batch, classes] with any softmax over the items."""
        logits, values = self.logits_and_values(items, query)
        found: Tensor = self.predict(torch.einsum("bn,bnd->bd", softmax(logits), values))
        return found


def sets(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Items with priorities uniform in 0 to 1 and random classes, a query that says nothing, and the right classes.

    Args:
        batch: how many sets.
        size: items in each.
        generator: draws them.
    """
    priority = torch.rand(batch, size, generator=generator)
    classes = torch.randint(CLASSES, (batch, size), generator=generator)
    items = torch.cat([priority[..., None], nn.functional.one_hot(classes, CLASSES).float()], -1)
    targets = classes.gather(1, priority.argmax(1, keepdim=True))[:, 0]
    return items, torch.rand(batch, 1, generator=generator), targets


def run(settings: Settings) -> Outcome:
    """Trains, fits, and measures accuracies and the largest coefficient by the size of the set."""
    updates, tested = (10_000, 1024) if settings.full else (600, 256)
    accuracy: dict[str, list[list[float]]] = {name: [] for name in SOFTMAXES}
    largest, entropies = [], []
    for seed in settings.track(range(5), "sets"):
        generator = settings.generator(seed)
        model = MaxRetrieval(generator)
        for _ in training(model, lambda m=model, g=generator: _set_loss(m, g), updates, 0.003):  # type: ignore[misc]
            pass
        coefficients = _own_fit(model, generator)
        tests = [sets(tested if size <= 1024 else max(16, tested // 8), size, generator) for size in SIZES]
        with torch.no_grad():
            for name in SOFTMAXES:
                accuracy[name].append([_accuracy(model, test, name, coefficients) for test in tests])
            logits = [model.logits_and_values(items, query)[0] for items, query, _ in tests]
        largest.append([float(s.softmax(-1).amax(-1).mean()) for s in logits])
        entropies.append([float(softmax_entropy(s).mean()) for s in logits])
    bits = [_text(seed, settings) for seed in settings.track(range(3), "language models")]
    series: dict[str, list[float]] = {"sizes": [float(n) for n in SIZES]}
    for name, rows in {**accuracy, "largest coefficient": largest, "entropy": entropies}.items():
        series |= {f"{name}, seed {i}": row for i, row in enumerate(rows)}
    series |= {"bits per byte, softmax": [b[0] for b in bits], "bits per byte, adaptive": [b[1] for b in bits]}
    return Outcome([*_dispersion(accuracy, largest), *_repair(accuracy), _text_claim(bits)], series)


def _set_loss(model: MaxRetrieval, generator: torch.Generator) -> Tensor:
    size = int(torch.randint(5, 17, (1,), generator=generator))
    items, query, targets = sets(128, size, generator)
    return nn.functional.cross_entropy(model(items, query), targets)


def _accuracy(
    model: MaxRetrieval, test: tuple[Tensor, Tensor, Tensor], name: str, coefficients: tuple[float, ...]
) -> float:
    def softmax(logits: Tensor) -> Tensor:
        if name == "softmax":
            return logits.softmax(-1)
        return adaptive_softmax(logits, coefficients=COEFFICIENTS if name == "adaptive" else coefficients)

    items, query, targets = test
    return float((model(items, query, softmax).argmax(-1) == targets).double().mean())


@torch.no_grad()
def _own_fit(model: MaxRetrieval, generator: torch.Generator) -> tuple[float, ...]:
    """A line of the inverse temperature with the highest probability of the right class, where plain softmax is wrong.

    Sets of up to 256 items alone: what is larger, it has to get right by extrapolation, which a polynomial of
    degree 4 does badly.
    """
    betas = torch.linspace(1, 12, 45)
    entropies, best = [], []
    for size in (16, 32, 64, 128, 256):
        items, query, targets = sets(256, size, generator)
        logits, values = model.logits_and_values(items, query)
        weights = (betas[:, None, None] * logits).softmax(-1)
        predicted = model.predict(torch.einsum("kbn,bnd->kbd", weights, values)).softmax(-1)
        right = predicted.gather(2, targets.expand(len(betas), -1)[..., None])[..., 0]
        wrong = predicted[0].argmax(-1) != targets
        entropies.append(softmax_entropy(logits)[wrong])
        best.append(betas[right.argmax(0)][wrong])
    entropy, beta = torch.cat(entropies), torch.cat(best)
    return fit_temperature_polynomial(entropy, beta, 1) if len(entropy) > 1 else (1.0,)


def _text(seed: int, settings: Settings) -> tuple[float, float]:
    """Bits per byte on long pieces, with the plain softmax and the adaptive one."""
    length, batch, updates, tested = (128, 16, 1500, 200_000) if settings.full else (128, 8, 100, 33_000)
    corpus = python_source()
    config = TinyLMConfig(d_model=64, layers=2, heads=4, hidden=128)
    model = TinyLM(config, AdaptiveTemperatureAttention, generator=settings.generator(100 + seed)).to(settings.device)
    batches = corpus.train.batches(length, batch, settings.generator(200 + seed))
    for _ in training(model, lambda: next_token_loss(model, next(batches).to(settings.device)), updates, 0.005):
        pass
    # the layer has the plain softmax in training mode
    plain = bits_per_byte(model.train(), corpus.validation, 4 * length, tested)
    return plain, bits_per_byte(model.eval(), corpus.validation, 4 * length, tested)


def _dispersion(accuracy: dict[str, list[list[float]]], largest: list[list[float]]) -> list[Claim]:
    return [
        measure(
            "Coefficients disperse: the largest one's mean at 16,384 items, as a part of that at 16",
            f"{PAPER}, theorem 2.2 and figure 2",
            [row[-1] / row[0] for row in largest],
            at_most=0.2,
        ),
        measure(
            "With plain softmax accuracy falls from 16 to 1,024 items (by how much)",
            f"{PAPER}, table 1",
            [row[0] - row[3] for row in accuracy["softmax"]],
            at_least=0.05,
        ),
    ]


def _repair(accuracy: dict[str, list[list[float]]]) -> list[Claim]:
    def gain(statement: str, source: str, name: str, size: int, at_least: float) -> Claim:
        place = SIZES.index(size)
        pairs = zip(accuracy[name], accuracy["softmax"], strict=True)
        statement = f"{statement} (accuracy at {size:,} items, less plain softmax's)"
        return measure(statement, source, [a[place] - b[place] for a, b in pairs], at_least=at_least)

    table, fit = f"{PAPER}, table 1", "ours, after the paper's fit"
    return [
        gain("The paper's adaptive softmax is more accurate out of distribution", table, "adaptive", 1024, 0.01),
        gain("... also where entropies are beyond its polynomial's range", table, "adaptive", 16384, 0.01),
        gain("So is a line fitted to this model", fit, "adaptive, own fit", 1024, 0.01),
        gain("... which has no such range", fit, "adaptive, own fit", 16384, 0.01),
        gain("On the sizes of training it does no harm", table, "adaptive", 16, -0.01),
    ]


def _text_claim(bits: list[tuple[float, float]]) -> Claim:
    return measure(
        "It helps language models on texts four times as long as in training (bits per byte, less plain softmax's)",
        f"{PAPER}, section 5, for other tasks",
        [adaptive - plain for plain, adaptive in bits],
        unit="bits per byte",
        at_most=0.0,
    )


def draw(outcome: Outcome) -> Figure:
    """Accuracy, largest coefficient and entropy by the size of the set; means over seeds."""
    figure, (accuracy, coefficient, entropy) = panels(3)
    series = outcome.series
    sizes = series["sizes"]

    def mean(name: str) -> list[float]:
        rows = [row for key, row in series.items() if key.startswith(f"{name}, seed ")]
        return [statistics.fmean(values) for values in zip(*rows, strict=True)]

    for name, marker in zip(SOFTMAXES, "os^", strict=True):
        accuracy.plot(sizes, mean(name), marker=marker, label=name)
    accuracy.set(title="Class of the largest item", xlabel="items (16 in training)", ylabel="accuracy, mean of 5 seeds")
    accuracy.legend()
    coefficient.loglog(sizes, mean("largest coefficient"), marker="o", label="measured")
    coefficient.loglog(sizes, [1 / n for n in sizes], "--", color="#444444", label="1 / n")
    coefficient.set(title="Dispersion", xlabel="items", ylabel="largest coefficient")
    coefficient.legend()
    entropy.plot(sizes, mean("entropy"), marker="o")
    entropy.axhspan(0.85, 5.94, alpha=0.15, label="sharpened by the paper's polynomial")
    entropy.set(title="Entropy of plain softmax", xlabel="items", ylabel="nats", ylim=(0, None))
    entropy.legend(loc="lower right")
    for axis in (accuracy, coefficient, entropy):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{n:,.0f}" for n in sizes], rotation=30)
    return figure
