"""Does the test error really fall a second time when a model has more parameters than data, and when does it not?

Random Fourier features on scikit-learn's digits (1,000 training points, with the true labels and with a tenth of them
wrong), Gaussian data where the risk is known exactly, and two-layer networks. The bandwidth is the median distance of
the training points, a rule that looks at no labels.
Quick: 60 widths to 10,000 features and 5 seeds, small networks with 3 seeds; under a minute on two cores.
Full: 10 seeds, a longer Monte Carlo, networks on twice the points, trained for the paper's 6,000 epochs (10,000 for the
curve over training time); about ten minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.common.least_squares import min_norm_solve
from mlreviews.common.two_layer_net import TwoLayerNet
from mlreviews.datasets import Table, digits, one_hot
from mlreviews.generalization.double_descent import (
    RandomFourierFeatures,
    RiskCurve,
    Sample,
    asymptotic_ridgeless_risk,
    double_descent_curve,
    epoch_wise_curve,
    gaussian_min_norm_risk,
    optimal_gaussian_ridge,
    sample_wise_curve,
    tuned_ridge_curve,
    weight_reuse_curve,
)
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BELKIN = "arXiv:1812.11118"
WEAK_FEATURES = "arXiv:1903.07571"
RIDGELESS = "arXiv:1903.08560"
DEEP = "arXiv:1912.02292"
OPTIMAL_RIDGE = "arXiv:2003.01897"
N, WIDEST, NOISE = 1000, 10_000, 0.1
Found = tuple[list[Claim], dict[str, list[float]]]
Series = Mapping[str, Sequence[float]]


def run(settings: Settings) -> Outcome:
    """Measures the curves over model size, sample size and training time, and compares them with the theory."""
    claims: list[Claim] = []
    series: dict[str, list[float]] = {}
    for part in (_model_wise, _kernel_limit, _sample_wise, _gaussian, _networks, _epoch_wise):
        found, numbers = part(settings)
        claims += found
        series |= numbers
    return Outcome(claims, series)


def _model_wise(settings: Settings) -> Found:
    """Digits over growing widths: wrong labels without and with a tuned ridge, and true labels."""
    widths = _widths()
    fewer = sorted({*widths[2:24:3], *(round(f * N) for f in (0.98, 1, 1.02)), *widths[-19::6]})
    ridges = [1e-3, 1e-2, 1e-1, 1.0]
    noisy, true, tuned, limits = [], [], [], []
    for seed in settings.track(range(10 if settings.full else 5), "digits: curves over the width"):
        generator = settings.generator(seed)
        table, valid, test = digits().split([N, 200, 597], generator)
        wrong = _sample(table.with_label_noise(NOISE, generator), settings)
        chooser = _sample(valid.with_label_noise(NOISE, generator), settings)
        right, held_out = _sample(table, settings), _sample(test, settings)
        bandwidth = float(torch.pdist(right.x).median())
        features = _features(WIDEST, bandwidth, generator, settings)
        noisy.append(double_descent_curve(features, wrong, held_out, widths))
        if settings.full or seed < 3:
            true.append(double_descent_curve(features, right, held_out, fewer))
            tuned.append(tuned_ridge_curve(features, wrong, chooser, held_out, fewer, ridges)[0])
        predictions, norm = _kernel_interpolant(wrong, held_out.x, bandwidth)
        limits.append((float((predictions - held_out.y).square().mean()), norm))
    claims = _model_wise_claims(noisy, true, tuned)
    series = _columns("width", noisy, "wrong labels") | _columns("width", true, "true labels")
    series |= _columns("width", tuned, "tuned ridge")
    series["kernel: test mse, norm"] = torch.tensor(limits).mean(0).tolist()
    return claims, series


def _model_wise_claims(noisy: list[RiskCurve], true: list[RiskCurve], tuned: list[RiskCurve]) -> list[Claim]:
    widths = torch.tensor(noisy[0].sizes)
    first_minimum = [float(c.test_mse[widths < 0.9 * N].min()) for c in noisy]
    at_8n = int((widths - 8 * N).abs().argmin())
    drops = [
        float(c.test_mse.max()) / max(low, float(c.test_mse[at_8n]))
        for c, low in zip(noisy, first_minimum, strict=True)
    ]
    return [
        measure(
            f"The test error peaks at N = n (place of the largest, over n; {NOISE:.0%} wrong labels)",
            f"{BELKIN}, figure 2",
            [int(widths[c.test_mse.argmax()]) / N for c in noisy],
            at_least=0.99,
            at_most=1.01,
        ),
        measure(
            "... and is there more than 3 times that of the best smaller model and of N = 8n (log10 of the ratio)",
            f"{BELKIN}, figure 2",
            [math.log10(drop) for drop in drops],
            at_least=math.log10(3),
        ),
        measure(
            "The training error is zero from N = n on (largest mean square of all seeds)",
            f"{BELKIN}, section 2",
            max(float(c.train_mse[widths >= N].max()) for c in noisy),
            at_most=1e-8,
        ),
        measure(
            "... and not below N = n (smallest mean square of all seeds for N < n - 1)",
            f"{BELKIN}, section 2",
            min(float(c.train_mse[widths < N - 1].min()) for c in noisy),
            at_least=1e-8,
        ),
        measure(
            "The norm of the coefficients peaks at N = n (place of the largest, over n)",
            f"{BELKIN}, figure 2",
            [int(widths[c.norm.argmax()]) / N for c in noisy],
            at_least=0.99,
            at_most=1.01,
        ),
        measure(
            "True labels: the second descent ends below the first minimum (test error at N = 10n over that minimum)",
            f"{BELKIN}, section 2",
            [_final_over_first_minimum(c) for c in true],
            at_most=1,
        ),
        measure(
            f"{NOISE:.0%} wrong labels: it ends below the first minimum, too",
            "review of 2023-05-16",
            [_final_over_first_minimum(c) for c in noisy],
            at_most=1,
        ),
        measure(
            "With a ridge tuned on validation points there is no peak (largest rise of the test error over the widths)",
            OPTIMAL_RIDGE,
            [_largest_rise(c.test_mse) for c in tuned],
            at_most=1.1,
            unit="x",
        ),
    ]


def _final_over_first_minimum(curve: RiskCurve) -> float:
    below = torch.tensor(curve.sizes) < 0.9 * N
    return float(curve.test_mse[-1] / curve.test_mse[below].min())


def _largest_rise(errors: Tensor) -> float:
    """The most by which an error exceeds an earlier one, as a ratio; 1 for errors that never rise."""
    return float((errors / errors.cummin(0).values).max())


def _kernel_limit(settings: Settings) -> Found:
    """How fast predictions of ever more features approach those of the Gaussian kernel's interpolant."""
    n = 200
    widths = [round(n * f) for f in (2, 3, 5, 8, 12, 20, 30, 50)]
    slopes, distances = [], []
    for seed in settings.track(range(10 if settings.full else 5), "digits: limit of many features"):
        generator = settings.generator(100 + seed)
        table, test = digits().split([n, 597], generator)
        train, held_out = _sample(table, settings), _sample(test, settings)
        bandwidth = float(torch.pdist(train.x).median())
        limit, _ = _kernel_interpolant(train, held_out.x, bandwidth)
        features = _features(widths[-1], bandwidth, generator, settings)
        # The test error against the limit in place of the labels is the distance to the limit.
        curve = double_descent_curve(features, train, Sample(held_out.x, limit), widths)
        distance = (curve.test_mse / limit.square().mean()).sqrt()
        far = [i for i, width in enumerate(widths) if width >= 5 * n]
        slopes.append(_slope([math.log(widths[i]) for i in far], [math.log(float(distance[i])) for i in far]))
        distances.append(distance)
    claims = [
        measure(
            "Predictions of N features approach those of the kernel as N^(-1/2) (exponent, N = 5n to 50n)",
            f"{BELKIN}, section 2",
            slopes,
            at_least=-0.6,
            at_most=-0.4,
        )
    ]
    mean = torch.stack(distances).mean(0)
    return claims, {"kernel limit: width / n": [w / n for w in widths], "kernel limit: distance": mean.tolist()}


def _sample_wise(settings: Settings) -> Found:
    """Digits over growing training sets at a fixed width."""
    width = 300
    sizes = [
        50,
        100,
        150,
        200,
        230,
        250,
        265,
        280,
        290,
        295,
        300,
        305,
        310,
        320,
        335,
        350,
        375,
        400,
        500,
        650,
        850,
        1200,
    ]
    curves = []
    for seed in settings.track(range(10 if settings.full else 5), "digits: curves over the sample size"):
        generator = settings.generator(200 + seed)
        table, test = digits().split([sizes[-1], 597], generator)
        train = _sample(table.with_label_noise(NOISE, generator), settings)
        bandwidth = float(torch.pdist(train.x).median())
        features = _features(width, bandwidth, generator, settings)
        curves.append(sample_wise_curve(features, train, _sample(test, settings), width, sizes))
    half, full = sizes.index(width // 2), sizes.index(width)
    claims = [
        measure(
            "More data hurt: with N features, n = N points are worse than n = N / 2 (log10 of the ratio of errors)",
            f"{DEEP}, section 7",
            [math.log10(float(c.test_mse[full] / c.test_mse[half])) for c in curves],
            at_least=0,
        )
    ]
    return claims, _columns("n", curves, "sample-wise") | {"sample-wise: N": [width]}


def _gaussian(settings: Settings) -> Found:
    """Least squares on the first of 200 equally important Gaussian features, against the exact risk."""
    n, sigma, repetitions = 40, 0.5, 20_000 if settings.full else 500
    beta = torch.full((200,), 200**-0.5, dtype=torch.float64)
    measured = [5, 10, 20, 30, 35, 46, 50, 60, 80, 120, 160, 200]
    generator = settings.generator(300)
    plain, ridged = [], []
    for p in settings.track(measured, "Gaussian data: Monte Carlo"):
        ridge = optimal_gaussian_ridge(p, beta, sigma)
        risks = _monte_carlo(p, n, beta, sigma, (0.0, ridge), repetitions, generator)
        plain.append(float(risks[0].mean()))
        ridged.append(float(risks[1].mean()))
    exact = [gaussian_min_norm_risk(p, n, beta, sigma) for p in measured]
    checked = {p: abs(plain[measured.index(p)] / exact[measured.index(p)] - 1) for p in (n // 2, 2 * n, 4 * n)}
    large = [abs(_asymptotic(g, beta, sigma) / _exact(g, beta, sigma) - 1) for g in (0.5, 2.0, 4.0)]
    claims = [
        measure(
            "Monte Carlo agrees with the exact risk (largest relative difference at p = n/2, 2n and 4n)",
            f"{WEAK_FEATURES}, theorem 1",
            max(checked.values()),
            at_most=0.05,
        ),
        measure(
            "The exact risk tends to the asymptotic one (largest relative difference, n = 1,000, p / n = 0.5, 2, 4)",
            f"{RIDGELESS}, theorem 1",
            max(large),
            at_most=0.01,
        ),
        measure(
            "With the optimal ridge more features never hurt (largest rise of the risk over p)",
            OPTIMAL_RIDGE,
            _largest_rise(torch.tensor(ridged)),
            at_most=1.02,
            unit="x",
        ),
    ]
    every = [p for p in range(1, 201) if abs(p - n) > 1]
    theory = {p: gaussian_min_norm_risk(p, n, beta, sigma) for p in every}
    return claims, {
        "gaussian: p / n, measured": [p / n for p in measured],
        "gaussian: risk, measured": plain,
        "gaussian: risk with optimal ridge, measured": ridged,
        "gaussian: p / n": [p / n for p in range(1, 201)],
        "gaussian: risk": [theory.get(p, math.nan) for p in range(1, 201)],
        "gaussian: asymptotic risk": [_finite(_asymptotic(p / n, beta, sigma, n)) for p in range(1, 201)],
    }


def _exact(gamma: float, beta: Tensor, sigma: float) -> float:
    """The exact risk at 25 times the size: n = 1,000 points and 5,000 features of the same total strength."""
    wide = beta.repeat_interleave(25) / 5
    return gaussian_min_norm_risk(round(1000 * gamma), 1000, wide, sigma)


def _asymptotic(gamma: float, beta: Tensor, sigma: float, n: int = 40) -> float:
    """Eq. (4) where the missing features count as noise."""
    p = round(gamma * n)
    noise = float(beta[p:].square().sum()) + sigma**2
    return noise + asymptotic_ridgeless_risk(gamma, float(beta[:p].square().sum()), noise)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _monte_carlo(
    p: int, n: int, beta: Tensor, sigma: float, ridges: tuple[float, ...], repetitions: int, generator: torch.Generator
) -> Tensor:
    """Test errors given the training set, exact over test points: [ridges, repetitions]."""
    found = []
    for _ in range(0, repetitions, 500):
        x = torch.randn(500, n, p, dtype=beta.dtype, generator=generator)
        spread = math.sqrt(float(beta[p:].square().sum()) + sigma**2)  # the missing features are noise like any other
        y = x @ beta[:p] + spread * torch.randn(500, n, dtype=beta.dtype, generator=generator)
        tall = x if p <= n else x.mT
        gram = tall.mT @ tall
        identity = torch.eye(gram.shape[-1], dtype=beta.dtype)
        fits = []
        for ridge in ridges:
            right = x.mT @ y[..., None] if p <= n else y[..., None]
            solution = torch.linalg.solve(gram + ridge * identity, right)
            fits.append(((solution if p <= n else x.mT @ solution)[..., 0] - beta[:p]).square().sum(1) + spread**2)
        found.append(torch.stack(fits))
    return torch.cat(found, dim=1)


def _networks(settings: Settings) -> Found:
    """Two-layer networks of growing width on few digits, each started from the one before it below the threshold."""
    n, epochs, seeds = (200, 6000, 5) if settings.full else (100, 300, 3)
    fractions = [0.1, 0.25, 0.5, 0.7, 0.98, 1.5, 3, 10]
    hidden = [max(1, round((f * 10 * n - 10) / 75)) for f in fractions]  # 75 H + 10 parameters against 10 n targets
    curves = []
    for seed in settings.track(range(seeds), "networks over the width"):
        generator = settings.generator(400 + seed)
        train, test = _few_digits(n, 0.0, generator, settings)
        with _one_thread():
            curves.append(weight_reuse_curve(train, test, hidden, lr=0.1, epochs=epochs, generator=generator))
    sizes = torch.tensor(curves[0].sizes) / (10 * n)
    under = sizes < 1
    peaks = []
    for c in curves:
        first = int(c.test_mse[under].argmin())
        peaks.append(float(sizes[first + int(c.test_mse[first:].argmax())]))
    claims = [
        measure(
            "Networks with reused weights: below the threshold the training error falls with the width (largest rise)",
            f"{BELKIN}, appendix",
            [_largest_rise(c.train_mse[under]) for c in curves],
            at_most=1,
            unit="x",
        ),
        measure(
            "... the test error peaks where parameters equal targets (place of the largest after the first minimum)",
            f"{BELKIN}, section 2",
            peaks,
            at_least=0.8,
            at_most=1.25,
        ),
        measure(
            "... and ends below the first minimum (test error of the largest network over that minimum)",
            f"{BELKIN}, section 2",
            [float(c.test_mse[-1] / c.test_mse[under].min()) for c in curves],
            at_most=1,
        ),
    ]
    series = _columns("parameters", curves, "network")
    return claims, series | {"network: parameters / targets": sizes.tolist()}


def _epoch_wise(settings: Settings) -> Found:
    """One wide network on digits with a fifth of the labels wrong, over training time."""
    n, units, longest, seeds = (400, 500, 10_000, 5) if settings.full else (200, 300, 1000, 3)
    epochs = sorted({round(longest ** (i / 40)) for i in range(41)})
    curves = []
    for seed in settings.track(range(seeds), "a network over training time"):
        generator = settings.generator(500 + seed)
        train, test = _few_digits(n, 0.2, generator, settings)
        net = TwoLayerNet(train.x.shape[1], units, 10, generator=generator).to(settings.device)
        with _one_thread():
            curves.append(epoch_wise_curve(net, train, test, epochs, lr=0.1))
    rises, falls = [], []
    for c in curves:
        after = c.test_error[int(c.test_error.argmin()) :]
        rises.append(float(after.max() - after[0]))
        falls.append(float(after.max() - after[-1]))
    claims = [
        measure(
            "Training for longer hurts: with 20 % wrong labels the share of errors rises after its minimum",
            f"{DEEP}, section 6",
            rises,
            at_least=0.02,
        ),
        measure(
            "... and falls a second time (by how much it ends below the peak)",
            f"{DEEP}, section 6",
            falls,
            at_least=0.02,
        ),
    ]
    return claims, _columns("epoch", curves, "epoch-wise")


@contextmanager
def _one_thread() -> Iterator[None]:
    """For small networks: sharing out such small matrices takes longer than multiplying them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _widths() -> list[int]:
    """60 widths from n / 100 to 10 n, dense around n."""
    around = [round(N * f) for f in (0.93, 0.96, 0.98, 0.99, 0.995, 0.998, 1, 1.002, 1.01, 1.02, 1.05)]
    below = [round(10 * 90 ** (i / 25)) for i in range(26)]
    above = [round(1.1 * N * (WIDEST / (1.1 * N)) ** (i / 22)) for i in range(23)]
    return [*below, *around, *above]


def _features(width: int, bandwidth: float, generator: torch.Generator, settings: Settings) -> RandomFourierFeatures:
    """In single precision, which is quicker; the solutions are found in double precision all the same."""
    features = RandomFourierFeatures(64, width, bandwidth, generator=generator, dtype=torch.float32)
    return features.to(settings.device)


def _sample(table: Table, settings: Settings) -> Sample:
    """Pixels from 0 to 1 and one-hot classes."""
    x, y = (table.features / 16).float(), one_hot(table.targets, table.classes, dtype=torch.float32)
    return Sample(x.to(settings.device), y.to(settings.device))


def _few_digits(n: int, noise: float, generator: torch.Generator, settings: Settings) -> tuple[Sample, Sample]:
    """Centred pixels."""
    table, test = digits().split([n, 597], generator)
    samples = [_sample(part, settings) for part in (table.with_label_noise(noise, generator), test)]
    middle = samples[0].x.mean(0)
    train, held_out = (Sample(s.x - middle, s.y) for s in samples)
    return train, held_out


def _kernel_interpolant(train: Sample, x: Tensor, bandwidth: float) -> tuple[Tensor, float]:
    """Predictions of the interpolant of least norm in the space of the Gaussian kernel, and that norm."""
    points, y = torch.cat([train.x, x]).double(), train.y.double()
    products = torch.exp(-torch.cdist(points, points[: len(y)]).square() / (2 * bandwidth**2))
    weights = min_norm_solve(products[: len(y)], y)
    return products[len(y) :] @ weights, math.sqrt(float((y * weights).sum()))


def _slope(x: list[float], y: list[float]) -> float:
    design = torch.tensor([[1.0, value] for value in x], dtype=torch.float64)
    return float(min_norm_solve(design, torch.tensor(y, dtype=torch.float64))[1])


def _columns(axis: str, curves: list[RiskCurve], name: str) -> dict[str, list[float]]:
    """The curves of all seeds as series: geometric mean, smallest and largest of each, for a logarithmic axis."""
    found: dict[str, list[float]] = {f"{name}: {axis}": [float(size) for size in curves[0].sizes]}
    for column in ("train_mse", "test_mse", "norm"):
        values = torch.stack([getattr(curve, column) for curve in curves])
        found[f"{name}: {column}"] = values.clamp_min(1e-32).log().mean(0).exp().tolist()
        if column == "test_mse":
            found[f"{name}: {column}, least"] = values.amin(0).tolist()
            found[f"{name}: {column}, most"] = values.amax(0).tolist()
    found[f"{name}: test_error"] = torch.stack([curve.test_error for curve in curves]).mean(0).tolist()
    return found


def draw(outcome: Outcome) -> Figure:
    """Six panels: test error, training error and norm on digits; Gaussian data, sample size, and networks."""
    figure, axes = panels(3, 2, width=4.8, height=3.5)
    parts = (_draw_test, _draw_train, _draw_norm, _draw_gaussian, _draw_samples, _draw_networks)
    for axis, part in zip(axes, parts, strict=True):
        part(axis, outcome.series)
    return figure


def _draw_test(axis: Axes, series: Series) -> None:
    _line(axis, series, "wrong labels: width", "wrong labels: test_mse", COLOURS[1], f"{NOISE:.0%} wrong labels")
    _line(axis, series, "true labels: width", "true labels: test_mse", COLOURS[0], "true labels")
    _line(axis, series, "tuned ridge: width", "tuned ridge: test_mse", COLOURS[2], f"{NOISE:.0%} wrong, tuned ridge")
    for name, colour in (("true labels", COLOURS[0]), ("wrong labels", COLOURS[1])):
        points = zip(series[f"{name}: test_mse"], series[f"{name}: width"], strict=True)
        lowest, at = min(point for point in points if point[1] < 0.9 * N)
        label = "first minimum" if name == "wrong labels" else None
        axis.plot([at, WIDEST], [lowest, lowest], color=colour, linestyle="--", linewidth=1, label=label)
    axis.set(title="Digits: test error", xlabel="features N", ylabel="mean squared error", xscale="log", yscale="log")
    _threshold(axis, N, "N = n")
    axis.legend(loc="upper left")


def _draw_train(axis: Axes, series: Series) -> None:
    _line(axis, series, "wrong labels: width", "wrong labels: train_mse", COLOURS[1], f"{NOISE:.0%} wrong labels")
    _line(axis, series, "true labels: width", "true labels: train_mse", COLOURS[0], "true labels")
    axis.set(title="Digits: training error", xlabel="features N", xscale="log", yscale="log")
    _threshold(axis, N, "N = n")
    axis.legend(loc="lower left")


def _draw_norm(axis: Axes, series: Series) -> None:
    for name, colour, label in (
        ("wrong labels", COLOURS[1], f"{NOISE:.0%} wrong labels"),
        ("tuned ridge", COLOURS[2], f"{NOISE:.0%} wrong, tuned ridge"),
    ):
        widths = series[f"{name}: width"]
        # In units in which the features of every width have the same inner products, those of the kernel.
        norms = [norm * math.sqrt(w / WIDEST) for norm, w in zip(series[f"{name}: norm"], widths, strict=True)]
        axis.plot(widths, norms, color=colour, label=label)
    axis.axhline(
        series["kernel: test mse, norm"][1], color=COLOURS[6], linestyle="--", linewidth=1.2, label="kernel, N → ∞"
    )
    axis.set(title="Digits: norm of the solution", xlabel="features N", xscale="log", yscale="log")
    _threshold(axis, N, "N = n")
    axis.legend(loc="upper left")


def _draw_gaussian(axis: Axes, series: Series) -> None:
    axis.plot(series["gaussian: p / n"], series["gaussian: risk"], color=COLOURS[0], label="exact")
    axis.plot(
        series["gaussian: p / n"],
        series["gaussian: asymptotic risk"],
        color=COLOURS[4],
        linestyle="--",
        label="asymptotic",
    )
    x = series["gaussian: p / n, measured"]
    axis.plot(x, series["gaussian: risk, measured"], "o", color=COLOURS[0], markersize=4, label="Monte Carlo")
    axis.plot(
        x,
        series["gaussian: risk with optimal ridge, measured"],
        "o-",
        color=COLOURS[2],
        markersize=4,
        label="Monte Carlo, optimal ridge",
    )
    axis.set(title="Gaussian data: theory", xlabel="features per point p / n", ylabel="mean squared error", ylim=(0, 5))
    _threshold(axis, 1, "p = n", at_bottom=True)
    axis.legend(loc="upper right")


def _draw_samples(axis: Axes, series: Series) -> None:
    _line(axis, series, "sample-wise: n", "sample-wise: test_mse", COLOURS[1], f"test error, {NOISE:.0%} wrong labels")
    axis.set(title="Digits: more data can hurt", xlabel="training points n", xscale="log", yscale="log")
    width = series["sample-wise: N"][0]
    _threshold(axis, width, f"n = N = {width:.0f}")
    axis.legend(loc="upper left")


def _draw_networks(axis: Axes, series: Series) -> None:
    x = "network: parameters / targets"
    _line(axis, series, x, "network: test_mse", COLOURS[3], "test error")
    _line(axis, series, x, "network: train_mse", COLOURS[6], "training error")
    axis.set(title="Digits: two-layer networks", xlabel="parameters / targets", xscale="log")
    _threshold(axis, 1, "parameters = targets")
    axis.legend(loc="lower left")


def _line(axis: Axes, series: Series, x: str, y: str, colour: str, label: str) -> None:
    """The mean over the seeds, and the range where there is one."""
    axis.plot(series[x], series[y], color=colour, label=label)
    if f"{y}, least" in series:
        axis.fill_between(series[x], series[f"{y}, least"], series[f"{y}, most"], color=colour, alpha=0.15, linewidth=0)


def _threshold(axis: Axes, at: float, text: str, *, at_bottom: bool = False) -> None:
    """A vertical line, and beside it what it means."""
    axis.axvline(at, color="0.35", linestyle=":", linewidth=1.2, zorder=0)
    place = axis.get_xaxis_transform()
    height, align = (0.03, "bottom") if at_bottom else (0.97, "top")
    axis.annotate(
        text, (at, height), (5, 0), xycoords=place, textcoords="offset points", va=align, fontsize=9, color="0.35"
    )
