r"""cDPO: token-level DPO that holds a wrong answer's critical tokens to account, and not its innocent ones.

Paper: Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability
    (arXiv:2411.19943).

A wrong chain of reasoning often goes wrong at one token: every continuation before it may succeed, none after it does.
Rollouts find such a critical token at great cost. A cheap estimate contrasts two models, one fine-tuned on correct
answers and one on incorrect ones: where the first finds a token much less likely than the second, it is critical. cDPO
weighs the tokens of the rejected answer by that estimate. (Conservative DPO, with smoothed labels, has the same
abbreviation: it is `smoothed_dpo_loss`.)

Equation:
    $$ s_t = \operatorname{softmax}_v\bigl((1 + \beta) \log p(v \mid x, y_{<t}) - \beta \log q(v \mid x, y_{<t})\bigr)
       \big|_{v = y_t} \tag{1} $$
    $$ \phi_w = \sum_t \log\frac{\pi(y^w_t)}{\pi_{\mathrm{ref}}(y^w_t)}, \qquad
       \phi_l = \sum_t (1 - s_t) \log\frac{\pi(y^l_t)}{\pi_{\mathrm{ref}}(y^l_t)}, \qquad
       L = -\log\sigma\bigl(\gamma (\phi_w - \phi_l)\bigr) \tag{2} $$

Symbols:
    p, q: models fine-tuned on correct and on incorrect answers.
    s_t: [batch, time], score of a token in [0, 1]; small is critical.
    y^w, y^l: a correct and an incorrect answer to prompt x.

Defaults:
    beta: 1 (the authors' code).
    gamma: 0.1 (the authors' code).
    samples, tolerance: 64 rollouts at each token, and fewer than 5 % of them correct later on (section 2).

Deviations:
    1. Equation (2) takes sums over tokens before the logarithm of the sigmoid, as the paper writes it. The released
       code takes it at each position, of the chosen minus the rejected answer's token that happens to stand there, and
       averages over positions, padding included.
    2. Weights on the chosen answer, s_t in the released code and off by default there, are an optional argument.

Reduces to:
    dpo: all scores are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.preference.logps import token_logps
from mlreviews.preference.losses import PreferenceLoss, check_logps, check_mask, masked_sum

__all__ = ["contrastive_token_scores", "critical_dpo_loss", "find_critical_token"]

Token = TypeVar("Token")


def contrastive_token_scores(
    positive_logits: Float[Tensor, "batch time vocab"],
    negative_logits: Float[Tensor, "batch time vocab"],
    labels: Int[Tensor, "batch time"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, "batch time"]:
    """How little each token is to blame, eq. (1): near 0 for critical tokens.

    Args:
        positive_logits: [batch, time, vocab], of the model fine-tuned on correct answers.
        negative_logits: [batch, time, vocab], of the one fine-tuned on incorrect answers.
        labels: [batch, time], the answer's tokens; ``logits[:, t]`` predicts ``labels[:, t]``.
        beta: strength of the contrast; 0 gives the first model's probabilities.

    Raises:
        ValueError: shapes that don't fit, or a negative beta.
    """
    check_number("beta", beta, least=0.0)
    if positive_logits.shape != negative_logits.shape:
        wanted, came = tuple(positive_logits.shape), tuple(negative_logits.shape)
        raise ValueError(f"negative_logits: expected shape {wanted}, as positive_logits has, got {came}")
    # Normalisers of either model are the same for all tokens of a position, so logits do as well.
    return token_logps((1 + beta) * positive_logits - beta * negative_logits, labels).exp()


def critical_dpo_loss(
    policy_chosen_token_logps: Float[Tensor, "batch time"],
    policy_rejected_token_logps: Float[Tensor, "batch longer"],
    ref_chosen_token_logps: Float[Tensor, "batch time"],
    ref_rejected_token_logps: Float[Tensor, "batch longer"],
    chosen_mask: Bool[Tensor, "batch time"],
    rejected_mask: Bool[Tensor, "batch longer"],
    rejected_scores: Float[Tensor, "batch longer"],
    *,
    gamma: float = 0.1,
    chosen_weights: Float[Tensor, "batch time"] | None = None,
) -> PreferenceLoss:
    """cDPO, eq. (2): a rejected token of score 1 has no gradient.

    Args:
        policy_chosen_token_logps: [batch, time], of each token of the correct answers under the policy.
        policy_rejected_token_logps: [batch, longer], of the incorrect ones.
        ref_chosen_token_logps: [batch, time], under the reference.
        ref_rejected_token_logps: [batch, longer], under the reference.
        chosen_mask: [batch, time], True at the tokens of the answer.
        rejected_mask: [batch, longer].
        rejected_scores: [batch, longer], s_t in [0, 1] of the incorrect answers' tokens.
        gamma: strength of the KL penalty, beta of DPO.
        chosen_weights: [batch, time], of the correct answers' tokens; None: 1.

    Returns:
        The losses; the rewards are weighted as in the loss.

    Raises:
        ValueError: shapes that don't fit, a mask that is not of bool, a score outside [0, 1], or gamma <= 0.
    """
    weights = torch.ones_like(policy_chosen_token_logps) if chosen_weights is None else chosen_weights
    check_logps(
        2,
        policy_chosen_token_logps=policy_chosen_token_logps,
        ref_chosen_token_logps=ref_chosen_token_logps,
        chosen_weights=weights,
    )
    check_logps(
        2,
        policy_rejected_token_logps=policy_rejected_token_logps,
        ref_rejected_token_logps=ref_rejected_token_logps,
        rejected_scores=rejected_scores,
    )
    check_mask(chosen_mask, weights.shape, name="chosen_mask", like="policy_chosen_token_logps")
    check_mask(rejected_mask, rejected_scores.shape, name="rejected_mask", like="policy_rejected_token_logps")
    if len(chosen_mask) != len(rejected_mask):
        raise ValueError(f"rejected_mask: expected {len(chosen_mask)} answers, got {len(rejected_mask)}")
    if not torch.compiler.is_compiling() and ((rejected_scores < 0) | (rejected_scores > 1)).any():
        raise ValueError("rejected_scores: expected probabilities in [0, 1]")
    check_number("gamma", gamma, above=0.0)
    chosen = masked_sum(weights * (policy_chosen_token_logps - ref_chosen_token_logps), chosen_mask)
    blame = 1 - rejected_scores
    rejected = masked_sum(blame * (policy_rejected_token_logps - ref_rejected_token_logps), rejected_mask)
    return PreferenceLoss(-logsigmoid(gamma * (chosen - rejected)), gamma * chosen.detach(), gamma * rejected.detach())


def find_critical_token(
    tokens: Sequence[Token],
    rollout: Callable[[Sequence[Token], int], int],
    *,
    samples: int = 64,
    tolerance: float = 0.05,
) -> int | None:
    """The critical token of an incorrect answer, by rollouts, from its end to where they first succeed.

    Args:
        tokens: the answer.
        rollout: continues a prefix of the answer that many times, and says how many continuations are correct.
        samples: continuations at each token.
        tolerance: share of correct continuations from which on a later token is no dead end.

    Returns:
        The number of the first token after which no continuation is correct, and after all later ones less than the
        tolerance; None where there is no such token.

    Raises:
        ValueError: no samples, or a tolerance outside [0, 1].
    """
    check_count("samples", samples)
    check_probability("tolerance", tolerance)
    found = None
    for position in reversed(range(len(tokens))):
        correct = rollout(tokens[: position + 1], samples)
        if correct >= tolerance * samples:
            break
        if correct == 0:
            found = position
    return found
