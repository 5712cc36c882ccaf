"""Does a model memorise exactly as many observations as it has parameters, and random labels as easily as true ones?

Digits of scikit-learn, with the true labels and with labels drawn at random (the randomisation test of the paper).
Quick: 200 points, 5 seeds, half a minute. Full: 800 points, 10 seeds, a minute and a half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.common.least_squares import nested_solutions
from mlreviews.datasets import digits
from mlreviews.generalization.parameter_counting import effective_dof, interpolation_threshold, memorize_construct
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:1611.03530"
REVIEW = "review of 2023-05-16"


def run(settings: Settings) -> Outcome:
    """Measures the interpolation threshold of random features, and what networks do with random labels."""
    n, seeds = (800, 10) if settings.full else (200, 5)
    widths = sorted({*range(n // 10, 2 * n + 1, n // 10), *range(n - 3, n + 4)})
    thresholds: dict[str, list[float]] = {"true": [], "random": []}
    curves: dict[str, list[Tensor]] = {"true": [], "random": []}
    spline_error, train_accuracy, test_accuracy, dof_ratio = [], [], [], []
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        x, labels, x_test, labels_test = _digits(n, generator)
        shuffled = torch.randint(10, (n,), generator=generator)
        features = torch.relu(x @ torch.randn(x.shape[1], max(widths), dtype=x.dtype, generator=generator))
        errors = _train_errors(features, [labels, shuffled], widths)
        for name, error in zip(thresholds, errors, strict=True):
            curves[name].append(torch.tensor(list(error.values())))
            found = interpolation_threshold(error.__getitem__, widths)
            thresholds[name].append((found or 2 * max(widths)) / n)
        with torch.no_grad():
            net = memorize_construct(x, shuffled.double(), generator=generator)
            spline_error.append(float((net(x) - shuffled).abs().max()))
        fit, guess = _train_network(x, shuffled, x_test, labels_test, generator)
        train_accuracy.append(fit)
        test_accuracy.append(guess)
        dof_ratio.append(effective_dof(features, ridge=float(features.square().sum()) / n) / n)
    claims = [
        measure(
            "Random features memorise the true labels from width n on, and not before (threshold / n)",
            REVIEW,
            thresholds["true"],
            at_least=1,
            at_most=1,
        ),
        measure(
            "Random labels are memorised at the same width (threshold / n)",
            f"{PAPER}, section 2",
            thresholds["random"],
            at_least=1,
            at_most=1,
        ),
        measure(
            "A two-layer ReLU network with 2n + d weights fits random labels (largest error)",
            f"{PAPER}, theorem 1",
            max(spline_error),
            at_most=1e-4,
        ),
        measure(
            "A network trained by gradient descent fits random labels (training accuracy)",
            f"{PAPER}, table 1",
            train_accuracy,
            at_least=0.99,
        ),
        measure(
            "... and has learnt nothing (test accuracy, chance is 0.1)",
            f"{PAPER}, section 2.1",
            test_accuracy,
            at_least=0.05,
            at_most=0.15,
        ),
        measure(
            "A ridge penalty leaves 2n weights fewer than n / 2 effective parameters (df / n)",
            "equation 1 of the card",
            dof_ratio,
            at_most=0.5,
        ),
    ]
    series = {"width / n": [width / n for width in widths]}
    series |= {f"train error, {name} labels": torch.stack(runs).mean(0).tolist() for name, runs in curves.items()}
    return Outcome(claims, series)


def _digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n digits to train on and the rest to test on, as (inputs, labels) each; pixels centred by the training mean."""
    data = digits()
    order = torch.randperm(len(data), generator=generator)
    # Without centring, all pixels being positive, many random units are on (or off) for every digit: linear, not new.
    x = data.features[order] / 16
    x = x - x[:n].mean(0)
    labels = data.targets[order]
    return x[:n], labels[:n], x[n:], labels[n:]


def _train_errors(features: Tensor, labelings: list[Tensor], widths: list[int]) -> list[dict[int, float]]:
    """For each labelling: width -> mean squared training error of least squares on its one-hot targets."""
    targets = torch.cat([nn.functional.one_hot(labels, 10).double() for labels in labelings], dim=1)
    errors: list[dict[int, float]] = [{} for _ in labelings]
    for point in nested_solutions(features, targets, widths):
        squares = (point.predictions - targets).square().mean(0)
        for error, square in zip(errors, squares.split(10), strict=True):
            error[point.width] = float(square.mean())
    return errors


def _train_network(
    x: Tensor, classes: Tensor, x_test: Tensor, classes_test: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """Trains 64-512-10 with Adam on the whole batch; returns training and test accuracy."""
    x, x_test = x.float(), x_test.float()
    first = (torch.randn(x.shape[1], 512, generator=generator) / x.shape[1] ** 0.5).requires_grad_()
    second = (torch.randn(512, 10, generator=generator) / 512**0.5).requires_grad_()

    def logits(inputs: Tensor) -> Tensor:
        return torch.relu(inputs @ first) @ second

    optimiser = torch.optim.Adam([first, second], lr=3e-3)
    for _ in range(600):
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits(x), classes).backward()
        optimiser.step()
    with torch.no_grad():
        fit = (logits(x).argmax(1) == classes).float().mean()
        guess = (logits(x_test).argmax(1) == classes_test).float().mean()
    return float(fit), float(guess)


def draw(outcome: Outcome) -> Figure:
    """Training error against width: it meets zero at width n, for true and for random labels."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    series = outcome.series
    for name in ("true", "random"):
        error = [max(value, 1e-32) for value in series[f"train error, {name} labels"]]
        axis.semilogy(series["width / n"], error, marker="o", markersize=3, label=f"{name} labels")
    axis.axvline(1, color="0.4", linestyle=":")
    axis.annotate("width = n", (1, 1e-8), xytext=(6, 0), textcoords="offset points", color="0.3")
    axis.set(title="As many parameters as observations", xlabel="width / n", ylabel="mean squared training error")
    axis.legend()
    return figure
