r"""Bias-variance U-curve: test error falls and rises with complexity, as bias makes way for variance.

Source: Geman, Bienenstock and Doursat (1992), Neural Networks and the Bias/Variance Dilemma, Neural Computation 4(1)
Source: Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, 2nd edition, section 7.3

A model fitted to another training set makes other predictions. Their mean misses the truth by the bias, and they
scatter about that mean by the variance: a simple model has much of the first, a complex one of the second, and the
test error is smallest in between. Both are measured here by refitting any model on many training sets; polynomials of
rising degree show the U, and the minimum-norm ones beyond it what comes after.

Equation:
    $$ \mathbb{E}\bigl[(y - f_m(x))^2\bigr]
       = \underbrace{(\mathbb{E} f_m(x) - f^*(x))^2}_{\text{bias}^2}
       + \underbrace{\operatorname{Var} f_m(x)}_{\text{variance}} + \underbrace{\sigma^2}_{\text{noise}},
       \qquad y = f^*(x) + \varepsilon \tag{1} $$
    $$ S^2(x) = \frac{1}{M - 1} \sum_{m=1}^M \bigl(f_m(x) - \bar f(x)\bigr)^2, \qquad
       B(x) = \bigl(\bar f(x) - f^*(x)\bigr)^2 - \frac{S^2(x)}{M} \tag{2} $$
    estimate variance and squared bias from M fits. The mean of the fits has a variance of its own, Var / M, which the
    square counts as bias: B subtracts it, so both are unbiased, and B may come out below 0 where there is no bias.
    $$ \phi_k(x) = \sqrt{2k + 1}\, P_k(t), \qquad t = \frac{2x - \ell - h}{h - \ell} \tag{3} $$
    are the features of the polynomials, k = 0 to the degree: orthonormal for x uniform on the domain from l to h.

Symbols:
    f_m: [points] or [points, models], predictions after fitting to the m-th training set.
    f^*: [points], the true regression function.
    M: n_rep, the number of independent training sets.
    sigma: standard deviation of the noise of the labels (in units of y).
    P_k: Legendre polynomial of degree k.
    l, h: lower and upper end of the domain.

Defaults:
    n_rep: 200 training sets (ours); the standard error of a variance is then about 10 % of it.
    domain: from -1 to 1, where Legendre's polynomials are orthogonal.

Deviations:
    1. The squared bias of eq. (2) is corrected for the finite number of fits; the plain square is usual.
    2. Training sets are independent draws, or random subsets of a larger pool, and not bootstrap samples of one
       training set, whose repeated rows change what an interpolating model does.
    3. From degree n on least squares has many solutions, and the one of minimum norm is taken (as in
       arXiv:1812.11118). It depends on the basis, hence the orthonormal one.

Reduces to:
    mean-as-minimal-model: degree 0.
    min-norm-interpolation: one training set of n different inputs and a degree of at least n - 1, in the features of
        eq. (3).
    numpy.polynomial.legendre.legfit: one training set and a degree below n, up to the normalisation of eq. (3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_same_length
from mlreviews.common.least_squares import min_norm_solve

__all__ = [
    "BiasVariance",
    "DataBiasVariance",
    "bias_variance_decompose",
    "bias_variance_on_data",
    "fixed_design",
    "legendre_features",
    "polynomial_curve",
    "random_design",
    "squared_bias_and_variance",
    "subsets",
]

Function = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor], Function]
Sampler = Callable[[Generator | None], tuple[Tensor, Tensor]]
Inputs = Float[Tensor, " points"] | Float[Tensor, "points d"]
PerPoint = Float[Tensor, " points"] | Float[Tensor, "points models"]
PerSet = Float[Tensor, " n_rep"] | Float[Tensor, "n_rep models"]


class _Parts:
    def means(self) -> dict[str, Tensor]:
        """Each part by name, averaged over the test points (train_mse: over training sets): a number for each model."""
        return {name: part.mean(0) for name, part in vars(self).items()}


@dataclass(frozen=True, eq=False)
class BiasVariance(_Parts):
    """The parts of the test error where the truth is known, for each test point, in squared units of the labels.

    Attributes:
        bias2: unbiased and therefore possibly below 0.
        variance: unbiased.
        noise: sigma squared.
        mse: measured against new labels, the sum of the three up to sampling error.
        train_mse: for each training set, the mean squared error on it.
    """

    bias2: PerPoint
    variance: PerPoint
    noise: PerPoint
    mse: PerPoint
    train_mse: PerSet


@dataclass(frozen=True, eq=False)
class DataBiasVariance(_Parts):
    """The parts of the test error on data whose truth is unknown, for each test point, in squared units of the labels.

    Attributes:
        bias2_and_noise: the average over many test points estimates that of bias^2 + noise.
        variance: unbiased.
        mse: measured against the one label that is there, exactly the sum of the two.
        train_mse: for each training set, the mean squared error on it.
    """

    bias2_and_noise: PerPoint
    variance: PerPoint
    mse: PerPoint
    train_mse: PerSet


def squared_bias_and_variance(
    predictions: Float[Tensor, "n_rep points"] | Float[Tensor, "n_rep points models"], truth: Float[Tensor, " points"]
) -> tuple[PerPoint, PerPoint]:
    """Unbiased estimates of squared bias and variance from repeated fits, eq. (2).

    Args:
        predictions: of at least two fits, for the same points.
        truth: f^* at these points; with labels in its place, the first result is bias^2 + noise.

    Returns:
        Squared bias (not clipped at 0) and variance.

    Raises:
        ValueError: fewer than two fits, another number of points, NaN or infinity.
    """
    check_matrix("predictions", predictions, dims=(2, 3))
    check_matrix("truth", truth, dims=(1,))
    check_count("number of fits", len(predictions), least=2)
    check_same_length(predictions=predictions[0], truth=truth)
    variance = predictions.var(0, correction=1)
    return (predictions.mean(0) - _beside(truth, variance)).square() - variance / len(predictions), variance


def bias_variance_decompose(
    fit: Fit,
    sampler: Sampler,
    x_test: Inputs,
    f_true: Function,
    *,
    sigma: float,
    n_rep: int = 200,
    generator: Generator | None = None,
) -> BiasVariance:
    """Measures bias^2, variance and noise of a way to fit models, and the test error they should add up to.

    Args:
        fit: from inputs ([n] or [n, d]) and labels [n] to a function that predicts labels for inputs. It may predict
            by several models at once, as columns; each is then measured by itself.
        sampler: draws a training set; `random_design` and `fixed_design` make one.
        x_test: inputs at which errors are measured. The training inputs, for the in-sample error of a fixed design.
        f_true: the true regression function, from inputs to labels without noise.
        sigma: standard deviation of the Gaussian noise of the test labels.
        n_rep: training sets to draw, at least 2.
        generator: draws training sets and test labels.

    Returns:
        The parts, in float64.

    Raises:
        ValueError: NaN or infinite data or predictions, shapes that don't fit, or sigma or n_rep out of range.
    """
    check_number("sigma", sigma, least=0.0)
    truth = f_true(x_test).double()
    predictions, train_mse = _refit(fit, sampler, x_test, truth, n_rep, generator)
    bias2, variance = squared_bias_and_variance(predictions, truth)
    errors = torch.randn(n_rep, len(truth), dtype=torch.float64, generator=generator).to(truth.device)
    labels = _beside(truth + sigma * errors, predictions)
    mse = (labels - predictions).square().mean(0)
    return BiasVariance(
        bias2=bias2, variance=variance, noise=torch.full_like(mse, sigma**2), mse=mse, train_mse=train_mse
    )


def bias_variance_on_data(
    fit: Fit,
    sampler: Sampler,
    x_test: Inputs,
    y_test: Float[Tensor, " points"],
    *,
    n_rep: int = 200,
    generator: Generator | None = None,
) -> DataBiasVariance:
    """Measures bias^2 + noise together, and variance, on real data, where the truth is not known.

    Args:
        fit: as for `bias_variance_decompose`.
        sampler: draws a training set; `subsets` makes one from a pool. The parts are those over subsets of this pool,
            which stand for new data as long as they are much smaller than it.
        x_test: inputs that are not in the pool.
        y_test: their labels.
        n_rep: training sets to draw, at least 2.
        generator: draws training sets.

    Returns:
        The parts, in float64.

    Raises:
        ValueError: NaN or infinite data or predictions, shapes that don't fit, or n_rep out of range.
    """
    labels = y_test.double()
    predictions, train_mse = _refit(fit, sampler, x_test, labels, n_rep, generator)
    bias2_and_noise, variance = squared_bias_and_variance(predictions, labels)
    mse = (_beside(labels, variance) - predictions).square().mean(0)
    return DataBiasVariance(bias2_and_noise=bias2_and_noise, variance=variance, mse=mse, train_mse=train_mse)


def _refit(
    fit: Fit, sampler: Sampler, x_test: Tensor, labels: Tensor, n_rep: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Predictions for x_test and mean squared training errors of n_rep fits, stacked, in float64."""
    check_count("n_rep", n_rep, least=2)
    _check_data("x_test", x_test, "labels of x_test", labels)
    predictions, train_mse = [], []
    for _ in range(n_rep):
        x, y = sampler(generator)
        _check_data("x", x, "y", y)
        predict = fit(x, y)
        predictions.append(_predicted(predict, x_test))
        fitted = _predicted(predict, x)
        train_mse.append((fitted - _beside(y, fitted)).square().mean(0))
    return torch.stack(predictions), torch.stack(train_mse)


def _check_data(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    check_matrix(x_name, x, dims=(1, 2))
    check_matrix(y_name, y, dims=(1,))
    check_same_length(**{x_name: x, y_name: y})


def _predicted(predict: Function, x: Tensor) -> Tensor:
    predictions = predict(x).detach().double()
    check_matrix("predictions", predictions, dims=(1, 2))
    check_same_length(inputs=x, predictions=predictions)
    return predictions


def _beside(labels: Tensor, predictions: Tensor) -> Tensor:
    """The labels with an axis for the models where the predictions, of the same points, have one."""
    return labels if labels.ndim == predictions.ndim else labels[..., None]


def random_design(draw: Callable[[Generator | None], Tensor], f_true: Function, sigma: float) -> Sampler:
    """A sampler whose training sets have new inputs each time, with labels f_true(x) + N(0, sigma^2).

    Args:
        draw: draws the inputs of one training set, [n] or [n, d].
        f_true: the true regression function.
        sigma: standard deviation of the noise.
    """
    check_number("sigma", sigma, least=0.0)

    def sample(generator: Generator | None) -> tuple[Tensor, Tensor]:
        x = draw(generator)
        truth = f_true(x)
        return x, truth + sigma * torch.randn(truth.shape, dtype=truth.dtype, generator=generator).to(truth.device)

    return sample


def fixed_design(x: Inputs, f_true: Function, sigma: float) -> Sampler:
    """A sampler whose training sets all have the inputs x, with new labels f_true(x) + N(0, sigma^2) each time.

    Args:
        x: the training inputs.
        f_true: the true regression function, from inputs to labels without noise.
        sigma: standard deviation of the labels' noise.

    Returns:
        from a generator to inputs and labels.
    """
    return random_design(lambda generator: x, f_true, sigma)


def subsets(x: Inputs, y: Float[Tensor, " points"], n_train: int) -> Sampler:
    """A sampler whose training sets are random subsets, without repetition, of a pool of data.

    Args:
        x: inputs of the pool.
        y: labels of the pool.
        n_train: rows of a training set, fewer than the pool has.

    Raises:
        ValueError: n_train is out of range, shapes don't fit, NaN or infinity.
    """
    _check_data("x", x, "y", y)
    check_count("n_train", n_train)
    if n_train >= len(x):
        raise ValueError(f"n_train: expected fewer than the {len(x)} rows of the pool, got {n_train}")

    def sample(generator: Generator | None) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(x), generator=generator)[:n_train].to(x.device)
        return x[rows], y[rows]

    return sample


def legendre_features(
    x: Float[Tensor, " n"], degree: int, domain: tuple[float, float] = (-1.0, 1.0)
) -> Float[Tensor, "n terms"]:
    """Orthonormal Legendre polynomials of degree 0 to ``degree``, eq. (3).

    Args:
        x: inputs inside the domain.
        degree: of the last polynomial, at least 0.
        domain: lower and upper end of the interval on which they are orthonormal.

    Returns:
        [n, degree + 1] in the dtype of x, computed in float64.

    Raises:
        ValueError: an input outside the domain, an empty domain, a negative degree, NaN or infinity.
    """
    check_matrix("x", x, dims=(1,))
    check_count("degree", degree, least=0)
    low, high = domain
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"domain: expected finite ends in ascending order, got {domain}")
    if x.min() < low or x.max() > high:
        raise ValueError(f"x: expected values from {low} to {high}, got {float(x.min())} to {float(x.max())}")
    t = (2 * x.double() - low - high) / (high - low)
    polynomials = [torch.ones_like(t), t]
    for k in range(1, degree):  # Bonnet's recursion: (k + 1) P_{k+1} = (2k + 1) t P_k - k P_{k-1}
        before = polynomials[k - 1] * (-k / (k + 1))
        polynomials.append(before.addcmul_(t, polynomials[k], value=(2 * k + 1) / (k + 1)))
    norms = torch.arange(1, 2 * degree + 2, 2, dtype=t.dtype, device=t.device).sqrt()
    return (torch.stack(polynomials[: degree + 1], dim=1) * norms).to(x.dtype)


def polynomial_curve(degrees: Sequence[int], domain: tuple[float, float] = (-1.0, 1.0)) -> Fit:
    """A way to fit polynomials of several degrees to the same data, for the decompositions above.

    Args:
        degrees: the complexities, each at least 0. Degree n - 1 has as many coefficients as there are points; from
            degree n on the minimiser with the shortest coefficients is taken.
        domain: lower and upper end of all inputs, test inputs included.

    Returns:
        From inputs [n] and labels [n] to a function that predicts, in float64, by all models: [points, degrees].

    Raises:
        ValueError: no degrees, or one below 0. The fit raises where an input is outside the domain.
    """
    if not degrees:
        raise ValueError("degrees: expected at least one")
    for degree in degrees:
        check_count("degrees", degree, least=0)

    def fit(x: Tensor, y: Tensor) -> Function:
        features = legendre_features(x.double(), max(degrees), domain)
        coefficients = features.new_zeros(features.shape[1], len(degrees))
        for column, degree in enumerate(degrees):
            coefficients[: degree + 1, column] = min_norm_solve(features[:, : degree + 1], y.double())
        return lambda inputs: legendre_features(inputs.double(), max(degrees), domain) @ coefficients

    return fit
