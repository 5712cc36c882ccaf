r"""Minimum-norm interpolation: of all models that fit the data exactly, the one with the smallest weights.

Paper: Reconciling modern machine learning practice and the bias-variance trade-off (arXiv:1812.11118).
Paper: How do infinite width bounded norm networks look in function space? (arXiv:1902.05040).

A model that has memorised its data must still fill the gaps between them: given 1, 2, 4 and 5 it has to guess the value
at 3. Zero training error doesn't fix that guess; what fixes it is which of the interpolants is taken. Gradient descent
from zero takes the one of minimum norm, and the norm can only fall as features are added. Whether a small norm means a
smooth curve depends on the features: it does when rough ones cost more, or are rare among random ones.

Equation:
    $$ \hat w = \arg\min_{w:\, \Phi w = y} \sum_j d_j w_j^2 = D^{-1} \Phi^\top (\Phi D^{-1} \Phi^\top)^{-1} y \tag{1} $$
    Gradient descent on $\tfrac12 \|\Phi w - y\|^2$ moves only within the row space of $\Phi$, so that it ends at
    $$ w_\infty = w_0 + \Phi^+ (y - \Phi w_0) \tag{2} $$
    and with small steps is, at time t = steps times step size and with $\Phi = U S V^\top$, at
    $$ w(t) = w_0 + V \frac{1 - e^{-S^2 t}}{S} U^\top (y - \Phi w_0) \tag{3} $$
    How roughly the dots are joined, on an even grid of spacing h:
    $$ R(f) = \operatorname{mean}_i \frac{|f(x_{i-1}) - 2 f(x_i) + f(x_{i+1})|}{h^2}
       \approx \operatorname{mean} |f''| \tag{4} $$
    The smoothest interpolant in the squared sense is the natural cubic spline:
    $$ s = \arg\min_{f:\, f(x_i) = y_i} \int f''(x)^2 \, dx \tag{5} $$
    The review's toy: each of these passes through (1, 1), (2, 2), (4, 4), (5, 5), and the value at 3 is 3 + 4c:
    $$ f_c(x) = x + c\,(x-1)(x-2)(x-4)(x-5) \tag{6} $$

Symbols:
    Phi: [n, p], features of the training points.
    y: [n] or [n, k], targets.
    d: [p], penalties of the features; D is their diagonal matrix.
    w_0: [p] or [p, k], where gradient descent starts.
    S: singular values of Phi.

Defaults:
    penalty: 1 for every feature, the plain norm (paper 1, section 2).
    start: zero (ours).
    step_size: $1 / S_{\max}^2$, half the largest stable one (ours).

Deviations:
    1. Where nothing interpolates (fewer features than points), (1) is the least-squares fit of smallest norm.
    2. The second differences of (4) are divided by h^2, so that the value does not depend on the grid.
    3. Beyond the last knots the spline (5) goes on as a straight line, which is what minimises the integral there.

Reduces to:
    torch.linalg.pinv: equal penalties, where the weights are pinv(Phi) y.
    ridge regression: the limit of a vanishing ridge.
    kernel interpolation: the predictions are those of the kernel $k(x, x') = \phi(x)^\top D^{-1} \phi(x')$.
    natural cubic spline: the limit of ReLU features with ever denser thresholds, and hardly any penalty on a line.
    mean-as-minimal-model: one constant feature, whose weight is the mean of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_same_length
from mlreviews.common.least_squares import min_norm_solve

__all__ = [
    "cosine_features",
    "gap_interpolant",
    "gd_interpolate",
    "gd_limit",
    "gradient_flow",
    "min_norm_interpolate",
    "natural_cubic_spline",
    "roughness",
]

_EPS = torch.finfo(torch.float64).eps


def min_norm_interpolate(
    features: Float[Tensor, "n p"],
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    *,
    penalty: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
    """The weights of smallest, possibly weighted, norm among those that fit the targets best, eq. (1).

    Args:
        features: [n, p], Phi. Computed in float64.
        targets: [n] or [n, k], y.
        penalty: [p], d > 0: what the square of each weight costs. None: 1 for all.

    Returns:
        [p] or [p, k], in the dtype of the features.

    Raises:
        ValueError: shapes that don't fit, NaN or infinite values, or a penalty that isn't positive.
    """
    if penalty is None:
        return min_norm_solve(features, targets)
    check_matrix("features", features)
    check_matrix("penalty", penalty, dims=(1,))
    if penalty.shape != features.shape[1:] or not bool((penalty > 0).all()):
        raise ValueError(
            f"penalty: expected a positive number for each of {features.shape[1]} features, "
            f"got shape {tuple(penalty.shape)} with minimum {float(penalty.min())}"
        )
    # With v = sqrt(d) w the weighted norm of w is the plain norm of v.
    scale = penalty.double().rsqrt()
    weights = min_norm_solve(features.double() * scale, targets)
    return (scale.reshape(-1, *[1] * (targets.ndim - 1)) * weights).to(features)


def gd_limit(
    features: Float[Tensor, "n p"],
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    start: Float[Tensor, " p"] | Float[Tensor, "p k"],
) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
    """Where gradient descent on the squared error ends: the solution nearest to its start, eq. (2).

    Args:
        features: [n, p], Phi. Computed in float64.
        targets: [n] or [n, k], y.
        start: [p] or [p, k], w_0.

    Returns:
        [p] or [p, k], in the dtype of the features.

    Raises:
        ValueError: shapes that don't fit, or NaN or infinite values.
    """
    phi, y, w = _checked(features, targets, start)
    return (w + min_norm_solve(phi, y - phi @ w)).to(features)


def gradient_flow(
    features: Float[Tensor, "n p"],
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    time: float,
    *,
    start: Float[Tensor, " p"] | Float[Tensor, "p k"] | None = None,
) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
    """The weights that gradient descent with infinitely small steps has reached at a time, eq. (3).

    Args:
        features: [n, p], Phi. Computed in float64.
        targets: [n] or [n, k], y.
        time: steps times step size, in units of one over a squared singular value.
        start: [p] or [p, k], w_0. None: zero.

    Returns:
        [p] or [p, k], in the dtype of the features.

    Raises:
        ValueError: shapes that don't fit, NaN or infinite values, or a negative time.
    """
    check_number("time", time, least=0.0)
    phi, y, w = _checked(features, targets, start)
    u, s, vt = torch.linalg.svd(phi, full_matrices=False)
    # Directions at rounding level hold no signal; in the limit of long times they would be amplified without bound.
    gain = torch.where(s > s.max() * max(phi.shape) * _EPS, -torch.expm1(-s.square() * time) / s, 0.0)
    moved = (vt.T * gain) @ (u.T @ (y - phi @ w))
    return (w + moved).to(features)


def gd_interpolate(
    features: Float[Tensor, "n p"],
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    steps: int,
    *,
    start: Float[Tensor, " p"] | Float[Tensor, "p k"] | None = None,
    step_size: float | None = None,
) -> tuple[Float[Tensor, " p"] | Float[Tensor, "p k"], Float[Tensor, " steps_plus_1"]]:
    r"""Gradient descent on $\tfrac12 \|\Phi w - y\|^2$.

    Args:
        features: [n, p], Phi. Computed in float64.
        targets: [n] or [n, k], y.
        steps: how many.
        start: [p] or [p, k], w_0. None: zero.
        step_size: below 2 / S_max^2, where S_max is the largest singular value. None: 1 / S_max^2.

    Returns:
        The weights, [p] or [p, k] in the dtype of the features, and the mean squared training error before the first
        step and after each, [steps + 1] in float64.

    Raises:
        ValueError: shapes that don't fit, NaN or infinite values, or a step size with which the descent diverges.
    """
    check_count("steps", steps, least=0)
    phi, y, w = _checked(features, targets, start)
    largest = max(float(torch.linalg.matrix_norm(phi, ord=2)) ** 2, torch.finfo(phi.dtype).tiny)
    step_size = 1 / largest if step_size is None else step_size
    if not 0 < step_size < 2 / largest:
        raise ValueError(f"step_size: expected a number above 0 and below {2 / largest:.6g}, got {step_size}")
    errors = []
    for _ in range(steps):
        residual = phi @ w - y
        errors.append(residual.square().mean())
        w = w - step_size * (phi.T @ residual)
    errors.append((phi @ w - y).square().mean())
    return w.to(features), torch.stack(errors)


def roughness(predict: Callable[[Tensor], Tensor], grid: Float[Tensor, " m"] | Float[Tensor, "m d"]) -> float:
    """Mean absolute second difference of a function along an evenly spaced line, eq. (4).

    Args:
        predict: from points shaped like the grid to values, [m] or [m, k]; the mean is taken over the k as well.
        grid: [m] numbers, or [m, d] points on a straight line, evenly spaced; m >= 3.

    Returns:
        In units of the values over the squared unit of the grid.

    Raises:
        ValueError: fewer than three points, uneven spacing, NaN or infinite values, or not one value a point.
    """
    check_matrix("grid", grid, dims=(1, 2))
    if len(grid) < 3:
        raise ValueError(f"grid: expected at least 3 points, got {len(grid)}")
    steps = grid.double().diff(dim=0)
    spacing = float(torch.linalg.vector_norm(steps.mean(0)))
    uneven = float((steps - steps.mean(0)).abs().max())
    if spacing == 0 or uneven > 1e-3 * spacing:
        raise ValueError(f"grid: expected evenly spaced points, got steps of {spacing:.6g} that differ by {uneven:.6g}")
    values = predict(grid)
    check_matrix("values of predict", values, dims=(1, 2))
    check_same_length(grid=grid, values=values)
    return float(values.double().diff(n=2, dim=0).abs().mean()) / spacing**2


def natural_cubic_spline(
    knots: Float[Tensor, " n"], values: Float[Tensor, " n"], at: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """The interpolant with the smallest integral of its squared second derivative, eq. (5).

    Args:
        knots: [n], n >= 2, strictly increasing.
        values: [n], at the knots.
        at: [m], where to evaluate; outside the knots the spline is a straight line.

    Returns:
        [m], in the dtype of the values; computed in float64.

    Raises:
        ValueError: shapes that don't fit, NaN or infinite values, or knots that don't increase.
    """
    for name, tensor in {"knots": knots, "values": values, "at": at}.items():
        check_matrix(name, tensor, dims=(1,))
    check_same_length(knots=knots, values=values)
    x, y, points = knots.double(), values.double(), at.double()
    h = x.diff()
    if len(x) < 2 or not bool((h > 0).all()):
        raise ValueError(f"knots: expected at least 2, strictly increasing, got {knots.tolist()}")
    slopes = y.diff() / h
    # The second derivative is piecewise linear; that the first one is continuous makes a tridiagonal system of it.
    system = torch.diag((h[:-1] + h[1:]) / 3) + torch.diag(h[1:-1] / 6, 1) + torch.diag(h[1:-1] / 6, -1)
    bend = torch.zeros_like(x)
    bend[1:-1] = torch.linalg.solve(system, slopes.diff())
    inside = points.clamp(x[0], x[-1])
    i = torch.searchsorted(x, inside).clamp(min=1) - 1
    a, b = (x[i + 1] - inside) / h[i], (inside - x[i]) / h[i]
    curve = a * y[i] + b * y[i + 1] + h[i] ** 2 / 6 * ((a**3 - a) * bend[i] + (b**3 - b) * bend[i + 1])
    # The bend is zero at both ends.
    left, right = slopes[0] - h[0] / 6 * bend[1], slopes[-1] + h[-1] / 6 * bend[-2]
    return (curve + (points - inside) * torch.where(points < x[0], left, right)).to(values)


def gap_interpolant(x: Float[Tensor, "*shape"], c: float) -> Float[Tensor, "*shape"]:
    """The quartic f_c of eq. (6): the identity at 1, 2, 4 and 5, and 3 + 4c at 3.

    Args:
        x: any shape.
        c: which member of the family.
    """
    return x + c * (x - 1) * (x - 2) * (x - 4) * (x - 5)


def cosine_features(x: Float[Tensor, " n"], width: int, *, low: float, high: float) -> Float[Tensor, "n width"]:
    """The first cosines on an interval, from the constant to ever higher frequency: cos(pi j (x - low) / (high - low)).

    Args:
        x: [n], points.
        width: how many, j = 0 to width - 1.
        low: left end of the interval.
        high: right end of the interval.

    Raises:
        ValueError: NaN or infinite values, width below 1, or an empty interval.
    """
    check_matrix("x", x, dims=(1,))
    check_count("width", width)
    check_number("low", low)
    check_number("high", high, above=low)
    return torch.cos(math.pi / (high - low) * (x[:, None] - low) * torch.arange(width, device=x.device))


def _checked(features: Tensor, targets: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_matrix("features", features)
    check_matrix("targets", targets, dims=(1, 2))
    check_same_length(features=features, targets=targets)
    shape = (features.shape[1], *targets.shape[1:])
    start = features.new_zeros(shape) if start is None else start
    check_matrix("start", start, dims=(1, 2))
    if start.shape != shape:
        raise ValueError(f"start: expected shape {shape}, got {tuple(start.shape)}")
    return features.double(), targets.double(), start.double()
