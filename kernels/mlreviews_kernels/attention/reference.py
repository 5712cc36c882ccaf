"""The equation of `attention`, with all scores at once; autograd gives the backward."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log-sum-exp of the scores, over tokens laid out one after another.

    Args:
        q: ``[q_tokens, heads, dim]``.
        k: ``[k_tokens, kv_heads, dim]``.
        v: ``[k_tokens, kv_heads, value_dim]``.
        mask: True where a query may attend: ``[k_tokens]``, or ``[sequences, q_time, k_time]``.
        q_offsets: ``[sequences + 1]``.
        k_offsets: ``[sequences + 1]``.
        causal: no key after the query's own position, which is counted from the last key.
        scale: of the scores.
        window: how many positions back (and forth, if not causal) a query sees, its own included; 0: all.

    Returns:
        out ``[q_tokens, heads, value_dim]`` and lse ``[q_tokens, heads]`` in the dtype of the computation.
    """
    outs, lses = [], []
    row_spans = pairwise(check_offsets(q_offsets, q.shape[0]))
    key_spans = pairwise(check_offsets(k_offsets, k.shape[0]))
    for i, (rows, keys) in enumerate(zip(row_spans, key_spans, strict=True)):
        one = slice(*rows), slice(*keys)
        seen = allowed(i, one, mask, causal=causal, window=window, device=q.device)
        p, lse = probabilities(q[one[0]], k[one[1]], seen, scale)
        outs.append(torch.einsum("hij,jhd->ihd", p, repeated(v[one[1]], q.shape[1]).to(p.dtype)))
        lses.append(lse.T)
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


def probabilities(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax ``[heads, q_time, k_time]`` of one sequence, 0 in rows that see nothing, and its log-sum-exp."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scale * torch.einsum("ihd,jhd->hij", q.to(dtype), repeated(k, q.shape[1]).to(dtype))
    empty = ~seen.any(-1)
    # an empty row sees everything for a moment: the gradient of a log-sum-exp over nothing is NaN
    scores = scores.masked_fill(~(seen | empty[:, None]), float("-inf"))
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse[..., None]).masked_fill(empty[:, None], 0.0)
    return p, lse.masked_fill(empty, float("-inf"))


def repeated(kv: Tensor, heads: int) -> Tensor:
    """Query head h uses head h // (heads / kv_heads) of the keys and values."""
    return kv.repeat_interleave(heads // kv.shape[1], 1)


def allowed(
    sequence: int,
    spans: tuple[slice, slice],
    mask: Tensor | None,
    *,
    causal: bool,
    window: int,
    device: torch.device,
) -> Tensor:
    """``[q_time, k_time]``, True where a query of a sequence may attend to a key."""
    rows, keys = (span.stop - span.start for span in spans)
    gap = torch.arange(rows, device=device)[:, None] + (keys - rows) - torch.arange(keys, device=device)
    seen = torch.ones_like(gap, dtype=torch.bool)
    if causal:
        seen &= gap >= 0
    if window:
        seen &= gap.abs() < window
    if mask is not None:
        seen &= mask[spans[1]] if mask.ndim == 1 else mask[sequence]
    return seen
