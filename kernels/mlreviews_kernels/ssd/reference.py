"""The equation of `ssd`, one step at a time; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets


def ssd(
    x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, offsets: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + B_t x_t^T and y_t = C_t^T h_t + D x_t over tokens laid out one after another.

    Args:
        x: ``[tokens, heads, dim]``.
        log_a: ``[tokens, heads]``.
        B: ``[tokens, groups, state]``.
        C: like B.
        D: ``[heads]``, or ``[0]``: none.
        initial: ``[sequences, heads, state, dim]``, in the dtype of the computation.
        offsets: ``[sequences + 1]``.
        chunk_size: has no meaning here.

    Returns:
        y ``[tokens, heads, dim]`` and the final states.
    """
    wide, log_a, B, C, D = (tensor.to(initial.dtype) for tensor in (x, log_a, B, C, D))
    repeats = x.shape[1] // B.shape[1]  # a group's B and C belong to neighbouring heads
    B, C = (tensor.repeat_interleave(repeats, 1) for tensor in (B, C))
    outputs, finals = [], []
    for i, (start, stop) in enumerate(pairwise(check_offsets(offsets, x.shape[0]))):
        h = initial[i]
        for t in range(start, stop):
            h = torch.exp(log_a[t])[:, None, None] * h + B[t, :, :, None] * wide[t, :, None, :]
            outputs.append((C[t, :, :, None] * h).sum(1))
        finals.append(h)
    y = torch.stack(outputs) if outputs else wide.clone()
    if D.shape[0]:
        y = y + D[:, None] * wide
    return y.to(x.dtype), torch.stack(finals)
