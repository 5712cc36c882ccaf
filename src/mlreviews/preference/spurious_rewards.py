r"""Spurious rewards: what GRPO learns when the reward has nothing to do with the answer.

Paper: Spurious Rewards: Rethinking Training Signals in RLVR (arXiv:2506.10947)

Training on verifiable rewards lifted the mathematics of Qwen2.5-Math even where the reward was a coin or a wrong label,
and of hardly any other model. The advantages of random rewards cancel, but the clip does not: it acts on one side of a
ratio first, which favours what the model does often already. Where that habit is a good one, accuracy rises.

Equation:
    $$ E_A[\min(\rho A, \operatorname{clip}(\rho) A)] = -\frac{a}{2} \lvert \rho - \operatorname{clip}(\rho) \rvert,
       \qquad A = \pm a \text{ with equal probability} \tag{1} $$
    Inside of the clip's range the expected objective is flat; outside it pulls the ratio back. A likely action, with
    $\pi_{old} > 1 / (1 + \epsilon)$, can't leave the range upwards, only downwards.

Symbols:
    answers: [batch], the id of each answer's final result; groups stand together.
    gold: [batch], the id of the right result.
    rho: ratio of new to old probability.
    a: size of the advantage.

Defaults:
    p: 0.5 (the paper's coin).
    clip: 0.2 (the paper's GRPO).

Deviations:
    1. The paper's incorrect labels are majority votes that happen to be wrong; here the most frequent wrong result of
       the group itself is the label.
    2. `train_bandit` takes plain gradient steps on a table, not Adam on a network: its expected update is exact.

Reduces to:
    rloo: one epoch on each group; without the standard deviation, times G / (G - 1), it is RLOO's gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.losses import check_group_size
from mlreviews.preference.ppo import ppo_clip_loss

__all__ = [
    "expected_clipped_surrogate",
    "format_reward",
    "incorrect_reward",
    "majority_reward",
    "random_reward",
    "train_bandit",
    "truth_reward",
]

Reward = Callable[[Tensor], Tensor]


def truth_reward(answers: Int[Tensor, " batch"], gold: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """1 where the result is right, else 0.

    Args:
        answers: [batch], ids of results.
        gold: [batch], ids of the right ones.

    Raises:
        ValueError: shapes differ.
    """
    if answers.shape != gold.shape:
        raise ValueError(f"gold: expected shape {tuple(answers.shape)}, got {tuple(gold.shape)}")
    return (answers == gold).float()


def majority_reward(answers: Int[Tensor, " batch"], group_size: int) -> Float[Tensor, " batch"]:
    """1 where the result is the most frequent one of its group; of several such the smallest id.

    Args:
        answers: [batch], ids of results, groups after one another.
        group_size: answers to one prompt.

    Raises:
        ValueError: the group size does not divide the batch.
    """
    check_group_size(group_size, len(answers))
    groups = answers.view(-1, group_size)
    return (groups == groups.mode(1, keepdim=True).values).float().flatten()


def incorrect_reward(
    answers: Int[Tensor, " batch"], gold: Int[Tensor, " batch"], group_size: int
) -> Float[Tensor, " batch"]:
    """1 where the result is the most frequent wrong one of its group, 0 elsewhere; all 0 where none is wrong.

    Args:
        answers: [batch], ids of results, groups after one another.
        gold: [batch], ids of the right ones.
        group_size: answers to one prompt.

    Raises:
        ValueError: shapes differ, or the group size does not divide the batch.
    """
    wrong = truth_reward(answers, gold) == 0
    check_group_size(group_size, len(answers))
    rewards = torch.zeros(len(answers))
    for start in range(0, len(answers), group_size):
        group = slice(start, start + group_size)
        if wrong[group].any():
            label = answers[group][wrong[group]].mode().values
            rewards[group] = (answers[group] == label).float()
    return rewards


def random_reward(
    answers: Int[Tensor, "*batch"], p: float = 0.5, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch"]:
    """A coin for each answer: 1 with probability p, whatever it says.

    Args:
        answers: of any shape; only that shape matters.
        p: in [0, 1].
        generator: throws the coins; None is the global one.

    Raises:
        ValueError: p is not a probability.
    """
    check_probability("p", p)
    return torch.full(answers.shape, p).bernoulli(generator=generator)


def format_reward(texts: Sequence[str]) -> Float[Tensor, " batch"]:
    r"""1 where the text holds a ``\boxed{...}`` with something in it, right or wrong.

    Args:
        texts: the answers.
    """
    return torch.tensor([1.0 if re.search(r"\\boxed\{\s*[^\s}]", text) else 0.0 for text in texts])


def expected_clipped_surrogate(
    ratio: Float[Tensor, "*shape"], a: float, clip_low: float = 0.2, clip_high: float = 0.2
) -> Float[Tensor, "*shape"]:
    """Mean of the clipped objective over advantages +a and -a with equal probability, eq. (1).

    Args:
        ratio: new over old probability.
        a: at least 0.
        clip_low: how far the range reaches below 1.
        clip_high: how far above.

    Raises:
        ValueError: a or a clip is negative.
    """
    check_number("a", a, least=0.0)
    check_number("clip_low", clip_low, least=0.0)
    check_number("clip_high", clip_high, least=0.0)
    return -a / 2 * (ratio - ratio.clamp(1 - clip_low, 1 + clip_high)).abs()


def train_bandit(
    logits: Float[Tensor, "runs arms"],
    reward: Reward,
    *,
    steps: int,
    group_size: int = 16,
    epochs: int = 1,
    rate: float = 1.0,
    clip: float = 0.2,
    normalise_std: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "steps_plus_1 runs arms"]:
    """GRPO on bandits, many independent runs at once: each step draws a group and learns it for several epochs.

    Args:
        logits: [runs, arms], the first policies.
        reward: from arms drawn, [runs, group_size], to rewards of the same shape.
        steps: groups drawn one after another.
        group_size: arms drawn in a step, at least 2.
        epochs: gradient steps on each group; the ratio is 1 in the first.
        rate: of plain gradient steps.
        clip: epsilon > 0; infinite for none.
        normalise_std: divide advantages by the group's standard deviation.
        generator: draws the arms; None is the global one.

    Returns:
        Probabilities of the arms before the first step and after each, [steps + 1, runs, arms].

    Raises:
        ValueError: a count is below 1, a group below 2, or rate or clip are not positive.
    """
    check_count("steps", steps)
    check_count("epochs", epochs)
    check_number("rate", rate, above=0.0)
    if math.isnan(clip) or clip <= 0:
        raise ValueError(f"clip: expected more than 0, got {clip}")
    policy = logits.detach().clone()
    mask = torch.ones(len(policy), group_size, dtype=torch.bool)
    history = [policy.softmax(-1)]
    for _ in range(steps):
        arms = torch.multinomial(history[-1], group_size, replacement=True, generator=generator)
        rewards = reward(arms).to(policy.dtype)
        advantages = group_advantages(rewards.flatten(), group_size, normalise_std=normalise_std).view_as(rewards)
        old = policy.log_softmax(-1).gather(1, arms)
        for _ in range(epochs):
            policy.requires_grad_()
            logp = policy.log_softmax(-1).gather(1, arms)
            loss = ppo_clip_loss(logp, old, advantages, mask, clip=clip, normaliser=group_size).loss
            (gradient,) = torch.autograd.grad(loss, policy)
            policy = policy.detach() - rate * gradient
        history.append(policy.softmax(-1))
    return torch.stack(history)
