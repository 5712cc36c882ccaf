r"""APO: preference losses that also say where each of the two likelihoods is to go; CLAIR: pairs that differ in little.

Paper: Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment
    (arXiv:2408.06266).

DPO fixes the difference of two rewards and leaves open whether the preferred answer becomes likelier or the rejected
one less likely: both may fall. APO anchors each reward at 0, the reference. APO-zero raises the preferred answer and
lowers the rejected one, for preferred answers that are better than what the model says by itself. APO-down lowers both,
the rejected one more, for a model that is already better than its data. CLAIR makes the pairs: the rejected answer is
the model's own, the preferred one a minimal revision of it, so that they differ in what matters and in nothing else.

Equation:
    $$ r(y) = \beta \log\frac{\pi(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)}, \qquad
       L_{\mathrm{zero}} = 1 - \sigma(r_w) + \sigma(r_l) \tag{1} $$
    $$ L_{\mathrm{down}} = \sigma(r_w) + 1 - \sigma(r_w - r_l) \tag{2} $$
    The slopes are those of the sigmoid, sigma (1 - sigma), largest at the anchor: an answer that has moved far from the
    reference, in either direction, is left alone.
    $$ y_l \sim \pi(\cdot \mid x), \qquad y_w = \operatorname{revise}(x, y_l) \tag{3} $$

Symbols:
    pi, pi_ref: probabilities of an answer under the policy and the reference; their logarithms in nats, [batch].
    y_w, y_l: the preferred and the rejected answer to prompt x.
    r: reward of an answer, 0 where the policy is the reference.
    beta: how soon an answer counts as far from the reference.

Defaults:
    beta: 0.1 (ours, as trl; the paper tunes it).

Deviations:
    1. Both losses are the paper's plus 1, as in trl, which makes them positive: in (0, 2).
    2. An answer that its revision leaves as it was makes no pair.

Reduces to:
    none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor

from mlreviews.preference.losses import PreferenceLoss, log_ratio

__all__ = ["ClairPair", "apo_down_loss", "apo_zero_loss", "clair_pairs", "edit_distance", "jaccard_similarity"]

Prompt = TypeVar("Prompt")
Answer = TypeVar("Answer")
Logps = Float[Tensor, " batch"]


def apo_zero_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-zero, eq. (1): the preferred answer rises, the rejected one falls; 1 where the policy is the reference.

    Args:
        policy_chosen_logps: [batch] log-probabilities of the preferred answers under the policy, summed over the tokens
            of the answer, in nats.
        policy_rejected_logps: [batch], those of the rejected answers.
        ref_chosen_logps: [batch], of the preferred answers under the reference.
        ref_rejected_logps: [batch], of the rejected answers under the reference.
        beta: scale of the rewards.

    Raises:
        ValueError: shapes that differ, NaN or infinity, or beta <= 0.
    """
    chosen, rejected = _rewards(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    # 1 - sigmoid(r) would round to 0, where sigmoid(-r) keeps its digits.
    losses = (-chosen).sigmoid() + rejected.sigmoid()
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())


def apo_down_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """APO-down, eq. (2): both answers fall, the rejected one further; 1 where the policy is the reference.

    Args:
        policy_chosen_logps: [batch], as for `apo_zero_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: scale of the rewards.

    Raises:
        ValueError: shapes that differ, NaN or infinity, or beta <= 0.
    """
    chosen, rejected = _rewards(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    losses = chosen.sigmoid() + (rejected - chosen).sigmoid()
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())


class ClairPair(NamedTuple):
    """A prompt with two answers that differ in little.

    Attributes:
        prompt: what was asked.
        chosen: the revised answer.
        rejected: the model's own answer.
    """

    prompt: object
    chosen: object
    rejected: object


def clair_pairs(
    prompts: Sequence[Prompt],
    generate: Callable[[Prompt], Answer],
    revise: Callable[[Prompt, Answer], Answer],
) -> list[ClairPair]:
    """Pairs by contrastive revision, eq. (3), one for each answer that its revision changes.

    Args:
        prompts: what to answer.
        generate: samples the policy's own answer to a prompt.
        revise: improves an answer and leaves the rest of it as it is, as a stronger model does when asked to.
    """
    pairs = []
    for prompt in prompts:
        rejected = generate(prompt)
        chosen = revise(prompt, rejected)
        if chosen != rejected:
            pairs.append(ClairPair(prompt, chosen, rejected))
    return pairs


def jaccard_similarity(chosen: Sequence[Hashable], rejected: Sequence[Hashable]) -> float:
    """Shared tokens over all tokens of a pair, as sets (the paper's first measure): 1 for the same vocabulary.

    Args:
        chosen: tokens of one answer.
        rejected: tokens of the other.
    """
    one, other = set(chosen), set(rejected)
    return len(one & other) / len(one | other) if one | other else 1.0


def edit_distance(chosen: Sequence[Hashable], rejected: Sequence[Hashable]) -> int:
    """Levenshtein distance (the paper's second measure): the fewest insertions, deletions and replacements.

    Args:
        chosen: tokens, or characters, of one answer.
        rejected: tokens, or characters, of the other.
    """
    row = list(range(len(rejected) + 1))
    for i, token in enumerate(chosen):
        above, row = row, [i + 1]
        for j, other in enumerate(rejected):
            row.append(min(above[j] + (token != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def _rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return beta * chosen, beta * rejected
