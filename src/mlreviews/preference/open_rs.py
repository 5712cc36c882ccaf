r"""Open-RS: GRPO with a reward that prefers short correct answers, for a small model and a small budget.

Paper: Reinforcement Learning for Reasoning in Small LLMs: What Works and What Doesn't (arXiv:2503.16219)
Paper: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv:2402.03300; GRPO)
Paper: Understanding R1-Zero-Like Training: A Critical Perspective (arXiv:2503.20783; Dr. GRPO)

A 1.5B model is trained for a day on 7000 mathematical questions, with several answers to each compared with one another
and a rule that checks the result. What keeps the training stable is a reward that falls with an answer's length when it
is correct, and rises with it when it is wrong. Dr. GRPO names the reason why answers grow without it: each answer's
gradient is divided by its own length, so that a long wrong one is hardly punished.

Equation:
    $$ L = -\frac{1}{G} \sum_i \frac{1}{|o_i|} \sum_t \bigl[\min(\rho_{it} A_i,
       \operatorname{clip}(\rho_{it}, 1 - \epsilon, 1 + \epsilon) A_i) - \beta D_{it}\bigr] \tag{1} $$
    $$ D_{it} = \frac{\pi_{ref}}{\pi_\theta} - \log \frac{\pi_{ref}}{\pi_\theta} - 1 \tag{2} $$
    $$ L_{Dr} = -\frac{1}{G M} \sum_i \sum_t \bigl[\min(\rho_{it} A_i,
       \operatorname{clip}(\rho_{it}, 1 - \epsilon, 1 + \epsilon) A_i) - \beta D_{it}\bigr] \tag{3} $$
    $$ R(o) = b + \frac{a - b}{2} \Bigl(1 + \cos \frac{\pi |o|}{M}\Bigr) \tag{4} $$
    with (a, b) the rewards of the shortest and of the longest answer: one pair for correct ones, one for wrong ones.

Symbols:
    o_i: one of G answers to a prompt, |o_i| tokens long, at most M.
    rho: [batch, time], policy ratio of each token.
    A: [batch], advantages of answers: `group_advantages`, for Dr. GRPO without division by the standard deviation.
    D: [batch, time], estimate of the divergence from the reference policy, in nats; never negative.

Defaults:
    clip: 0.2, on both sides (DeepSeekMath; the paper names none).
    beta: 0.04 (DeepSeekMath).
    correct: (1, 0.5); wrong: (-1, -0.5) (the paper's code; its M is 3584).
    group_size: none; 6 in the paper (42,000 answers to 7,000 questions).

Deviations:
    1. Answers without a token (masked rows) are left out of the mean over answers.
    2. Beyond M the reward of eq. (4) stays what it is at M; the cosine would turn back.
    3. The rewards for a boxed result and for the format are rules about text, and the caller's.

Reduces to:
    gspo: answers of one token, with the same clips.
    rloo: on-policy, Dr. GRPO has the gradient of RLOO times (G - 1) / (G M).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number
from mlreviews.preference.gspo import check_advantages, mean_over_answers
from mlreviews.preference.losses import PolicyLoss
from mlreviews.preference.ppo import check_tokens, clipped_surrogate, masked_ratio, mean_over_tokens, policy_stats

__all__ = ["cosine_length_reward", "dr_grpo_loss", "grpo_loss", "reference_kl"]


def cosine_length_reward(
    is_correct: Bool[Tensor, " batch"],
    lengths: Int[Tensor, " batch"],
    max_length: int,
    *,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
) -> Float[Tensor, " batch"]:
    """The reward of eq. (4).

    Args:
        is_correct: [batch], whether the answer passed its check.
        lengths: [batch], tokens of each answer.
        max_length: M >= 1; longer answers count as this long.
        correct: rewards of a correct answer at lengths 0 and M.
        wrong: rewards of a wrong one.

    Returns:
        [batch], float32.

    Raises:
        ValueError: shapes differ, a negative length, or rewards that are not finite.
    """
    check_count("max_length", max_length)
    if is_correct.dtype != torch.bool:
        raise TypeError(f"is_correct: expected bool, got {is_correct.dtype}")
    if is_correct.ndim != 1 or is_correct.shape != lengths.shape:
        came = f"{tuple(is_correct.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"is_correct, lengths: expected the same [batch], got {came}")
    if (lengths < 0).any():
        raise ValueError(f"lengths: expected at least 0, got {int(lengths.min())}")
    for name, ends in (("correct", correct), ("wrong", wrong)):
        for end in ends:
            check_number(name, end)
    progress = lengths.clamp(max=max_length).float() / max_length
    share = (1 + (math.pi * progress).cos()) / 2
    shortest, longest = (torch.where(is_correct, c, w).float() for c, w in zip(correct, wrong, strict=True))
    return longest + (shortest - longest) * share


def grpo_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    *,
    logp_ref: Float[Tensor, "batch time"] | None = None,
    beta: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss of eq. (1): tokens are averaged within their answer, answers with each other.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the answers.
        mask: [batch, time], True at the tokens of answers.
        advantages: [batch], of `group_advantages`.
        logp_ref: [batch, time], under the reference; None for no penalty.
        beta: weight of the divergence from the reference, at least 0.
        clip_low: > 0, below 1.
        clip_high: > 0, above 1.
        normaliser: what the sum over answers is divided by, the same for all micro-batches; None for the number of
            answers that have tokens.

    Returns:
        The loss and, over tokens, ``clip_fraction``, ``approx_kl`` and, with a reference, ``reference_kl``.

    Raises:
        ValueError: shapes differ, the mask is not boolean, values are NaN or infinite, a negative beta, or clips or
            normaliser that are not positive.
    """
    objective, stats = _objective(logp, logp_old, mask, advantages, logp_ref, beta, clip_low, clip_high)
    return PolicyLoss(-mean_over_answers(objective, mask, normaliser), stats)


def dr_grpo_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    *,
    max_length: int,
    logp_ref: Float[Tensor, "batch time"] | None = None,
    beta: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss of eq. (3): every token has the same weight, whatever the length of its answer.

    Args:
        logp: [batch, time], log-probabilities under the policy being trained.
        logp_old: [batch, time], under the policy that drew the answers.
        mask: [batch, time], True at the tokens of answers.
        advantages: [batch], of ``group_advantages(..., normalise_std=False)``.
        max_length: M >= 1, the longest an answer may be.
        logp_ref: [batch, time], under the reference; None for no penalty.
        beta: weight of the divergence from the reference, at least 0.
        clip_low: > 0, below 1.
        clip_high: > 0, above 1.
        normaliser: how many answers there are, the same for all micro-batches; None for those that have tokens.

    Returns:
        As `grpo_loss`.

    Raises:
        ValueError: as `grpo_loss`, or max_length below 1.
    """
    check_count("max_length", max_length)
    objective, stats = _objective(logp, logp_old, mask, advantages, logp_ref, beta, clip_low, clip_high)
    if normaliser is None:
        normaliser = max(1, int(mask.any(1).sum()))
    check_number("normaliser", normaliser, above=0.0)
    return PolicyLoss(-mean_over_tokens(objective, mask, normaliser * max_length), stats)


def reference_kl(
    logp: Float[Tensor, "batch time"], logp_ref: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """The estimate of eq. (2) of KL[policy || reference] from tokens that the policy drew; 0 at masked entries.

    Args:
        logp: [batch, time], with gradient.
        logp_ref: [batch, time], no gradient flows to them.
        mask: [batch, time].

    Raises:
        ValueError: shapes differ, the mask is not boolean, or an unmasked value is NaN or infinite.
    """
    check_tokens(mask, logp=logp, logp_ref=logp_ref)
    # pi_ref / pi_theta as one over the ratio: masked entries and cut tails are those of the ratio.
    ratio = masked_ratio(logp, logp_ref, mask)
    return 1 / ratio + ratio.log() - 1


def _objective(
    logp: Tensor,
    logp_old: Tensor,
    mask: Tensor,
    advantages: Tensor,
    logp_ref: Tensor | None,
    beta: float,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What eqs. (1) and (3) sum over tokens, and the statistics."""
    check_tokens(mask, logp=logp, logp_old=logp_old)
    check_number("beta", beta, least=0.0)
    spread = check_advantages(advantages, mask).expand(mask.shape)
    ratio = masked_ratio(logp, logp_old, mask)
    objective = clipped_surrogate(ratio, spread, clip_low, clip_high)
    stats = policy_stats(ratio, spread, mask, clip_low, clip_high)
    if logp_ref is not None:
        divergence = reference_kl(logp, logp_ref, mask)
        objective = objective - beta * divergence
        stats["reference_kl"] = mean_over_tokens(divergence.detach(), mask)
    return objective, stats
