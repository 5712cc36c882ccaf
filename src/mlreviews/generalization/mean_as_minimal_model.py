r"""Mean as minimal model: the best constant, a model of one parameter, which memorises only when n = 1.

Source: Koenker and Bassett (1978), Regression Quantiles, Econometrica 46(1)
Source: Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, 2nd edition, section 7.4

The simplest model distils a whole group into one number: the mean if squared errors count, the median if absolute
ones do, a quantile if errors above and below weigh differently. What such a number gives away of the data it was
fitted to is its optimism, the gap between test and training error, which falls as 1 / n. With a single observation the
model is that observation: training error 0, test error twice the variance.

Equation:
    $$ \bar y = \arg\min_c \sum_i w_i (y_i - c)^2, \qquad
       y_{(q)} = \arg\min_c \sum_i w_i\, \rho_q(y_i - c), \qquad
       \rho_q(r) = \max(q r, (q - 1) r) \tag{1} $$
    The median is q = 1/2. Where a whole interval minimises the pinball loss, as for the median of an even number of
    observations, its middle is taken.
    $$ \mathbb{E}\,\text{train} = \sigma^2 \Bigl(1 - \frac{p}{n}\Bigr), \qquad
       \mathbb{E}\,\text{test} = \sigma^2 \Bigl(1 + \frac{p}{n}\Bigr), \qquad
       \text{optimism} = \frac{2 \sigma^2 p}{n} \tag{2} $$
    for the mean (p = 1), whatever the distribution, and for least squares with p parameters that can express the
    truth, with the test error taken at the training inputs (fixed design).

Symbols:
    y: [n], observations.
    w: [n], weights of the observations, not negative; None means all equal.
    q: the quantile, between 0 and 1, and slope of the pinball loss where the model is too low.
    c: the model's one parameter (in units of y).
    p: number of parameters.
    sigma: standard deviation of an observation about the truth (in units of y).

Defaults:
    minimiser: the weighted mean (the review's simplest model).

Deviations:
    1. Quantiles are minimisers of the pinball loss (the inverse of the empirical distribution function, averaged where
       it jumps). The interpolated quantiles that are the default elsewhere are not.

Reduces to:
    torch.linalg.lstsq: the mean, with a column of ones as the design.
    sklearn.linear_model.Ridge: the mean, as alpha goes to infinity with an intercept that is not penalised.
    sklearn.dummy.DummyRegressor: strategies "mean" and "median".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_matrix, check_number, check_same_length

__all__ = [
    "ConstantPredictor",
    "expected_optimism",
    "expected_test_error",
    "expected_train_error",
    "pinball_loss",
    "weighted_mean",
    "weighted_median",
    "weighted_quantile",
]

Weights = Float[Tensor, " n"] | None


def weighted_mean(y: Float[Tensor, " n"], weights: Weights = None) -> Float[Tensor, ""]:
    """The constant of least squared error.

    Args:
        y: observations.
        weights: of the observations, not negative and not all 0; None means all equal.

    Returns:
        The mean, computed in float64, in the dtype of y.

    Raises:
        ValueError: no observations, NaN or infinity, lengths that differ, or weights that are negative or all 0.
    """
    values, weight = _checked(y, weights)
    return ((weight / weight.sum()) @ values).to(y.dtype)


def weighted_median(y: Float[Tensor, " n"], weights: Weights = None) -> Float[Tensor, ""]:
    """The constant of least absolute error: `weighted_quantile` at one half.

    Args:
        y: observations.
        weights: of the observations, not negative and not all 0; None means all equal.

    Returns:
        The median in the dtype of y: an observation, or halfway between two.

    Raises:
        ValueError: as `weighted_mean`.
    """
    return weighted_quantile(y, 0.5, weights)


def weighted_quantile(y: Float[Tensor, " n"], q: float, weights: Weights = None) -> Float[Tensor, ""]:
    """The constant of least pinball loss, eq. (1).

    Args:
        y: observations.
        q: share of the weight that is to lie below, strictly between 0 and 1.
        weights: of the observations, not negative and not all 0; None means all equal.

    Returns:
        The quantile in the dtype of y: an observation, or halfway between two.

    Raises:
        ValueError: q outside (0, 1), or as `weighted_mean`.
    """
    _check_quantile(q)
    values, weight = _checked(y, weights)
    values, order = values[weight > 0].sort()
    below = weight[weight > 0][order].cumsum(0)
    target = q * below[-1]
    # A share of exactly q leaves the interval up to the next observation; rounding must not decide whether it does.
    slack = 4 * len(below) * torch.finfo(below.dtype).eps * below[-1]
    first = torch.searchsorted(below, target - slack)
    last = torch.searchsorted(below, target + slack, right=True).clamp(max=len(below) - 1)
    return ((values[first] + values[last]) / 2).to(y.dtype)


def pinball_loss(
    prediction: Float[Tensor, " n"] | Float[Tensor, ""], y: Float[Tensor, " n"], q: float, weights: Weights = None
) -> Float[Tensor, ""]:
    """The mean pinball loss, eq. (1): half the mean absolute error at q = 1/2.

    Args:
        prediction: for each observation, or one for all.
        y: observations.
        q: the quantile that minimises the expected loss, strictly between 0 and 1.
        weights: of the observations, not negative and not all 0; None means all equal.

    Returns:
        The weighted mean, differentiable in the prediction, in units of y.

    Raises:
        ValueError: q outside (0, 1), or as `weighted_mean`.
    """
    _check_quantile(q)
    _, weight = _checked(y, weights)
    check_finite("prediction", prediction)
    if prediction.shape not in (y.shape, ()):
        raise ValueError(
            f"prediction: expected one number, or the shape {tuple(y.shape)} of y, got {tuple(prediction.shape)}"
        )
    residual = y - prediction
    loss = torch.maximum(q * residual, (q - 1) * residual)
    return loss @ (weight / weight.sum()).to(loss.dtype)


class ConstantPredictor(nn.Module):
    """The model of one parameter. It starts at 0 and is fitted in closed form, or by gradients like any module.

    Args:
        minimiser: from observations and weights to the best constant: `weighted_mean` (squared error),
            `weighted_median` (absolute error), or ``partial(weighted_quantile, q=0.9)`` (pinball loss).
    """

    def __init__(self, minimiser: Callable[..., Tensor] = weighted_mean) -> None:
        super().__init__()
        self.minimiser = minimiser
        self.value = nn.Parameter(torch.zeros(()))

    def fit(self, y: Float[Tensor, " n"], weights: Weights = None) -> ConstantPredictor:
        """Sets the constant to the best one for y. The parameter is replaced by one of the dtype and device of y."""
        self.value = nn.Parameter(self.minimiser(y, weights=weights))
        return self

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """The same prediction for every row of x."""
        return self.value.expand(len(x))


def expected_optimism(p: float, n: int, sigma: float) -> float:
    """By how much the expected test error exceeds the expected training error, eq. (2).

    Args:
        p: parameters of a least-squares fit, or effective degrees of freedom of any linear fit; 1 for the mean.
        n: observations, at least p.
        sigma: standard deviation of the noise, in units of y.

    Returns:
        2 sigma^2 p / n, in squared units of y.

    Raises:
        ValueError: an argument out of range.
    """
    check_count("n", n)
    check_number("p", p, least=0.0)
    check_number("sigma", sigma, least=0.0)
    if p > n:
        raise ValueError(f"p: expected at most n = {n}, got {p}")
    return 2 * sigma**2 * p / n


def expected_train_error(p: int, n: int, sigma: float) -> float:
    """The expected mean squared error on the training data, eq. (2): half the optimism less than the noise.

    Args:
        p: as for `expected_optimism`.
        n: as for `expected_optimism`.
        sigma: as for `expected_optimism`.

    Returns:
        the error, in squared units of y.

    Raises:
        ValueError: an argument out of range.
    """
    return sigma**2 - expected_optimism(p, n, sigma) / 2


def expected_test_error(p: int, n: int, sigma: float) -> float:
    """The expected mean squared error on new data, eq. (2): half the optimism more than the noise.

    Args:
        p: as for `expected_optimism`.
        n: as for `expected_optimism`.
        sigma: as for `expected_optimism`.

    Returns:
        the error, in squared units of y.

    Raises:
        ValueError: an argument out of range.
    """
    return sigma**2 + expected_optimism(p, n, sigma) / 2


def _checked(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Observations and weights in float64."""
    check_matrix("y", y, dims=(1,))
    if weights is None:
        return y.double(), torch.ones_like(y, dtype=torch.float64)
    check_matrix("weights", weights, dims=(1,))
    check_same_length(y=y, weights=weights)
    if weights.min() < 0 or weights.max() == 0:
        raise ValueError("weights: expected numbers of at least 0, and at least one above")
    return y.double(), weights.double()


def _check_quantile(q: float) -> None:
    if not 0.0 < q < 1.0:
        raise ValueError(f"q: expected a number between 0 and 1, both excluded, got {q}")
