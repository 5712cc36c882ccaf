r"""PPO for language models against DPO: the recipe with which PPO wins, and the policies that DPO cannot tell apart.

Paper: Is DPO Superior to PPO for LLM Alignment? A Comprehensive Study (arXiv:2404.10719)

Every policy that PPO can reach from the reward that DPO implies is optimal for DPO, too, but not the other way round:
DPO sees answers of its data only, and leaves open how much mass the others get. What PPO needs to win in practice is
named: normalised advantages, large batches, and a reference that slowly follows the policy.

Equation:
    $$ r_t = -\beta \log \frac{\pi_{old}(a_t | s_t)}{\pi_{ref}(a_t | s_t)} + 1[t = T] R \tag{1} $$
    $$ A \leftarrow \frac{A - \operatorname{mean}(A)}{\operatorname{std}(A)} \quad \text{over the tokens of the batch}
       \tag{2} $$
    $$ \theta_{ref} \leftarrow \alpha \theta_{ref} + (1 - \alpha) \theta \tag{3} $$
    With eq. (1) the best policy is unique:
    $$ \pi^*(y) \propto \pi_{ref}(y) e^{R(y) / \beta} \tag{4} $$
    DPO's loss for a single pair is the same for all policies of one ratio, whatever they leave to a third answer:
    $$ \frac{\pi(y_1)}{\pi(y_2)} = \frac{\pi_{ref}(y_1)}{\pi_{ref}(y_2)} e^{m / \beta}, \qquad
       \log(1 + e^{-m}) = L \tag{5} $$

Symbols:
    r: [batch, time], rewards of tokens; R: [batch], rewards of answers.
    T: an answer's last token.
    A: [batch, time], advantages.
    alpha: share of the reference that stays.
    L: loss of DPO, in nats; m: its margin.

Defaults:
    beta: none, the caller's choice.
    gamma, lam: 1 and 0.95 (ours: an answer is not discounted; lam as in `ppo`).
    clip, value_clip: 0.2 and 0.2 (as in `ppo`).
    value_weight: 0.5 (ours).

Deviations:
    1. Advantages are computed and normalised over the whole batch by a function of their own, so that micro-batches
       share them.
    2. The mask of an answer must have no holes: rewards and values flow through all tokens between its first and last.

Reduces to:
    ppo: beta = 0, advantages not normalised.
    dpo: eq. (4) with the reward beta log(pi / pi_ref) that DPO implies gives back DPO's policy.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlreviews.common.checks import check_number, check_probability
from mlreviews.preference.losses import PolicyLoss, check_logps, masked_sum
from mlreviews.preference.ppo import check_tokens, gae, ppo_clip_loss, value_clip_loss

__all__ = [
    "dpo_optimal_policy",
    "kl_optimal_policy",
    "normalise_advantages",
    "ppo_rlhf_loss",
    "rlhf_advantages",
    "token_rewards",
    "update_reference",
]


def token_rewards(
    rewards: Float[Tensor, " batch"],
    logp_old: Float[Tensor, "batch time"],
    logp_ref: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    beta: float,
) -> Float[Tensor, "batch time"]:
    """Rewards of tokens, eq. (1): the penalty everywhere, the answer's reward at its last token; 0 where masked.

    Args:
        rewards: [batch], of answers.
        logp_old: [batch, time], log-probabilities under the policy that drew the answers.
        logp_ref: [batch, time], under the reference.
        mask: [batch, time], True at the tokens of answers. A row without any has no reward.
        beta: reward per nat, at least 0.

    Raises:
        ValueError: shapes differ, the mask is not boolean or has holes, values are NaN or infinite, or a negative beta.
    """
    check_tokens(mask, logp_old=logp_old, logp_ref=logp_ref)
    check_logps(rewards=rewards)
    check_number("beta", beta, least=0.0)
    if len(rewards) != len(mask):
        raise ValueError(f"rewards: expected one for each of {len(mask)} answers, got {len(rewards)}")
    penalty = torch.where(mask, beta * (logp_ref - logp_old), 0.0)
    return (penalty + torch.where(_last_tokens(mask), rewards[:, None], 0.0)).detach()


def rlhf_advantages(
    token_reward: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    normalise: bool = True,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Advantages and returns of answers of several lengths, padded on either side.

    Args:
        token_reward: [batch, time], of `token_rewards`.
        values: [batch, time], of the critic when the answers were drawn.
        mask: [batch, time], True at the tokens of answers, without holes.
        gamma: discount in [0, 1].
        lam: of generalised advantage estimation, in [0, 1].
        normalise: eq. (2); the returns are not touched by it.

    Returns:
        [batch, time] each, 0 where masked.

    Raises:
        ValueError: shapes differ, the mask is not boolean or has holes, values are NaN or infinite, or a factor is
            outside of [0, 1].
    """
    check_tokens(mask, token_reward=token_reward, values=values)
    ends = _last_tokens(mask)
    advantages, returns = gae(
        torch.where(mask, token_reward, 0.0), torch.where(mask, values, 0.0), ends, gamma=gamma, lam=lam
    )
    if normalise:
        advantages = normalise_advantages(advantages, mask)
    return torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)


def normalise_advantages(
    advantages: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, eps: float = 1e-8
) -> Float[Tensor, "batch time"]:
    """Mean 0 and standard deviation 1 over the unmasked entries, eq. (2); 0 elsewhere.

    Args:
        advantages: [batch, time], of a whole batch: micro-batches of it don't have its mean.
        mask: [batch, time].
        eps: added to the standard deviation.

    Raises:
        ValueError: shapes differ, the mask is not boolean, values are NaN or infinite, or a negative eps.
    """
    check_tokens(mask, advantages=advantages)
    check_number("eps", eps, least=0.0)
    count = mask.sum().clamp(min=1)
    centred = torch.where(mask, advantages - masked_sum(advantages, mask).sum() / count, 0.0)
    return centred / ((centred.square().sum() / count).sqrt() + eps)


def ppo_rlhf_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    values_old: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.5,
    normaliser: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate plus clipped value loss.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the answers.
        values: [batch, time], of the critic being trained.
        values_old: [batch, time], of the critic when the answers were drawn.
        advantages: [batch, time], of `rlhf_advantages` over the whole batch.
        returns: [batch, time], likewise.
        mask: [batch, time], True at the tokens of answers.
        clip: of the policy ratio, > 0.
        value_clip: of the values, > 0.
        value_weight: of the value loss (which has the factor 1/2), at least 0.
        normaliser: what sums over tokens are divided by, the same for all micro-batches; None for their number.

    Returns:
        The loss and ``clip_fraction``, ``approx_kl``, ``policy_loss`` and ``value_loss``.

    Raises:
        ValueError: as `ppo_clip_loss` and `value_clip_loss`, or a negative weight.
    """
    check_number("value_weight", value_weight, least=0.0)
    policy, stats = ppo_clip_loss(logp, logp_old, advantages, mask, clip=clip, normaliser=normaliser)
    fit = value_clip_loss(values, values_old, returns, mask, clip=value_clip, normaliser=normaliser)
    stats |= {"policy_loss": policy.detach(), "value_loss": fit.detach()}
    return PolicyLoss(policy + value_weight * fit, stats)


@torch.no_grad()
def update_reference(reference: nn.Module, policy: nn.Module, decay: float) -> None:
    """Moves the reference a little towards the policy, eq. (3), in place.

    Args:
        reference: a copy of the policy; its parameters and floating-point buffers are averaged, other buffers copied.
        policy: what is being trained.
        decay: alpha in [0, 1]; 1 leaves the reference as it is, 0 makes it the policy.

    Raises:
        ValueError: decay is outside of [0, 1], or the two have other tensors; then nothing has changed.
    """
    check_probability("decay", decay)
    old, new = reference.state_dict(keep_vars=True), policy.state_dict()
    if {name: t.shape for name, t in old.items()} != {name: t.shape for name, t in new.items()}:
        raise ValueError("policy: expected tensors of the reference's names and shapes")
    # a tensor that has two names, such as a tied head, moves once
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in old.items()}.values():
        if tensor.is_floating_point():
            tensor.lerp_(new[name].to(tensor.dtype), 1 - decay)
        elif decay < 1:
            tensor.copy_(new[name])


def kl_optimal_policy(
    reference: Float[Tensor, "*batch answers"], rewards: Float[Tensor, "*batch answers"], beta: float
) -> Float[Tensor, "*batch answers"]:
    """The only policy that maximises reward - beta KL[policy || reference], eq. (4).

    Args:
        reference: [..., answers], probabilities.
        rewards: [..., answers].
        beta: > 0.

    Raises:
        ValueError: shapes differ, or beta is not positive.
    """
    check_number("beta", beta, above=0.0)
    if reference.shape != rewards.shape:
        raise ValueError(f"rewards: expected shape {tuple(reference.shape)}, got {tuple(rewards.shape)}")
    return (reference.log() + rewards / beta).softmax(-1)


def dpo_optimal_policy(reference: Float[Tensor, " 3"], loss: float, outside: float, beta: float) -> Float[Tensor, " 3"]:
    """A policy over three answers with a given DPO loss on the pair (first, second) and a given mass on the third.

    Args:
        reference: [3], probabilities of the reference.
        loss: wanted value of DPO's loss, > 0, in nats.
        outside: wanted probability of the third answer, in [0, 1): the pair says nothing of it.
        beta: of DPO, > 0.

    Returns:
        [3], in float64.

    Raises:
        ValueError: a loss or beta that is not positive, or a probability outside of [0, 1).
    """
    check_number("loss", loss, above=0.0)
    check_number("beta", beta, above=0.0)
    check_probability("outside", outside)
    if outside == 1:
        raise ValueError("outside: expected a probability below 1, got 1")
    margin = -math.log(math.expm1(loss))
    odds = torch.log(reference[0].double() / reference[1].double()) + margin / beta
    inside = (1 - outside) * torch.stack([odds.sigmoid(), (-odds).sigmoid()])
    return torch.cat([inside, inside.new_tensor([outside])])


def _last_tokens(mask: Tensor) -> Tensor:
    """True at the last token of each row that has any; raises ValueError where a row has holes."""
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    ends = mask & ~follows
    if (ends.sum(1) > 1).any():
        raise ValueError("mask: expected the tokens of each answer to stand together, got a row with holes")
    return ends
