r"""GSPO: the policy ratio of a whole answer, averaged over its tokens, is what is weighted and clipped.

Paper: Group Sequence Policy Optimization (arXiv:2507.18071)
Paper: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv:2402.03300; GRPO)

GRPO compares the rewards of several answers to one prompt and weights each token by its own probability ratio. A single
token's ratio is a noisy weight for a reward that belongs to the whole answer, and the noise does not average out over
long answers. GSPO takes the geometric mean of an answer's ratios and clips the answer as one.

Equation:
    $$ A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r)} \tag{1} $$
    $$ s_i = \Bigl(\frac{\pi_\theta(y_i | x)}{\pi_{old}(y_i | x)}\Bigr)^{1 / |y_i|} = \exp \Bigl(\frac{1}{|y_i|}
       \sum_t \log \frac{\pi_\theta(y_{it} | \cdot)}{\pi_{old}(y_{it} | \cdot)}\Bigr) \tag{2} $$
    $$ L = -\frac{1}{G} \sum_i \min\bigl(s_i A_i, \operatorname{clip}(s_i, 1 - \epsilon_l, 1 + \epsilon_r) A_i\bigr)
       \tag{3} $$
    The token variant allows for an advantage of each token; sg stops the gradient:
    $$ s_{it} = \operatorname{sg}[s_i] \frac{\pi_\theta(y_{it} | \cdot)}{\operatorname{sg}[\pi_\theta(y_{it} | \cdot)]},
       \quad L = -\frac{1}{G} \sum_i \frac{1}{|y_i|} \sum_t \min\bigl(s_{it} A_{it},
       \operatorname{clip}(s_{it}, 1 - \epsilon_l, 1 + \epsilon_r) A_{it}\bigr) \tag{4} $$

Symbols:
    y_i: one of G answers to the prompt x, |y_i| tokens long.
    logp, logp_old: [batch, time], log-probabilities of the tokens, in nats.
    mask: [batch, time], True at the tokens of answers.
    r, A: [batch], rewards and advantages; [batch, time] advantages in eq. (4).

Defaults:
    clip_low, clip_high: 3e-4 and 4e-4 (section 5.1; GRPO's in the same experiments are 0.2 and 0.27).
    normalise_std: True, with 1e-4 added to the standard deviation (ours, as trl; the paper adds nothing).

Deviations:
    1. The standard deviation has G - 1 in its denominator, as in trl and verl; the paper does not say. It is computed
       from differences to the mean: mean squares minus squared means lose all digits in single precision.
    2. Answers without a token are left out of the mean over answers.
    3. Mean log-ratios are cut to at most 20 in size, as in `ppo`.

Reduces to:
    ppo: for answers of one token, with the same clip on both sides.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_number
from mlreviews.preference.losses import PolicyLoss, check_group_size, check_logps, masked_sum
from mlreviews.preference.ppo import check_tokens, clipped_surrogate, masked_ratio, policy_stats

__all__ = ["group_advantages", "gspo_loss", "gspo_token_loss", "sequence_ratio"]


def group_advantages(
    rewards: Float[Tensor, " batch"], group_size: int, *, normalise_std: bool = True, eps: float = 1e-4
) -> Float[Tensor, " batch"]:
    """Rewards compared within their group, eq. (1).

    Args:
        rewards: [batch], groups of answers to one prompt after one another.
        group_size: G >= 2.
        normalise_std: divide by the group's standard deviation; False as in Dr. GRPO.
        eps: added to the standard deviation, in units of the reward.

    Returns:
        [batch], without gradient: in each group they sum to 0, and are 0 where all rewards are equal.

    Raises:
        ValueError: the group size is below 2 or does not divide the batch, a reward is NaN or infinite, or eps is
            negative.
    """
    check_logps(rewards=rewards)
    check_group_size(group_size, len(rewards), least=2)
    check_number("eps", eps, least=0.0)
    groups = rewards.detach().view(-1, group_size)
    # Relative to its first member, a group of equal rewards is exactly zero, whatever the rounding of its mean.
    offsets = groups - groups[:, :1]
    centred = offsets - offsets.mean(1, keepdim=True)
    if normalise_std:
        spread = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
        centred = torch.where(spread > 0, centred / (spread + eps), 0.0)
    return centred.flatten()


def sequence_ratio(
    logp: Float[Tensor, "batch time"], logp_old: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """The geometric mean of an answer's token ratios, eq. (2); exactly 1 where the policies agree.

    Args:
        logp: [batch, time], with gradient.
        logp_old: [batch, time], no gradient flows to them.
        mask: [batch, time]; an answer without tokens has the ratio 1.

    Raises:
        ValueError: shapes differ, the mask is not boolean, or an unmasked value is NaN or infinite.
    """
    check_tokens(mask, logp=logp, logp_old=logp_old)
    mean = masked_sum(logp - logp_old.detach(), mask) / mask.sum(1).clamp(min=1)
    row = mean.to(logp.dtype)[:, None]
    return masked_ratio(row, torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool))[:, 0]


def gspo_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The clipped objective of whole answers, eq. (3), to be minimised.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the answers.
        mask: [batch, time], True at the tokens of answers.
        advantages: [batch], of `group_advantages`.
        clip_low: epsilon_l > 0.
        clip_high: epsilon_r > 0.
        normaliser: what the sum over answers is divided by, the same for all micro-batches; None for the number of
            answers that have tokens.

    Returns:
        The loss and, over answers, ``clip_fraction`` and ``approx_kl`` of their ratios.

    Raises:
        ValueError: shapes differ, the mask is not boolean, values are NaN or infinite, or clips or normaliser are not
            positive.
    """
    ratio = sequence_ratio(logp, logp_old, mask)[:, None]
    counted = mask.any(1, keepdim=True)
    rows = check_advantages(advantages, mask)
    objective = clipped_surrogate(ratio, rows, clip_low, clip_high)
    loss = -mean_over_answers(objective, counted, normaliser)
    return PolicyLoss(loss, policy_stats(ratio, rows, counted, clip_low, clip_high))


def gspo_token_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The variant with an advantage of each token, eq. (4); with equal ones in an answer it is `gspo_loss`.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the answers.
        mask: [batch, time], True at the tokens of answers.
        advantages: [batch, time].
        clip_low: epsilon_l > 0.
        clip_high: epsilon_r > 0.
        normaliser: what the sum over answers is divided by; None for the number of answers that have tokens.

    Returns:
        The loss and, over tokens, ``clip_fraction`` and ``approx_kl``.

    Raises:
        ValueError: as `gspo_loss`.
    """
    check_tokens(mask, advantages=advantages)
    weight = sequence_ratio(logp, logp_old, mask).detach()[:, None]
    ratio = weight * masked_ratio(logp, logp, mask)  # the second factor is 1 and carries the gradient
    objective = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    loss = -mean_over_answers(objective, mask, normaliser)
    return PolicyLoss(loss, policy_stats(ratio, advantages, mask, clip_low, clip_high))


def mean_over_answers(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], normaliser: float | None = None
) -> Float[Tensor, ""]:
    """The mean over each answer's tokens, summed over answers and divided by the normaliser.

    Args:
        x: [batch, time].
        mask: [batch, time]; a row without True counts for nothing.
        normaliser: > 0; None for the number of rows with a token, at least 1.

    Raises:
        ValueError: the normaliser is not positive.
    """
    if normaliser is not None:
        check_number("normaliser", normaliser, above=0.0)
    means = masked_sum(x, mask) / mask.sum(1).clamp(min=1)
    return means.sum() / (mask.any(1).sum().clamp(min=1) if normaliser is None else normaliser)


def check_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of answers as a column beside [batch, time]; raises ValueError unless there is one a row."""
    check_logps(advantages=advantages)
    if len(advantages) != len(mask):
        raise ValueError(f"advantages: expected one for each of {len(mask)} answers, got {len(advantages)}")
    return advantages.detach()[:, None]
