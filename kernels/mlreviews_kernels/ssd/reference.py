"""The equation of `ssd`, one step at a time; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets


class Inputs(NamedTuple):
    """Tokens laid out one after another, and the states before the first ones.

    Attributes:
        x: ``[tokens, heads, dim]``.
        log_a: ``[tokens, heads]``.
        B: ``[tokens, groups, state]``.
        C: like B.
        initial: ``[sequences, heads, state, dim]``, in the dtype of the computation.
        D: ``[heads]``.
    """

    x: Tensor
    log_a: Tensor
    B: Tensor
    C: Tensor
    initial: Tensor
    D: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """All tensors contiguous and of one dtype."""
        return Inputs(*(None if tensor is None else tensor.to(dtype).contiguous() for tensor in self))  # type: ignore[arg-type]


def ssd(given: Inputs, offsets: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + B_t x_t^T and y_t = C_t^T h_t + D x_t.

    Args:
        given: the inputs.
        offsets: ``[sequences + 1]``.
        chunk_size: has no meaning here.

    Returns:
        y ``[tokens, heads, dim]`` and the final states.
    """
    x, log_a, B, C, initial, D = given.to(given.initial.dtype)
    repeats = x.shape[1] // B.shape[1]  # a group's B and C belong to neighbouring heads
    B, C = (tensor.repeat_interleave(repeats, 1) for tensor in (B, C))
    outputs, finals = [], []
    for i, (start, stop) in enumerate(pairwise(check_offsets(offsets, x.shape[0]))):
        h = initial[i]
        for t in range(start, stop):
            h = torch.exp(log_a[t])[:, None, None] * h + B[t, :, :, None] * x[t, :, None, :]
            outputs.append((C[t, :, :, None] * h).sum(1))
        finals.append(h)
    y = torch.stack(outputs) if outputs else x.clone()
    if D is not None:
        y = y + D[:, None] * x
    return y.to(given.x.dtype), torch.stack(finals)
