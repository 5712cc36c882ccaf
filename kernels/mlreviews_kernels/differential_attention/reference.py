"""The equation of `differential_attention`, with all scores at once; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets
from mlreviews_kernels.attention.reference import allowed, probabilities, repeated


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(softmax(scale q1 k1^T) - lam softmax(scale q2 k2^T)) v over tokens laid out one after another.

    Args:
        q1: ``[q_tokens, heads, dim]``.
        k1: ``[k_tokens, kv_heads, dim]``.
        q2: like q1.
        k2: like k1.
        v: ``[k_tokens, kv_heads, value_dim]``.
        lam: ``[heads]``, in the dtype of the computation.
        mask: True where a query may attend: ``[k_tokens]``, or ``[sequences, q_time, k_time]``.
        q_offsets: ``[sequences + 1]``.
        k_offsets: ``[sequences + 1]``.
        causal: no key after the query's own position, which is counted from the last key.
        scale: of the scores.

    Returns:
        out ``[q_tokens, heads, value_dim]``, and both log-sum-exps ``[2, q_tokens, heads]`` in lam's dtype.
    """
    outs, lses = [], []
    row_spans = pairwise(check_offsets(q_offsets, q1.shape[0]))
    key_spans = pairwise(check_offsets(k_offsets, k1.shape[0]))
    for i, (rows, keys) in enumerate(zip(row_spans, key_spans, strict=True)):
        one = slice(*rows), slice(*keys)
        seen = allowed(i, one, mask, causal=causal, window=0, device=q1.device)
        p1, lse1 = probabilities(q1[one[0]], k1[one[1]], seen, scale)
        p2, lse2 = probabilities(q2[one[0]], k2[one[1]], seen, scale)
        p = p1 - lam[:, None, None] * p2
        outs.append(torch.einsum("hij,jhd->ihd", p, repeated(v[one[1]], q1.shape[1]).to(p.dtype)))
        lses.append(torch.stack([lse1.T, lse2.T]))
    return torch.cat(outs).to(q1.dtype), torch.cat(lses, 1)
