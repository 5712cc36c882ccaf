r"""Parameter counting: a model memorises as many observations as it has free parameters.

Paper: Understanding deep learning requires rethinking generalization (arXiv:1611.03530).

A line has two parameters and passes exactly through any two points; linear least squares on p features passes through
any p points. That count predicts when a model can learn its training data by heart, random labels included. Networks
need no more: two layers of ReLU units with 2n + d weights are enough for any n points in d dimensions. A penalty on the
weights lowers the count that matters without removing a parameter: the effective degrees of freedom.

Equation:
    $$ \operatorname{df}(\lambda) = \operatorname{tr}\bigl[X (X^\top X + \lambda I)^{-1} X^\top\bigr]
       = \sum_i \frac{d_i^2}{d_i^2 + \lambda} \tag{1} $$
    $$ c(x) = \sum_{j=1}^n w_j \max(\langle a, x \rangle - b_j, 0), \qquad
       b_1 < \langle a, x_1 \rangle \le b_2 < \langle a, x_2 \rangle \le \dots \tag{2} $$
    With the points sorted by their projection on a, the matrix of the hidden units is lower triangular with a positive
    diagonal (theorem 1), so there are weights w for any targets.

Symbols:
    X: [n, p], features of the training points.
    d_i: singular values of X.
    lambda: ridge penalty, in units of a squared singular value.
    a: [d], direction on which the points are projected.
    b, w: [n], thresholds and output weights of the n hidden units.

Defaults:
    tolerance: 1e-10, the mean squared training error that counts as zero (ours).

Deviations:
    1. The proof only asks for thresholds between neighbouring projections. Here each is the projection before it, which
       makes the network the linear spline through the points and gives w in closed form, without a triangular solve.

Reduces to:
    mean-as-minimal-model: one constant feature, where df(0) = 1 and one observation is memorised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_matrix, check_number, check_same_length

__all__ = ["MemorizingNet", "effective_dof", "interpolation_threshold", "memorize_construct"]


def effective_dof(features: Float[Tensor, "n p"], ridge: float = 0.0) -> float:
    """Effective degrees of freedom of ridge regression: the trace of its hat matrix, eq. (1).

    Args:
        features: [n, p], the design matrix. The singular values are computed in float64.
        ridge: penalty lambda >= 0 on the squared norm of the coefficients.

    Returns:
        The count; at ``ridge=0`` the numerical rank of the features, and towards 0 as the penalty grows.

    Raises:
        ValueError: not a matrix, empty, NaN or infinite, or a negative penalty.
    """
    check_matrix("features", features)
    check_number("ridge", ridge, least=0.0)
    squared = torch.linalg.svdvals(features.double()).square()
    # Singular values at rounding level are zeros: without a penalty each would count as a full parameter.
    noise = squared.max() * (max(features.shape) * torch.finfo(features.dtype).eps) ** 2
    squared = squared[squared > noise]
    return float((squared / (squared + ridge)).sum())


def interpolation_threshold(
    train_error: Callable[[int], float], widths: Iterable[int], *, tolerance: float = 1e-10
) -> int | None:
    """The smallest width at which a family of models memorises its training data.

    Args:
        train_error: fits the model of the given width and returns its mean squared training error.
        widths: tried in this order, so give them in ascending order.
        tolerance: the error up to which the data count as memorised, in squared units of the targets.

    Returns:
        The first width that memorises, or None when none does.

    Raises:
        ValueError: the tolerance is negative.
    """
    check_number("tolerance", tolerance, least=0.0)
    return next((width for width in widths if train_error(width) <= tolerance), None)


class MemorizingNet(nn.Module):
    """The two-layer ReLU network of eq. (2), with 2n + d trainable weights.

    Args:
        direction: [d], the shared input weights a of all hidden units.
        thresholds: [n], b.
        weights: [n], output weights w.
    """

    def __init__(
        self, direction: Float[Tensor, " d"], thresholds: Float[Tensor, " n"], weights: Float[Tensor, " n"]
    ) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction)
        self.thresholds = nn.Parameter(thresholds)
        self.weights = nn.Parameter(weights)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The network's output c(x) for inputs of shape [..., d]."""
        hidden = torch.relu((x @ self.direction)[..., None] - self.thresholds)
        return hidden @ self.weights


def memorize_construct(
    inputs: Float[Tensor, "n d"], targets: Float[Tensor, " n"], *, generator: torch.Generator | None = None
) -> MemorizingNet:
    """Builds a network of 2n + d weights that passes exactly through n points (theorem 1 of the paper).

    Args:
        inputs: [n, d], no two rows equal.
        targets: [n], any values: random labels are memorised as well.
        generator: draws the direction of projection.

    Returns:
        The network in float64. Its error at the points is rounding, of the order n * 1e-16 times the steepest slope
        between neighbouring projections.

    Raises:
        ValueError: shapes don't fit, values are NaN or infinite, or two inputs are the same point.
    """
    check_matrix("inputs", inputs)
    check_matrix("targets", targets, dims=(1,))
    check_same_length(inputs=inputs, targets=targets)
    direction = torch.randn(inputs.shape[1], dtype=torch.float64, generator=generator).to(inputs.device)
    projections, order = (inputs.double() @ direction).sort()
    gaps = projections.diff()
    if (gaps <= 0).any():
        raise ValueError("inputs: expected distinct rows, got two rows with the same projection")
    values = targets.double()[order]
    # The first unit alone reaches the first point, with slope y_1 over a distance of 1.
    thresholds = torch.cat([projections[:1] - 1, projections[:-1]])
    slopes = torch.cat([values[:1], values.diff() / gaps])
    weights = slopes.diff(prepend=slopes.new_zeros(1))  # a ReLU unit adds its weight to every slope after it
    return MemorizingNet(direction, thresholds, weights)
