r"""Double descent: past the point where a model fits its training data exactly, the test error falls a second time.

Paper: Reconciling modern machine learning practice and the bias-variance trade-off (arXiv:1812.11118)
Paper: Two models of double descent for weak features (arXiv:1903.07571)
Paper: Surprises in High-Dimensional Ridgeless Least Squares Interpolation (arXiv:1903.08560)
Paper: Deep Double Descent: Where Bigger Models and More Data Hurt (arXiv:1912.02292)

With few parameters the test error of a model is U-shaped in their number. It peaks where the model has just enough of
them to fit the n training points, because a single solution is left there, and a wild one. Beyond, many solutions fit,
least squares takes the shortest, and that gets smoother with each further parameter: the error falls again. The same
peak can be met by adding data to a fixed model, and by training for longer.

Equation:
    $$ h_N(x) = \sum_{k=1}^N a_k \varphi(x; v_k), \qquad a = \Phi_N^+ y \tag{1} $$
    $$ \varphi(x; v, b) = \sqrt{2/M} \cos(\langle v, x \rangle + b) \quad\text{or}\quad
       \varphi(x; v) = \sqrt{2/M} \max(\langle v, x \rangle, 0) \tag{2} $$
    Least squares on p of D features, $x \sim N(0, I_D)$ and $y = \langle \beta, x \rangle + N(0, \sigma^2)$: with
    $s^2 = \|\beta_{>p}\|^2 + \sigma^2$, the noise and what the missing features add to it, the expected test error is
    $$ \begin{aligned} R &= s^2 \Bigl(1 + \frac{p}{n-p-1}\Bigr) && (p \le n-2) \\[0.6em]
       R &= \|\beta_{\le p}\|^2 \Bigl(1 - \frac{n}{p}\Bigr) + s^2 \Bigl(1 + \frac{n}{p-n-1}\Bigr) && (p \ge n+2)
       \end{aligned} \tag{3} $$
    and infinite between. For $n, p \to \infty$ with $p/n = \gamma$ and no missing features,
    $$ \begin{aligned} R - \sigma^2 &\to \sigma^2 \frac{\gamma}{1-\gamma} && (\gamma < 1) \\[0.6em]
       R - \sigma^2 &\to r^2 \Bigl(1 - \frac{1}{\gamma}\Bigr) + \frac{\sigma^2}{\gamma - 1} && (\gamma > 1)
       \end{aligned} \tag{4} $$

Symbols:
    x: [n, d], inputs.
    y: [n] or [n, k], targets. One-hot targets of k classes make it N k coefficients; the peak stays at N = n.
    N: width, the number of features in use, out of M.
    v, b: [d] and scalar, drawn once for each feature.
    a: [N] or [N, k], coefficients.
    beta: [D], true coefficients, of which the first p are fitted.
    gamma, r: p / n, and the norm of beta.

Defaults:
    ridge: 0, the minimum-norm solution (paper, section 2).
    momentum: 0.95 (paper, appendix).
    epochs, step decay: 6000, and below the threshold 10 % after every 500 (paper, appendix).
    widening: new weights are drawn with variance 0.01 (paper, appendix).

Deviations:
    1. Real cosines with a random phase instead of complex exponentials, so that N counts real coefficients.
    2. Features carry the factor of eq. (2), so that inner products of all M tend to the Gaussian or arc-cosine kernel.
    3. Networks are trained on the whole set at each step instead of small batches, whose size the paper leaves open.

Reduces to:
    min-norm-interpolation: any width N >= n without a ridge.
    mean-as-minimal-model: a single constant feature.
    torch.linalg.lstsq: one width up to n without a ridge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_matrix, check_number, check_same_length
from mlreviews.common.least_squares import PathPoint, nested_solutions
from mlreviews.common.two_layer_net import TwoLayerNet, gradient_descent

__all__ = [
    "RandomFourierFeatures",
    "RandomReLUFeatures",
    "RiskCurve",
    "Sample",
    "asymptotic_ridgeless_risk",
    "double_descent_curve",
    "epoch_wise_curve",
    "gaussian_min_norm_risk",
    "optimal_gaussian_ridge",
    "sample_wise_curve",
    "tuned_ridge_curve",
    "weight_reuse_curve",
]


class Sample(NamedTuple):
    """Data points.

    Attributes:
        x: inputs.
        y: targets; one-hot for classes.
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"] | Float[Tensor, "n k"]


class RiskCurve(NamedTuple):
    """Errors along an axis of model size, sample size or training time; float64.

    Attributes:
        sizes: widths, numbers of parameters, sample sizes or epochs.
        train_mse: mean squared error at the training points, over all entries of the targets.
        test_mse: the same at the test points.
        test_error: share of the test points whose largest output is not the largest target; NaN for a single output.
        norm: Frobenius norm of the coefficients, or of all parameters of a network.
    """

    sizes: list[int]
    train_mse: Float[Tensor, " points"]
    test_mse: Float[Tensor, " points"]
    test_error: Float[Tensor, " points"]
    norm: Float[Tensor, " points"]


class _RandomFeatures(nn.Module):
    """M functions of the input with frozen random directions, any range of which can be computed alone."""

    directions: Tensor

    def __init__(self, dim: int, n_features: int, generator: torch.Generator | None, dtype: torch.dtype) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("n_features", n_features)
        self.n_features = n_features
        self.register_buffer("directions", torch.randn(dim, n_features, generator=generator, dtype=dtype))

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        if not 0 <= start < stop <= self.n_features:
            raise ValueError(f"start, stop: expected a range within {self.n_features} features, got {start}:{stop}")
        return x @ self.directions[:, start:stop]


class RandomFourierFeatures(_RandomFeatures):
    r"""Cosine features of eq. (2), $v \sim N(0, I / \text{bandwidth}^2)$ and b uniform on $[0, 2 \pi)$.

    Inner products of all M tend to the Gaussian kernel $\exp(-\|x - x'\|^2 / 2\,\text{bandwidth}^2)$.

    Args:
        dim: d, of the inputs.
        n_features: M.
        bandwidth: of the kernel, in units of the inputs.
        generator: draws directions and phases.
        dtype: of the frozen weights.
    """

    phases: Tensor

    def __init__(
        self,
        dim: int,
        n_features: int,
        bandwidth: float,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_number("bandwidth", bandwidth, above=0.0)
        super().__init__(dim, n_features, generator, dtype)
        self.directions /= bandwidth
        self.register_buffer("phases", 2 * math.pi * torch.rand(n_features, generator=generator, dtype=dtype))

    def forward(self, x: Float[Tensor, "n d"], start: int, stop: int) -> Float[Tensor, "n width"]:
        """The features start:stop of the inputs."""
        angles = self._project(x, start, stop) + self.phases[start:stop]
        return math.sqrt(2 / self.n_features) * torch.cos(angles)


class RandomReLUFeatures(_RandomFeatures):
    r"""ReLU features of eq. (2), v uniform on the sphere of radius $\sqrt d$.

    Inner products of all M tend to the arc-cosine kernel
    $\|x\| \|x'\| (\sin\theta + (\pi - \theta) \cos\theta) / \pi$, where $\theta$ is the angle between the inputs.

    Args:
        dim: d, of the inputs.
        n_features: M.
        generator: draws the directions.
        dtype: of the frozen weights.
    """

    def __init__(
        self,
        dim: int,
        n_features: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(dim, n_features, generator, dtype)
        self.directions *= math.sqrt(dim) / torch.linalg.norm(self.directions, dim=0)

    def forward(self, x: Float[Tensor, "n d"], start: int, stop: int) -> Float[Tensor, "n width"]:
        """The features start:stop of the inputs."""
        return math.sqrt(2 / self.n_features) * torch.relu(self._project(x, start, stop))


def double_descent_curve(
    features: Callable[[Tensor, int, int], Tensor],
    train: Sample,
    test: Sample,
    widths: Sequence[int],
    *,
    ridge: float = 0.0,
) -> RiskCurve:
    """The errors of eq. (1) over growing widths, in float64, with one factorisation reused along them.

    Args:
        features: gives the features start:stop of inputs, as `RandomFourierFeatures` does.
        train: the n points to fit.
        test: points to predict.
        widths: the N, strictly increasing.
        ridge: penalty on the squared norm of the coefficients; 0 is the minimum-norm solution.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity, no data, widths below 1, not increasing or beyond the
            features, or a negative ridge.
    """
    points = _path(features, train, test, widths, [ridge])
    n = len(train.y)
    return _curve(widths, ((p.predictions[:n], train.y, p.predictions[n:], test.y, p.norm) for p in points))


def tuned_ridge_curve(
    features: Callable[[Tensor, int, int], Tensor],
    train: Sample,
    valid: Sample,
    test: Sample,
    widths: Sequence[int],
    ridges: Sequence[float],
) -> tuple[RiskCurve, list[float]]:
    """The errors over growing widths, each with the ridge that has the least squared error at the validation points.

    Args:
        features: as in `double_descent_curve`.
        train: the n points to fit.
        valid: points that choose the ridge; neither fitted nor tested on.
        test: points to predict.
        widths: the N, strictly increasing.
        ridges: to choose from.

    Returns:
        the curve, and the ridge chosen at each width.

    Raises:
        ValueError: as in `double_descent_curve`.
    """
    _check_samples(valid=valid, test=test)
    both = Sample(torch.cat([valid.x, test.x]), torch.cat([valid.y, test.y]))
    ends = [len(train.y), len(valid.y), len(test.y)]
    best: list[tuple[Tensor, Tensor, PathPoint]] = []
    for _, points in itertools.groupby(_path(features, train, both, widths, ridges), lambda point: point.width):
        fitted = [(*point.predictions.split(ends), point) for point in points]
        trained, _, tested, point = min(fitted, key=lambda item: _mse(item[1], valid.y))
        best.append((trained, tested, point))
    curve = _curve(widths, ((trained, train.y, tested, test.y, point.norm) for trained, tested, point in best))
    return curve, [point.ridge for _, _, point in best]


def sample_wise_curve(
    features: Callable[[Tensor, int, int], Tensor],
    train: Sample,
    test: Sample,
    width: int,
    sizes: Sequence[int],
    *,
    ridge: float = 0.0,
) -> RiskCurve:
    """The errors of one width over growing training sets, each the first points of the same sample.

    Args:
        features: as in `double_descent_curve`.
        train: the points of the largest set.
        test: points to predict.
        width: N.
        sizes: the n, strictly increasing, at most as many as there are points.
        ridge: as in `double_descent_curve`.

    Raises:
        ValueError: as in `double_descent_curve`; sizes below 1, not increasing or above the number of points.
    """
    _check_samples(train=train, test=test)
    _check_increasing("sizes", sizes)
    if sizes[-1] > len(train.y):
        raise ValueError(f"sizes: expected at most the {len(train.y)} points of train, got {sizes[-1]}")
    parts = (Sample(train.x[:n], train.y[:n]) for n in sizes)
    curves = [double_descent_curve(features, part, test, [width], ridge=ridge) for part in parts]
    return RiskCurve(list(sizes), *(torch.cat(column) for column in list(zip(*curves, strict=True))[1:]))


def gaussian_min_norm_risk(p: int, n: int, beta: Float[Tensor, " D"], sigma: float) -> float:
    r"""Expected squared test error of minimum-norm least squares on Gaussian data, eq. (3).

    Args:
        p: how many features are fitted, the first ones.
        n: training points.
        beta: true coefficients of all features.
        sigma: standard deviation of the noise.

    Returns:
        the error in squared units of the targets; infinite for $n - 1 \le p \le n + 1$. Where nothing is noise
        ($s = 0$), what is left is the part of beta outside the span of the data, $\|\beta\|^2 \max(0, 1 - n / p)$.

    Raises:
        ValueError: n or p below 1, p beyond beta, values that aren't finite, or a negative sigma.
    """
    check_count("n", n)
    signal, noise = _signal_and_noise(p, beta, sigma)
    unseen = signal * max(0.0, 1 - n / p)
    if noise == 0:
        return unseen
    spare = abs(n - p) - 1  # both branches of eq. (3): the smaller one of n and p over the degrees of freedom to spare
    return unseen + noise * (1 + min(n, p) / spare) if spare > 0 else math.inf


def asymptotic_ridgeless_risk(gamma: float, r2: float, sigma2: float) -> float:
    """Limit of the excess test error of minimum-norm least squares on isotropic features, eq. (4).

    Args:
        gamma: features per training point, p / n.
        r2: squared norm of the true coefficients.
        sigma2: variance of the noise, which is not part of the result.

    Raises:
        ValueError: gamma not positive, or a negative r2 or sigma2.
    """
    check_number("gamma", gamma, above=0.0)
    check_number("r2", r2, least=0.0)
    check_number("sigma2", sigma2, least=0.0)
    if gamma == 1:
        return math.inf if sigma2 else 0.0
    return sigma2 * gamma / (1 - gamma) if gamma < 1 else r2 * (1 - 1 / gamma) + sigma2 / (gamma - 1)


def optimal_gaussian_ridge(p: int, beta: Float[Tensor, " D"], sigma: float) -> float:
    r"""The ridge with the least expected test error on Gaussian data, $p s^2 / \|\beta_{\le p}\|^2$, whatever n is.

    Rotating the features changes no expectation, so beta might as well be spread evenly over all directions; of such a
    prior this ridge is the linear estimate of least error.

    Args:
        p: how many features are fitted, the first ones.
        beta: true coefficients of all features.
        sigma: standard deviation of the noise.

    Raises:
        ValueError: p below 1 or beyond beta, values that aren't finite, a negative sigma, or zero coefficients.
    """
    signal, noise = _signal_and_noise(p, beta, sigma)
    if signal == 0:
        raise ValueError(f"beta: expected a coefficient other than zero among the first {p}")
    return p * noise / signal


def weight_reuse_curve(
    train: Sample,
    test: Sample,
    hidden: Sequence[int],
    *,
    lr: float,
    epochs: int = 6000,
    momentum: float = 0.95,
    generator: torch.Generator | None = None,
) -> RiskCurve:
    """The errors of two-layer networks of growing width, trained one after the other on squared loss.

    As in the paper: below the threshold, where a network has fewer parameters than there are entries in the targets,
    each network starts from the trained one before it, the step decays, and training ends once all training points are
    classified correctly. Above, each starts from new weights and trains for all epochs.

    Args:
        train: the n points to fit, with targets [n, k].
        test: points to predict.
        hidden: numbers of hidden units, strictly increasing.
        lr: step size of gradient descent on the mean squared error.
        epochs: the most steps for each network.
        momentum: of gradient descent.
        generator: draws all weights.

    Returns:
        the curve, over the numbers of parameters.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity, no data, units below 1 or not increasing, no epochs, or a
            step that is not positive.
    """
    _check_samples(train=train, test=test)
    check_matrix("train.y", train.y)
    _check_increasing("hidden", hidden)
    nets: list[TwoLayerNet] = []
    for units in hidden:
        net = TwoLayerNet(train.x.shape[1], units, train.y.shape[1], generator=generator, dtype=train.x.dtype)
        below = net.n_parameters < train.y.numel()
        if below and nets:
            net = nets[-1].widened(units, std=0.1, generator=generator)
        decay = 0.9 if below else 1.0
        for _ in gradient_descent(net, *train, steps=epochs, lr=lr, momentum=momentum, decay=decay, decay_every=500):
            if below and _is_fitted(net, train):
                break
        nets.append(net)
    return _curve([net.n_parameters for net in nets], (_evaluate(net, train, test) for net in nets))


def epoch_wise_curve(
    net: nn.Module, train: Sample, test: Sample, epochs: Sequence[int], *, lr: float, momentum: float = 0.95
) -> RiskCurve:
    """The errors of one network while it is trained on squared loss, in place.

    Args:
        net: any network.
        train: the n points to fit, with targets of the form of the outputs.
        test: points to predict.
        epochs: after how many steps to measure, strictly increasing.
        lr: step size of gradient descent on the mean squared error.
        momentum: of gradient descent.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity, no data, epochs below 1 or not increasing, or a step that
            is not positive.
    """
    _check_samples(train=train, test=test)
    _check_increasing("epochs", epochs)
    training = gradient_descent(net, *train, steps=epochs[-1], lr=lr, momentum=momentum)
    wanted = set(epochs)
    return _curve(epochs, (_evaluate(net, train, test) for epoch in training if epoch in wanted))


Fit = tuple[Tensor, Tensor, Tensor, Tensor, float]


@torch.no_grad()
def _is_fitted(net: nn.Module, train: Sample) -> bool:
    return _error(net(train.x), train.y) == 0


@torch.no_grad()
def _evaluate(net: nn.Module, train: Sample, test: Sample) -> Fit:
    norm = math.hypot(*(float(torch.linalg.norm(p)) for p in net.parameters()))
    return net(train.x), train.y, net(test.x), test.y, norm


def _path(
    features: Callable[[Tensor, int, int], Tensor],
    train: Sample,
    test: Sample,
    widths: Sequence[int],
    ridges: Sequence[float],
) -> Iterator[PathPoint]:
    _check_samples(train=train, test=test)
    x = torch.cat([train.x, test.x])
    points = nested_solutions(lambda start, stop: features(x, start, stop), train.y, widths, ridges=ridges)
    features(x[:1], widths[-1] - 1, widths[-1])  # a width beyond the features should not surface after minutes
    return points


def _curve(sizes: Sequence[int], fits: Iterable[Fit]) -> RiskCurve:
    """One row for each fit: predictions and targets of the training points, of the test points, and the norm."""
    rows = [(_mse(fit, y), _mse(out, y_test), _error(out, y_test), norm) for fit, y, out, y_test, norm in fits]
    return RiskCurve(list(sizes), *torch.tensor(rows, dtype=torch.float64).T)


def _mse(predictions: Tensor, targets: Tensor) -> float:
    return float((predictions.double() - targets.double()).square().mean())


def _error(predictions: Tensor, targets: Tensor) -> float:
    if targets.ndim == 1 or targets.shape[1] == 1:
        return math.nan
    return float((predictions.argmax(1) != targets.argmax(1)).double().mean())


def _signal_and_noise(p: int, beta: Tensor, sigma: float) -> tuple[float, float]:
    check_count("p", p)
    check_finite("beta", beta)
    check_number("sigma", sigma, least=0.0)
    if p > len(beta):
        raise ValueError(f"p: expected at most the {len(beta)} features of beta, got {p}")
    squares = beta.double().square()
    return float(squares[:p].sum()), float(squares[p:].sum()) + sigma**2


def _check_increasing(name: str, values: Sequence[int]) -> None:
    if not values or any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: expected strictly increasing numbers, got {list(values)}")
    check_count(name, values[0])


def _check_samples(**samples: Sample) -> None:
    for name, (x, y) in samples.items():
        check_matrix(f"{name}.x", x)
        check_matrix(f"{name}.y", y, dims=(1, 2))
        check_same_length(**{f"{name}.x": x, f"{name}.y": y})
    (first, one), (second, other) = itertools.islice(samples.items(), 2)
    for part, a, b in (("x", one.x, other.x), ("y", one.y, other.y)):
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"{first}.{part}, {second}.{part}: expected the same number of columns, "
                f"got shapes {tuple(a.shape)} and {tuple(b.shape)}"
            )
