r"""RLOO: plain policy gradient on whole answers, each compared with the other answers to its prompt.

Paper: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
    (arXiv:2402.14740)
Paper: Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool, van Hoof, Welling; DeepRLStructPred workshop, 2019)

A fine-tuned language model is so good a start that most of PPO's machinery is not needed: an answer is one action with
one reward, and its gradient is that of REINFORCE. RLOO draws k answers to a prompt and takes the mean reward of the
other k - 1 as the baseline of each, which needs no value network and stays unbiased.

Equation:
    $$ R_i = r_i - \beta \log \frac{\pi_\theta(y_i | x)}{\pi_{ref}(y_i | x)} \tag{1} $$
    $$ \nabla J = \frac{1}{k} \sum_{i=1}^k \Bigl[R_i - \frac{1}{k - 1} \sum_{j \ne i} R_j\Bigr]
       \nabla \log \pi_\theta(y_i | x) \tag{2} $$
    $$ A_i = R_i - \frac{1}{k - 1} \sum_{j \ne i} R_j = \frac{k}{k - 1} (R_i - \bar R) \tag{3} $$
    REINFORCE has one baseline b for all answers, the mean reward over training so far:
    $$ \nabla J = (R - b) \nabla \log \pi_\theta(y | x) \tag{4} $$
    RAFT is maximum likelihood on the best answer of each group.

Symbols:
    y_i: one of k answers drawn from the policy for the prompt x; groups stand together in the batch.
    seq_logps: [batch], log pi(y|x), summed over the tokens, in nats.
    r, R: [batch], rewards without and with the KL term.
    beta: reward per nat of divergence.

Defaults:
    beta: none, the caller's choice.
    group_size: none; k = 2 and 4 in the paper's experiments.
    clip: 0.2 for the clipped variant (as PPO; the paper does without).

Deviations:
    1. The KL term counts as a reward (eq. 1) without a gradient of its own: in expectation that gradient is zero.
    2. `rloo_clip_loss`, for several steps on the same answers, clips the ratio of whole answers, as trl does; the paper
       takes one step and finds that clipping is hardly ever active.

Reduces to:
    gspo: RLOO's advantages times (k - 1) / k over the standard deviation are the group advantages of GRPO and GSPO.
    maximum likelihood: REINFORCE with reward 1 and baseline 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_number
from mlreviews.preference.losses import PolicyLoss, check_group_size, check_logps
from mlreviews.preference.ppo import clipped_surrogate, masked_ratio, policy_stats

__all__ = [
    "RunningBaseline",
    "kl_shaped_rewards",
    "raft_loss",
    "reinforce_loss",
    "rloo_advantages",
    "rloo_clip_loss",
    "rloo_loss",
]


def rloo_advantages(rewards: Float[Tensor, " batch"], group_size: int) -> Float[Tensor, " batch"]:
    """Each reward minus the mean of the others in its group, eq. (3).

    Args:
        rewards: [batch], groups of answers to one prompt after one another.
        group_size: k >= 2.

    Returns:
        [batch], without gradient. They sum to 0 in each group; a constant added to a group's rewards changes nothing.

    Raises:
        ValueError: the group size is below 2 (an answer alone has no baseline: see `RunningBaseline`) or does not
            divide the batch, or a reward is NaN or infinite.
    """
    check_logps(rewards=rewards)
    check_group_size(group_size, len(rewards), least=2)
    groups = rewards.detach().view(-1, group_size)
    # The difference first: rewards far from 0 keep their digits, and equal ones give exactly 0.
    others = groups[:, None, :] - groups[:, :, None]
    return -(others.sum(2) / (group_size - 1)).flatten()


def kl_shaped_rewards(
    rewards: Float[Tensor, " batch"],
    seq_logps: Float[Tensor, " batch"],
    ref_seq_logps: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Rewards with the KL penalty inside, eq. (1), without gradient.

    Args:
        rewards: [batch].
        seq_logps: [batch], log-probabilities of the answers under the policy that drew them.
        ref_seq_logps: [batch], under the reference.
        beta: at least 0.

    Raises:
        ValueError: shapes differ, NaN or infinite values, or a negative beta.
    """
    check_logps(rewards=rewards, seq_logps=seq_logps, ref_seq_logps=ref_seq_logps)
    check_number("beta", beta, least=0.0)
    return (rewards - beta * (seq_logps - ref_seq_logps)).detach()


def rloo_loss(
    seq_logps: Float[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss whose gradient is minus eq. (2), averaged over prompts.

    Args:
        seq_logps: [batch], log-probabilities of the answers, with gradient.
        rewards: [batch], of `kl_shaped_rewards` or plain.
        group_size: k >= 2, answers to one prompt, which stand together.
        normaliser: what the sum is divided by, the same for all micro-batches; None for the batch size.

    Returns:
        The loss and ``baseline_gap``, the mean size of the advantages.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, a group is too small or does not divide the batch, or
            the normaliser is not positive.
    """
    check_logps(seq_logps=seq_logps, rewards=rewards)
    advantages = rloo_advantages(rewards, group_size)
    loss = -(advantages * seq_logps).sum() / _count(seq_logps, normaliser)
    return PolicyLoss(loss, {"baseline_gap": advantages.abs().mean()})


def rloo_clip_loss(
    seq_logps: Float[Tensor, " batch"],
    seq_logps_old: Float[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    clip: float = 0.2,
    normaliser: float | None = None,
) -> PolicyLoss:
    """RLOO for several steps on the same answers: the clipped ratio of whole answers in place of their log-probability.

    Args:
        seq_logps: [batch], log-probabilities of the answers, with gradient.
        seq_logps_old: [batch], under the policy that drew them.
        rewards: [batch].
        group_size: k >= 2.
        clip: epsilon > 0, as in PPO; infinite for none.
        normaliser: what the sum is divided by; None for the batch size.

    Returns:
        The loss and, over answers, ``clip_fraction`` and ``approx_kl``.

    Raises:
        ValueError: as `rloo_loss`, or a clip that is not positive.
    """
    check_logps(seq_logps=seq_logps, seq_logps_old=seq_logps_old, rewards=rewards)
    advantages = rloo_advantages(rewards, group_size)[:, None]
    mask = torch.ones_like(advantages, dtype=torch.bool)
    ratio = masked_ratio(seq_logps[:, None], seq_logps_old[:, None], mask)
    objective = clipped_surrogate(ratio, advantages, clip, clip)
    stats = policy_stats(ratio, advantages, mask, clip, clip)
    return PolicyLoss(-objective.sum() / _count(seq_logps, normaliser), stats)


def reinforce_loss(
    seq_logps: Float[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    baseline: float = 0.0,
    *,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss whose gradient is minus eq. (4).

    Args:
        seq_logps: [batch], log-probabilities of the answers, with gradient.
        rewards: [batch].
        baseline: b, from earlier batches (`RunningBaseline`): one that saw these answers would bias the gradient.
        normaliser: what the sum is divided by; None for the batch size.

    Returns:
        The loss and ``baseline_gap``, the mean size of reward minus baseline.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, or the normaliser is not positive.
    """
    check_logps(seq_logps=seq_logps, rewards=rewards)
    check_number("baseline", baseline)
    advantages = rewards.detach() - baseline
    loss = -(advantages * seq_logps).sum() / _count(seq_logps, normaliser)
    return PolicyLoss(loss, {"baseline_gap": advantages.abs().mean()})


@dataclass(frozen=True)
class RunningBaseline:
    """The mean of all rewards so far, the baseline of eq. (4).

    Attributes:
        mean: of the rewards seen; 0 before the first.
        count: how many they were.
    """

    mean: float = 0.0
    count: int = 0

    def update(self, rewards: Float[Tensor, " batch"]) -> RunningBaseline:
        """The baseline that has seen these rewards, too.

        Args:
            rewards: [batch], not empty.

        Raises:
            ValueError: no rewards, or NaN or infinite ones.
        """
        check_logps(rewards=rewards)
        count = self.count + len(rewards)
        return RunningBaseline(self.mean + float((rewards.double() - self.mean).sum()) / count, count)


def raft_loss(
    seq_logps: Float[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    normaliser: float | None = None,
) -> PolicyLoss:
    """RAFT: minus the log-probability of the best answer of each group.

    Args:
        seq_logps: [batch], log-probabilities of the answers, with gradient.
        rewards: [batch]. Of several best answers the first is taken.
        group_size: k >= 1.
        normaliser: what the sum is divided by; None for the number of groups.

    Returns:
        The loss and ``best_reward``, the mean of the rewards chosen.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, the group size does not divide the batch, or the
            normaliser is not positive.
    """
    check_logps(seq_logps=seq_logps, rewards=rewards)
    check_group_size(group_size, len(rewards))
    best, index = rewards.detach().view(-1, group_size).max(1, keepdim=True)
    chosen = seq_logps.view(-1, group_size).gather(1, index)[:, 0]
    return PolicyLoss(-chosen.sum() / _count(chosen, normaliser), {"best_reward": best.mean()})


def _count(answers: Tensor, normaliser: float | None) -> float:
    if normaliser is None:
        return len(answers)
    check_number("normaliser", normaliser, above=0.0)
    return normaliser
