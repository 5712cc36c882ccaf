"""Is a number predicted better through a distribution over bins than by least squares?

Three tables that ship with scikit-learn: the progression of diabetes, the proline of wines from their other
measurements, and the standard error of the area of cell nuclei (a heavy tail) from their mean measurements. The same
network is trained on each split with the same number of updates: by least squares, by classification into hard or soft
bins with fixed centres, and with encoder and decoder trained as well. The error is relative to that of least squares.
Quick: 5 splits, 250 updates. Full: 20 splits, 1,000 updates.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.common.layers import linear
from mlreviews.datasets import breast_cancer, diabetes, wine
from mlreviews.decoding.numeric_decoding_regression import SoftBinRegressor, bin_divergence, even_centers, hard_bin
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2502.02996"
WAYS = ("least squares", "hard bins", "soft bins", "end to end")
CLASSES = 20
HIDDEN = 64


def run(settings: Settings) -> Outcome:
    """Trains all ways on all splits of all tables."""
    seeds, updates = (20, 1000) if settings.full else (5, 250)
    tables = _tables()
    errors: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in tables}
    for seed in settings.track(range(seeds), "splits"):
        for i, (name, (x, y)) in enumerate(tables.items()):
            for way, error in _errors(x, y, updates, settings, 10 * seed + i).items():
                errors[name][way].append(error)

    def ratio(way: str, other: str) -> list[float]:
        """Of each split: the geometric mean over the tables of the ratio of errors."""
        logs = [
            [math.log(a / b) for a, b in zip(errors[name][way], errors[name][other], strict=True)] for name in tables
        ]
        return [math.exp(sum(column) / len(column)) for column in zip(*logs, strict=True)]

    claims = [
        measure(
            "Trained end to end, the error is smaller than by least squares (ratio of squared errors, geometric mean "
            "of the tables)",
            f"{PAPER}, experiments: up to 25 % on average",
            ratio("end to end", "least squares"),
            at_most=1,
        ),
        measure(
            "Soft bins are better than hard bins (ratio of squared errors)",
            f"{PAPER}, experiments",
            ratio("soft bins", "hard bins"),
            at_most=1,
        ),
        measure(
            "Trained end to end is better than fixed soft bins (ratio of squared errors)",
            f"{PAPER}, experiments",
            ratio("end to end", "soft bins"),
            at_most=1,
        ),
        measure(
            "On the target with the heaviest tail, end to end is better than least squares (ratio of squared errors)",
            "the review: bins for targets that least squares serves badly",
            [
                a / b
                for a, b in zip(errors["area error"]["end to end"], errors["area error"]["least squares"], strict=True)
            ],
            at_most=1,
        ),
    ]
    series = {f"{way}, {name}": values for name, ways in errors.items() for way, values in ways.items()}
    return Outcome(claims, series)


def _tables() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and a number to predict, float32."""
    grapes, nuclei, patients = wine(), breast_cancer(), diabetes()
    proline = grapes.feature_names.index("proline")
    area = nuclei.feature_names.index("area error")
    others = [i for i in range(len(grapes.feature_names)) if i != proline]
    means = [i for i, name in enumerate(nuclei.feature_names) if name.startswith("mean")]
    return {
        "diabetes": (patients.features.float(), patients.targets.float()),
        "proline": (grapes.features[:, others].float(), grapes.features[:, proline].float()),
        "area error": (nuclei.features[:, means].float(), nuclei.features[:, area].float()),
    }


def _errors(x: Tensor, y: Tensor, updates: int, settings: Settings, stream: int) -> dict[str, float]:
    """Mean squared errors on the held-out third, in variances of the training targets."""
    generator = settings.generator(stream)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    x, y = x.to(settings.device), y.to(settings.device)
    centers = even_centers(y[train], CLASSES)
    found = {}
    for way in WAYS:
        network = _network(x.shape[1], 1 if way == "least squares" else CLASSES, settings.generator(stream + 100_000))
        network = network.to(settings.device)
        model = SoftBinRegressor(network, centers, learn_encoder=way == "end to end")
        model.values.requires_grad_(way == "end to end")
        batches = settings.generator(stream + 200_000)

        def loss(way: str = way, network: nn.Module = network, model: SoftBinRegressor = model) -> Tensor:
            rows = train[torch.randint(len(train), (64,), generator=batches)]  # noqa: B023
            if way == "least squares":
                return nn.functional.mse_loss(network(x[rows])[:, 0], y[rows])
            if way == "hard bins":
                return bin_divergence(hard_bin(y[rows], centers), network(x[rows])).mean()
            rest = {} if way == "end to end" else {"autoencoding": 0.0, "regression": 0.0}
            total: Tensor = model(x[rows], y[rows], **rest).total
            return total

        for _ in training(network if way == "least squares" else model, loss, updates, 3e-3, weight_decay=1e-2):
            pass
        with torch.no_grad():
            predicted = network(x[test])[:, 0] if way == "least squares" else model.predict(x[test])
            found[way] = float((predicted - y[test]).square().mean())
    return found


def _network(features: int, outputs: int, generator: torch.Generator) -> nn.Module:
    sizes = (features, HIDDEN, HIDDEN, outputs)
    layers = [linear(a, b, generator=generator) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def draw(outcome: Outcome) -> Figure:
    """Errors on held-out rows, relative to least squares, for each table."""
    figure, (axis,) = panels(1, width=7)
    series = outcome.series
    tables = list(dict.fromkeys(name.partition(", ")[2] for name in series))
    for i, way in enumerate(WAYS[1:]):
        places, means = [], []
        for j, table in enumerate(tables):
            ratios = [a / b for a, b in zip(series[f"{way}, {table}"], series[f"{WAYS[0]}, {table}"], strict=True)]
            place = j + 0.25 * (i - 1)
            axis.plot([place] * len(ratios), ratios, ".", color="black", markersize=4, zorder=3)
            places.append(place)
            means.append(sum(ratios) / len(ratios))
        axis.bar(places, means, width=0.22, label=way)
    axis.axhline(1, color="black", linestyle=":", label="least squares")
    axis.set_xticks(range(len(tables)), tables)
    axis.set(title="Error on held-out rows", ylabel="squared error / least squares'")
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=4, loc="upper center")
    return figure
