r"""RRM: a reward model that also sees answers to other prompts, so that the look of an answer alone earns nothing.

Paper: RRM: Robust Reward Model Training Mitigates Reward Hacking (arXiv:2409.13156)

Comparisons of two answers to one prompt can't tell what is good for this prompt from what preferred answers have in
common anywhere, such as length or a set phrase. Answers of other examples are mixed in: against an answer to the prompt
they lose, and among themselves they tie. A model that goes by an artefact then errs on half of these pairs.

Equation:
    With a permutation sigma that leaves no example in place, every example i gives pairs with its own prompt x_i:
    $$ (y^+_i, y^-_i) \succ (y^+_{\sigma(i)}, y^-_{\sigma(i)}), \text{ each against each}, \quad C = 1 \tag{1} $$
    $$ y^+_{\sigma(i)} \sim y^-_{\sigma(i)}, \quad C = \tfrac{1}{2} \tag{2} $$
    $$ L = -C \log \sigma(r_1 - r_2) - (1 - C) \log \sigma(r_2 - r_1) \tag{3} $$
    Of the new pairs those are kept that a model of the original data gets wrong:
    $$ |\sigma(r_1 - r_2) - C| \ge \delta \tag{4} $$

Symbols:
    r_1, r_2: [pairs], rewards of the first and the second answer.
    C: [pairs], target probability that the first is preferred.
    delta: threshold, a difference of probabilities.

Defaults:
    permutations: 2 (with which the paper's 14 new pairs an example arise: 8 by eq. (1), 6 ties).
    threshold: 0.2 (the review's figure).

Deviations:
    1. Indices are augmented, not texts, so that the same function serves tokens, texts and features.
    2. The permutations are the powers of one random cycle through all examples, which are never at odds.
    3. The pairwise comparisons use a difference of rewards; the paper's pairwise model reads both answers at once.

Reduces to:
    regularised-rm-ensembles: the loss, with C = 1, is the one there with center = 0.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number
from mlreviews.preference.losses import PreferenceLoss, check_logps

__all__ = ["RRMPairs", "rrm_augment", "rrm_filter", "rrm_loss", "rrm_permutations"]


class RRMPairs(NamedTuple):
    """Pairs of answers by index. Of n examples, answer i is the preferred one of example i, answer n + i the other.

    Attributes:
        prompts: [pairs], the example that has the prompt.
        first: [pairs], index of an answer.
        second: [pairs], index of another.
        target: [pairs], C: 1 where the first is preferred, 0.5 for a tie.
    """

    prompts: Int[Tensor, " pairs"]
    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    target: Float[Tensor, " pairs"]


def rrm_permutations(
    examples: int, count: int = 2, *, generator: torch.Generator | None = None
) -> Int[Tensor, "count examples"]:
    """Permutations that leave no example in place and agree nowhere.

    Args:
        examples: how many, more than `count`.
        count: how many permutations.
        generator: draws the cycle; None is the global one.

    Returns:
        [count, examples], the example that stands in for each.

    Raises:
        ValueError: no permutation asked for, or too few examples.
    """
    check_count("count", count)
    check_count("examples", examples, least=count + 1)
    order = torch.randperm(examples, generator=generator)
    places = order.argsort()
    return torch.stack([order.roll(-shift)[places] for shift in range(1, count + 1)])


def rrm_augment(permutations: Int[Tensor, "count examples"]) -> RRMPairs:
    """The new pairs of eqs. (1) and (2), without the original ones.

    Args:
        permutations: [count, examples], for instance of `rrm_permutations`.

    Returns:
        4 count pairs an example with a preference, then count (2 count - 1) ties an example.

    Raises:
        ValueError: a row that is no permutation, leaves an example in place, or agrees with another anywhere.
    """
    if permutations.ndim != 2 or permutations.numel() == 0:
        raise ValueError(f"permutations: expected [count, examples], got shape {tuple(permutations.shape)}")
    examples = permutations.shape[1]
    own = torch.arange(examples, device=permutations.device)
    if not torch.equal(permutations.sort(1).values, own.expand_as(permutations)):
        raise ValueError(f"permutations: expected each of {examples} examples once in every row")
    for row, other in itertools.combinations([own, *permutations], 2):
        if bool((row == other).any()):
            raise ValueError("permutations: expected rows that leave no example in place and agree nowhere")
    strangers = [index for row in permutations for index in (row, row + examples)]
    better = list(itertools.product([own, own + examples], strangers))
    ties = list(itertools.combinations(strangers, 2))
    first, second = (torch.cat(side) for side in zip(*better, *ties, strict=True))
    target = torch.ones(len(first), device=first.device)
    target[len(better) * examples :] = 0.5
    return RRMPairs(own.repeat(len(better) + len(ties)), first, second, target)


def rrm_filter(
    first: Float[Tensor, " pairs"],
    second: Float[Tensor, " pairs"],
    target: Float[Tensor, " pairs"],
    *,
    threshold: float = 0.2,
) -> Bool[Tensor, " pairs"]:
    """Which pairs a model does not know already, eq. (4).

    Args:
        first: [pairs], rewards that a model of the original data gives to the first answers.
        second: [pairs], to the second ones.
        target: [pairs], C.
        threshold: delta, from 0 (all are kept).

    Raises:
        ValueError: shapes differ, values are not finite, a target is no probability, or the threshold is negative.
    """
    _check(first, second, target)
    check_number("threshold", threshold, least=0.0)
    return ((first - second).sigmoid() - target).abs() >= threshold


def rrm_loss(
    first: Float[Tensor, " pairs"], second: Float[Tensor, " pairs"], target: Float[Tensor, " pairs"]
) -> PreferenceLoss:
    """The Bradley-Terry loss with ties, eq. (3).

    Args:
        first: [pairs], rewards of the first answers, with gradient.
        second: [pairs], of the second ones.
        target: [pairs], C, probability that the first is preferred.

    Returns:
        Losses of pairs, not reduced, and the rewards without gradient, those of the first answers as chosen.

    Raises:
        ValueError: shapes differ, values are not finite, or a target is no probability.
    """
    _check(first, second, target)
    margin = first - second
    lost = target * torch.nn.functional.logsigmoid(margin) + (1 - target) * torch.nn.functional.logsigmoid(-margin)
    return PreferenceLoss(-lost, first.detach(), second.detach())


def _check(first: Tensor, second: Tensor, target: Tensor) -> None:
    check_logps(first=first, second=second, target=target)
    if not torch.compiler.is_compiling() and bool(((target < 0) | (target > 1)).any()):
        raise ValueError("target: expected probabilities in [0, 1]")
