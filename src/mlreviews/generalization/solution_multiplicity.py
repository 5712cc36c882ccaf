r"""Solution multiplicity: with more parameters than data many solutions fit, and the shortest reacts little to noise.

Paper: Two models of double descent for weak features (arXiv:1903.07571).
Paper: Double Trouble in Double Descent: Bias and Variance(s) in the Lazy Regime (arXiv:2003.01054).

With exactly as many parameters as data points a single solution has zero error, and the features have to be inverted:
the smallest singular value is near zero and label noise comes out magnified. Each further parameter adds a dimension
to the set of solutions and lifts the smallest singular value, so that the shortest solution gets less sensitive. The
others needn't be: a solution drawn at random from the set carries an arbitrary part that the data don't see.

Equation:
    Noise of variance sigma^2 on the targets moves the weights $\Phi^+ y$ by sigma^2 times
    $$ A(\Phi) = \|\Phi^+\|_F^2 = \sum_i s_i^{-2} \tag{1} $$
    in total. Whatever the features, as long as their rank is full, this rises with each one up to p = n and falls with
    each one beyond. For independent standard normal features
    $$ \mathbb{E} A = \frac{\min(n, p)}{|p - n| - 1} \quad (|p - n| \ge 2, \text{ else infinite}), \qquad
       s_{\min} \approx |\sqrt p - \sqrt n| \tag{2} $$
    For p >= n, the i-th diagonal entry of $(\Phi \Phi^\top)^{-1}$ is one over the squared distance of row i from the
    span of the other rows, which is chi-squared with k = p - n + 1 degrees of freedom; its inverse has the mean
    1 / (k - 2). For p < n exchange rows and columns. The prediction at x is $\sum_j \ell_j y_j$, and its variance
    $$ \operatorname{Var} f(x) = \sigma^2 \|\ell\|^2, \qquad \ell = (\Phi^+)^\top \phi(x) \tag{3} $$
    If phi(x) is standard normal too and p >= n, $\sqrt k\, \ell$ has the multivariate t distribution with k degrees of
    freedom. Over independent random features, the average of m models has the expected variance
    $$ V_m = V_\infty + (V_1 - V_\infty) / m, \qquad V_\infty = \sigma^2 \|\mathbb{E}\, \ell\|^2 \tag{4} $$
    where $V_1$ is finite. At p = n the distribution is Cauchy's, and the average is no less spread than one model.
    All solutions of least error are where gradient descent ends from different starts z:
    $$ w = \Phi^+ y + (I - \Phi^+ \Phi) z, \qquad \dim = p - \operatorname{rank} \Phi \tag{5} $$

Symbols:
    Phi: [n, p], features of the training points, with singular values s_i.
    phi(x): [p], features of a test point.
    y: [n] or [n, k], targets.
    z: [p] or [p, k], standard normal times the spread.
    sigma: standard deviation of the noise on each target.

Defaults:
    spread: 1 (ours).
    repetitions: 100 (ours).

Deviations:
    1. Singular values at rounding level are no constraint: they add a dimension to (5) and nothing to (1).
    2. $s_{\min}$ of (2) is a lower bound of the mean (Gordon's inequality), and sharp only for large sizes and p != n.

Reduces to:
    min-norm-interpolation: solutions of spread 0.
    parameter-counting: the dimension is p minus the effective degrees of freedom without a penalty.
    fixed-vs-random-design: the mean of (3) over test points is the variance part of the error there.
    double-descent: without a signal, the Gaussian test error is sigma^2 (1 + E A).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_same_length
from mlreviews.generalization.fixed_vs_random_design import least_squares_weights
from mlreviews.generalization.min_norm_interpolation import gd_limit
from mlreviews.generalization.parameter_counting import effective_dof

__all__ = [
    "ensemble_weights",
    "gaussian_noise_amplification",
    "gaussian_smallest_singular_value",
    "input_sensitivity",
    "noise_amplification",
    "prediction_variance",
    "sample_solutions",
    "sensitivity",
    "solution_set_dim",
]


def solution_set_dim(features: Float[Tensor, "n p"]) -> int:
    """The dimension of the set of weights with the least training error, eq. (5): 0 where they are unique.

    Args:
        features: [n, p], Phi.

    Returns:
        p minus the numerical rank.

    Raises:
        ValueError: not a matrix, empty, NaN or infinite.
    """
    return features.shape[1] - round(effective_dof(features))


def noise_amplification(features: Float[Tensor, "n p"]) -> float:
    """How much variance noise of unit variance on the targets gives to the weights in total: A of eq. (1).

    The same for the features and their transpose: tr((Phi Phi^T)^+) = tr((Phi^T Phi)^+).

    Args:
        features: [n, p], Phi. The singular values are computed in float64.

    Returns:
        A, in units of one over a squared feature.

    Raises:
        ValueError: not a matrix, empty, NaN or infinite.
    """
    check_matrix("features", features)
    s = torch.linalg.svdvals(features.double())
    s = s[s > s[0] * max(features.shape) * torch.finfo(features.dtype).eps]
    return float(s.square().reciprocal().sum())


def gaussian_noise_amplification(n: int, p: int) -> float:
    """The exact mean of `noise_amplification` over n x p matrices of independent standard normal entries, eq. (2).

    Args:
        n: training points.
        p: features.

    Returns:
        The mean; infinity for n - 1 <= p <= n + 1.

    Raises:
        ValueError: n or p below 1.
    """
    check_count("n", n)
    check_count("p", p)
    spare = abs(p - n) - 1
    return min(n, p) / spare if spare > 0 else math.inf


def gaussian_smallest_singular_value(n: int, p: int) -> float:
    """About the smallest singular value of an n x p matrix of independent standard normal entries, eq. (2).

    Args:
        n: training points.
        p: features.

    Returns:
        A lower bound of the mean that is sharp for large n and p away from p = n, where it is 0.

    Raises:
        ValueError: n or p below 1.
    """
    check_count("n", n)
    check_count("p", p)
    return abs(math.sqrt(p) - math.sqrt(n))


def sample_solutions(
    features: Float[Tensor, "n p"],
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    count: int,
    *,
    spread: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count p"] | Float[Tensor, "count p k"]:
    """Random weights of least training error, eq. (5): where gradient descent ends from normal starts.

    Args:
        features: [n, p], Phi.
        targets: [n] or [n, k], y.
        count: how many solutions.
        spread: standard deviation of the starts z; 0 gives the minimum-norm solution every time.
        generator: draws the starts.

    Returns:
        [count, p] or [count, p, k], in the dtype of the features.

    Raises:
        ValueError: shapes that don't fit, NaN or infinite values, a count below 1 or a negative spread.
    """
    check_matrix("features", features)
    check_matrix("targets", targets, dims=(1, 2))
    check_count("count", count)
    check_number("spread", spread, least=0.0)
    p, y = features.shape[1], targets.reshape(len(targets), -1)
    start = torch.randn(p, count * y.shape[1], dtype=torch.float64, generator=generator).to(features.device)
    solutions = gd_limit(features, y.repeat(1, count), spread * start)
    return solutions.reshape(p, count, *targets.shape[1:]).movedim(1, 0)


def prediction_variance(weights: Float[Tensor, "m n"], sigma: float) -> Float[Tensor, " m"]:
    """Variance of predictions over noise on the training targets, eq. (3).

    Args:
        weights: [m, n], row i gives the i-th prediction from the n targets, as `least_squares_weights` and
            `ensemble_weights` do.
        sigma: standard deviation of the noise, in units of the targets.

    Returns:
        [m], in squared units of the targets.

    Raises:
        ValueError: not a matrix, NaN or infinite values, or a negative sigma.
    """
    check_matrix("weights", weights)
    check_number("sigma", sigma, least=0.0)
    return sigma**2 * weights.square().sum(dim=1)


def ensemble_weights(
    features_train: Sequence[Float[Tensor, "n _p"]], features: Sequence[Float[Tensor, "m _p"]]
) -> Float[Tensor, "m n"]:
    """Weights of the training targets in the average prediction of several minimum-norm least-squares models.

    Args:
        features_train: of each model, [n, p_i], features of the same n training points.
        features: of each model, [m, p_i], features of the same m test points.

    Returns:
        [m, n]; times the targets [n] they give the averaged predictions [m].

    Raises:
        ValueError: no models, not as many of one as of the other, shapes that don't fit, NaN or infinite values.
    """
    if not features_train or len(features_train) != len(features):
        raise ValueError(
            "features_train, features: expected one of each for every model, "
            f"got {len(features_train)} and {len(features)}"
        )
    members = [least_squares_weights(train, test) for train, test in zip(features_train, features, strict=True)]
    return torch.stack(members).mean(0)


def sensitivity(
    fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]],
    x_train: Float[Tensor, "n d"],
    y_train: Float[Tensor, " n"] | Float[Tensor, "n k"],
    x: Float[Tensor, "m d"],
    sigma: float,
    *,
    repetitions: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " m"] | Float[Tensor, "m k"]:
    """Variance of any learner's predictions when normal noise is added to its training targets, by refitting.

    Args:
        fit: called with (x_train, targets), returns the fitted function from inputs [m, d] to predictions.
        x_train: [n, d], the training inputs.
        y_train: [n] or [n, k], the targets that the noise is added to.
        x: [m, d], where to predict.
        sigma: standard deviation of the noise.
        repetitions: how often the noise is drawn and the learner fitted, at least 2.
        generator: draws the noise.

    Returns:
        [m] or [m, k] in squared units of the targets and float64: unbiased, with a relative error of about
        (2 / repetitions) ** 0.5.

    Raises:
        ValueError: shapes that don't fit, values (also predictions) NaN or infinite, sigma negative, or fewer than
            two repetitions.
    """
    check_matrix("x_train", x_train)
    check_matrix("y_train", y_train, dims=(1, 2))
    check_same_length(x_train=x_train, y_train=y_train)
    check_matrix("x", x)
    check_number("sigma", sigma, least=0.0)
    check_count("repetitions", repetitions, least=2)
    predictions = []
    for _ in range(repetitions):
        noise = torch.randn(y_train.shape, dtype=torch.float64, generator=generator).to(y_train)
        predicted = fit(x_train, y_train + sigma * noise)(x)
        check_matrix("predictions of fit", predicted, dims=(1, 2))
        check_same_length(x=x, predictions=predicted)
        predictions.append(predicted.detach().double())
    return torch.stack(predictions).var(dim=0)


def input_sensitivity(predict: Callable[[Tensor], Tensor], x: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """How fast predictions change with the input: the Frobenius norm of the Jacobian at each point.

    Args:
        predict: differentiable, from inputs [m, d] to predictions [m] or [m, k], each row from its own input alone.
        x: [m, d], where to measure.

    Returns:
        [m], in units of the predictions over those of the inputs.

    Raises:
        ValueError: not a matrix, NaN or infinite values, or predictions that aren't one row for each input.
    """
    check_matrix("x", x)
    points = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = predict(points)
        check_matrix("values of predict", values, dims=(1, 2))
        check_same_length(x=x, values=values)
        # The rows don't mix, so that the gradient of a sum over them holds every row's own gradient.
        outputs = values.reshape(len(x), -1).sum(dim=0)
        gradients = [torch.autograd.grad(output, points, retain_graph=True)[0] for output in outputs]
    return torch.stack(gradients).square().sum(dim=(0, 2)).sqrt()
