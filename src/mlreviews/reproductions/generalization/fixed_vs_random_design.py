"""Does double descent need new inputs, and is interpolation benign only there?

Inputs are real: diabetes (10 features) for nearest neighbours and forests, digits (64 features) for random Fourier
features, whose bandwidth is the square root of the dimension except in the sweep over bandwidths. The true function is
a random two-layer network of unit variance, so that bias and variance are known exactly, and so is that of the noise.
Quick: 100 points, 5 draws of the training inputs, a minute on one core. Full: 200 points, 20 draws, about six.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import diabetes, digits
from mlreviews.generalization.double_descent import RandomFourierFeatures
from mlreviews.generalization.fixed_vs_random_design import (
    DesignErrors,
    design_errors,
    effective_parameters,
    knn_weights,
    least_squares_weights,
    smoother_errors,
)
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sklearn.ensemble import RandomForestRegressor

PAPER = "arXiv:2409.18842"
REVIEW = "review of 2025-02-01"
SIGMA = 1.0  # as much noise as signal
DESIGNS = ("fixed", "random")

Curves = dict[str, list[list[float]]]  # name -> one curve for each seed


def run(settings: Settings) -> Outcome:
    """Sweeps k, the number of random features and their bandwidth, and the number of trees, in both designs."""
    n, seeds = (200, 20) if settings.full else (100, 5)
    neighbours = sorted({max(1, round(n * 10 ** (-e / 12))) for e in range(36)})
    widths = sorted({round(n * 2 ** (e / 2)) for e in range(-8, 11)} | {n - 1, n + 1})
    bandwidths = [0.25, 0.5, 1.0, 2.0, 4.0]  # in units of the square root of the dimension
    trees = [1, 2, 5, 10, 20, 50, 100]
    curves: Curves = {}
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        problem = _Problem(diabetes().features, n, generator)
        for k in neighbours:
            _smoother(curves, seed, "knn", problem, [knn_weights(problem.x_train, x, k) for x in problem.designs])
        _forest(curves, seed, trees, problem, generator)
        problem = _Problem(digits().features, n, generator)
        for bandwidth in bandwidths:
            width = math.sqrt(problem.x_train.shape[1]) * bandwidth
            features = RandomFourierFeatures(problem.x_train.shape[1], widths[-1], width, generator=generator)
            phi = features(torch.cat(problem.designs), 0, widths[-1])
            for p in widths if bandwidth == 1 else []:
                _smoother(curves, seed, "features", problem, _solve(phi[:, :p], n))
            _smoother(curves, seed, "bandwidth", problem, _solve(phi, n))
    series = {
        "k / n": [k / n for k in neighbours],
        "p / n": [p / n for p in widths],
        "bandwidth / sqrt(d)": bandwidths,
        "trees": [float(count) for count in trees],
    }
    series |= {name: torch.tensor(runs).mean(0).tolist() for name, runs in curves.items()}
    return Outcome(_neighbour_claims(curves) + _feature_claims(curves, widths, n) + _forest_claims(curves), series)


class _Problem:
    """A random n of the standardised inputs, the rest, and a true function of variance 1 over all of them."""

    def __init__(self, inputs: Tensor, n: int, generator: torch.Generator) -> None:
        x = (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-9)
        d, hidden = x.shape[1], 50
        self.first = torch.randn(d, hidden, dtype=x.dtype, generator=generator) / math.sqrt(d)
        self.shift, self.second = torch.randn(2, hidden, dtype=x.dtype, generator=generator)
        self.scale, self.mean = torch.std_mean(self._network(x))
        order = torch.randperm(len(x), generator=generator)
        self.x_train = x[order[:n]]
        self.designs = (self.x_train, x[order[n:]])

    def _network(self, x: Tensor) -> Tensor:
        return torch.tanh(2 * x @ self.first + self.shift) @ self.second

    def f_star(self, x: Tensor) -> Tensor:
        return (self._network(x) - self.mean) / self.scale


def _solve(phi: Tensor, n: int) -> list[Tensor]:
    """Weights of the minimum-norm solution at the training inputs, which come first, and at the others."""
    weights = least_squares_weights(phi[:n], phi)
    return [weights[:n], weights[n:]]


def _smoother(curves: Curves, seed: int, prefix: str, problem: _Problem, weights: list[Tensor]) -> None:
    """Adds a point to the curves of this seed: errors in both designs in units of the noise, p_s in units of n."""
    f_train = problem.f_star(problem.x_train)
    for design, x, s in zip(DESIGNS, problem.designs, weights, strict=True):
        _errors(curves, seed, prefix, design, smoother_errors(s, f_train, problem.f_star(x), SIGMA))
        _put(curves, seed, f"{prefix}: p_s / n, {design}", effective_parameters(s) / len(f_train))


def _errors(curves: Curves, seed: int, prefix: str, design: str, errors: DesignErrors) -> None:
    for name in ("bias2", "variance", "error"):
        _put(curves, seed, f"{prefix}: {name}, {design}", getattr(errors, name) / SIGMA**2)


def _put(curves: Curves, seed: int, name: str, value: float) -> None:
    runs = curves.setdefault(name, [])
    runs.extend([] for _ in range(seed + 1 - len(runs)))
    runs[seed].append(value)


def _forest(curves: Curves, seed: int, trees: list[int], problem: _Problem, generator: torch.Generator) -> None:
    """Forests of trees grown until they interpolate, without bootstrap, which would keep them from it."""
    from sklearn.ensemble import RandomForestRegressor

    def fit(x: Tensor, y: Tensor, count: int) -> RandomForestRegressor:
        state = int(torch.randint(2**31, (), generator=generator))
        model = RandomForestRegressor(count, bootstrap=False, max_features=1 / 3, random_state=state)
        return model.fit(x.numpy(), y.numpy())

    def predictor(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        model = fit(x, y, 20)
        return lambda at: torch.from_numpy(model.predict(at.numpy()))

    f_train = problem.f_star(problem.x_train)
    labels = f_train + SIGMA * torch.randn(len(f_train), dtype=f_train.dtype, generator=generator)
    model = fit(problem.x_train, labels, max(trees))
    leaves = [torch.from_numpy(model.apply(x.numpy())) for x in problem.designs]
    for design, x, leaf in zip(DESIGNS, problem.designs, leaves, strict=True):
        for count in trees:
            effective = effective_parameters(_leaf_weights(leaves[0][:, :count], leaf[:, :count]))
            _put(curves, seed, f"forest: p_s / n, {design}", effective / len(f_train))
        errors = design_errors(
            predictor, problem.f_star, problem.x_train, x, SIGMA, repetitions=10, generator=generator
        )
        _errors(curves, seed, "forest", design, errors)


def _leaf_weights(train: Tensor, at: Tensor) -> Tensor:
    """The weights of a forest: each tree averages the training points that share the leaf, the forest the trees."""
    total = torch.zeros(len(at), len(train), dtype=torch.float64)
    for own, other in zip(train.T, at.T, strict=True):
        together = (other[:, None] == own).double()
        total += together / together.sum(1, keepdim=True)
    return total / train.shape[1]


def _neighbour_claims(curves: Curves) -> list[Claim]:
    fixed, random = (torch.tensor(curves[f"knn: bias2, {design}"]) for design in DESIGNS)
    error = torch.tensor(curves["knn: error, fixed"])
    falls = (fixed.cummax(1).values - fixed).amax(1) / fixed.amax(1)
    lowest = random.amin(1)
    return [
        measure(
            "k-NN, fixed design: no bias at k = 1 (bias² / noise)",
            PAPER,
            fixed[:, 0].max().item(),
            at_most=1e-12,
        ),
        measure(
            "k-NN, fixed design: the bias² rises monotonically with k (largest fall / its maximum)",
            PAPER,
            falls.tolist(),
            at_most=0.02,
        ),
        measure(
            "... and the variance falls, so that the error is U-shaped (lowest error / the smaller one of k = 1 and n)",
            PAPER,
            (error.amin(1) / torch.minimum(error[:, 0], error[:, -1])).tolist(),
            at_most=0.9,
        ),
        measure(
            "k-NN, random design: the bias² falls first, from k = 1 (bias² at k = 1 / lowest)",
            PAPER,
            (random[:, 0] / lowest).tolist(),
            at_least=1.1,
        ),
        measure(
            "... and then rises: it is U-shaped (bias² at k = n / lowest)",
            PAPER,
            (random[:, -1] / lowest).tolist(),
            at_least=1.1,
        ),
    ]


def _feature_claims(curves: Curves, widths: list[int], n: int) -> list[Claim]:
    p = torch.tensor(widths)
    fixed, random = (torch.tensor(curves[f"features: error, {design}"]) for design in DESIGNS)
    variance = torch.tensor(curves["features: variance, fixed"])
    effective = torch.tensor(curves["features: p_s / n, random"])
    by_bandwidth = torch.tensor(curves["bandwidth: p_s / n, random"])
    best = torch.tensor(curves["bandwidth: error, random"]).argmin(1, keepdim=True)
    at_n = widths.index(n)
    # Ratios with the error at p = n have no finite mean over draws: their logarithms are averaged.
    return [
        measure(
            "Random features, fixed design: the variance is p / n noises up to p = n (largest difference)",
            "equations 2 and 5 of the card",
            (variance - p.clamp(max=n) / n)[:, p <= n].abs().max().item(),
            at_most=1e-4,
        ),
        measure(
            "... and from p = n on the error is twice the noise: no second descent (largest difference / noise)",
            PAPER,
            (fixed[:, at_n:] - 2).abs().max().item(),
            at_most=1e-4,
        ),
        measure(
            "Random features, random design: the error peaks at p = n (p / n of the peak)",
            REVIEW,
            (p[random.argmax(1)] / n).tolist(),
            at_least=0.98,
            at_most=1.02,
        ),
        measure(
            f"... and descends again (error at p = n / error at p = {widths[-1] / n:.0f} n, as a power of 10)",
            REVIEW,
            (random[:, at_n] / random[:, -1]).log10().tolist(),
            at_least=math.log10(2),
        ),
        measure(
            "... as the effective parameters at new inputs do (the same ratio of p_s, as a power of 10)",
            REVIEW,
            (effective[:, at_n] / effective[:, -1]).log10().tolist(),
            at_least=math.log10(2),
        ),
        measure(
            "Benign interpolation: with the kernel of lowest error, p_s at new inputs is far below n (p_s / n)",
            REVIEW,
            by_bandwidth.gather(1, best).flatten().tolist(),
            at_most=0.5,
        ),
        measure(
            "... which is due to the kernel, not to interpolation: with the widest, p_s exceeds n (p_s / n)",
            "ours",
            by_bandwidth[:, -1].tolist(),
            at_least=1,
        ),
    ]


def _forest_claims(curves: Curves) -> list[Claim]:
    fixed, random = (curves[f"forest: p_s / n, {design}"] for design in DESIGNS)
    return [
        measure(
            "A forest of interpolating trees has p_s = n at its training inputs (p_s / n)",
            REVIEW,
            [run[-1] for run in fixed],
            at_least=1 - 1e-9,
            at_most=1 + 1e-9,
        ),
        measure(
            "... and at new inputs far less, although one tree has n (p_s / n, 100 trees)",
            REVIEW,
            [run[-1] for run in random],
            at_most=0.5,
        ),
        measure(
            "... so that redrawn labels cost it twice the noise in fixed design (error / noise, 20 trees)",
            PAPER,
            [run[0] for run in curves["forest: error, fixed"]],
            at_least=1.9,
            at_most=2.1,
        ),
        measure(
            "... and vary its predictions at new inputs much less (variance / noise, 20 trees)",
            PAPER,
            [run[0] for run in curves["forest: variance, random"]],
            at_most=0.5,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Errors of nearest neighbours and random features in both designs, and the effective parameters behind them."""
    figure, (neighbours, features, effective, bandwidths) = panels(2, 2, width=5, height=3.6)
    series = outcome.series
    for design, colour in zip(DESIGNS, COLOURS, strict=False):
        k, p = series["k / n"], series["p / n"]
        neighbours.plot(k, series[f"knn: error, {design}"], color=colour, label=f"error, {design} design")
        neighbours.plot(k, series[f"knn: bias2, {design}"], "--", color=colour, label=f"bias², {design} design")
        features.plot(p, series[f"features: error, {design}"], color=colour, label=f"{design} design")
        inputs = {"fixed": "training inputs", "random": "new inputs"}[design]
        effective.plot(p, series[f"features: p_s / n, {design}"], color=colour, label=f"features, {inputs}")
    neighbours.plot(k, series["knn: variance, fixed"], ":", color=COLOURS[6], label="variance, both")
    neighbours.set(xscale="log", title="k nearest neighbours (diabetes)", xlabel="k / n", ylabel="in units of σ²")
    neighbours.invert_xaxis()  # complexity grows to the right
    features.set(xscale="log", yscale="log", title="Random features (digits)", xlabel="p / n", ylabel="error / σ²")
    features.axhline(2, color="0.4", linestyle=":", linewidth=1)
    features.annotate("2σ²", (p[-1], 2), xytext=(-4, 4), textcoords="offset points", color="0.3", ha="right")
    forest = series["forest: p_s / n, random"]
    effective.plot(series["trees"], forest, "--", color=COLOURS[2], label="forest, new inputs")
    effective.set(xscale="log", yscale="log", title="Effective parameters", ylabel="p_s / n")
    effective.set_xlabel("p / n, or number of trees")
    at = series["bandwidth / sqrt(d)"]
    bandwidths.plot(at, series["bandwidth: p_s / n, random"], marker="o", color=COLOURS[1], label="p_s / n")
    bandwidths.plot(at, series["bandwidth: error, random"], marker="s", color=COLOURS[3], label="error / σ²")
    bandwidths.axhline(1, color="0.4", linestyle=":", linewidth=1)
    bandwidths.set(xscale="log", title=f"At p = {p[-1]:.0f} n, new inputs", xlabel="bandwidth / √d")
    bandwidths.set_xticks(at, [f"{value:g}" for value in at], minor=False)
    bandwidths.set_xticks([], minor=True)
    neighbours.set_ylim(top=2.9 * max(series["knn: variance, fixed"]))
    for axis in (neighbours, features, bandwidths):
        axis.legend()
    effective.legend(loc="upper right")
    return figure
