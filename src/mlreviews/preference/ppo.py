r"""PPO: several steps of policy gradient on the same samples, held near the policy that drew them.

Paper: Proximal Policy Optimization Algorithms (arXiv:1707.06347)
Paper: High-Dimensional Continuous Control Using Generalized Advantage Estimation (arXiv:1506.02438)

A policy gradient is right only for the policy that drew the samples. PPO weights each sample by how much likelier it
has become and cuts the incentive to move it beyond a margin, so that one batch serves for several epochs. The
advantages of the actions come from a learned value function by generalised advantage estimation (GAE).

Equation:
    $$ \rho_t = \exp(\log \pi_\theta(a_t | s_t) - \log \pi_{old}(a_t | s_t)) \tag{1} $$
    $$ L = -\frac{1}{N} \sum_t \min\bigl(\rho_t A_t, \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr)
       \tag{2} $$
    $$ A_t = \delta_t + \gamma \lambda (1 - d_t) A_{t+1}, \qquad
       \delta_t = r_t + \gamma (1 - d_t) V_{t+1} - V_t \tag{3} $$
    $$ L_V = \frac{1}{2N} \sum_t \max\bigl((V_t - R_t)^2,
       (V^{old}_t + \operatorname{clip}(V_t - V^{old}_t, -\epsilon, \epsilon) - R_t)^2\bigr), \quad
       R_t = A_t + V^{old}_t \tag{4} $$
    $$ L_{KL} = -\frac{1}{N} \sum_t \bigl(\rho_t A_t - \beta \operatorname{KL}[\pi_{old} \| \pi_\theta]_t\bigr)
       \tag{5} $$
    beta is halved when the measured KL is below two thirds of its target, and doubled above one and a half times it.

Symbols:
    logp, logp_old: [batch, time], log-probabilities of the actions taken, in nats; the old ones from the policy that
        drew them, at the sampling temperature.
    mask: [batch, time], True at actions of the policy (completion tokens), False at prompts and padding.
    A: [batch, time], advantages; R: returns; V: values, in units of the reward.
    d: [batch, time], whether the step ended its episode.
    N: the normaliser; by default the number of unmasked entries.

Defaults:
    clip: 0.2 (table 1 and table 3).
    gamma: 0.99 (table 3).
    lam: 0.95 (table 3).
    beta: none; 1 at the start, target KL 0.01 (table 1).
    weights of the terms: 1 for the value loss with eq. (4)'s factor 1/2 left out, 0.01 for the entropy (table 5); most
        implementations use 0.5 and 0.01, which is the same loss with the factor.

Deviations:
    1. Log-ratios are cut to at most 20 in size before the exponential. Eq. (2) is unbounded where the advantage is
       negative: beyond a ratio of 5e8 the loss stays finite and the sample gives no gradient.
    2. The value loss is clipped as in the authors' code (OpenAI baselines); the paper has plain squares (`value_loss`).

Reduces to:
    importance-weighted policy gradient: an infinite clip.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_finite, check_number, check_probability
from mlreviews.preference.losses import PolicyLoss, masked_sum
from mlreviews_kernels.linear_scan import linear_scan

__all__ = [
    "adapt_kl_coefficient",
    "categorical_kl",
    "clipped_surrogate",
    "entropy_bonus",
    "gae",
    "ppo_clip_loss",
    "ppo_kl_loss",
    "value_clip_loss",
    "value_loss",
]

_MAX_LOG_RATIO = 20.0


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    dones: Bool[Tensor, "batch time"],
    *,
    last_value: Float[Tensor, " batch"] | None = None,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Generalised advantage estimation, eq. (3), as one reverse linear scan.

    Nothing behind a step that ended its episode leaks into the steps before it: for answers of several lengths, padded
    on the right, mark each one's last token as done.

    Args:
        rewards: [batch, time], r_t, received after action t.
        values: [batch, time], V_t, estimated before action t.
        dones: [batch, time], True where step t ended the episode.
        last_value: [batch], the value after the last step, where its episode goes on; 0 if None.
        gamma: discount in [0, 1].
        lam: in [0, 1]; 0 is the one-step error of the value function, 1 the return minus the value.

    Returns:
        Advantages and returns (advantages + values), [batch, time] each, without gradient.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, or a factor is outside [0, 1].
    """
    check_tokens(torch.ones_like(dones), "dones", rewards=rewards, values=values)
    check_probability("gamma", gamma)
    check_probability("lam", lam)
    if last_value is None:
        last_value = values.new_zeros(len(values))
    if last_value.shape != values.shape[:1]:
        raise ValueError(f"last_value: expected shape {tuple(values.shape[:1])}, got {tuple(last_value.shape)}")
    check_finite("last_value", last_value)
    with torch.no_grad():
        alive = (~dones).to(values.dtype)
        following = torch.cat([values[:, 1:], last_value[:, None]], dim=1)
        errors = rewards + gamma * alive * following - values
        advantages, _ = linear_scan(gamma * lam * alive, errors, reverse=True)
        return advantages, advantages + values


def ppo_clip_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip: float = 0.2,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate of eq. (2), to be minimised.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the actions; no gradient flows to them.
        advantages: [batch, time], for instance of `gae`.
        mask: [batch, time], True at actions that count.
        clip: epsilon > 0; infinite for none.
        normaliser: what the sum is divided by, the same for all micro-batches of a batch; None for the number of
            unmasked entries.

    Returns:
        The loss and, without gradient, ``clip_fraction`` and ``approx_kl`` (see `policy_stats`).

    Raises:
        ValueError: shapes differ, the mask is not boolean, or clip or normaliser are not positive.
    """
    check_tokens(mask, logp=logp, logp_old=logp_old, advantages=advantages)
    ratio = masked_ratio(logp, logp_old, mask)
    objective = clipped_surrogate(ratio, advantages, clip, clip)
    loss = -mean_over_tokens(objective, mask, normaliser)
    return PolicyLoss(loss, policy_stats(ratio, advantages, mask, clip, clip))


def ppo_kl_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    kl: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    beta: float,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The surrogate with a KL penalty in place of the clip, eq. (5), to be minimised.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the actions.
        advantages: [batch, time].
        kl: [batch, time], KL[old || new] at each step, in nats, with gradient: see `categorical_kl`.
        mask: [batch, time], True at actions that count.
        beta: weight of the penalty, at least 0; see `adapt_kl_coefficient`.
        normaliser: what the sum is divided by; None for the number of unmasked entries.

    Returns:
        The loss and, without gradient, ``kl``, its mean over the unmasked entries.

    Raises:
        ValueError: shapes differ, the mask is not boolean, beta is negative or the normaliser not positive.
    """
    check_tokens(mask, logp=logp, logp_old=logp_old, advantages=advantages, kl=kl)
    check_number("beta", beta, least=0.0)
    objective = masked_ratio(logp, logp_old, mask) * advantages.detach() - beta * kl
    loss = -mean_over_tokens(objective, mask, normaliser)
    return PolicyLoss(loss, {"kl": mean_over_tokens(kl.detach(), mask)})


def adapt_kl_coefficient(beta: float, kl: float, target: float) -> float:
    """The coefficient for the next batch: half of beta below 2/3 of the target, twice beta above 3/2 of it.

    Args:
        beta: coefficient used for this batch.
        kl: mean divergence measured after it, in nats.
        target: wanted divergence > 0, in nats.

    Raises:
        ValueError: the target is not positive.
    """
    check_number("target", target, above=0.0)
    if kl < target / 1.5:
        return beta / 2
    return beta * 2 if kl > target * 1.5 else beta


def categorical_kl(
    logits_old: Float[Tensor, "*batch choices"], logits: Float[Tensor, "*batch choices"]
) -> Float[Tensor, "*batch"]:
    """KL[old || new] of the distributions over the last axis, in nats; no gradient flows to the old logits.

    Args:
        logits_old: [..., choices], of the policy that drew the actions.
        logits: [..., choices], of the policy being trained.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != logits_old.shape:
        raise ValueError(f"logits: expected {tuple(logits_old.shape)}, as logits_old has, got {tuple(logits.shape)}")
    old = logits_old.detach().log_softmax(-1)
    return (old.exp() * (old - logits.log_softmax(-1))).sum(-1)


def entropy_bonus(
    logits: Float[Tensor, "batch time choices"],
    mask: Bool[Tensor, "batch time"],
    *,
    normaliser: float | None = None,
) -> Float[Tensor, ""]:
    """Mean entropy of the policy, in nats; its multiple is subtracted from the loss.

    Args:
        logits: [batch, time, choices].
        mask: [batch, time], True at actions that count.
        normaliser: what the sum is divided by; None for the number of unmasked entries.

    Raises:
        ValueError: shapes don't fit, the mask is not boolean, or the normaliser is not positive.
    """
    check_tokens(mask, logits=logits.logsumexp(-1))
    logp = logits.log_softmax(-1)
    return -mean_over_tokens((logp.exp() * logp).sum(-1), mask, normaliser)


def value_loss(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    normaliser: float | None = None,
) -> Float[Tensor, ""]:
    """Half the mean squared error of the value function.

    Args:
        values: [batch, time], V_t with gradient.
        returns: [batch, time], of `gae`.
        mask: [batch, time], True at steps that count.
        normaliser: what the sum is divided by; None for the number of unmasked entries.

    Raises:
        ValueError: shapes differ, the mask is not boolean, or the normaliser is not positive.
    """
    check_tokens(mask, values=values, returns=returns)
    return 0.5 * mean_over_tokens((values - returns).square(), mask, normaliser)


def value_clip_loss(
    values: Float[Tensor, "batch time"],
    values_old: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip: float = 0.2,
    normaliser: float | None = None,
) -> Float[Tensor, ""]:
    """The clipped value loss of eq. (4): a value that has moved by more than the clip towards its return stops.

    Args:
        values: [batch, time], V_t with gradient.
        values_old: [batch, time], the values with which the returns were computed.
        returns: [batch, time], of `gae`.
        mask: [batch, time], True at steps that count.
        clip: largest useful move > 0, in units of the reward.
        normaliser: what the sum is divided by; None for the number of unmasked entries.

    Raises:
        ValueError: shapes differ, the mask is not boolean, or clip or normaliser are not positive.
    """
    check_tokens(mask, values=values, values_old=values_old, returns=returns)
    _check_clip(clip)
    near = values_old.detach() + (values - values_old.detach()).clamp(-clip, clip)
    squares = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * mean_over_tokens(squares, mask, normaliser)


def masked_ratio(
    logp: Float[Tensor, "batch time"], logp_old: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Eq. (1): the probability ratios, exactly 1 where the mask is False or the policies agree.

    Args:
        logp: [batch, time], with gradient.
        logp_old: [batch, time], no gradient flows to them.
        mask: [batch, time]; what stands behind False, be it NaN, matters neither for values nor for gradients.
    """
    difference = torch.where(mask, logp - logp_old.detach(), 0.0)
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], clip_low: float, clip_high: float
) -> Float[Tensor, "*shape"]:
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), entry by entry.

    Args:
        ratio: new over old probability, with gradient.
        advantages: A, of the same shape.
        clip_low: > 0, how far below 1 the ratio is followed where A < 0.
        clip_high: > 0, how far above 1 the ratio is followed where A > 0.

    Raises:
        ValueError: shapes differ, or a clip is not positive.
    """
    if ratio.shape != advantages.shape:
        raise ValueError(f"advantages: expected shape {tuple(ratio.shape)}, got {tuple(advantages.shape)}")
    _check_clip(clip_low)
    _check_clip(clip_high)
    advantages = advantages.detach()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def policy_stats(
    ratio: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    clip_low: float,
    clip_high: float,
) -> dict[str, Tensor]:
    """What training logs report of the ratios, without gradient.

    Args:
        ratio: new over old probability.
        advantages: of the same shape.
        mask: True at entries that count.
        clip_low: as in `clipped_surrogate`.
        clip_high: likewise.

    Returns:
        ``clip_fraction``, the share of entries that the clip deprives of their gradient, and ``approx_kl``, the mean of
        ratio - 1 - log ratio: an estimate of KL[old || new] in nats that is never negative.
    """
    ratio = ratio.detach()
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    return {
        "clip_fraction": mean_over_tokens(clipped.to(ratio.dtype), mask),
        "approx_kl": mean_over_tokens(ratio - 1 - ratio.log(), mask),
    }


def mean_over_tokens(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], normaliser: float | None = None
) -> Float[Tensor, ""]:
    """The sum over unmasked entries, divided by the normaliser or, where it is None, by their number (at least 1).

    Args:
        x: [batch, time]; what stands at masked entries, be it NaN, matters neither for values nor for gradients.
        mask: [batch, time].
        normaliser: > 0.

    Raises:
        ValueError: the normaliser is not positive.
    """
    if normaliser is not None:
        check_number("normaliser", normaliser, above=0.0)
    return masked_sum(x, mask).sum() / (mask.sum().clamp(min=1) if normaliser is None else normaliser)


def check_tokens(mask: Tensor, name: str = "mask", **tensors: Tensor) -> None:
    """Raises ValueError unless the mask is a boolean [batch, time], and the tensors of its shape and finite where True.

    Args:
        mask: the boolean argument.
        name: what the caller calls it.
        **tensors: the other arguments by their names.
    """
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.numel() == 0:
        raise ValueError(f"{name}: expected a boolean [batch, time], got {mask.dtype} of shape {tuple(mask.shape)}")
    for other, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{other}: expected {tuple(mask.shape)}, as {name} has, got shape {tuple(tensor.shape)}")
        if not torch.compiler.is_compiling():
            check_finite(other, torch.where(mask, tensor, 0.0))


def _check_clip(clip: float) -> None:
    if math.isnan(clip) or clip <= 0:
        raise ValueError(f"clip: expected more than 0, got {clip}")
