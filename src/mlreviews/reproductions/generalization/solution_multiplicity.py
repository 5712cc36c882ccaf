"""Are models with many solutions of zero error less sensitive, and is it the number of solutions that makes them so?

Gaussian features against the exact expectations; random Fourier features on the digits of scikit-learn, with label
noise of standard deviation 1 (variances scale with its square) and a kernel as wide as two images are typically apart.
Quick: 200 digits, 5 seeds, averages of 10 models, half a minute. Full: 400 digits, 10 seeds, averages of 20
models, about five minutes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import digits, one_hot
from mlreviews.generalization.double_descent import RandomFourierFeatures
from mlreviews.generalization.fixed_vs_random_design import least_squares_weights
from mlreviews.generalization.solution_multiplicity import (
    ensemble_weights,
    gaussian_noise_amplification,
    gaussian_smallest_singular_value,
    input_sensitivity,
    noise_amplification,
    prediction_variance,
    sample_solutions,
    solution_set_dim,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REVIEW = "review of 2023-05-16"
TWO_MODELS = "arXiv:1903.07571"
ENSEMBLES = "arXiv:2003.01054"
FACTORS = (0.1, 0.3, 0.5, 0.7, 0.9, 1, 1.1, 1.5, 2, 5, 10, 20)  # widths in units of n
AVERAGED = (0.9, 1, 1.1, 1.5, 2)
SPREADS = (0.0, 0.1, 0.3, 1.0, 3.0)


def run(settings: Settings) -> Outcome:
    """Measures sensitivity to noise and input over width, of the shortest solution, of averages and of random ones."""
    gaussian_claims, gaussian_series = _gaussian(settings)
    digits_claims, digits_series = _digits(settings)
    return Outcome(gaussian_claims + digits_claims, gaussian_series | digits_series)


def _gaussian(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    n, seeds, draws = (100, 10, 100) if settings.full else (40, 10, 50)
    widths = [round(factor * n) for factor in (0.25, 0.5, 0.8, 0.9, 1, 1.1, 1.25, 2, 4, 8)]
    found = torch.zeros(seeds, len(widths), draws, dtype=torch.float64)
    for seed in settings.track(range(seeds), "Gaussian features"):
        generator = settings.generator(seed)
        for i, p in enumerate(widths):
            phi = torch.randn(draws, n, p, dtype=torch.float64, generator=generator)
            found[seed, i] = torch.tensor([noise_amplification(matrix) for matrix in phi], dtype=torch.float64)
    exact = [gaussian_noise_amplification(n, p) for p in widths]
    far = [i for i, p in enumerate(widths) if p <= n / 2 or p >= 2 * n]
    ratios = torch.stack([found[:, i].mean(dim=1) / exact[i] for i in far]).mean(dim=0)
    smallest = []
    for seed in range(seeds):
        phi = torch.randn(200, 800, dtype=torch.float64, generator=settings.generator(100 + seed))
        smallest.append(float(torch.linalg.svdvals(phi)[-1]) / gaussian_smallest_singular_value(200, 800))
    claims = [
        measure(
            "Gaussian features, p ≤ n/2 or p ≥ 2n: noise is amplified min(n, p) / (|p - n| - 1) times (ratio)",
            f"{TWO_MODELS}, theorem 1",
            ratios.tolist(),
            at_least=0.97,
            at_most=1.03,
        ),
        measure(
            "Gaussian features: the smallest singular value is √p - √n (ratio, n = 200, p = 800)",
            "equation 2 of the card",
            smallest,
            at_least=0.95,
            at_most=1.1,
        ),
    ]
    medians = found.transpose(0, 1).flatten(1).median(dim=1).values
    series = {"Gaussian p / n": [p / n for p in widths], "Gaussian median": medians.tolist()}
    series["Gaussian mean"] = [
        float(found[:, i].mean()) if math.isfinite(mean) else math.nan for i, mean in enumerate(exact)
    ]
    fine = [p for p in range(n // 4, 8 * n) if abs(p - n) >= 2]
    series["exact p / n"] = [p / n for p in fine]
    series["exact mean"] = [gaussian_noise_amplification(n, p) for p in fine]
    return claims, series


def _digits(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    n, seeds, models = (400, 10, 20) if settings.full else (200, 5, 10)
    rows: dict[str, list[list[float]]] = {name: [] for name in ("one", "average", "slope", "error", "random", "steep")}
    dimensions = []
    for seed in settings.track(range(seeds), "digits"):
        generator = settings.generator(1000 + seed)
        train, test = digits().split([n, 300], generator, stratified=True)
        x, x_test = train.features / 16, test.features / 16
        y, y_test = one_hot(train.targets, 10), one_hot(test.targets, 10)
        bandwidth = float(torch.pdist(x).median())
        features = RandomFourierFeatures(x.shape[1], 20 * n, bandwidth, generator=generator)
        phi, phi_test = features(x, 0, 20 * n), features(x_test, 0, 20 * n)
        one, slope, error = [], [], []
        for width in (round(factor * n) for factor in FACTORS):
            weights = least_squares_weights(phi[:, :width], phi_test[:, :width])
            one.append(float(prediction_variance(weights, 1.0).mean()))
            error.append(float((weights @ y - y_test).square().mean()))
            if width in (n, 20 * n):
                slope.append(_slope(features, sample_solutions(phi[:, :width], y, 1, spread=0.0)[0], x_test))
        average = []
        for width in (round(factor * n) for factor in AVERAGED):
            members = [RandomFourierFeatures(x.shape[1], width, bandwidth, generator=generator) for _ in range(models)]
            weights = ensemble_weights([m(x, 0, width) for m in members], [m(x_test, 0, width) for m in members])
            average.append(float(prediction_variance(weights, 1.0).mean()))
        solutions = [sample_solutions(phi, y, 1, spread=spread, generator=generator)[0] for spread in SPREADS]
        rows["random"].append([float((phi_test @ w - y_test).square().mean()) for w in solutions])
        rows["steep"].append([_slope(features, w, x_test) for w in solutions])
        for name, values in {"one": one, "average": average, "slope": slope, "error": error}.items():
            rows[name].append(values)
        dimensions.append(solution_set_dim(phi) / n)
    claims = _digits_claims(rows, dimensions, models)
    series: dict[str, list[float]] = {"p / n": list(FACTORS), "averaged p / n": list(AVERAGED), "spread": list(SPREADS)}
    names = {"one": "variance", "average": "variance of the average", "error": "test error"}
    names |= {"random": "test error of random solutions", "steep": "slope of random solutions"}
    series |= {label: _geometric_mean(rows[name]) for name, label in names.items()}
    return claims, series


def _digits_claims(rows: dict[str, list[list[float]]], dimensions: list[float], models: int) -> list[Claim]:
    at_n, wide, standard = FACTORS.index(1), len(FACTORS) - 1, SPREADS.index(1.0)
    best_small = [min(range(at_n), key=row.__getitem__) for row in rows["error"]]

    def log_ratio(above: list[float], below: list[float]) -> list[float]:
        return [math.log10(a / b) for a, b in zip(above, below, strict=True)]

    def column(name: str, index: int) -> list[float]:
        return [row[index] for row in rows[name]]

    return [
        measure(
            "Digits: 20n features have zero error on a space of 19n dimensions (dimension / n)",
            REVIEW,
            dimensions,
            at_least=19,
            at_most=19,
        ),
        measure(
            "Digits: label noise moves predictions most with n features (place of the peak / n)",
            REVIEW,
            [FACTORS[max(range(len(row)), key=row.__getitem__)] for row in rows["one"]],
            at_least=1,
            at_most=1,
        ),
        measure(
            "... and with 20n features at most a tenth as much (log10 of the variance)",
            REVIEW,
            log_ratio(column("one", wide), column("one", at_n)),
            at_most=-1,
        ),
        measure(
            "... and less than the best model of fewer than n features (log10 of the variance)",
            "ours: the other side of the peak",
            log_ratio(column("one", wide), [row[i] for row, i in zip(rows["one"], best_small, strict=True)]),
            at_most=0,
        ),
        measure(
            "Digits: from n to 20n features the slope at test images falls (log10 of the Jacobian norm)",
            REVIEW,
            log_ratio(column("slope", 1), column("slope", 0)),
            at_most=-0.3,
        ),
        measure(
            f"Averaging {models} models of 1.1n features divides the variance by three or more (log10 of the ratio)",
            ENSEMBLES,
            log_ratio(column("average", AVERAGED.index(1.1)), column("one", FACTORS.index(1.1))),
            at_most=-math.log10(3),
        ),
        measure(
            "... to that of one model of 10n or less (log10 of the ratio)",
            ENSEMBLES,
            log_ratio(column("average", AVERAGED.index(1.1)), column("one", FACTORS.index(10))),
            at_most=0,
        ),
        measure(
            "... and leaves no peak at n (log10 of the average's variance at n to that at 1.1n)",
            ENSEMBLES,
            log_ratio(column("average", AVERAGED.index(1)), column("average", AVERAGED.index(1.1))),
            at_most=0,
        ),
        measure(
            "20n features: a random solution of zero error guesses as well as the shortest (log10 of the error)",
            REVIEW,
            log_ratio(column("random", standard), column("random", 0)),
            at_most=0.1,
        ),
        measure(
            "... and is as insensitive to the input (log10 of the Jacobian norm)",
            REVIEW,
            log_ratio(column("steep", standard), column("steep", 0)),
            at_most=0.1,
        ),
    ]


def _slope(features: RandomFourierFeatures, weights: Tensor, x: Tensor) -> float:
    """Root mean square, over some test images, of the Jacobian norm."""
    found = input_sensitivity(lambda points: features(points, 0, len(weights)) @ weights, x[:50])
    return float(found.square().mean().sqrt())


def _geometric_mean(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).log().mean(dim=0).exp().tolist()


def draw(outcome: Outcome) -> Figure:
    """Noise amplification of Gaussian features; variance on digits; what solutions off the shortest one do."""
    series = outcome.series
    figure, (gaussian, variance, spread) = panels(3, width=4.4, height=3.8)
    for side in (lambda v: v < 1, lambda v: v > 1):
        points = [(x, y) for x, y in zip(series["exact p / n"], series["exact mean"], strict=True) if side(x)]
        gaussian.loglog(*zip(*points, strict=True), color="0.6", label="exact mean" if points[0][0] < 1 else None)
    gaussian.loglog(series["Gaussian p / n"], series["Gaussian mean"], "o", color="C0", label="measured mean")
    gaussian.loglog(series["Gaussian p / n"], series["Gaussian median"], "x", color="C1", label="measured median")
    gaussian.set(title="Gaussian: noise in the weights", xlabel="p / n", ylabel="noise amplification")
    gaussian.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    variance.loglog(series["p / n"], series["variance"], marker="o", markersize=4, label="one model")
    variance.loglog(
        series["averaged p / n"], series["variance of the average"], marker="s", markersize=4, label="average of models"
    )
    variance.set(title="Digits: noise in predictions", xlabel="features / n", ylabel="variance / noise variance")
    variance.set_xticks([0.1, 0.5, 1, 2, 5, 20], ["0.1", "0.5", "1", "2", "5", "20"])
    for name, label in {"test error of random solutions": "test error", "slope of random solutions": "slope"}.items():
        values = series[name]
        spread.loglog(series["spread"][1:], [v / values[0] for v in values[1:]], marker="o", markersize=4, label=label)
    spread.axhline(1, color="0.6", linestyle=":")
    spread.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    spread.set(
        title="Digits: random solutions, 20n features", xlabel="spread of the starts", ylabel="relative to the shortest"
    )
    for axis in (gaussian, variance, spread):
        axis.xaxis.minorticks_off()
        axis.legend()
    return figure
