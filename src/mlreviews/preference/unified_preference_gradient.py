r"""Unified preference gradient: every method is a weighted likelihood, and differs from the others in its weights.

Paper: Towards a Unified View of Preference Learning for Large Language Models: A Survey (arXiv:2409.02795).
Paper: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv:2402.03300), from which
    the survey takes the form.
Paper: ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models
    (arXiv:2310.10505).

Fine-tuning, rejection sampling, policy gradients and preference losses all move a model along the gradients of the
log-probabilities of tokens. What tells them apart is the data, the feedback, and the coefficient of each token: 1 for
fine-tuning, a baselined reward for REINFORCE, the doubt that is left about a pair for DPO. Given the coefficients, one
loss trains them all.

Equation:
    $$ \nabla J = \mathbb{E}_{(q, o) \sim D}\Bigl[\frac{1}{|o|} \sum_t \delta_t(q, o)\,
       \nabla \log\pi(o_t \mid q, o_{<t})\Bigr] \tag{1} $$
    $$ \delta^{\mathrm{SFT}} = 1, \quad \delta^{\mathrm{RAFT}} = 1[o \text{ is the best of its group}], \quad
       \delta^{\mathrm{REINFORCE}} = R(o) - b \tag{2} $$
    $$ \delta^{\mathrm{PPO}}_t = A_t \frac{\pi(o_t)}{\pi_{\mathrm{old}}(o_t)} \text{ unless clipped, else } 0, \qquad
       \delta^{\mathrm{GRPO}}_t = A + \beta \Bigl(\frac{\pi_{\mathrm{ref}}(o_t)}{\pi(o_t)} - 1\Bigr) \tag{3} $$
    $$ \delta^{\mathrm{DPO}} = \pm |o|\, \beta \sigma(-u), \qquad
       \delta^{\mathrm{IPO}} = \pm 2 |o| \Bigl(\frac{1}{2\beta} - \frac{u}{\beta}\Bigr), \qquad
       u = \beta \log\frac{\pi(o_w)}{\pi_{\mathrm{ref}}(o_w)}
       - \beta \log\frac{\pi(o_l)}{\pi_{\mathrm{ref}}(o_l)} \tag{4} $$
    plus for the preferred answer, minus for the rejected one. For any other loss of the answers' log-probabilities,
    $$ \delta_i = -|o_i| \frac{\partial L}{\partial \log\pi(o_i)} \tag{5} $$
    Reward models are fitted to pairs, or to verdicts y on single answers:
    $$ L_{\mathrm{BT}} = -\log\sigma(r_c - r_r - m), \qquad
       L_{\mathrm{point}} = -y \log\sigma(r) - (1 - y) \log\sigma(-r) \tag{6} $$

Symbols:
    o: [time], an answer to the query q; |o| its number of tokens.
    delta: [batch, time], coefficients, positive where the likelihood is to rise.
    R, b, A: reward, baseline, advantage.
    r_c, r_r, m: [batch], rewards of the chosen and the rejected answer, and a margin.

Defaults:
    beta: 0.1 for pairs (DPO, appendix B), 0.04 for GRPO (DeepSeekMath, section 4.2).
    clip: 0.2 (PPO, section 6.1).

Deviations:
    1. The coefficients of DPO and IPO carry the factor |o|, which cancels the mean over tokens in (1): with it the
       gradient is exactly that of the method's own loss of sums.
    2. GRPO's coefficient is the survey's for the first step after sampling, when the ratio to the old policy is 1.

Reduces to:
    dpo: the coefficients of eq. (4).
    ppo: the clipped coefficients of eq. (3), one token's advantage at a time.
    rloo: REINFORCE coefficients with the mean reward of the other answers as the baseline.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlreviews.common.checks import check_number
from mlreviews.preference.losses import check_group_size, check_logps, check_mask, masked_sum

__all__ = [
    "bradley_terry_loss",
    "dpo_coefficients",
    "grpo_coefficients",
    "ipo_coefficients",
    "pointwise_reward_loss",
    "ppo_coefficients",
    "raft_coefficients",
    "reinforce_coefficients",
    "sequence_coefficients",
    "sft_coefficients",
    "unified_preference_loss",
]

Rewards = Float[Tensor, " batch"]
Mask = Bool[Tensor, "batch time"]
Tokens = Float[Tensor, "batch time"]


def unified_preference_loss(
    token_logps: Tokens, mask: Mask, coefficients: Tokens, *, normaliser: float | None = None
) -> Float[Tensor, ""]:
    """A loss whose gradient is minus eq. (1).

    Args:
        token_logps: [batch, time], log-probabilities of the answers' tokens.
        mask: [batch, time], True at the tokens of the answers.
        coefficients: [batch, time], delta; no gradient goes through them.
        normaliser: what the sum over answers is divided by; None: their number. Give the number of the whole batch to
            take it in parts.

    Raises:
        ValueError: shapes that differ, a mask that is not of bool, NaN or infinity, or a normaliser <= 0.
    """
    check_logps(2, token_logps=token_logps, coefficients=coefficients)
    check_mask(mask, token_logps.shape, like="token_logps")
    count = len(mask) if normaliser is None else normaliser
    check_number("normaliser", count, above=0.0)
    weighted = masked_sum(coefficients.detach() * token_logps, mask)
    return -(weighted / mask.sum(1).clamp(min=1)).sum() / count


def sft_coefficients(mask: Mask) -> Tokens:
    """Fine-tuning, eq. (2): 1 at each token.

    Args:
        mask: [batch, time], True at the tokens of the answers.
    """
    return mask.float()


def raft_coefficients(rewards: Rewards, mask: Mask, group_size: int) -> Tokens:
    """Rejection sampling fine-tuning, eq. (2): 1 for the best answer of each group (the first of equals), else 0.

    Args:
        rewards: [batch], groups one after another.
        mask: [batch, time], True at the tokens of the answers.
        group_size: answers to one query.
    """
    _check_rewards(mask, rewards=rewards)
    check_group_size(group_size, len(rewards))
    best = rewards.view(-1, group_size).argmax(1, keepdim=True)
    chosen = torch.zeros_like(rewards).view(-1, group_size).scatter(1, best, 1.0)
    return _per_token(chosen.flatten(), mask)


def reinforce_coefficients(rewards: Rewards, baselines: Rewards, mask: Mask) -> Tokens:
    """REINFORCE, eq. (2); ReMax where the baselines are the rewards of the greedy answers.

    Args:
        rewards: [batch].
        baselines: [batch], independent of the answers that they are taken off.
        mask: [batch, time], True at the tokens of the answers.
    """
    _check_rewards(mask, rewards=rewards, baselines=baselines)
    return _per_token(rewards - baselines, mask)


def ppo_coefficients(
    token_logps: Tokens, old_token_logps: Tokens, advantages: Tokens, mask: Mask, *, clip: float = 0.2
) -> Tokens:
    """PPO, eq. (3): advantage times ratio, 0 where the ratio has left the clip range in the advantage's direction.

    Args:
        token_logps: [batch, time], under the policy.
        old_token_logps: [batch, time], under the policy that drew the answers.
        advantages: [batch, time].
        mask: [batch, time], True at the tokens of the answers.
        clip: half the width of the clip range; infinity never clips.
    """
    check_logps(2, token_logps=token_logps, old_token_logps=old_token_logps, advantages=advantages)
    check_mask(mask, token_logps.shape, like="token_logps")
    if not clip > 0:
        raise ValueError(f"clip: expected more than 0, got {clip}")
    ratio = (token_logps - old_token_logps).detach().exp()
    clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(mask & ~clipped, advantages * ratio, 0.0)


def grpo_coefficients(
    token_logps: Tokens, ref_token_logps: Tokens, advantages: Rewards, mask: Mask, *, beta: float = 0.04
) -> Tokens:
    """GRPO on its own samples, eq. (3): the advantage in the group, and a pull to the reference.

    Args:
        token_logps: [batch, time], under the policy.
        ref_token_logps: [batch, time], under the reference.
        advantages: [batch], of the answers.
        mask: [batch, time], True at the tokens of the answers.
        beta: weight of the KL penalty.
    """
    check_logps(2, token_logps=token_logps, ref_token_logps=ref_token_logps)
    _check_rewards(mask, advantages=advantages)
    check_mask(mask, token_logps.shape, like="token_logps")
    check_number("beta", beta, least=0.0)
    pull = beta * torch.expm1((ref_token_logps - token_logps).detach())
    return torch.where(mask, advantages[:, None] + pull, 0.0)


def dpo_coefficients(
    policy_logps: Float[Tensor, " pairs_twice"],
    ref_logps: Float[Tensor, " pairs_twice"],
    mask: Bool[Tensor, "pairs_twice time"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, "pairs_twice time"]:
    """DPO, eq. (4); with the unified loss divided by the number of pairs, its gradient is that of `dpo_loss`.

    Args:
        policy_logps: [2 pairs], sums over the answers, the preferred ones first, then the rejected ones.
        ref_logps: [2 pairs], under the reference.
        mask: [2 pairs, time], True at the tokens of the answers.
        beta: strength of the KL penalty.
    """
    margin = _margins(policy_logps, ref_logps, mask, beta)
    doubt = beta * (-beta * margin).sigmoid()
    return _per_token(torch.cat([doubt, -doubt]) * mask.sum(1), mask)


def ipo_coefficients(
    policy_logps: Float[Tensor, " pairs_twice"],
    ref_logps: Float[Tensor, " pairs_twice"],
    mask: Bool[Tensor, "pairs_twice time"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, "pairs_twice time"]:
    """IPO, eq. (4): negative for the preferred answer once the margin is above its target.

    Args:
        policy_logps: [2 pairs], as for `dpo_coefficients`.
        ref_logps: [2 pairs].
        mask: [2 pairs, time], True at the tokens of the answers.
        beta: tau of IPO.
    """
    missing = 2 * (1 / (2 * beta) - _margins(policy_logps, ref_logps, mask, beta))
    return _per_token(torch.cat([missing, -missing]) * mask.sum(1), mask)


def sequence_coefficients(loss: Float[Tensor, ""], logps: Rewards, mask: Mask) -> Tokens:
    """The coefficients of any loss of the answers' log-probabilities, eq. (5), by automatic differentiation.

    Args:
        loss: a scalar computed from `logps`.
        logps: [batch], sums over the answers, which require gradients.
        mask: [batch, time], True at the tokens of the answers.

    Returns:
        [batch, time], for the unified loss with ``normaliser=1``.
    """
    _check_rewards(mask, logps=logps)
    (slopes,) = torch.autograd.grad(loss, logps, retain_graph=True)
    return _per_token(-slopes * mask.sum(1), mask)


def bradley_terry_loss(chosen_rewards: Rewards, rejected_rewards: Rewards, *, margin: float = 0.0) -> Rewards:
    """Loss of a reward model on pairs, eq. (6), one a pair.

    Args:
        chosen_rewards: [batch], of the preferred answers.
        rejected_rewards: [batch], of the rejected answers to the same queries.
        margin: by which the preferred reward is to be larger.
    """
    check_logps(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_number("margin", margin)
    return -logsigmoid(chosen_rewards - rejected_rewards - margin)


def pointwise_reward_loss(rewards: Rewards, correct: Bool[Tensor, " batch"]) -> Rewards:
    """Loss of a reward model on single answers that are correct or not, eq. (6).

    Args:
        rewards: [batch], log odds of being correct.
        correct: [batch], True for correct answers.
    """
    check_logps(rewards=rewards)
    check_mask(correct, rewards.shape, name="correct", like="rewards")
    return -logsigmoid(torch.where(correct, rewards, -rewards))


def _margins(policy_logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Log ratio of the preferred answer minus that of the rejected one, [pairs]."""
    check_logps(policy_logps=policy_logps, ref_logps=ref_logps)
    _check_rewards(mask, policy_logps=policy_logps)
    check_group_size(2, len(policy_logps))
    check_number("beta", beta, above=0.0)
    chosen, rejected = (policy_logps - ref_logps).chunk(2)
    return chosen - rejected


def _check_rewards(mask: Tensor, **values: Tensor) -> None:
    check_logps(1, **values)
    name, first = next(iter(values.items()))
    if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != len(first):
        wanted = f"[{len(first)}, time], as many answers as {name} has, of bool"
        raise ValueError(f"mask: expected {wanted}, got shape {tuple(mask.shape)} of {mask.dtype}")


def _per_token(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.detach()[:, None], 0.0)
