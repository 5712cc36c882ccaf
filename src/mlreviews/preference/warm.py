r"""WARM: one reward model whose weights are the mean of several that were fine-tuned from one start.

Paper: WARM: On the Benefits of Weight Averaged Reward Models (arXiv:2401.12187)

An ensemble of reward models is harder to cheat than one, but costs as much as all its members. Models that were
fine-tuned from the same pretrained weights stay linearly connected, so that their weights can be averaged: the result
costs as much as one model and predicts about as their mean does. Features that only one run has learnt, such as wrong
labels learnt by heart, are averaged away.

Equation:
    $$ \theta_{WARM} = \frac{1}{M} \sum_{m=1}^M \theta_m \tag{1} $$
    Linear mode connectivity of two members, for all $\lambda$ in [0, 1]:
    $$ \operatorname{acc}((1 - \lambda) \theta_1 + \lambda \theta_2) \ge (1 - \lambda) \operatorname{acc}(\theta_1) +
       \lambda \operatorname{acc}(\theta_2) \tag{2} $$

Symbols:
    theta_m: weights of a member, all of one architecture and from one pretrained start.
    acc: accuracy on comparisons, a share.
    lambda: place on the line between two members.

Defaults:
    weights: equal (the paper's average).
    points: 11 (ours).

Deviations:
    1. Buffers of whole numbers, such as the counters of batch normalisation, can't be averaged: the largest is taken.

Reduces to:
    regularised-rm-ensembles: models that are linear in their weights; the mean of rewards is the reward of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlreviews.common.checks import check_count

__all__ = ["ConnectivityCurve", "average_weights", "lmc_curve"]

Weights = Mapping[str, Tensor]


def average_weights(members: Sequence[Weights], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of state dicts, eq. (1), summed in float32 at least.

    Args:
        members: state dicts of one architecture.
        weights: of the members, not negative; they are divided by their sum. None: equal ones.

    Returns:
        A new state dict with the members' dtypes, which shares no memory with them.

    Raises:
        ValueError: no members, tensors of other names or shapes, or weights that are negative, not finite, all zero, or
            not one a member.
    """
    if len(members) == 0:
        raise ValueError("members: expected a state dict at least, got none")
    weights = [1.0] * len(members) if weights is None else list(weights)
    if len(weights) != len(members):
        raise ValueError(f"weights: expected one for each of {len(members)} members, got {len(weights)}")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {weights}")
    shapes = [{name: tensor.shape for name, tensor in member.items()} for member in members]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("members: expected tensors of the same names and shapes in all of them")
    return {
        name: _average([member[name].detach() for member in members], [w / sum(weights) for w in weights])
        for name in members[0]
    }


def _average(tensors: list[Tensor], shares: list[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        return torch.stack(tensors).amax(0)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.to(wide)
    return total.to(tensors[0].dtype)


class ConnectivityCurve(NamedTuple):
    """How good the models on the line between two are.

    Attributes:
        places: lambda, from 0 to 1.
        scores: of the models with interpolated weights.
        chords: the interpolated scores of the two ends.
        gap: the smallest score minus chord; eq. (2) holds where it is at least 0.
    """

    places: list[float]
    scores: list[float]
    chords: list[float]
    gap: float


def lmc_curve(
    first: Weights, second: Weights, evaluate: Callable[[dict[str, Tensor]], float], *, points: int = 11
) -> ConnectivityCurve:
    """Scores on the line between two members, eq. (2).

    Args:
        first: state dict at lambda = 0.
        second: state dict at lambda = 1.
        evaluate: from a state dict to a score, the larger the better.
        points: how many models are evaluated, at least 2, both ends included.

    Raises:
        ValueError: too few points, or state dicts of different architectures.
    """
    check_count("points", points, least=2)
    places = [i / (points - 1) for i in range(points)]
    scores = [float(evaluate(average_weights([first, second], [1 - place, place]))) for place in places]
    chords = [(1 - place) * scores[0] + place * scores[-1] for place in places]
    gap = min(score - chord for score, chord in zip(scores, chords, strict=True))
    return ConnectivityCurve(places, scores, chords, gap)
