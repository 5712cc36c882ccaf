r"""Efficient reward model ensembles: members that share a backbone, and differ in a linear head or in LoRA matrices.

Paper: Improving Reinforcement Learning from Human Feedback with Efficient Reward Model Ensemble (arXiv:2401.16635)

Several reward models are harder to cheat than one, but as dear as several language models. Members can share all but
little: the linear layer at the end, so that the backbone runs once for all of them, or that layer and a low-rank change
of the backbone's weights, which lets members see answers differently. Their rewards are put together by the mean, the
minimum, or the mean less a measure of disagreement.

Equation:
    $$ r_m(x, y) = w_m^\top h(x, y) + b_m \quad \text{(linear-layer ensemble)} \tag{1} $$
    $$ r_m(x, y) = w_m^\top h_m(x, y) + b_m, \quad W_m = W_0 + \frac{\alpha}{r} B_m A_m \text{ in } h_m
       \quad \text{(LoRA-based ensemble)} \tag{2} $$
    $$ r = \operatorname{mean}_m r_m - \lambda \operatorname{var}_m r_m \tag{3} $$
    The other ways of putting rewards together are those of `regularised-rm-ensembles`.

Symbols:
    h: [batch, d_model], the backbone's vector of a prompt and an answer.
    w_m: [d_model], b_m: a number; member m's head.
    A_m: [rank, in_features], uniform at first; B_m: [out_features, rank], 0 at first.
    r_m: [members, batch].
    lambda: weight of the variance, per unit of reward.

Defaults:
    n_members: 5 (ours; the review has 3 to 5).
    rank: 8, alpha: 16 (ours).
    weight: 0.5 (ours).

Deviations:
    1. All LoRA members run at once: the batch is repeated for each along its first axis, and goes through the backbone
       once. Any backbone whose inputs and output have the batch first will do, unless it mixes rows of a batch.
    2. The variance over members has their number in its denominator.
    3. How members are trained is the caller's choice; to train the backbone on a part of the data before members are
       made, as the paper does, takes a linear ensemble on the same backbone.

Reduces to:
    regularised-rm-ensembles: an ensemble of whole models whose weights are W_m; weight = 0 is the mean.
    lora: one member's layer is one with one adapter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.adapter import matching_layers
from mlreviews.common.checks import check_count, check_number
from mlreviews.common.layers import linear
from mlreviews.preference.regularised_rm_ensembles import mean_reward

__all__ = ["LinearRewardEnsemble", "LoRARewardEnsemble", "MultiLoRALinear", "mean_minus_variance_reward"]


def mean_minus_variance_reward(rewards: Float[Tensor, "members ..."], weight: float = 0.5) -> Tensor:
    """The mean, less the weighted variance over members, eq. (3).

    Args:
        rewards: [members, ...].
        weight: lambda, at least 0.

    Returns:
        [...], without the first axis.

    Raises:
        ValueError: the weight is negative, or there are no members.
    """
    check_number("weight", weight, least=0.0)
    mean = mean_reward(rewards)
    return mean - weight * (rewards - mean).square().mean(0)


class LinearRewardEnsemble(nn.Module):
    """Heads on one backbone, eq. (1), all trained jointly.

    Args:
        backbone: from its inputs to [batch, d_model].
        d_model: width of the backbone's vectors.
        n_members: how many heads.
        generator: draws the heads; None is the global one.

    Raises:
        ValueError: a width or a number of heads below 1.
    """

    def __init__(
        self, backbone: nn.Module, d_model: int, n_members: int = 5, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("n_members", n_members)
        self.backbone = backbone
        self.heads = linear(d_model, n_members, generator=generator)

    def forward(self, *inputs: Tensor) -> Float[Tensor, "members batch"]:
        """The members' rewards; the backbone runs once.

        Args:
            *inputs: what the backbone is called with.
        """
        rewards: Tensor = self.heads(self.backbone(*inputs))
        return rewards.mT


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with a low-rank change for each member; the first axis holds one member after another.

    Args:
        base: the layer, which is frozen.
        n_members: how many members.
        rank: of each change.
        alpha: a change is scaled by alpha / rank.
        generator: draws the A; None is the global one.

    Raises:
        TypeError: the layer is no `torch.nn.Linear`.
        ValueError: a number below 1, or alpha is not finite.
    """

    def __init__(
        self,
        base: nn.Module,
        n_members: int = 5,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base: expected torch.nn.Linear, got {type(base).__name__}")
        check_count("n_members", n_members)
        check_count("rank", rank)
        check_number("alpha", alpha)
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        bound = base.in_features**-0.5
        drawn = torch.empty(n_members, rank, base.in_features, dtype=base.weight.dtype)
        drawn = drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(base.weight.device))
        self.lora_B = nn.Parameter(base.weight.new_zeros(n_members, base.out_features, rank))

    def forward(self, x: Float[Tensor, "members_batch *rest in_features"]) -> Float[Tensor, "members_batch *rest out"]:
        """The layer's output, of each row by its member's weight.

        Args:
            x: [members * batch, ..., in_features].

        Raises:
            ValueError: the first axis does not hold the same number of rows for each member.
        """
        members = len(self.lora_A)
        if len(x) % members:
            raise ValueError(f"x: expected a multiple of {members} rows, one part a member, got {len(x)}")
        y: Tensor = self.base(x)
        rows = x.reshape(members, -1, x.shape[-1])
        change = rows @ self.lora_A.mT @ self.lora_B.mT
        return y + self.scaling * change.view(y.shape)


class LoRARewardEnsemble(nn.Module):
    """Members with a low-rank change of a frozen backbone and a head each, eq. (2), run at once.

    Args:
        backbone: from its inputs, batch first, to [batch, d_model]; its layers are replaced in place.
        d_model: width of the backbone's vectors.
        targets: regular expressions of paths of linear layers in the backbone, which get the changes.
        n_members: how many members.
        rank: of each change.
        alpha: a change is scaled by alpha / rank.
        generator: draws the A and the heads; None is the global one.

    Raises:
        TypeError: a target is no `torch.nn.Linear`.
        ValueError: an expression matches nothing, a number below 1, or alpha is not finite.
    """

    def __init__(
        self,
        backbone: nn.Module,
        d_model: int,
        targets: str | Iterable[str],
        n_members: int = 5,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("n_members", n_members)
        layers = matching_layers(backbone, targets)
        made = {
            path: MultiLoRALinear(layer, n_members, rank, alpha, generator=generator) for path, layer in layers.items()
        }
        backbone.requires_grad_(False)
        for path, layer in made.items():
            backbone.set_submodule(path, layer)
        self.backbone = backbone
        self.heads = linear(d_model, n_members, generator=generator)

    def forward(self, *inputs: Tensor) -> Float[Tensor, "members batch"]:
        """The members' rewards; the backbone runs once, on a batch as many times as large as there are members.

        Args:
            *inputs: what the backbone is called with, [batch, ...] each.
        """
        members = self.heads.out_features
        h = self.backbone(*(x.repeat(members, *[1] * (x.ndim - 1)) for x in inputs)).unflatten(0, (members, -1))
        rewards: Tensor = (h @ self.heads.weight[..., None])[..., 0] + self.heads.bias[:, None]
        return rewards
