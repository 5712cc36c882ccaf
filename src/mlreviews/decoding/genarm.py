r"""GenARM: a frozen language model steered by rewards of single tokens, which a small language model gives.

Paper: GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment (arXiv:2410.08193).

What KL-regularised reinforcement learning would make of a model is the model times the exponential of a reward. Rewards
of whole answers can't tell which token to take next. Here the reward of an answer is the log-likelihood that a language
model gives it, trained from preferences, so that each token has a reward of its own, and a step costs one pass of that
model more. It may be much smaller than what it steers. Several rewards are weighted at decoding.

Equation:
    $$ r(x, y) = \sum_t \log \pi_r(y_t \mid x, y_{<t}) \tag{1} $$
    $$ L = -\log \sigma\big(\beta_r\, r(x, y^c) - \beta_r\, r(x, y^r)\big) \tag{2} $$
    $$ \pi(y_t \mid x, y_{<t}) \propto \pi_{\mathrm{base}}(y_t \mid \cdot)
       \prod_i \pi_{r_i}(y_t \mid \cdot)^{\alpha_i / \beta} \tag{3} $$

Symbols:
    pi_base: the language model that is steered.
    pi_r: the reward model, over the same vocabulary.
    r: [batch], reward of an answer.
    alpha: weights of the rewards.
    beta: weight of the divergence from the base; small values follow the rewards.

Defaults:
    beta_r: 0.05 (the names of training runs in a fork of the code).
    beta: 1 (ours: the reward model as it was trained).
    weights: 1 for each reward model (ours).

Deviations:
    1. The sampler's temperature and cuts apply to the product of equation (3), not to its factors.

Reduces to:
    dpo: the loss, with a reference that finds all answers equally likely, and beta = beta_r.
    plain decoding: weights 0, or reward models that find all tokens equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_number
from mlreviews.models import CausalLM, LMOutput

__all__ = ["GenARM", "arm_loss", "guided_logits"]


def arm_loss(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"], *, beta_r: float = 0.05
) -> Float[Tensor, " batch"]:
    """Equation (2), of each pair: trains a language model to be a reward.

    Args:
        chosen: [batch], log-likelihood of the preferred answer, summed over its tokens.
        rejected: [batch], of the other one.
        beta_r: weight of the preference, above 0.

    Raises:
        ValueError: beta_r is out of range.
    """
    check_number("beta_r", beta_r, above=0.0)
    return -nn.functional.logsigmoid(beta_r * (chosen - rejected))


def guided_logits(
    base: Float[Tensor, "*batch vocab"],
    rewards: Sequence[Float[Tensor, "*batch vocab"]],
    weights: Sequence[float],
    beta: float = 1.0,
) -> Float[Tensor, "*batch vocab"]:
    """Equation (3), up to a constant for each distribution.

    Args:
        base: [..., vocab], logits of the model that is steered.
        rewards: [..., vocab] each, logits of the reward models.
        weights: one for each; negative ones avoid what the reward prefers.
        beta: weight of the divergence from the base, above 0.

    Raises:
        ValueError: a number out of range, or not as many weights as rewards.
    """
    check_number("beta", beta, above=0.0)
    if len(weights) != len(rewards):
        raise ValueError(f"weights: expected one for each of {len(rewards)} rewards, got {len(weights)}")
    logits = base
    for weight, reward in zip(weights, rewards, strict=True):
        check_number("weights", weight)
        if weight:  # 0 times a token that a reward excludes
            logits = logits + weight / beta * reward.log_softmax(-1)
    return logits


class _Caches(NamedTuple):
    """The caches of all models, the base's first; see `mlreviews.models.Cache`."""

    each: tuple[Any, ...]

    @property
    def length(self) -> int:
        """How many tokens the models have seen."""
        return int(self.each[0].length)

    def crop(self, length: int) -> _Caches:
        """The caches after the first `length` tokens."""
        return _Caches(tuple(cache.crop(length) for cache in self.each))

    def rows(self, index: Tensor) -> _Caches:
        """The given rows of the batch."""
        return _Caches(tuple(cache.rows(index) for cache in self.each))

    def keep(self, start: int, index: Tensor, mask: Tensor | None = None) -> _Caches:
        """The first `start` tokens, and of the others the given ones."""
        return _Caches(tuple(cache.keep(start, index, mask) for cache in self.each))


class GenARM:
    """A causal language model steered by reward models; decoders take it like any other, speculative ones as well.

    Args:
        base: any `mlreviews.models.CausalLM`; hidden states, embedding and head are its own.
        reward_models: language models over the same vocabulary.
        weights: of the rewards; None is 1 for each.
        beta: weight of the divergence from the base, above 0.

    Raises:
        ValueError: no reward model, vocabularies that differ, or a number out of range.
    """

    def __init__(
        self,
        base: CausalLM,
        reward_models: Sequence[CausalLM],
        weights: Sequence[float] | None = None,
        *,
        beta: float = 1.0,
    ) -> None:
        self.base, self.reward_models, self.beta = base, list(reward_models), beta
        self.weights = [1.0] * len(self.reward_models) if weights is None else list(weights)
        if not self.reward_models:
            raise ValueError("reward_models: expected at least one, got none")
        for model in self.reward_models:
            if model.vocab_size != base.vocab_size:
                raise ValueError(
                    f"reward_models: expected the base's {base.vocab_size} ids, got one with {model.vocab_size}"
                )
        one = torch.zeros(1)
        guided_logits(one, [one] * len(self.reward_models), self.weights, beta)  # raises where they are out of range
        self.embed_tokens, self.norm, self.lm_head = base.embed_tokens, base.norm, base.lm_head

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.base.vocab_size

    @property
    def max_length(self) -> int | None:
        """How many tokens all models can see."""
        return min((n for m in (self.base, *self.reward_models) if (n := m.max_length) is not None), default=None)

    @torch.no_grad()
    def __call__(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Any = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over the tokens that follow those of the cache; arguments as of `mlreviews.models.TinyLM.forward`."""
        models = (self.base, *self.reward_models)
        caches = (None,) * len(models) if cache is None else cache.each
        layout = {"mask": mask, "positions": positions, "tree": tree}
        base, *rewards = (
            model(ids, each, hidden_states=hidden_states and i == 0, **layout)
            for i, (model, each) in enumerate(zip(models, caches, strict=True))
        )
        logits = guided_logits(base.logits, [reward.logits for reward in rewards], self.weights, self.beta)
        found: Any = _Caches((base.cache, *(reward.cache for reward in rewards)))
        return LMOutput(logits, found, base.hidden_states)
