r"""Reward-robust RLHF: several heads with a mean and a spread each; a policy gets a mix of the surest and the lowest.

Paper: Reward-Robust RLHF in LLMs (arXiv:2409.15360)

Every trained reward is a noisy draw around an unknown ideal one. A reward model is trained by Bradley-Terry first; then
several heads on its backbone learn its rewards (a Bayesian reward model ensemble, BRME), each with a standard deviation
of its own. The policy is trained on a mixture: of the head that is surest, for performance, and of the lowest head, for
robustness, because too low a reward does less harm than too high a one.

Equation:
    $$ r_i = \mu_i + \sigma_i \epsilon, \quad \epsilon \sim \mathcal N(0, 1), \qquad L = (r_i - r_{BT})^2 \tag{1} $$
    Every answer trains one head, drawn at random. In expectation the loss is
    $$ E[L] = (\mu_i - r_{BT})^2 + \sigma_i^2, \tag{2} $$
    least at sigma = 0, wherever an answer lies. The paper takes what training has left of sigma as a head's doubt.
    $$ r = \lambda\, \mu_{\arg\min_i \sigma_i} + (1 - \lambda) \min_i \mu_i \tag{3} $$

Symbols:
    h: [batch, d_model], the backbone's vector of an answer.
    mu_i, sigma_i: [heads, batch], mean and standard deviation of head i's reward.
    r_BT: [batch], reward of the model that was trained first.
    lambda: share of the nominal reward, the surest head's.

Defaults:
    n_heads: 5 (the review's figure).
    lam: 0.5 (the review's best are around 0.4 to 0.6).

Deviations:
    1. The heads take the backbone's vectors, and leave to the caller whether it is trained.
    2. The loss is the squared error alone. The review mentions a Bradley-Terry term beside it, without its form.
    3. sigma is the softplus of a head's second output, which the sources leave open.

Reduces to:
    regularised-rm-ensembles: lam = 0 is the minimum over the heads' means.
    a single reward model: one head, or heads that agree, with any lam.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_probability
from mlreviews.common.layers import linear

__all__ = [
    "BayesianRewardEnsemble",
    "GaussianRewards",
    "assign_heads",
    "brme_loss",
    "gaussian_rewards",
    "nominal_reward",
    "robust_reward",
]


class GaussianRewards(NamedTuple):
    """What heads say of answers.

    Attributes:
        mu: [heads, ...], means.
        sigma: [heads, ...], standard deviations.
    """

    mu: Float[Tensor, "heads ..."]
    sigma: Float[Tensor, "heads ..."]


def gaussian_rewards(outputs: Float[Tensor, "heads *answers 2"]) -> GaussianRewards:
    """Means and standard deviations from two numbers a head and answer.

    Args:
        outputs: [heads, ..., 2]; the second number's softplus is the standard deviation.

    Raises:
        ValueError: the last axis has not two entries, or there are no heads.
    """
    if outputs.ndim < 2 or outputs.shape[-1] != 2 or len(outputs) == 0:
        raise ValueError(f"outputs: expected [heads, ..., 2] with a head at least, got shape {tuple(outputs.shape)}")
    return GaussianRewards(outputs[..., 0], nn.functional.softplus(outputs[..., 1]))


def assign_heads(batch: int, n_heads: int, *, generator: torch.Generator | None = None) -> Int[Tensor, " batch"]:
    """The head that each answer trains, drawn at random.

    Args:
        batch: how many answers.
        n_heads: how many heads.
        generator: draws; None is the global one.

    Raises:
        ValueError: no answers or no heads.
    """
    check_count("batch", batch)
    check_count("n_heads", n_heads)
    return torch.randint(n_heads, (batch,), generator=generator)


def brme_loss(
    mu: Float[Tensor, "heads batch"],
    sigma: Float[Tensor, "heads batch"],
    heads: Int[Tensor, " batch"],
    reference: Float[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Squared errors of sampled rewards, eq. (1). Preferred and other answers alike are learnt from.

    Args:
        mu: [heads, batch], means, with gradient.
        sigma: [heads, batch], standard deviations, with gradient through the sample.
        heads: [batch], the head that learns from an answer.
        reference: [batch], rewards of the model that was trained first; no gradient goes there.
        generator: draws epsilon; None is the global one.

    Returns:
        [batch], not reduced.

    Raises:
        ValueError: shapes that do not fit, a head that is not there, values that are not finite, or sigma < 0.
    """
    _check(mu, sigma)
    if mu.ndim != 2 or heads.shape != mu.shape[1:] or reference.shape != mu.shape[1:]:
        got = f"mu {tuple(mu.shape)}, heads {tuple(heads.shape)}, reference {tuple(reference.shape)}"
        raise ValueError(f"mu, heads, reference: expected [heads, batch], [batch] and [batch], got {got}")
    if bool(((heads < 0) | (heads >= len(mu))).any()):
        raise ValueError(f"heads: expected numbers from 0 to {len(mu) - 1}")
    check_finite("reference", reference)
    mean, spread = (t.gather(0, heads[None])[0] for t in (mu, sigma))
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return (mean + spread * noise - reference.detach()).square()


def nominal_reward(mu: Float[Tensor, "heads ..."], sigma: Float[Tensor, "heads ..."]) -> Tensor:
    """The mean of the head that is surest of an answer.

    Args:
        mu: [heads, ...].
        sigma: [heads, ...].

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: shapes differ, there are no heads, values are not finite, or sigma < 0.
    """
    _check(mu, sigma)
    return mu.gather(0, sigma.argmin(0, keepdim=True))[0]


def robust_reward(mu: Float[Tensor, "heads ..."], sigma: Float[Tensor, "heads ..."], lam: float = 0.5) -> Tensor:
    """The reward for training a policy, eq. (3); the KL penalty is the trainer's.

    Args:
        mu: [heads, ...].
        sigma: [heads, ...].
        lam: share of the nominal reward, from 0 (the lowest head) to 1 (the surest).

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: lam outside [0, 1], or as in `nominal_reward`.
    """
    check_probability("lam", lam)
    return lam * nominal_reward(mu, sigma) + (1 - lam) * mu.amin(0)


def _check(mu: Tensor, sigma: Tensor) -> None:
    if mu.ndim == 0 or mu.numel() == 0 or sigma.shape != mu.shape:
        got = f"{tuple(mu.shape)} and {tuple(sigma.shape)}"
        raise ValueError(f"mu, sigma: expected [heads, ...] of one shape with no empty axis, got {got}")
    check_finite("mu", mu)
    check_finite("sigma", sigma)
    if bool((sigma < 0).any()):
        raise ValueError("sigma: expected standard deviations of at least 0")


class BayesianRewardEnsemble(nn.Module):
    """Linear heads with a mean and a standard deviation each, on the vectors of one backbone.

    Args:
        d_model: width of the vectors.
        n_heads: how many heads.
        generator: draws the heads; None is the global one.

    Raises:
        ValueError: a width or a number of heads below 1.
    """

    def __init__(self, d_model: int, n_heads: int = 5, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("n_heads", n_heads)
        self.n_heads = n_heads
        self.heads = linear(d_model, 2 * n_heads, generator=generator)

    def forward(self, h: Float[Tensor, "batch d_model"]) -> GaussianRewards:
        """Means and standard deviations, [heads, batch] each.

        Args:
            h: [batch, d_model].

        Raises:
            ValueError: another shape.
        """
        if h.ndim != 2 or h.shape[1] != self.heads.in_features:
            raise ValueError(f"h: expected [batch, {self.heads.in_features}], got shape {tuple(h.shape)}")
        return gaussian_rewards(self.heads(h).unflatten(-1, (self.n_heads, 2)).movedim(-2, 0))
