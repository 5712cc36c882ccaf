r"""Reward model ensembles: several rewards on one scale, put together so that a policy finds it harder to cheat.

Paper: Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking (arXiv:2312.09244)

A policy that maximises a learnt reward finds answers that only this model likes. Models that differ disagree on such
answers, so their mean, minimum or mean minus spread is harder to cheat. The Bradley-Terry loss leaves each prompt's
level of reward open, and levels of different models can't be compared: a small penalty on the sum of a pair's rewards
sets them all near zero. Members that differ in pretraining help more than those that differ in fine-tuning only.

Equation:
    $$ L = -\log \sigma(r(x, y^+) - r(x, y^-)) + \eta \, (r(x, y^+) + r(x, y^-))^2 \tag{1} $$
    With eta = 0 the loss of r(x, y) + C(x) is that of r(x, y), for any C.
    $$ \operatorname{mean}_m r_m, \quad \operatorname{median}_m r_m, \quad \min_m r_m, \quad
       \operatorname{mean}_m r_m - k \operatorname{std}_m r_m \tag{2} $$

Symbols:
    r(x, y): [batch], reward of an answer to a prompt.
    eta: weight of the penalty, per squared unit of reward.
    r_m: [members, ...], rewards of the members.

Defaults:
    center: 0.01 (the paper's eta).
    k: 1 (ours; the paper subtracts the standard deviation itself).

Deviations:
    1. The standard deviation over members has their number in its denominator, so that a single member has none.
    2. The median of an even number of members is the mean of the two in the middle.

Reduces to:
    the Bradley-Terry loss: center = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_number
from mlreviews.preference.losses import PreferenceLoss, check_logps

__all__ = [
    "RewardEnsemble",
    "bt_reward_loss",
    "mean_minus_std_reward",
    "mean_reward",
    "median_reward",
    "min_reward",
]


def bt_reward_loss(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"], *, center: float = 0.01
) -> PreferenceLoss:
    """The Bradley-Terry loss with centred rewards, eq. (1).

    Args:
        chosen: [batch], rewards of the preferred answers, with gradient.
        rejected: [batch], of the others.
        center: eta, at least 0.

    Returns:
        Losses of pairs, not reduced, and the rewards without gradient.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, or eta is negative.
    """
    check_logps(chosen=chosen, rejected=rejected)
    check_number("center", center, least=0.0)
    losses = -nn.functional.logsigmoid(chosen - rejected) + center * (chosen + rejected).square()
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())


def mean_reward(rewards: Float[Tensor, "members ..."]) -> Tensor:
    """The mean over members.

    Args:
        rewards: [members, ...].

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: there are no members.
    """
    return _members(rewards).mean(0)


def median_reward(rewards: Float[Tensor, "members ..."]) -> Tensor:
    """The median over members.

    Args:
        rewards: [members, ...].

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: there are no members.
    """
    return _members(rewards).quantile(0.5, dim=0)


def min_reward(rewards: Float[Tensor, "members ..."]) -> Tensor:
    """The most pessimistic member's reward.

    Args:
        rewards: [members, ...].

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: there are no members.
    """
    return _members(rewards).amin(0)


def mean_minus_std_reward(rewards: Float[Tensor, "members ..."], k: float = 1.0) -> Tensor:
    """The mean, less k standard deviations over members.

    Args:
        rewards: [members, ...].
        k: at least 0.

    Raises:
        ValueError: k is negative, or there are no members.
    """
    check_number("k", k, least=0.0)
    mean = _members(rewards).mean(0)
    # Members that agree have no spread, and then a root would have no gradient.
    variance = (rewards - mean).square().mean(0)
    spread = torch.where(variance > 0, variance, 1.0).sqrt()
    return mean - k * torch.where(variance > 0, spread, 0.0)


def _members(rewards: Tensor) -> Tensor:
    if rewards.ndim < 1 or len(rewards) == 0:
        raise ValueError(f"rewards: expected [members, ...] with a member at least, got shape {tuple(rewards.shape)}")
    return rewards


class RewardEnsemble(nn.Module):
    """Reward models of one interface, called together.

    Args:
        models: the members; all get the same arguments and return rewards of one shape.
        aggregate: from [members, ...] to [...], for instance `min_reward`.

    Raises:
        ValueError: no members.
    """

    def __init__(self, models: Sequence[nn.Module], aggregate: Callable[[Tensor], Tensor] = mean_reward) -> None:
        super().__init__()
        if len(models) == 0:
            raise ValueError("models: expected a member at least, got none")
        self.models = nn.ModuleList(models)
        self.aggregate = aggregate

    def members(self, *inputs: Tensor) -> Tensor:
        """Rewards of all members, [members, ...].

        Args:
            *inputs: what each member is called with.
        """
        return torch.stack([model(*inputs) for model in self.models])

    def forward(self, *inputs: Tensor) -> Tensor:
        """The aggregated rewards.

        Args:
            *inputs: what each member is called with.
        """
        return self.aggregate(self.members(*inputs))
