r"""Fixed vs random design: the same model judged at its training inputs with fresh labels, and at new inputs.

Paper: Classical Statistical (In-Sample) Intuitions Don't Generalize Well: A Note on Bias-Variance Tradeoffs,
    Overfitting and Moving from Fixed to Random Designs (arXiv:2409.18842)
Paper: A U-turn on Double Descent: Rethinking Parameter Counting in Statistical Learning (arXiv:2310.18988), for eq. (5)

Textbooks derive the bias-variance trade-off in fixed design: the test inputs are the training inputs and only the
labels are drawn again. There every interpolator has the same error, twice the noise, so that neither a second descent
nor benign overfitting can occur. Machine learning is judged in random design, at new inputs, where the bias need not
fall with complexity and an interpolator may predict smoothly. Both errors are exact for linear smoothers (nearest
neighbours, least squares, forests with given leaves), and found by redrawing the labels for anything else.

Equation:
    $$ \operatorname{ERR} = \frac{1}{m} \sum_{j=1}^m \mathbb{E}\bigl[(\tilde y_j - \hat f(x_j))^2\bigr], \qquad
       \tilde y_j = f^*(x_j) + \epsilon_j, \quad \operatorname{Var} \epsilon_j = \sigma^2 \tag{1} $$
    with $x_j$ the n training inputs in fixed design and m new ones in random design. It is bias² + variance + noise:
    $$ \operatorname{ERR} = \frac{1}{m} \sum_j \bigl(f^*(x_j) - \mathbb{E} \hat f(x_j)\bigr)^2
       + \frac{1}{m} \sum_j \operatorname{Var} \hat f(x_j) + \sigma^2. \tag{2} $$
    A linear smoother predicts $\hat f(x) = \sum_i s_i(x) y_i$, so that
    $$ \operatorname{Bias}(x) = f^*(x) - \sum_i s_i(x) f^*(x_i), \qquad
       \operatorname{Var} \hat f(x) = \sigma^2 \lVert s(x) \rVert^2, \tag{3} $$
    $$ \operatorname{Bias}(x) = \underbrace{f^*(x) - f^*\bigl(\textstyle\sum_i s_i(x) x_i\bigr)}_{\text{matching}}
       + \underbrace{f^*\bigl(\textstyle\sum_i s_i(x) x_i\bigr) - \textstyle\sum_i s_i(x) f^*(x_i)}_{\text{averaging}},
       \tag{4} $$
    $$ p_s = \frac{n}{m} \sum_{j=1}^m \lVert s(x_j) \rVert^2, \tag{5} $$
    which makes the variance in (2) equal to $\sigma^2 p_s / n$. An interpolator has $s(x_i) = e_i$ at the training
    inputs: bias 0, variance $\sigma^2$, $p_s = n$ and an error of $2 \sigma^2$. It is benign when $p_s \ll n$ at new
    inputs.

Symbols:
    f*: the true regression function, from [m, d] to [m].
    sigma: standard deviation of the label noise (unit of the targets).
    x_i: [n, d], the training inputs.
    x_j: [m, d], the inputs at which the model is judged.
    s: [m, n], the smoother's weights, one row for each x_j.
    p_s: effective number of parameters (a count).
    k: number of neighbours.

Defaults:
    repetitions: 100 label draws in `design_errors` (ours).
    ridge: 0, the least-squares solution of minimum norm.

Deviations:
    1. Errors are conditional on the training inputs; average over draws of them for the expectation over both.
    2. Neighbours at the same distance as the k-th share its weight equally, where the paper leaves ties open. Then the
       variance of k-NN is below $\sigma^2 / k$; without ties it is exactly that.
    3. The Monte-Carlo bias² is corrected for the variance of the mean over the repetitions, so that it has the right
       expectation; it can therefore be slightly negative.

Reduces to:
    parameter-counting: effective parameters of least squares without penalty, at the training inputs.
    mean-as-minimal-model: nearest neighbours with k = n, which leaves one effective parameter.
    min-norm-interpolation: `least_squares_weights` without a ridge, applied to the targets.
    sklearn.neighbors.KNeighborsRegressor: `knn_weights` applied to the targets, where there are no ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_same_length
from mlreviews.common.least_squares import min_norm_solve, ridge_solve

__all__ = [
    "DesignErrors",
    "design_errors",
    "effective_parameters",
    "knn_weights",
    "least_squares_weights",
    "smoother_bias_decomposition",
    "smoother_errors",
]

Function = Callable[[Tensor], Tensor]

_TIE = 1e-12  # relative difference of distances that is rounding


class DesignErrors(NamedTuple):
    """The three parts of the expected squared error, eq. (2), in squared units of the targets.

    Attributes:
        bias2: squared bias, averaged over the inputs.
        variance: of the prediction over training labels, averaged over the inputs.
        noise: sigma², which no model can avoid.
    """

    bias2: float
    variance: float
    noise: float

    @property
    def error(self) -> float:
        """The expected squared error at fresh labels: the sum of the parts."""
        return self.bias2 + self.variance + self.noise


def design_errors(
    fit: Callable[[Tensor, Tensor], Function],
    f_star: Function,
    x_train: Float[Tensor, "n d"],
    x: Float[Tensor, "m d"],
    sigma: float,
    *,
    repetitions: int = 100,
    generator: torch.Generator | None = None,
) -> DesignErrors:
    """Error of any learner by redrawing the training labels with normal noise, eq. (1) and (2).

    Args:
        fit: called with (x_train, labels [n]), returns the fitted function from inputs [m, d] to predictions [m].
        f_star: the true function, from inputs [m, d] to [m].
        x_train: [n, d], the training inputs; they stay as they are.
        x: [m, d], where to judge: ``x_train`` again for the fixed design, new inputs for the random design.
        sigma: standard deviation of the label noise.
        repetitions: how often the labels are drawn and the learner is fitted, at least 2.
        generator: draws the noise.

    Returns:
        The parts, of which ``noise`` is exact. The others carry a Monte-Carlo error that falls as repetitions ** -0.5.

    Raises:
        ValueError: shapes don't fit, values (also of ``f_star`` and predictions) are NaN or infinite, sigma is
            negative, or fewer than two repetitions.
    """
    check_matrix("x_train", x_train)
    check_matrix("x", x)
    check_number("sigma", sigma, least=0.0)
    check_count("repetitions", repetitions, least=2)
    f_train, f_x = _evaluate(f_star, "f_star", x_train), _evaluate(f_star, "f_star", x)
    predictions = []
    for _ in range(repetitions):
        noise = torch.randn(len(f_train), dtype=torch.float64, generator=generator).to(f_train.device)
        fitted = fit(x_train, (f_train + sigma * noise).to(x_train.dtype))
        predictions.append(_evaluate(fitted, "the prediction of fit", x))
    variance, mean = torch.var_mean(torch.stack(predictions), dim=0)
    bias2 = (f_x - mean).square() - variance / repetitions
    return DesignErrors(float(bias2.mean()), float(variance.mean()), sigma**2)


def smoother_errors(
    weights: Float[Tensor, "m n"], f_train: Float[Tensor, " n"], f_x: Float[Tensor, " m"], sigma: float
) -> DesignErrors:
    """The exact error of a linear smoother, eq. (3), in float64.

    Args:
        weights: [m, n], row j makes the prediction at the j-th input from the n training labels.
        f_train: [n], the true function at the training inputs.
        f_x: [m], the true function where the weights predict; ``f_train`` again for the fixed design.
        sigma: standard deviation of the label noise.

    Returns:
        Bias², variance and noise, each exact up to rounding.

    Raises:
        ValueError: shapes don't fit, values are NaN or infinite, or sigma is negative.
    """
    check_matrix("weights", weights)
    check_matrix("f_train", f_train, dims=(1,))
    check_matrix("f_x", f_x, dims=(1,))
    check_same_length(weights=weights, f_x=f_x)
    _check_columns(weights, "f_train", f_train)
    check_number("sigma", sigma, least=0.0)
    bias = f_x.double() - weights.double() @ f_train.double()
    variance = sigma**2 * effective_parameters(weights) / len(f_train)
    return DesignErrors(float(bias.square().mean()), variance, sigma**2)


def smoother_bias_decomposition(
    weights: Float[Tensor, "m n"], x_train: Float[Tensor, "n d"], x: Float[Tensor, "m d"], f_star: Function
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Splits a smoother's bias at each input into its two sources, eq. (4), in float64.

    Args:
        weights: [m, n], row j makes the prediction at ``x[j]``.
        x_train: [n, d], the training inputs.
        x: [m, d], the inputs of the predictions.
        f_star: the true function, from inputs [m, d] to [m].

    Returns:
        ``(matching, averaging)``, [m] each. Matching: the weighted mean of the training inputs is not x. Averaging: the
        weighted mean of f* is not f* of the weighted mean. Their sum is the bias.

    Raises:
        ValueError: shapes don't fit, or values (also of ``f_star``) are NaN or infinite.
    """
    check_matrix("weights", weights)
    check_matrix("x_train", x_train)
    check_matrix("x", x)
    check_same_length(weights=weights, x=x)
    _check_columns(weights, "x_train", x_train)
    s = weights.double()
    at_mean = _evaluate(f_star, "f_star", s @ x_train.double())
    matching = _evaluate(f_star, "f_star", x.double()) - at_mean
    return matching, at_mean - s @ _evaluate(f_star, "f_star", x_train.double())


def effective_parameters(weights: Float[Tensor, "m n"]) -> float:
    """Effective number of parameters that a smoother uses at the inputs of its rows, eq. (5).

    Args:
        weights: [m, n], one row for each input; training inputs or new ones, which is the point of the measure.

    Returns:
        The count: n for an interpolator at its training inputs, n / k for k nearest neighbours, 1 for the mean.

    Raises:
        ValueError: not a matrix, empty, NaN or infinite.
    """
    check_matrix("weights", weights)
    return weights.shape[1] * float(weights.double().square().sum(dim=1).mean())


def knn_weights(x_train: Float[Tensor, "n d"], x: Float[Tensor, "m d"], k: int) -> Float[Tensor, "m n"]:
    """Weights of k-nearest-neighbour regression in Euclidean distance.

    Args:
        x_train: [n, d], the training inputs.
        x: [m, d], where to predict. At a training input the nearest neighbour is the point itself.
        k: number of neighbours, 1 to n.

    Returns:
        [m, n], rows sum to 1: 1 / k for each of the k nearest. Points tied for the last places share them equally.

    Raises:
        ValueError: shapes don't fit, values are NaN or infinite, or k is not in 1 to n.
    """
    check_matrix("x_train", x_train)
    check_matrix("x", x)
    _check_same_columns(x=x, x_train=x_train)
    check_count("k", k)
    if k > len(x_train):
        raise ValueError(f"k: expected at most the {len(x_train)} training points, got {k}")
    # Through differences and not through a matrix product, which would turn the distance 0 into rounding noise.
    distance = torch.cdist(x.double(), x_train.double(), compute_mode="donot_use_mm_for_euclid_dist")
    kth = distance.kthvalue(k, dim=1, keepdim=True).values
    closer = distance < kth * (1 - _TIE)
    tied = (distance - kth).abs() <= kth * _TIE
    share = (k - closer.sum(dim=1, keepdim=True)).double() / tied.sum(dim=1, keepdim=True)
    return ((closer + tied * share) / k).to(x_train.dtype)


def least_squares_weights(
    features_train: Float[Tensor, "n p"], features: Float[Tensor, "m p"], *, ridge: float = 0.0
) -> Float[Tensor, "m n"]:
    r"""Weights of least squares on given features: $\Phi \Phi_{train}^+$, or its ridge version. Float64 inside.

    Args:
        features_train: [n, p], features of the training inputs.
        features: [m, p], features of the inputs where to predict.
        ridge: penalty on the squared norm of the coefficients; 0 is the solution of minimum norm, which interpolates
            once the features have rank n.

    Returns:
        [m, n]; times the targets [n] they give the predictions [m].

    Raises:
        ValueError: shapes don't fit, values are NaN or infinite, or the ridge is negative.
    """
    check_matrix("features", features)
    check_matrix("features_train", features_train)
    check_number("ridge", ridge, least=0.0)
    _check_same_columns(features=features, features_train=features_train)
    phi = features_train.double()
    units = torch.eye(len(phi), dtype=phi.dtype, device=phi.device)
    # Column i of the coefficients is the fit to labels that are 1 at the i-th training point and 0 elsewhere.
    coefficients = ridge_solve(phi, units, ridge) if ridge else min_norm_solve(phi, units)
    return (features.double() @ coefficients).to(features.dtype)


def _evaluate(function: Function, name: str, x: Tensor) -> Tensor:
    values = function(x)
    check_matrix(name, values, dims=(1,))
    if len(values) != len(x):
        raise ValueError(f"{name}: expected {len(x)} values for {len(x)} inputs, got {len(values)}")
    return values.detach().double()


def _check_same_columns(**tensors: Tensor) -> None:
    columns = [str(tensor.shape[1]) for tensor in tensors.values()]
    if len(set(columns)) > 1:
        raise ValueError(f"{' and '.join(tensors)}: expected the same number of columns, got {' and '.join(columns)}")


def _check_columns(weights: Tensor, name: str, tensor: Tensor) -> None:
    if weights.shape[1] != len(tensor):
        raise ValueError(
            f"weights: expected one column for each of {len(tensor)} rows of {name}, got {weights.shape[1]}"
        )
