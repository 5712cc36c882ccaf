"""Does the test error fall and then rise with complexity, as bias makes way for variance? And what comes after?

Polynomials on y = sin(2 pi x) + noise, where the truth is known; then real patients (diabetes of scikit-learn):
polynomials in the body mass index, and k nearest neighbours on all ten variables. Each seed draws new training sets
and, for the patients, a new split. Quick: 20 points, 5 seeds of 60 training sets or more, half a minute. Full: 30
points, 20 seeds of 200, about eight minutes on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from mlreviews.datasets import diabetes, standardised
from mlreviews.generalization.bias_variance_u_curve import (
    bias_variance_decompose,
    bias_variance_on_data,
    fixed_design,
    polynomial_curve,
    random_design,
    subsets,
)
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REVIEW = "review of 2023-05-16"
TEXTBOOK = "Hastie et al. (2009), section 7.3"
SIGMA = 0.3
UNIT = (0.0, 1.0)
NEIGHBOURS = (1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100)

Curves = dict[str, Tensor]  # name of a part -> [seeds, models]


def run(settings: Settings) -> Outcome:
    """Measures the parts of the error along the degree, and along k, on each of the four problems."""
    n, seeds, sets = (30, 20, 200) if settings.full else (20, 5, 60)
    below = list(range(n - 1))
    degrees = [*below, n - 1, n, n + 1, n + 4, 3 * n // 2, 2 * n, 3 * n, 5 * n, 10 * n, 20 * n]
    runs: dict[str, list[Curves]] = {"fixed design": [], "random design": [], "bmi": [], "neighbours": []}
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        runs["fixed design"].append(_fixed(n, below, max(sets, 100), generator))
        runs["random design"].append(_random(n, degrees, sets, generator))
        runs["bmi"].append(_body_mass_index(n, below, sets, generator))
        runs["neighbours"].append(_neighbours(sets, generator))
    curves = {
        problem: {part: torch.stack([seed[part] for seed in parts]) for part in parts[0]}
        for problem, parts in runs.items()
    }
    claims = [
        *_claims_fixed(curves["fixed design"], n),
        *_claims_random(curves["random design"], n, degrees),
        *_claims_data(curves["bmi"], curves["neighbours"], n),
    ]
    series: dict[str, Sequence[float]] = {
        "degree": degrees,
        "n / k": [max(NEIGHBOURS) / k for k in NEIGHBOURS],
        **_example_sine(n, settings.generator(seeds)),
        **_example_patients(n, settings.generator(seeds + 1)),
    }
    for problem, parts in curves.items():
        series |= {f"{problem}, {part}": values.mean(0).tolist() for part, values in parts.items()}
    return Outcome(claims, series)


def _sine(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x)


def _middles(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _uniform(n: int) -> Callable[[Generator | None], Tensor]:
    return lambda generator: torch.rand(n, dtype=torch.float64, generator=generator)


def _fixed(n: int, degrees: Sequence[int], sets: int, generator: Generator) -> Curves:
    """Equidistant inputs, errors at these same inputs."""
    sampler = fixed_design(_middles(n), _sine, SIGMA)
    return bias_variance_decompose(
        polynomial_curve(degrees, UNIT), sampler, _middles(n), _sine, sigma=SIGMA, n_rep=sets, generator=generator
    ).means()


def _random(n: int, degrees: Sequence[int], sets: int, generator: Generator) -> Curves:
    """Uniform inputs, errors at other inputs."""
    sampler = random_design(_uniform(n), _sine, SIGMA)
    parts = bias_variance_decompose(
        polynomial_curve(degrees, UNIT), sampler, _middles(100), _sine, sigma=SIGMA, n_rep=sets, generator=generator
    )
    rises = parts.train_mse[:, : n - 1].diff(dim=1).amax(0)
    return {**parts.means(), "largest rise of train_mse": rises}


def _body_mass_index(n: int, degrees: Sequence[int], sets: int, generator: Generator) -> Curves:
    """The progression of diabetes as a polynomial of the body mass index, from n patients."""
    patients = diabetes()
    bmi = patients.feature_names.index("bmi")
    pool, test = patients.split([0.75, 0.25], generator)
    curve = polynomial_curve(degrees, _range(patients.features[:, bmi]))
    sampler = subsets(pool.features[:, bmi], pool.targets, n)
    return bias_variance_on_data(
        curve, sampler, test.features[:, bmi], test.targets, n_rep=sets, generator=generator
    ).means()


def _range(x: Tensor) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _neighbours(sets: int, generator: Generator) -> Curves:
    """The same from all ten variables of 100 patients, as the mean of the k nearest."""
    (pool, test), _ = standardised(*diabetes().split([0.75, 0.25], generator))
    sampler = subsets(pool.features, pool.targets, max(NEIGHBOURS))
    return bias_variance_on_data(
        _nearest, sampler, test.features, test.targets, n_rep=sets, generator=generator
    ).means()


def _nearest(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Fits k nearest neighbours for every k of NEIGHBOURS."""
    ks = torch.tensor(NEIGHBOURS)
    return lambda at: y[torch.cdist(at, x).argsort(1)].cumsum(1)[:, ks - 1] / ks


def _claims_fixed(curves: Curves, n: int) -> list[Claim]:
    p = torch.arange(1, n, dtype=torch.float64)
    bias2, variance = curves["bias2"], curves["variance"]
    return [
        measure(
            "Fixed design: squared bias never rises with the degree (largest rise / bias² of degree 0)",
            TEXTBOOK,
            (bias2.diff(dim=1).amax(1) / bias2[:, 0]).tolist(),
            at_most=0.001,
        ),
        measure(
            "... and variance never falls (smallest rise / (σ² / n))",
            TEXTBOOK,
            (variance.diff(dim=1).amin(1) * n / SIGMA**2).tolist(),
            at_least=0,
        ),
        measure(
            "... as it is σ² p / n (measured / formula, over all degrees)",
            TEXTBOOK,
            (variance.sum(1) / (SIGMA**2 * p / n).sum()).tolist(),
            at_least=0.95,
            at_most=1.05,
        ),
    ]


def _claims_random(curves: Curves, n: int, degrees: Sequence[int]) -> list[Claim]:
    mse, train = curves["mse"], curves["train_mse"]
    together = curves["bias2"] + curves["variance"] + curves["noise"]
    classical, beyond = mse[:, : n - 1], mse[:, n + 1 :]
    best, where = classical.min(1)
    peak = torch.tensor(degrees)[mse.argmax(1)] / (n - 1)
    return [
        measure(
            "Random design: bias² + variance + noise is the measured error (worst deviation at any degree)",
            TEXTBOOK,
            (together / mse - 1).abs().amax(1).tolist(),
            at_most=0.05,
        ),
        measure(
            f"The best degree is neither the lowest nor the highest below n - 1 = {n - 1}",
            REVIEW,
            where.tolist(),
            at_least=1,
            at_most=n - 3,
        ),
        measure(
            "Training error only falls with the degree (largest rise on any training set)",
            TEXTBOOK,
            curves["largest rise of train_mse"].max().item(),
            at_most=1e-9,
        ),
        measure(
            "The most complex of them beats the best on the training data (training error / that of the best)",
            REVIEW,
            (train[:, n - 2] / train.gather(1, where[:, None])[:, 0]).tolist(),
            at_most=0.5,
        ),
        measure(
            "... and fails the test (log10 of test error / that of the best)",
            REVIEW,
            (classical[:, -1] / best).log10().tolist(),
            at_least=1,
        ),
        measure(
            "Too simple fails as well (test error of degree 0 / that of the best)",
            REVIEW,
            (mse[:, 0] / best).tolist(),
            at_least=2,
        ),
        measure(
            "The error peaks where the polynomial can just memorise (degree of the worst / (n - 1))",
            "arXiv:1812.11118",
            peak.tolist(),
            at_least=0.9,
            at_most=1.1,
        ),
        measure(
            "... and falls again beyond, with the minimum norm (log10 of the peak / the least error beyond)",
            "arXiv:1812.11118",
            (mse.amax(1) / beyond.amin(1)).log10().tolist(),
            at_least=1,
        ),
        measure(
            "... to below the best of the small ones (log10 of the least error beyond / that before)",
            "arXiv:1812.11118",
            (beyond.amin(1) / best).log10().tolist(),
            at_most=0,
        ),
    ]


def _claims_data(bmi: Curves, neighbours: Curves, n: int) -> list[Claim]:
    best, where = bmi["mse"].min(1)
    best_k, where_k = neighbours["mse"].min(1)
    ks = torch.tensor(NEIGHBOURS, dtype=torch.float64)
    return [
        measure(
            f"Patients, body mass index: the best degree is neither the lowest nor the highest below {n - 1}",
            REVIEW,
            where.tolist(),
            at_least=1,
            at_most=n - 3,
        ),
        measure(
            "... the constant is worse (test error / that of the best)",
            REVIEW,
            (bmi["mse"][:, 0] / best).tolist(),
            at_least=1.1,
        ),
        measure(
            "... and the most complex far worse (log10 of test error / that of the best)",
            REVIEW,
            (bmi["mse"][:, -1] / best).log10().tolist(),
            at_least=1,
        ),
        measure(
            "Patients, k nearest neighbours: the best k is neither 1 nor all of the 100",
            REVIEW,
            ks[where_k].tolist(),
            at_least=2,
            at_most=NEIGHBOURS[-2],
        ),
        measure(
            "... k = 1 is worse (test error / that of the best)",
            REVIEW,
            (neighbours["mse"][:, 0] / best_k).tolist(),
            at_least=1.1,
        ),
        measure(
            "... and so are all 100, the mean (test error / that of the best)",
            REVIEW,
            (neighbours["mse"][:, -1] / best_k).tolist(),
            at_least=1.1,
        ),
    ]


def _example_sine(n: int, generator: Generator) -> dict[str, Sequence[float]]:
    """One training set, with polynomials of low, middle and the highest degree."""
    x, y = fixed_design(_middles(n), _sine, SIGMA)(generator)
    return _example("sine", x, y, UNIT, [1, 3, n - 2])


def _example_patients(n: int, generator: Generator) -> dict[str, Sequence[float]]:
    patients = diabetes()
    bmi = patients.features[:, patients.feature_names.index("bmi")]
    x, y = subsets(bmi, patients.targets, n)(generator)
    return _example("patients", x, y, _range(bmi), [1, 3, n // 2])  # higher ones leave the page between any two points


def _example(
    name: str, x: Tensor, y: Tensor, domain: tuple[float, float], degrees: Sequence[int]
) -> dict[str, Sequence[float]]:
    grid = torch.linspace(float(x.min()), float(x.max()), 400, dtype=torch.float64)
    fits = polynomial_curve(degrees, domain)(x, y)(grid).T
    points = {"x": x.tolist(), "y": y.tolist(), "grid": grid.tolist()}
    lines = {f"degree {degree}": fit.tolist() for degree, fit in zip(degrees, fits, strict=True)}
    return {f"example {name}, {part}": values for part, values in (points | lines).items()}


def draw(outcome: Outcome) -> Figure:
    """Above the known function, below the patients: fits to one training set, then the parts of the error."""
    figure, axes = panels(3, 2, width=4.5, height=3.3)
    series = outcome.series
    n = len(series["example sine, x"])
    below = series["degree"][: n - 1]
    _draw_example(axes[0], outcome, "sine", f"{n} points, three degrees")
    axes[0].set(xlabel="x", ylabel="y")
    _draw_parts(axes[1], outcome, "fixed design", below)
    axes[1].set(title="Errors at the same inputs", xlabel="degree", ylim=(0, None))
    _draw_parts(axes[2], outcome, "random design", [degree + 1 for degree in series["degree"]])
    axes[2].set(title="Errors at new inputs", xlabel="degree + 1", xscale="log", yscale="log", ylim=(3e-3, 3e3))
    axes[2].axvline(n, color="0.4", linestyle=":")
    axes[2].annotate(_peak("n; peak at ", series["random design, mse"]), (n * 1.1, 1e-2), color="0.3")
    _draw_example(axes[3], outcome, "patients", f"{n} patients, three degrees")
    axes[3].set(xlabel="body mass index (kg/m²)", ylabel="progression of diabetes")
    _draw_parts(axes[4], outcome, "bmi", below)
    axes[4].set(title=f"{n} patients: polynomials", xlabel="degree", yscale="log", ylim=(1e2, 1e6))
    axes[4].annotate(_peak("rises to ", series["bmi, mse"]), (n / 2, 3e5), color="0.3")
    _draw_parts(axes[5], outcome, "neighbours", series["n / k"])
    axes[5].set(title="100 patients: k nearest neighbours", xlabel="complexity n / k", xscale="log", ylim=(0, None))
    for axis in (axes[1], axes[4]):
        axis.locator_params(axis="x", integer=True)
    axes[0].legend(loc="lower left", frameon=True)
    axes[3].legend(loc="upper left", frameon=True)
    axes[1].legend()
    axes[5].legend()
    return figure


def _peak(text: str, errors: Sequence[float]) -> str:
    return f"{text}$10^{{{math.log10(max(errors)):.0f}}}$"


def _draw_example(axis: Axes, outcome: Outcome, name: str, title: str) -> None:
    head = f"example {name}, "
    parts = {key.removeprefix(head): values for key, values in outcome.series.items() if key.startswith(head)}
    x, y, grid = parts.pop("x"), parts.pop("y"), parts.pop("grid")
    axis.plot(x, y, "o", color="0.2", markersize=4)
    for label, fit in parts.items():
        axis.plot(grid, fit, label=label)
    margin = 0.3 * (max(y) - min(y))
    axis.set(title=title, ylim=(min(y) - margin, max(y) + margin))


def _draw_parts(axis: Axes, outcome: Outcome, problem: str, complexity: Sequence[float]) -> None:
    """Test and training error and the parts. The bias has gaps where its estimate, being unbiased, is below 0."""
    styles = {
        "mse": ("test error", COLOURS[0], "-"),
        "train_mse": ("training error", COLOURS[6], "--"),
        "bias2": ("bias²", COLOURS[1], "-"),
        "bias2_and_noise": ("bias² + noise", COLOURS[1], "-"),
        "variance": ("variance", COLOURS[2], "-"),
    }
    for part, (label, colour, line) in styles.items():
        values = outcome.series.get(f"{problem}, {part}")
        if values:
            shown = [value if value >= 0 else math.nan for value in values]
            axis.plot(complexity, shown, line, color=colour, label=label, marker=".", markersize=4)
    axis.set_ylabel("mean squared error")
