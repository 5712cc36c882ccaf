"""The equations of `selective_scan`, one step at a time; autograd gives the backward."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from mlreviews_kernels.arguments import check_offsets

CHUNK = 64  # steps between the states that forward keeps for backward


def border_rows(tokens: int, sequences: int) -> int:
    """How many states forward keeps: enough for one before each chunk of each sequence, however they are cut.

    The state before chunk k of the sequence i, which begins at token s, is in row ``s // CHUNK + i + k``; some rows
    stay unused. So the number depends on no offset, and rows are found without a sum over the sequences before.
    """
    return tokens // CHUNK + sequences


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor,
    offsets: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over tokens ``[tokens, channels]``, B and C ``[tokens, groups, state]``, states ``[sequences, channels, state]``.

    The third result stands for the states at the borders of chunks, which this backward doesn't use.
    """
    outputs, finals = [torch.empty_like(u[:0])], []
    bounds = check_offsets(offsets, u.shape[0])
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        h = initial[i]
        for t in range(start, stop):
            gate = None if z is None else z[t : t + 1]
            now = slice(t, t + 1)
            y, h = step(u[now], delta[now], A, B[now], C[now], D, gate, delta_bias, h[None], delta_softplus)
            outputs.append(y)
            h = h[0]
        finals.append(h)
    borders = initial.new_zeros(border_rows(u.shape[0], initial.shape[0]), *initial.shape[1:])
    return torch.cat(outputs), torch.stack(finals), borders


def step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One token of each row: ``u [batch, channels]``, ``B [batch, groups, state]``, ``h [batch, channels, state]``."""
    dtype, groups = h.dtype, B.shape[1]
    x, step_size, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    if groups > 1:  # a single one is broadcast
        B, C = (matrix.repeat_interleave(u.shape[1] // groups, dim=1) for matrix in (B, C))
    if delta_bias is not None:
        step_size = step_size + delta_bias.to(dtype)
    if delta_softplus:  # functional.softplus would be linear above a threshold
        step_size = torch.logaddexp(step_size, torch.zeros_like(step_size))
    h = torch.exp(step_size[..., None] * A.to(dtype)) * h + (step_size * x)[..., None] * B
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * functional.silu(z.to(dtype))
    return y.to(u.dtype), h
