"""The equations of `selective_scan`, one step at a time; autograd gives the backward."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mlreviews_kernels.arguments import check_offsets

CHUNK = 64  # steps between the states that forward keeps for backward


def border_rows(tokens: int, sequences: int, chunk: int = CHUNK) -> int:
    """How many states forward keeps: enough for one before each chunk of each sequence, however they are cut.

    The state before chunk k of the sequence i, which begins at token s, is in row ``s // chunk + i + k``; some rows
    stay unused. So the number depends on no offset, and rows are found without a sum over the sequences before.
    """
    return tokens // chunk + sequences


class Inputs(NamedTuple):
    """Tokens laid out one after another, and the states before the first ones.

    Attributes:
        u: ``[tokens, channels]``.
        delta: like u, the step sizes.
        A: ``[channels, state]``, the rates.
        B: ``[tokens, groups, state]``.
        C: like B.
        initial: ``[sequences, channels, state]``, in the dtype of the computation.
        D: ``[channels]``, the skip connection.
        z: like u, the gate.
        delta_bias: ``[channels]``.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """All tensors contiguous and of one dtype."""
        return Inputs(*(None if x is None else x.to(dtype).contiguous() for x in self))  # type: ignore[arg-type]


def selective_scan(given: Inputs, offsets: Tensor, delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final states and what stands for those at the borders of chunks, which this backward doesn't use."""
    u, _, _, B, C, initial, _, z, _ = given
    outputs, finals = [torch.empty_like(u[:0])], []
    bounds = check_offsets(offsets, u.shape[0])
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        h = initial[i : i + 1]
        for t in range(start, stop):
            now = slice(t, t + 1)
            gate = None if z is None else z[now]
            token = given._replace(u=u[now], delta=given.delta[now], B=B[now], C=C[now], z=gate, initial=h)
            y, h = step(token, delta_softplus)
            outputs.append(y)
        finals.append(h)
    borders = initial.new_zeros(border_rows(u.shape[0], initial.shape[0]), *initial.shape[1:])
    return torch.cat(outputs), torch.cat(finals), borders


def step(given: Inputs, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """y and the states after one token of each row, with ``batch`` in place of ``tokens`` and of ``sequences``."""
    u, delta, A, B, C, h, D, z, delta_bias = given
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
