"""Is attention the first term of Inf-FS's series, what do the further terms add, and does Inf-FS choose good features?

The limits of the ranking, on the breast cancer table and on digits. Features chosen by Inf-FS, by spread alone, by
Fisher's criterion through the same series, and at random; a linear classifier (ridge regression on one-hot targets)
learns from those alone. Then language models of one block on Python's source code, with one hop and with all of them.
Quick: 10 splits, 3 models each, half a minute. Full: 50 splits, larger models that are trained longer, an hour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.inf_fs import MultiHopAttention, fisher_affinity, inf_fs, multi_hop_attention, spread_affinity
from mlreviews.datasets import breast_cancer, digits, python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2507.14560"
INF_FS = "arXiv:2006.08184"
ALL_PATHS, SPREAD, FISHER, RANDOM = "Inf-FS", "spread", "Inf-FS with labels", "random"
ONE_HOP, TWO_HOPS, ALL_HOPS = "one hop", "two hops", "all hops"
SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
KEPT = (0.1, 0.2, 0.3, 0.5)  # share of the features
TABLES = {"digits": digits, "breast cancer": breast_cancer}


@dataclass(frozen=True)
class Size:
    """Of the experiments.

    Attributes:
        splits: of each table.
        width: of the language models.
        length: bytes of a piece.
        updates: of a training.
        seeds: language models of each kind.
    """

    splits: int
    width: int
    length: int
    updates: int
    seeds: int


QUICK = Size(10, 32, 128, 80, 3)
FULL = Size(50, 128, 512, 3000, 5)


def run(settings: Settings) -> Outcome:
    """Ranks features, classifies with those that are kept, and trains the language models."""
    size = FULL if settings.full else QUICK
    series: dict[str, list[float]] = {"r": list(SHARES), "kept": list(KEPT)}
    limits = {name: _limits(_scaled(load().features)) for name, load in TABLES.items()}
    for name, (degree, leading) in limits.items():
        series |= {f"with degree, {name}": degree, f"with eigenvector, {name}": leading}
    accuracy: dict[str, dict[str, list[list[float]]]] = {}
    for name in TABLES:
        found: dict[str, list[list[float]]] = {}
        for split in settings.track(range(size.splits), f"splits of {name}"):
            for method, values in _accuracies(name, settings.generator(split)).items():
                found.setdefault(method, []).append(values)
        accuracy[name] = found
        series |= {f"accuracy, {name}, {m}": torch.tensor(v).mean(0).tolist() for m, v in found.items()}
    bits: dict[str, list[float]] = {name: [] for name in (ONE_HOP, TWO_HOPS, ALL_HOPS)}
    runs = [(seed, name) for seed in range(size.seeds) for name in bits]
    for seed, name in settings.track(runs, "models"):
        bits[name].append(_model_text({ONE_HOP: 1, TWO_HOPS: 2, ALL_HOPS: None}[name], size, settings, seed))
    series |= {f"bits of each seed, {name}": values for name, values in bits.items()}
    claims = [_one_hop(settings.generator(99)), *_limit_claims(limits), *_choice_claims(accuracy), *_text_claims(bits)]
    return Outcome(claims, series)


def _scaled(features: Tensor) -> Tensor:
    """Each column to [0, 1]: deviations in different units can't be compared."""
    low, high = features.amin(0), features.amax(0)
    return (features - low) / (high - low).clamp(min=1e-12)


def _limits(features: Tensor) -> tuple[list[float], list[float]]:
    """Rank correlation of Inf-FS's scores with the sums of the rows, and with the leading eigenvector, for each r."""
    A = spread_affinity(features)
    degree, leading = A.sum(1), torch.linalg.eigh(A).eigenvectors[:, -1].abs()
    scores = [inf_fs(A, r)[1] for r in SHARES]
    return [_rank_correlation(s, degree) for s in scores], [_rank_correlation(s, leading) for s in scores]


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _accuracies(name: str, generator: torch.Generator) -> dict[str, list[float]]:
    """Accuracy on the held-out third with the best features of each method, for each share that is kept."""
    table = TABLES[name]()
    order = torch.randperm(len(table), generator=generator)
    count = 2 * len(table) // 3
    x, labels = _scaled(table.features)[order], table.targets[order]
    train = x[:count]
    rankings = {
        ALL_PATHS: inf_fs(spread_affinity(train))[0],
        SPREAD: train.std(0).argsort(descending=True),
        FISHER: inf_fs(fisher_affinity(train, labels[:count]))[0],
        RANDOM: torch.randperm(x.shape[1], generator=generator),
    }
    found = {}
    for method, ranking in rankings.items():
        kept = [ranking[: round(share * x.shape[1])] for share in KEPT]
        found[method] = [_classify(x[:, columns], labels, count) for columns in kept]
    return found


def _classify(x: Tensor, labels: Tensor, count: int, ridge: float = 1e-2) -> float:
    """Ridge regression on one-hot targets; the rows from `count` on are held out."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    targets = nn.functional.one_hot(labels).to(x.dtype)
    gram = x[:count].T @ x[:count] + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x[:count].T @ targets[:count])
    return float(((x[count:] @ weights).argmax(1) == labels[count:]).double().mean())


def _model_text(hops: int | None, size: Size, settings: Settings, seed: int) -> float:
    """Bits for each byte of the validation text, of a model of one block."""
    config = TinyLMConfig(d_model=size.width, layers=1, heads=size.width // 16)
    layer: Callable[..., nn.Module] = partial(MultiHopAttention, hops=hops)
    model = TinyLM(config, layer, generator=settings.generator(seed)).to(settings.device)
    batches = python_source().train.batches(size.length, 8, settings.generator(2000 + seed))

    def loss() -> Tensor:
        return _loss(model, next(batches).to(settings.device))

    for _ in training(model, loss, size.updates, 0.01 if size.width < 64 else 0.003):
        pass
    held_out = python_source().validation.batches(size.length, 64, settings.generator(3000 + seed))
    with torch.no_grad():
        return float(_loss(model, next(held_out).to(settings.device))) / math.log(2)


def _loss(model: TinyLM, window: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())


def _one_hop(generator: torch.Generator) -> Claim:
    q, k, v = (torch.randn(2, 40, 3, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    found, expected = multi_hop_attention(q, k, v, hops=1)[0], attention(q, k, v)[0]
    return measure(
        "Self-attention is the one-hop case (relative error)",
        PAPER,
        float((found - expected).norm() / expected.norm()),
        at_most=1e-12,
    )


def _limit_claims(limits: dict[str, tuple[list[float], list[float]]]) -> list[Claim]:
    customary = SHARES.index(0.9)
    return [
        measure(
            "For small r features are ranked by the sums of their rows (rank correlation, the lower of two tables)",
            INF_FS,
            min(degree[0] for degree, _ in limits.values()),
            at_least=0.999,
        ),
        measure(
            "For r near its bound, by the leading eigenvector (rank correlation, the lower of two tables)",
            INF_FS,
            min(leading[-1] for _, leading in limits.values()),
            at_least=0.999,
        ),
        measure(
            "Longer paths change the ranking: at r = 0.9 it is another (rank correlation, the higher)",
            PAPER,
            max(degree[customary] for degree, _ in limits.values()),
            at_most=0.99,
        ),
    ]


def _choice_claims(accuracy: dict[str, dict[str, list[list[float]]]]) -> list[Claim]:
    claims = []
    for name, found in accuracy.items():
        mean = {method: [100 * sum(values) / len(values) for values in rows] for method, rows in found.items()}
        for method, other, what in (
            (ALL_PATHS, RANDOM, "Inf-FS chooses better features than chance"),
            (ALL_PATHS, SPREAD, "Inf-FS chooses better features than their spread alone"),
            (FISHER, ALL_PATHS, "Labels help Inf-FS"),
        ):
            claims.append(
                measure(
                    f"{what}, {name} (difference of accuracies, mean over shares kept)",
                    INF_FS,
                    [a - b for a, b in zip(mean[method], mean[other], strict=True)],
                    at_least=0,
                    unit="points",
                )
            )
    return claims


def _text_claims(bits: dict[str, list[float]]) -> list[Claim]:
    return [
        measure(
            f"More than one hop helps a model of one block: {name} (loss with one less loss with more)",
            "ours",
            [a - b for a, b in zip(bits[ONE_HOP], bits[name], strict=True)],
            at_least=0,
            unit="bits per byte",
        )
        for name in (TWO_HOPS, ALL_HOPS)
    ]


def draw(outcome: Outcome) -> Figure:
    """Where the ranking lies between its limits, what the chosen features are worth, and loss on text."""
    figure, (limits, one, other, text) = panels(2, 2, width=5, height=3.4)
    series = outcome.series
    for name, colour in zip(TABLES, COLOURS, strict=False):
        limits.plot(series["r"], series[f"with degree, {name}"], color=colour, marker="o", markersize=3, label=name)
        limits.plot(series["r"], series[f"with eigenvector, {name}"], "--", color=colour, marker="s", markersize=3)
    limits.set(
        title="Scores and rows' sums (dashed: eigenvector)",
        xlabel="r as a share of its bound",
        ylabel="rank correlation",
    )
    limits.legend()
    for axis, name in zip((one, other), TABLES, strict=True):
        for method, colour in zip((ALL_PATHS, SPREAD, FISHER, RANDOM), COLOURS, strict=False):
            values = [100 * a for a in series[f"accuracy, {name}, {method}"]]
            axis.plot(series["kept"], values, color=colour, marker="o", markersize=3, label=method)
        axis.set(title=f"Chosen features, {name}", xlabel="share of the features kept", ylabel="accuracy in %")
        axis.legend()
    names = (ONE_HOP, TWO_HOPS, ALL_HOPS)
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        bits = series[f"bits of each seed, {name}"]
        text.plot(bits, [row] * len(bits), "o", color=colour, markersize=5)
    text.set_yticks(range(3), names)
    text.set_ylim(2.5, -0.5)
    text.set(title="Source code, one block, each seed", xlabel="bits per byte")
    return figure
