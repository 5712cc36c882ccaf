"""The equations of `linear_scan` and `log_linear_scan`, one step at a time; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets


class Inputs(NamedTuple):
    """Factors and inputs ``[tokens, channels]``, first states ``[sequences, channels]``; logarithms in log space."""

    a: Tensor
    b: Tensor
    initial: Tensor


def linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, all tokens' and each sequence's last one."""
    a, b, initial = given
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    bounds = check_offsets(offsets, a.shape[0])
    for i, (start, stop) in enumerate(pairwise(bounds)):
        h = initial[i]
        states = []
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            h = a[t].to(h.dtype) * h + b[t].to(h.dtype)
            states.append(h)
        outputs += reversed(states) if reverse else states
        finals.append(h)
    return _stack(outputs, b).to(b.dtype), torch.stack(finals)


def log_linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """log h_t = log(a_t h_{t-1} + b_t) from the logarithms of all that is positive.

    The outputs have the states' dtype: the backward takes differences of them, which half precision would spoil.
    """
    log_a, log_b, initial = given
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    bounds = check_offsets(offsets, log_a.shape[0])
    for i, (start, stop) in enumerate(pairwise(bounds)):
        log_h = initial[i]
        states = []
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            log_h = _logaddexp(log_a[t].to(log_h.dtype) + log_h, log_b[t].to(log_h.dtype))
            states.append(log_h)
        outputs += reversed(states) if reverse else states
        finals.append(log_h)
    return _stack(outputs, initial), torch.stack(finals)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """As `torch.logaddexp`, with gradient 0 where both are -inf (PyTorch's is NaN there)."""
    nothing = torch.isneginf(x) & torch.isneginf(y)
    found = torch.logaddexp(x.masked_fill(nothing, 0.0), y.masked_fill(nothing, 0.0))
    return found.masked_fill(nothing, float("-inf"))


def _stack(states: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(states) if states else like.new_empty(0, like.shape[1])
