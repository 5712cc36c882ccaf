r"""Regression through classes: targets become distributions over bins, which are predicted and mapped back to numbers.

Paper: Building Bridges between Regression, Clustering, and Classification (arXiv:2502.02996).

Networks are often trained more easily to classify than to predict a number. An encoder turns the number into a
distribution over k classes, soft between neighbouring centres; the network predicts that distribution; and a linear
decoder, the same for both, turns distributions into numbers. Encoder, network and decoder are trained together.

Equation:
    $$ \psi(y)_j = \mathrm{softmax}_j\Big({-\frac{(y - c_j)^2}{2 \sigma^2}}\Big), \qquad
       \mu(p) = \sum_j p_j\, \mu_j \tag{1} $$
    $$ L = \mathrm{KL}\big(\psi(y) \,\|\, \pi(x)\big) + \lambda_1 \big(y - \mu(\psi(y))\big)^2
       + \lambda_2 \big(y - \mu(\pi(x))\big)^2 \tag{2} $$

Symbols:
    x: [n, ...], inputs.
    y: [n], targets, best standardised.
    psi: [n, k], encoded targets.
    pi: [n, k], softmax of the network's outputs.
    c: [k], centres of the encoder.
    mu: [k], values of the decoder.
    sigma: width of a bin, in the unit of y.

Defaults:
    lambda_1, lambda_2: 1 (ours; the paper finds the results little sensitive to them).
    sigma: the distance of the centres (ours).
    centres and values: trained, from evenly spaced ones on (ours).

Deviations:
    1. The encoder is the softmax of equation (1) with trained centres and width, not a network.
    2. Gradients of the divergence reach the encoder as well, as in the paper's end-to-end objective; training it
       beforehand is `SoftBinRegressor` with the other two weights at 0.

Reduces to:
    least squares: weights 0 of the divergence and of the encoder, on a network whose last layer is a softmax average.
    sklearn.preprocessing.KBinsDiscretizer: `hard_bin` with the middles of its bins as centres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_number

__all__ = ["RegressionLosses", "SoftBinRegressor", "bin_divergence", "even_centers", "hard_bin", "soft_bin"]


def even_centers(y: Float[Tensor, " n"], classes: int) -> Float[Tensor, " classes"]:
    """Middles of bins of equal width that cover the targets.

    Args:
        y: [n], targets.
        classes: how many bins.

    Raises:
        ValueError: no targets, targets that are all equal, or NaN among them.
    """
    check_count("classes", classes)
    if y.ndim != 1 or y.numel() == 0:
        raise ValueError(f"y: expected [n] with n of at least 1, got shape {tuple(y.shape)}")
    check_finite("y", y)
    low, high = y.min(), y.max()
    if bool(low == high):
        raise ValueError(f"y: expected different targets, got {float(low)} alone")
    half = (high - low) / (2 * classes)
    return torch.linspace(float(low + half), float(high - half), classes, dtype=y.dtype, device=y.device)


def soft_bin(
    y: Float[Tensor, " n"], centers: Float[Tensor, " classes"], sigma: Float[Tensor, ""] | float
) -> Float[Tensor, "n classes"]:
    """Equation (1): each target as a distribution over the classes.

    Args:
        y: [n], targets.
        centers: [classes].
        sigma: width, above 0; towards 0 it tends to `hard_bin`, towards infinity to the uniform distribution.
    """
    return _log_soft_bin(y, centers, sigma).exp()


def _log_soft_bin(y: Tensor, centers: Tensor, sigma: Tensor | float) -> Tensor:
    return (-((y[:, None] - centers) ** 2) / (2 * sigma**2)).log_softmax(-1)


def hard_bin(y: Float[Tensor, " n"], centers: Float[Tensor, " classes"]) -> Float[Tensor, "n classes"]:
    """Each target as certainty of the nearest centre, the first of equally near ones.

    Args:
        y: [n], targets.
        centers: [classes].
    """
    nearest = (y[:, None] - centers).abs().argmin(-1)
    return nn.functional.one_hot(nearest, len(centers)).to(y.dtype)


def bin_divergence(target: Float[Tensor, "n classes"], logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """Kullback-Leibler divergence of the predicted distribution from the target's, in nats.

    Args:
        target: [n, classes], distributions, zeros allowed; they have no gradient.
        logits: [n, classes], of the prediction.
    """
    target = target.detach()  # at zeros there is none
    return (torch.special.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)


class RegressionLosses(NamedTuple):
    """Equation (2) and its terms, means over the rows.

    Attributes:
        total: the weighted sum.
        divergence: of the predicted distribution from the encoded target.
        autoencoding: squared error of the decoded encoding.
        regression: squared error of the prediction.
    """

    total: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    autoencoding: Float[Tensor, ""]
    regression: Float[Tensor, ""]


class SoftBinRegressor(nn.Module):
    """A network with k outputs as a regression model, equations (1) and (2).

    Args:
        backbone: from inputs to [n, classes].
        centers: [classes], different ones, of the encoder and, to begin with, values of the decoder.
        sigma: width of the encoder; None is the mean distance of neighbouring centres.
        learn_encoder: whether centres and width are trained.

    Raises:
        ValueError: fewer than two centres, equal ones, or a width that is not above 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        centers: Float[Tensor, " classes"],
        *,
        sigma: float | None = None,
        learn_encoder: bool = True,
    ) -> None:
        super().__init__()
        if centers.ndim != 1 or len(centers) < 2:
            raise ValueError(f"centers: expected [classes] with 2 classes or more, got shape {tuple(centers.shape)}")
        check_finite("centers", centers)
        if len(centers.unique()) < len(centers):
            raise ValueError(f"centers: expected different ones, got {centers.tolist()}")
        spread = float(centers.max() - centers.min())
        sigma = spread / (len(centers) - 1) if sigma is None else sigma
        check_number("sigma", sigma, above=0.0)
        self.backbone = backbone
        self.centers = nn.Parameter(centers.clone(), requires_grad=learn_encoder)
        self.log_sigma = nn.Parameter(centers.new_tensor(sigma).log(), requires_grad=learn_encoder)
        self.values = nn.Parameter(centers.clone())

    def encode(self, y: Float[Tensor, " n"]) -> Float[Tensor, "n classes"]:
        """The targets as distributions.

        Args:
            y: [n].
        """
        return soft_bin(y, self.centers, self.log_sigma.exp())

    def decode(self, p: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
        """Distributions as numbers, between the smallest and the largest value of the decoder.

        Args:
            p: [n, classes].
        """
        return p @ self.values

    def predict(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """The prediction for each input.

        Args:
            x: [n, ...].
        """
        return self.decode(self.backbone(x).softmax(-1))

    def forward(
        self,
        x: Float[Tensor, "n ..."],
        y: Float[Tensor, " n"],
        *,
        divergence: float = 1.0,
        autoencoding: float = 1.0,
        regression: float = 1.0,
    ) -> RegressionLosses:
        """Equation (2).

        Args:
            x: [n, ...], inputs.
            y: [n], targets.
            divergence: weight of the first term.
            autoencoding: weight of the second, lambda 1.
            regression: weight of the third, lambda 2.
        """
        predicted = self.backbone(x).log_softmax(-1)
        # in logarithms, so that probabilities that underflow have a gradient
        target = _log_soft_bin(y, self.centers, self.log_sigma.exp())
        divergence_of_rows = nn.functional.kl_div(predicted, target, reduction="none", log_target=True).sum(-1)
        terms = (
            divergence_of_rows.mean(),
            (y - self.decode(target.exp())).square().mean(),
            (y - self.decode(predicted.exp())).square().mean(),
        )
        weights = (divergence, autoencoding, regression)
        total = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
        return RegressionLosses(total, *terms)
