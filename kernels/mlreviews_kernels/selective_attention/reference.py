"""The equations of `selective_attention` on whole matrices; autograd gives the backward."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_attention(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor, selector: int, scale: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, their log-sum-exps, the selection after the last query, and the memory term.

    Args:
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``.
        v: ``[batch, k_time, kv_heads, v_dim]``.
        initial: ``[batch, k_time]``, F for the first query, float32 or float64.
        mask: ``[batch, k_time]``, True for the tokens that count.
        selector: the head whose logits select.
        scale: of the logits.
        tau: of the memory term.

    Returns:
        out ``[batch, q_time, heads, v_dim]``, lse ``[batch, heads, q_time]``, selection ``[batch, k_time]`` and memory
        ``[batch, q_time]``.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # the query heads of a kv head as further queries: its keys are not repeated
    rows = heads // kv_heads * queries
    grouped = q.to(initial.dtype).transpose(1, 2).reshape(batch, kv_heads, rows, dim)
    wide_k, wide_v = (x.to(initial.dtype).transpose(1, 2) for x in (k, v))
    logits = (scale * grouped @ wide_k.mT).reshape(batch, heads, queries, keys)
    total = accumulated(logits[:, selector], initial, mask)
    F, selection = total[:, :-1], total[:, -1].clone()

    position = torch.arange(keys, device=q.device)
    visible = (position <= position[keys - queries :, None]) & mask[:, None, :]
    empty = ~visible.any(-1)[:, None, :, None]
    masked = (logits - F[:, None]).masked_fill(~visible[:, None], float("-inf")).masked_fill(empty, 0.0)
    weights = torch.softmax(masked, -1).masked_fill(empty, 0.0)
    out = (weights.reshape(batch, kv_heads, rows, keys) @ wide_v).reshape(batch, heads, queries, v.shape[3])
    lse = torch.logsumexp(masked, -1).masked_fill(empty[..., 0], float("-inf"))
    memory = (1.0 - F.clamp(max=tau) / tau).masked_fill(~visible, 0.0).sum(-1)
    return out.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format), lse, selection, memory


def accumulated(logits: Tensor, initial: Tensor, mask: Tensor) -> Tensor:
    """F of every query and, in the last row, of the one that would follow: ``[batch, q_time + 1, k_time]``.

    Args:
        logits: of the head that selects, ``[batch, q_time, k_time]``.
        initial: F for the first query.
        mask: True for the tokens that count.
    """
    queries, keys = logits.shape[1:]
    position = torch.arange(keys, device=logits.device)
    # no token selects itself, nor the first one of all; one that doesn't count doesn't select
    first = mask & (mask.cumsum(1) == 1)
    may_select = (mask & ~first)[:, None, :] & mask[:, keys - queries :, None]
    may_select = may_select & (position < position[keys - queries :, None])
    S = torch.relu(logits).masked_fill(~may_select, 0.0)
    return torch.cat([initial[:, None], initial[:, None] + S.cumsum(1)], 1)
