r"""Dropout: units are switched off at random during training, so that none can rely on the others.

Paper: Improving neural networks by preventing co-adaptation of feature detectors (arXiv:1207.0580)
Source: Dropout: A Simple Way to Prevent Neural Networks from Overfitting (Srivastava et al., JMLR 15, 2014), for
    eq. (3) and (5)
Paper: Efficient Object Localization Using Convolutional Networks (arXiv:1411.4280), for `channel_dropout`
Paper: Deep Networks with Stochastic Depth (arXiv:1603.09382), for `path_dropout`
Source: Regularization of Neural Networks using DropConnect (Wan et al., ICML 2013), for `drop_connect`
Paper: Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning (arXiv:1506.02142), for
    `mc_dropout_predict`

In training, each unit's output is set to zero with probability p, anew for every example; at test all units are there,
and a factor restores the expected input of the next layer. One network thus stands for an ensemble of all its thinned
versions, which share their weights. The variants drop channels, whole residual branches or single weights, or multiply
by normal noise. Kept on at test, the masks give an estimate of the model's uncertainty.

Equation:
    $$ y = \frac{m \odot x}{1 - p} \ \text{in training}, \qquad y = x \ \text{at test}, \qquad
       m_i \sim \operatorname{Bernoulli}(1 - p) \tag{1} $$
    so that $\mathbb{E}[y] = x$ and $\operatorname{Var}[y_i] = x_i^2\, p / (1 - p)$. In the original form the factor is
    applied at test:
    $$ y = m \odot x \ \text{in training}, \qquad y = (1 - p)\, x \ \text{at test.} \tag{2} $$
    Normal noise of the same variance, whose p may be read as a rate although nothing is dropped:
    $$ y_i = x_i \Bigl(1 + \sqrt{\tfrac{p}{1 - p}}\; \epsilon_i\Bigr), \qquad
       \epsilon_i \sim \mathcal{N}(0, 1) \tag{3} $$
    For softmax regression, the test rule (2) is exactly the normalised geometric mean of all $2^d$ thinned networks:
    $$ \operatorname{softmax}\bigl((1 - p) W x + b\bigr) \propto
       \prod_m \operatorname{softmax}\bigl(W (m \odot x) + b\bigr)^{\Pr(m)} \tag{4} $$
    For linear regression, the mean over masks on the inputs is a ridge penalty scaled by the norms of the features:
    $$ \mathbb{E}_m \lVert y - \tfrac{1}{1 - p} (M \odot X) w \rVert^2
       = \lVert y - X w \rVert^2 + \frac{p}{1 - p} \lVert \Gamma w \rVert^2, \qquad
       \Gamma = \operatorname{diag}(X^\top X)^{1/2} \tag{5} $$
    DropConnect masks the weights and biases, a mask for every example:
    $$ y = \frac{1}{1 - p} \bigl[(M \odot W) x + m \odot b\bigr] \tag{6} $$

Symbols:
    p: probability of being dropped (the papers that keep with probability p mean 1 - p).
    x: [..., d] for units; [batch, channels, ...] for channels; [batch, ...] for paths.
    m, M: masks, 1 where kept.
    W: [out, in] weights, b: [out] biases.
    X: [n, d] design matrix, y: [n] targets, w: [d] coefficients of linear regression.

Defaults:
    p: 0.5 (arXiv:1207.0580, hidden units; it takes 0.2 for inputs).
    samples: 100 masks in `mc_dropout_predict` (ours).

Deviations:
    1. `dropout`, `channel_dropout`, `path_dropout` and `drop_connect` scale in training, eq. (1), where their papers
       scale at test; `classic_dropout` keeps eq. (2).
    2. The limit on the norm of a unit's incoming weights, which arXiv:1207.0580 combines with dropout, is not here.
    3. At test `drop_connect` uses the mean weights, where its paper averages the activation over a normal
       approximation of its input.
    4. The variance of `mc_dropout_predict` is that of the model's function; arXiv:1506.02142 adds the noise of the
       observations, $\tau^{-1}$.

Reduces to:
    torch.nn.Dropout: `Dropout` with the default mask, in law.
    torch.nn.Linear: `DropConnectLinear` at test, or with p = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_matrix, check_probability, check_same_length
from mlreviews.common.least_squares import min_norm_solve, ridge_solve

__all__ = [
    "DropConnectLinear",
    "Dropout",
    "MCPrediction",
    "channel_dropout",
    "classic_dropout",
    "drop_connect",
    "dropout",
    "gaussian_dropout",
    "marginal_dropout_loss",
    "marginal_dropout_solve",
    "mc_dropout_predict",
    "path_dropout",
    "predictive_entropy",
]


def dropout(
    x: Float[Tensor, "*shape"], p: float = 0.5, *, training: bool = True, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Inverted dropout of single units, eq. (1).

    Args:
        x: activations of any shape.
        p: probability with which an entry becomes 0; at 1 all do, and their gradients.
        training: otherwise x itself is returned.
        generator: draws the mask; leave it out under ``torch.compile``, which can't trace one.

    Returns:
        Same shape and dtype as x; what is kept is divided by 1 - p.

    Raises:
        ValueError: p is not in [0, 1].
        TypeError: x is not floating point.
    """
    return _drop(x, x.shape, p, training, generator)


def classic_dropout(
    x: Float[Tensor, "*shape"], p: float = 0.5, *, training: bool = True, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Dropout as first published, eq. (2): no factor in training, weight scaling at test.

    Args:
        x: activations of any shape.
        p: probability with which an entry becomes 0.
        training: mask; otherwise multiply by 1 - p, which is the same as scaling the weights of the next layer.
        generator: draws the mask; leave it out under ``torch.compile``.

    Returns:
        Same shape and dtype as x.

    Raises:
        ValueError: p is not in [0, 1].
        TypeError: x is not floating point.
    """
    _check(x, p)
    return torch.where(_keep(x, x.shape, p, generator), x, 0) if training else (1 - p) * x


def channel_dropout(
    x: Float[Tensor, "batch channels *space"],
    p: float = 0.5,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels *space"]:
    """Spatial dropout: whole feature maps, since neighbouring pixels carry the same information; eq. (1).

    Args:
        x: [batch, channels, ...].
        p: probability with which a channel of an example becomes 0.
        training: otherwise x itself is returned.
        generator: draws the mask; leave it out under ``torch.compile``.

    Returns:
        Same shape and dtype as x.

    Raises:
        ValueError: p is not in [0, 1], or x has fewer than two dimensions.
        TypeError: x is not floating point.
    """
    if x.ndim < 2:
        raise ValueError(f"x: expected [batch, channels, ...], got shape {tuple(x.shape)}")
    return _drop(x, (*x.shape[:2], *[1] * (x.ndim - 2)), p, training, generator)


def path_dropout(
    x: Float[Tensor, " batch *rest"],
    p: float = 0.5,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch *rest"]:
    """Stochastic depth (DropPath): the residual branch x of a whole example; add the skip connection after it. Eq. (1).

    Args:
        x: [batch, ...], output of the branch.
        p: probability with which an example's branch becomes 0.
        training: otherwise x itself is returned.
        generator: draws the mask; leave it out under ``torch.compile``.

    Returns:
        Same shape and dtype as x.

    Raises:
        ValueError: p is not in [0, 1], or x has no dimension.
        TypeError: x is not floating point.
    """
    if x.ndim < 1:
        raise ValueError("x: expected [batch, ...], got a tensor without dimensions")
    return _drop(x, (x.shape[0], *[1] * (x.ndim - 1)), p, training, generator)


def gaussian_dropout(
    x: Float[Tensor, "*shape"], p: float = 0.5, *, training: bool = True, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Multiplies by normal noise with the mean and the variance of inverted dropout, eq. (3).

    Args:
        x: activations of any shape.
        p: rate of the Bernoulli dropout whose variance p / (1 - p) the noise has; below 1.
        training: otherwise x itself is returned.
        generator: draws the noise; leave it out under ``torch.compile``.

    Returns:
        Same shape and dtype as x.

    Raises:
        ValueError: p is not in [0, 1).
        TypeError: x is not floating point.
    """
    _check(x, p)
    _check_below_one(p)
    if not training or p == 0:
        return x
    noise = torch.randn(x.shape, dtype=_wide(x), device=x.device, generator=generator)
    return x * (1 + math.sqrt(p / (1 - p)) * noise).to(x.dtype)


def drop_connect(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    p: float = 0.5,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """A linear map with single weights and biases dropped, for every example anew, eq. (6).

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.
        p: probability with which a weight becomes 0.
        training: otherwise the linear map itself.
        generator: draws the masks; leave it out under ``torch.compile``.

    Returns:
        [..., out]. In training, the masked weights take memory of the order batch * out * in.

    Raises:
        ValueError: p is not in [0, 1], or shapes don't fit.
        TypeError: x is not floating point.
    """
    _check(x, p)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} inputs, as weight has, got shape {tuple(x.shape)}")
    if not training or p == 0:
        return nn.functional.linear(x, weight, bias)
    batch = x.shape[:-1]
    y = (dropout(weight.expand(*batch, *weight.shape), p, generator=generator) @ x[..., None])[..., 0]
    return y if bias is None else y + dropout(bias.expand(*batch, -1), p, generator=generator)


class Dropout(nn.Module):
    """Any of the variants as a layer, active in training only.

    Args:
        p: probability of being dropped.
        variant: the function of this module to apply; `dropout`, `classic_dropout`, `channel_dropout`, `path_dropout`
            or `gaussian_dropout`.
        generator: draws the masks, each call going on where the last one stopped; None is torch's own.

    Raises:
        ValueError: p is not in [0, 1].
    """

    def __init__(
        self, p: float = 0.5, variant: Callable[..., Tensor] = dropout, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p
        self.variant = variant
        self.generator = generator

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Applies the variant; see there."""
        return self.variant(x, self.p, training=self.training, generator=self.generator)

    def extra_repr(self) -> str:
        """The rate and the variant."""
        return f"p={self.p}, variant={self.variant.__name__}"


class DropConnectLinear(nn.Linear):
    """A linear layer with DropConnect; parameters and state dict are those of ``torch.nn.Linear``.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        p: probability with which a weight is dropped.
        bias: whether there are biases, which are dropped as well.
        generator: draws the masks; None is torch's own.

    Raises:
        ValueError: p is not in [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        p: float = 0.5,
        *,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        check_probability("p", p)
        self.p = p
        self.generator = generator

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Eq. (6) in training, the linear map otherwise."""
        return drop_connect(x, self.weight, self.bias, self.p, training=self.training, generator=self.generator)


# Layers with masks of their own that keep no statistics in training, so that nothing else changes when they are on.
_LAYERS = (Dropout, DropConnectLinear, nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True, eq=False)
class MCPrediction:
    """Predictions under independent masks.

    Attributes:
        draws: [samples, ...], the model's output under each mask.
    """

    draws: Float[Tensor, " samples *output"]

    @property
    def mean(self) -> Float[Tensor, "*output"]:
        """The mean over masks: the prediction."""
        return self.draws.mean(0)

    @property
    def variance(self) -> Float[Tensor, "*output"]:
        """The unbiased variance over masks: how much the thinned networks disagree."""
        return self.draws.var(0)


def mc_dropout_predict(
    model: nn.Module, x: Tensor, samples: int = 100, *, layers: tuple[type[nn.Module], ...] = ()
) -> MCPrediction:
    """Predicts with dropout left on, once for each of many masks, everything else in evaluation mode.

    Args:
        model: its dropout layers (those here and those of torch) draw from their own generators or torch's global one.
            Their modes are put back afterwards, and no statistics are updated.
        x: the model's input.
        samples: how many masks, at least 2.
        layers: further classes of the model that drop something in training mode.

    Returns:
        The outputs, without gradient.

    Raises:
        ValueError: fewer than 2 samples, or the model has no layer that drops.
    """
    check_count("samples", samples, least=2)
    with torch.no_grad(), _only_training(model, (*_LAYERS, *layers)):
        return MCPrediction(torch.stack([model(x) for _ in range(samples)]))


def predictive_entropy(
    logits: Float[Tensor, "samples *batch classes"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Uncertainty of a classifier from its logits under several masks.

    Args:
        logits: [samples, ..., classes], such as ``mc_dropout_predict(model, x).draws``.

    Returns:
        ``(total, mutual)``, in nats: the entropy of the mean of the predicted distributions, and the part of it that is
        disagreement between the masks (total less the mean entropy), which is at least 0.
    """
    log_each = torch.log_softmax(logits, dim=-1)
    log_mean = torch.logsumexp(log_each, dim=0) - math.log(len(logits))
    total, each = _entropy(log_mean), _entropy(log_each)
    return total, (total - each.mean(0)).clamp(min=0)


def marginal_dropout_loss(
    features: Float[Tensor, "n d"], targets: Float[Tensor, " n"], weights: Float[Tensor, " d"], p: float
) -> Float[Tensor, ""]:
    """Squared error of linear regression, summed over rows, averaged over all masks on the inputs; eq. (5).

    Args:
        features: [n, d].
        targets: [n].
        weights: [d], coefficients.
        p: probability with which an input is dropped, below 1.

    Returns:
        A scalar in squared units of the targets, differentiable in the weights.

    Raises:
        ValueError: shapes don't fit, data are NaN or infinite, or p is not in [0, 1).
    """
    _check_regression(features, targets, p)
    check_matrix("weights", weights, dims=(1,))
    if len(weights) != features.shape[1]:
        raise ValueError(f"weights: expected one for each of {features.shape[1]} features, got {len(weights)}")
    penalty = (features.square() @ weights.square()).sum()
    return (targets - features @ weights).square().sum() + p / (1 - p) * penalty


def marginal_dropout_solve(
    features: Float[Tensor, "n d"], targets: Float[Tensor, " n"], p: float
) -> Float[Tensor, " d"]:
    """The coefficients that minimise `marginal_dropout_loss`: ridge regression on features scaled to norm 1.

    Args:
        features: [n, d]; solved in float64.
        targets: [n].
        p: probability with which an input is dropped, below 1. At 0 the limit: least squares, of minimum norm in the
            scaled features where it is not unique.

    Returns:
        [d], to be used without dropout. A feature that is 0 everywhere gets the coefficient 0.

    Raises:
        ValueError: shapes don't fit, data are NaN or infinite, or p is not in [0, 1).
    """
    _check_regression(features, targets, p)
    norms = torch.linalg.vector_norm(features.double(), dim=0)
    norms = torch.where(norms > 0, norms, 1)
    scaled = features.double() / norms
    solution = ridge_solve(scaled, targets.double(), p / (1 - p)) if p else min_norm_solve(scaled, targets.double())
    return (solution / norms).to(features.dtype)


def _drop(x: Tensor, shape: tuple[int, ...], p: float, training: bool, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout with a mask of a shape that broadcasts to x."""
    _check(x, p)
    if not training or p == 0:
        return x
    scale = 1 / (1 - p) if p < 1 else 0.0
    # Not a product with the mask: that would turn a dropped infinity into NaN, and keep x for the backward pass.
    return torch.where(_keep(x, shape, p, generator), x * scale, 0)


def _keep(x: Tensor, shape: tuple[int, ...], p: float, generator: torch.Generator | None) -> Tensor:
    # In float32 whatever the dtype of x: bfloat16 has 256 uniform numbers, too few for a small p.
    return torch.rand(shape, dtype=torch.float32, device=x.device, generator=generator) >= p


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(x: Tensor, p: float) -> None:
    check_probability("p", p)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")


def _check_below_one(p: float) -> None:
    if p >= 1:
        raise ValueError(f"p: expected a probability below 1, got {p}")


def _check_regression(features: Tensor, targets: Tensor, p: float) -> None:
    check_matrix("features", features)
    check_matrix("targets", targets, dims=(1,))
    check_same_length(features=features, targets=targets)
    check_probability("p", p)
    _check_below_one(p)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return torch.special.entr(log_probabilities.exp()).sum(-1)


@contextmanager
def _only_training(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Training mode for layers of the given classes and evaluation mode for all others, then back as it was."""
    modes = {module: module.training for module in model.modules()}
    if not any(isinstance(module, layers) for module in modes):
        raise ValueError(f"model: expected a layer that drops, found none in {type(model).__name__}")
    # The fused path of torch's transformer layers skips their dropout when the layer itself is in evaluation mode.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modes:  # set directly: train() and eval() may be overridden to do more than that
            module.training = isinstance(module, layers)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
