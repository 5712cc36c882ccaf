"""Sequences laid out one after another, as batches: for backends that work on ``[batch, time, ...]``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["each"]


def each(
    function: Callable[..., tuple[Tensor, ...]],
    tokens: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    bounds: list[int],
    *,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Applies a function of ``[batch, time, ...]`` to sequences of ``[tokens, ...]``.

    It gets the tokens, then the states, and returns ``outputs`` tensors with a time axis and after them tensors with
    one row a sequence. Sequences of one length are one batch; others go one by one.

    Args:
        function: to apply.
        tokens: ``[tokens, ...]``.
        states: ``[sequences, ...]``.
        bounds: where each sequence begins, and where the last one ends.
        outputs: how many of the results have a time axis.
    """
    lengths = {stop - start for start, stop in pairwise(bounds)}
    if len(lengths) == 1:
        shape = (len(bounds) - 1, lengths.pop())
        found = function(*(x.reshape(*shape, *x.shape[1:]) for x in tokens), *states)
        return *(x.flatten(0, 1) for x in found[:outputs]), *found[outputs:]
    parts = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        one = tuple(x[start:stop] for x in tokens), tuple(x[i : i + 1] for x in states)
        parts.append(each(function, *one, [0, stop - start], outputs=outputs))
    return tuple(torch.cat(each_part) for each_part in zip(*parts, strict=True))
