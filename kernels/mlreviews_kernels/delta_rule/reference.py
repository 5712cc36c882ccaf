"""The equation of `delta_rule`, one step at a time; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets


class Inputs(NamedTuple):
    """Tokens laid out one after another, and the states before the first ones.

    Attributes:
        q: ``[tokens, heads, dim_k]``.
        k: like q.
        v: ``[tokens, heads, dim_v]``.
        beta: ``[tokens, heads]``.
        initial: ``[sequences, heads, dim_k, dim_v]``, in the dtype of the computation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    initial: Tensor


def delta_rule(given: Inputs, offsets: Tensor, mini_batch: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """W_t = W_{t-1} + beta_t k_t (v_t - W_base^T k_t)^T and out_t = W_t^T q_t.

    Args:
        given: the inputs.
        offsets: ``[sequences + 1]``.
        mini_batch: W_base is W before the first of so many steps, counted from the start of the sequence.
        chunk_size: has no meaning here.

    Returns:
        out ``[tokens, heads, dim_v]`` and the final states.
    """
    q, k, v, beta, initial = (tensor.to(given.initial.dtype) for tensor in given)
    outputs, finals = [], []
    for i, (start, stop) in enumerate(pairwise(check_offsets(offsets, q.shape[0]))):
        W = initial[i]
        for t in range(start, stop):
            if (t - start) % mini_batch == 0:
                base = W
            error = v[t] - (base * k[t, :, :, None]).sum(1)
            W = W + (beta[t, :, None] * k[t])[:, :, None] * error[:, None, :]
            outputs.append((W * q[t, :, :, None]).sum(1))
        finals.append(W)
    out = torch.stack(outputs) if outputs else v.clone()
    return out.to(given.v.dtype), torch.stack(finals)
