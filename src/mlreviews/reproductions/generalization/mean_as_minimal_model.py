"""Is the mean the constant that predicts best, and does it memorise only when n = 1?

The progression of diabetes in 442 patients (scikit-learn) serves as a population from which training sets are drawn, so
that variance and test error are known exactly although the values are real; normal numbers beside it. Then least
squares with up to eleven parameters on real inputs, with real residuals as noise. Quick: 5 seeds of 20,000 training
sets, a few seconds. Full: 20 seeds of 100,000, a minute and a half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from mlreviews.common.least_squares import min_norm_solve
from mlreviews.datasets import diabetes, standardised
from mlreviews.generalization.mean_as_minimal_model import (
    ConstantPredictor,
    expected_optimism,
    expected_test_error,
    expected_train_error,
    weighted_mean,
    weighted_median,
    weighted_quantile,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REVIEW = "review of 2023-05-16"
TEXTBOOK = "Hastie et al. (2009), section 7.4"
SIZES = (1, 2, 3, 5, 10, 20, 50, 100)
ROWS = 40


def run(settings: Settings) -> Outcome:
    """Measures training and test error of the best constant, and the optimism of larger models."""
    seeds, sets = (20, 100_000) if settings.full else (5, 20_000)
    values = diabetes().targets
    memorised, mean_wins, median_wins = [], [], []
    patients, normal, optimism = [], [], []
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        patients.append(torch.stack([_errors(_from(values, sets, n, generator), values) for n in SIZES]))
        normal.append(torch.stack([_normal_errors(sets, n, generator) for n in SIZES]))
        optimism.append(_optimism(sets, generator))
        memorised += [_memorisation(value) for value in _from(values, 100, 1, generator)]
        squared, absolute = _contest(_from(values, sets // 50, 100, generator), values)
        mean_wins.append(squared)
        median_wins.append(absolute)
    errors = {"patients": torch.stack(patients), "normal": torch.stack(normal)}
    claims = [
        measure(
            "n = 1: mean, median and quantile have learnt it by heart (training error)",
            REVIEW,
            max(memorised),
            at_most=0,
        ),
        *_claims(errors["patients"], "patients"),
        *_claims(errors["normal"], "normal numbers"),
        measure(
            "The mean predicts patients with less squared error than the median (error / that of the median)",
            REVIEW,
            mean_wins,
            at_most=1,
        ),
        measure(
            "... and the median with less absolute error than the mean (error / that of the mean)",
            "equation 1 of the card",
            median_wins,
            at_most=1,
        ),
        measure(
            "Least squares with 11 parameters in fixed design: optimism 2 σ² p / n (measured / formula)",
            TEXTBOOK,
            [float(seed[-1]) / expected_optimism(11, ROWS, 1.0) for seed in optimism],
            at_least=0.95,
            at_most=1.05,
        ),
    ]
    series: dict[str, Sequence[float]] = {"n": SIZES, "p": range(1, 12)}
    for name, error in errors.items():
        train, test = error.mean(0).T.tolist()
        series |= {f"training error, {name}": train, f"test error, {name}": test}
    series["optimism"] = torch.stack(optimism).mean(0).tolist()
    return Outcome(claims, series)


def _from(values: Tensor, sets: int, n: int, generator: Generator) -> Tensor:
    """Training sets [sets, n] drawn with replacement, which makes their values independent."""
    return values[torch.randint(len(values), (sets, n), generator=generator)]


def _errors(samples: Tensor, population: Tensor) -> Tensor:
    """Mean training and test error of the mean of each sample, in units of the variance of the population."""
    means = samples.mean(1)
    train = (samples - means[:, None]).square().mean()
    variance = population.var(correction=0)
    test = variance + (means - population.mean()).square().mean()  # over all the population, without sampling
    return torch.stack([train, test]) / variance


def _normal_errors(sets: int, n: int, generator: Generator) -> Tensor:
    samples = torch.randn(sets, n, dtype=torch.float64, generator=generator)
    return _errors(samples, torch.tensor([-1.0, 1.0], dtype=torch.float64))  # mean 0 and variance 1 are all that counts


def _memorisation(value: Tensor) -> float:
    """The largest training error of any of the constants, fitted to one observation."""
    minimisers: list[Callable[..., Tensor]] = [weighted_mean, weighted_median, partial(weighted_quantile, q=0.9)]
    with torch.no_grad():
        return max(float((ConstantPredictor(best).fit(value)(value) - value).abs().max()) for best in minimisers)


def _contest(samples: Tensor, population: Tensor) -> tuple[float, float]:
    """Squared error of the mean over that of the median, and absolute error of the median over that of the mean."""
    means = torch.stack([weighted_mean(sample) for sample in samples])
    medians = torch.stack([weighted_median(sample) for sample in samples])
    from_mean, from_median = population - means[:, None], population - medians[:, None]
    squared = from_mean.square().mean() / from_median.square().mean()
    return float(squared), float(from_median.abs().mean() / from_mean.abs().mean())


def _optimism(sets: int, generator: Generator) -> Tensor:
    """Test less training error at the inputs of some patients, over the noise variance, for 1 to 11 parameters.

    The truth is the model fitted to all patients, and the noise is drawn from its residuals.
    """
    (patients,), _ = standardised(diabetes())
    design = torch.cat([torch.ones(len(patients), 1, dtype=torch.float64), patients.features], dim=1)
    rows = torch.randperm(len(patients), generator=generator)[:ROWS]
    gaps = []
    for p in range(1, design.shape[1] + 1):
        x = design[:, :p]
        residuals = patients.targets - x @ min_norm_solve(x, patients.targets)
        noise, new = _from(residuals, 2 * sets // 10, ROWS, generator).T.tensor_split(2, dim=1)
        # The truth drops out of both errors: the model can express it.
        fitted = x[rows] @ min_norm_solve(x[rows], noise)
        gap = (new - fitted).square().mean() - (noise - fitted).square().mean()
        gaps.append(gap / residuals.square().mean())
    return torch.stack(gaps)


def _claims(errors: Tensor, name: str) -> list[Claim]:
    """Claims on errors [seeds, sizes, training and test] in units of the variance."""
    train, test = errors.unbind(-1)
    ten, hundred = SIZES.index(10), SIZES.index(100)
    return [
        measure(
            f"n = 1, {name}: the test error is twice the variance (error / σ²)",
            REVIEW,
            test[:, 0].tolist(),
            at_least=0.98 * expected_test_error(1, 1, 1.0),
            at_most=1.02 * expected_test_error(1, 1, 1.0),
        ),
        measure(
            f"n = 10, {name}: test less training error is 2 σ² / n (measured / formula)",
            TEXTBOOK,
            ((test - train)[:, ten] / expected_optimism(1, 10, 1.0)).tolist(),
            at_least=0.95,
            at_most=1.05,
        ),
        measure(
            f"n = 100, {name}: the mean does not memorise (test / training error)",
            REVIEW,
            (test / train)[:, hundred].tolist(),
            at_most=1.05,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Errors of the mean against n, and optimism against the number of parameters; lines are the formulas."""
    figure, (left, right) = panels(2, width=5.2, height=3.8)
    series = outcome.series
    sizes = [int(n) for n in series["n"]]
    left.plot(sizes, [expected_test_error(1, n, 1.0) for n in sizes], label="test error, formula")
    left.plot(sizes, [expected_train_error(1, n, 1.0) for n in sizes], label="training error, formula")
    for name, marker, size in (("patients", "o", 9), ("normal", "x", 6)):
        label = {"patients": "patients", "normal": "normal numbers"}[name]
        for part, colour in (("test error", "C0"), ("training error", "C1")):
            left.plot(sizes, series[f"{part}, {name}"], marker, color=colour, markersize=size, markerfacecolor="none")
        left.plot([], [], marker, color="0.3", markersize=size, markerfacecolor="none", label=label)
    left.set(title="The mean of n values", xlabel="n", ylabel="mean squared error / σ²", xscale="log")
    left.legend()
    ps = [int(p) for p in series["p"]]
    right.plot(ps, [expected_optimism(p, ROWS, 1.0) for p in ps], label="2 p / n")
    right.plot(ps, series["optimism"], "o", color="C0", markersize=8, markerfacecolor="none", label="measured")
    right.set(title=f"Least squares on {ROWS} patients", xlabel="parameters p", ylabel="optimism / σ²", ylim=(0, None))
    right.legend()
    return figure
