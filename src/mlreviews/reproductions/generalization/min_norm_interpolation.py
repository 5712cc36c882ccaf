"""Do very large models join the dots more smoothly, and is that why they guess well between them?

The review's toy (1, 2, _, 4, 5), random Fourier features through 20 points of a sine, small networks through a zigzag,
and digits of scikit-learn, where roughness is measured on straight lines from one test image to another.
Quick: 10 seeds, 200 digits for training, under a minute. Full: 50 seeds (digits: 10), 1000 digits, several minutes.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.common.least_squares import nested_solutions
from mlreviews.datasets import digits, one_hot
from mlreviews.generalization.double_descent import RandomFourierFeatures
from mlreviews.generalization.min_norm_interpolation import (
    cosine_features,
    gap_interpolant,
    min_norm_interpolate,
    natural_cubic_spline,
    roughness,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REVIEW = "review of 2023-05-16"
PAPER = "arXiv:1812.11118"
NETWORKS = "arXiv:1902.05040"
FACTORS = (1, 1.1, 1.5, 2, 3, 5, 10, 20)  # widths in units of n


def run(settings: Settings) -> Outcome:
    """Measures guesses, roughness and test error of interpolants from the threshold to 20 n features."""
    claims: list[Claim] = []
    series: dict[str, list[float]] = {"width / n": list(FACTORS)}
    for part in (_toy, _sine, _zigzag, _digits):
        found, numbers = part(settings)
        claims += found
        series |= numbers
    return Outcome(claims, series)


def _toy(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    known = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    middle, grid = known.new_tensor([3.0]), torch.linspace(1, 5, 321, dtype=torch.float64)
    width = 320
    series = {"toy x": grid.tolist()}
    series |= {f"toy c = {c}": gap_interpolant(grid, c).tolist() for c in (-1, 1)}
    guesses = {}
    for name, decay in {"rough cosines cost more": 4, "equal costs": 0}.items():
        penalty = (1.0 + torch.arange(width, dtype=torch.float64)) ** decay
        weights = min_norm_interpolate(cosine_features(known, width, low=1, high=5), known, penalty=penalty)
        guesses[name] = float(cosine_features(middle, width, low=1, high=5) @ weights)
        series[f"toy {name}"] = (cosine_features(grid, width, low=1, high=5) @ weights).tolist()
    spread = float(gap_interpolant(middle, 1.0) - gap_interpolant(middle, -1.0))
    claims = [
        measure("Zero error on 1, 2, 4, 5 leaves the guess at 3 open (range for |c| ≤ 1)", REVIEW, spread, at_least=1),
        measure(
            "320 cosines, the rougher the costlier: the minimum norm guesses 3 (distance)",
            REVIEW,
            abs(guesses["rough cosines cost more"] - 3),
            at_most=0.1,
        ),
        measure(
            "... and so it does when all cost the same, size being enough (distance)",
            REVIEW,
            abs(guesses["equal costs"] - 3),
            at_most=0.1,
        ),
    ]
    return claims, series


def _sine(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    n, seeds = 20, 50 if settings.full else 10
    widths = [round(factor * n) for factor in FACTORS]
    rough: dict[str, list[list[float]]] = {"noisy": [], "clean": []}
    errors: list[list[float]] = []
    series: dict[str, list[float]] = {}
    for seed in settings.track(range(seeds), "sine"):
        generator = settings.generator(seed)
        jitter = (torch.rand(n, dtype=torch.float64, generator=generator) - 0.5) / (n - 1)
        x = torch.linspace(-1, 1, n, dtype=torch.float64) + jitter
        noise = 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
        grid = torch.linspace(float(x[0]), float(x[-1]), 401, dtype=torch.float64)
        # The kernel is as wide as the points are apart.
        features = RandomFourierFeatures(1, widths[-1], 2 / (n - 1), generator=generator)
        truth, at_grid = torch.sin(2 * math.pi * grid), features(grid[:, None], 0, widths[-1])
        for name, y in {"noisy": torch.sin(2 * math.pi * x) + noise, "clean": torch.sin(2 * math.pi * x)}.items():
            curves = [at_grid[:, :width] @ min_norm_interpolate(features(x[:, None], 0, width), y) for width in widths]
            rough[name].append([roughness(lambda _, curve=curve: curve, grid) for curve in curves])  # type: ignore[misc]
            if name == "noisy":
                errors.append([float((curve - truth).square().mean()) for curve in curves])
            if name == "noisy" and seed == 0:
                series |= {"sine x": grid.tolist(), "sine n features": curves[0].tolist()}
                series |= {"sine 20 n features": curves[-1].tolist()}
                series |= {"sine spline": natural_cubic_spline(x, y, grid).tolist()}
                series |= {"sine dots x": x.tolist(), "sine dots y": y.tolist()}
    series |= {f"roughness, {name} sine": _geometric_mean(values) for name, values in rough.items()}
    claims = [
        measure(
            "Noisy sine: 20n features join the dots more smoothly than n (log10 of roughness)",
            REVIEW,
            _log_ratio(rough["noisy"]),
            at_most=-0.3,
        ),
        measure(
            "... and guess better between them (log10 of the squared error)",
            REVIEW,
            _log_ratio(errors),
            at_most=-0.3,
        ),
        measure(
            "Sine without noise: smoother as well (log10 of roughness)",
            REVIEW,
            _log_ratio(rough["clean"]),
            at_most=-0.3,
        ),
    ]
    return claims, series


def _zigzag(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    seeds, steps = (10, 20_000) if settings.full else (5, 2000)
    generator = settings.generator(1000)
    x, grid = torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 201)
    # Where the slopes alternate, the linear spline is the only minimiser of the integral of |f''|.
    y = (0.5 + 0.5 * torch.rand(seeds, 6, generator=generator)) * torch.tensor([1.0, -1.0] * 3)
    curves = _train_networks(x, y, grid, settings, steps, generator)
    straight = torch.stack([_linear_spline(x, row, grid) for row in y])
    smooth = torch.stack([natural_cubic_spline(x, row, grid) for row in y])
    to_straight, to_smooth = ((curves - spline).square().mean(dim=1).sqrt() for spline in (straight, smooth))
    claim = measure(
        "ReLU networks of small weights are linear splines (distance, over that to the natural cubic spline)",
        f"{NETWORKS}, abstract",
        (to_straight / to_smooth).tolist(),
        at_most=0.2,
    )
    series = {"zigzag x": grid.tolist(), "zigzag network": curves[0].tolist()}
    series |= {"zigzag linear": straight[0].tolist(), "zigzag cubic": smooth[0].tolist()}
    return [claim], series


def _train_networks(
    x: Tensor, y: Tensor, grid: Tensor, settings: Settings, steps: int, generator: torch.Generator
) -> Tensor:
    """Trains a two-layer network for each row of targets, with decay of all but the biases; returns their values."""
    models, width, decay = len(y), 60, 1e-4
    shapes = {"first": (models, 1, width), "bias": (models, 1, width), "second": (models, width, 1)}
    p = {name: (0.5 * torch.randn(shape, generator=generator)).requires_grad_() for name, shape in shapes.items()}
    p["offset"] = torch.zeros(models, 1, requires_grad=True)

    def networks(points: Tensor) -> Tensor:
        return (torch.relu(points[None, :, None] * p["first"] + p["bias"]) @ p["second"])[..., 0] + p["offset"]

    optimiser = torch.optim.Adam(p.values(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in settings.track(range(steps), "networks"):
        optimiser.zero_grad()
        loss = (networks(x) - y).square().mean(dim=1).sum()
        (loss + decay * (p["first"].square().sum() + p["second"].square().sum())).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return networks(grid)


def _linear_spline(x: Tensor, y: Tensor, grid: Tensor) -> Tensor:
    right = torch.searchsorted(x, grid).clamp(1, len(x) - 1)
    share = (grid - x[right - 1]) / (x[right] - x[right - 1])
    return torch.lerp(y[right - 1], y[right], share)


def _digits(settings: Settings) -> tuple[list[Claim], dict[str, list[float]]]:
    n, seeds = (1000, 10) if settings.full else (200, 5)
    widths = [round(factor * n) for factor in FACTORS]
    rough, errors, norms, wider_rough, wider_errors = [], [], [], [], []
    for seed in settings.track(range(seeds), "digits"):
        generator = settings.generator(2000 + seed)
        train, test = digits().split([n, 700], generator, stratified=True)
        x, x_test = train.features / 16, test.features / 16
        y, y_test = one_hot(train.targets, 10), one_hot(test.targets, 10)
        lines = torch.stack([torch.lerp(x_test[2 * i], x_test[2 * i + 1], _POSITIONS[:, None]) for i in range(20)])
        points = torch.cat([x, x_test, lines.flatten(0, 1)])
        bandwidth = float(torch.pdist(x).median())
        results = []
        for scale, sizes in ((1, widths), (2, widths[-1:])):
            features = RandomFourierFeatures(x.shape[1], widths[-1], scale * bandwidth, generator=generator)
            path = list(nested_solutions(partial(features, points), y, sizes))
            results.append([_on_digits(point.predictions[n:], y_test, lines) for point in path])
            if scale == 1:
                norms.append([point.norm for point in path])
        rough.append([value for value, _ in results[0]])
        errors.append([value for _, value in results[0]])
        wider_rough.append([rough[-1][-1], results[1][0][0]])
        wider_errors.append([errors[-1][-1], results[1][0][1]])
    rises = [max(b / a for a, b in pairwise(row)) for row in norms]
    claims = [
        measure(
            "Digits: 20n features join the images more smoothly than n (log10 of roughness)",
            REVIEW,
            _log_ratio(rough),
            at_most=-0.3,
        ),
        measure(
            "... and guess the others better (log10 of the squared error)", REVIEW, _log_ratio(errors), at_most=-0.3
        ),
        measure(
            "The norm never rises as features are added (largest ratio of neighbours)",
            f"{PAPER}, figure 2",
            max(rises),
            at_most=1,
        ),
        measure(
            "Digits, 20n features: twice the bandwidth joins the images as smoothly (log10 of the ratio)",
            REVIEW,
            _log_ratio(wider_rough),
            at_least=-0.05,
            at_most=0.05,
        ),
        measure(
            "... and, smoothness deciding, guesses as well (log10 of the ratio of squared errors)",
            REVIEW,
            _log_ratio(wider_errors),
            at_least=-0.05,
            at_most=0.05,
        ),
    ]
    return claims, {"roughness, digits": _geometric_mean(rough), "test error, digits": _geometric_mean(errors)}


_POSITIONS = torch.linspace(0, 1, 41, dtype=torch.float64)


def _on_digits(predictions: Tensor, y_test: Tensor, lines: Tensor) -> tuple[float, float]:
    """Mean roughness along the lines, and the mean squared test error."""
    on_lines = predictions[len(y_test) :].unflatten(0, lines.shape[:2])
    rough = [roughness(lambda _, values=values: values, line) for line, values in zip(lines, on_lines, strict=True)]  # type: ignore[misc]
    return sum(rough) / len(rough), float((predictions[: len(y_test)] - y_test).square().mean())


def _log_ratio(rows: list[list[float]]) -> list[float]:
    """Last over first of each row; as a logarithm, because the first, at the threshold, has heavy tails."""
    return [math.log10(row[-1] / row[0]) for row in rows]


def _geometric_mean(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).log().mean(dim=0).exp().tolist()


def draw(outcome: Outcome) -> Figure:
    """Ways to join the dots of the toy, of a noisy sine and of a zigzag; and how roughness falls with width."""
    series = outcome.series
    figure, (toy, sine, zigzag, falls) = panels(2, 2, width=5, height=3.6)
    for c in (-1, 1):
        toy.plot(series["toy x"], series[f"toy c = {c}"], color="0.7", label="quartics, c = ±1" if c == 1 else None)
    toy.plot(series["toy x"], series["toy equal costs"], color="C1", linewidth=1, label="320 cosines, equal costs")
    toy.plot(
        series["toy x"], series["toy rough cosines cost more"], color="C0", label="320 cosines, rough ones cost more"
    )
    toy.plot([1, 2, 4, 5], [1, 2, 4, 5], "o", color="black")
    toy.set(title="All fit 1, 2, 4, 5", xlabel="x", ylabel="f(x)", ylim=(-2, 11))
    toy.legend()
    sine.plot(series["sine x"], series["sine n features"], color="C1", linewidth=1, label="n features")
    sine.plot(series["sine x"], series["sine spline"], color="C2", linestyle="--", label="natural cubic spline")
    sine.plot(series["sine x"], series["sine 20 n features"], color="C0", label="20 n features")
    sine.plot(series["sine dots x"], series["sine dots y"], "o", color="black", markersize=4)
    sine.set(title="Noisy sine, minimum norm", xlabel="x", ylim=(-3, 5))
    sine.legend()
    zigzag.plot(series["zigzag x"], series["zigzag cubic"], color="C2", linestyle="--", label="natural cubic spline")
    zigzag.plot(series["zigzag x"], series["zigzag linear"], color="0.7", linewidth=5, label="linear spline")
    zigzag.plot(series["zigzag x"], series["zigzag network"], color="C0", label="ReLU network, weight decay")
    zigzag.set(title="Zigzag, trained network", xlabel="x", ylim=(-1.1, 1.8))
    zigzag.legend(loc="upper right")
    for name in ("noisy sine", "clean sine", "digits"):
        values = series[f"roughness, {name}"]
        falls.loglog(
            series["width / n"], [value / values[0] for value in values], marker="o", label=f"roughness, {name}"
        )
    errors = series["test error, digits"]
    falls.loglog(
        series["width / n"], [e / errors[0] for e in errors], color="C2", linestyle=":", label="test error, digits"
    )
    falls.set(title="Relative to n features", xlabel="features / n")
    falls.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    falls.xaxis.minorticks_off()
    falls.legend(loc="lower right", bbox_to_anchor=(1, 0.1))
    return figure
