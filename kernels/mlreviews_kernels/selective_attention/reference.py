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
    queries, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    wide_k, wide_v = (
        x.to(initial.dtype).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v)
    )  # [batch, heads, k_time, dim]
    logits = scale * q.to(initial.dtype).transpose(1, 2) @ wide_k.mT
    position = torch.arange(keys, device=q.device)
    row = position[keys - queries :, None]
    visible = (position <= row) & mask[:, None, :]

    # no token selects itself, nor the first one of all; one that doesn't count doesn't select
    first = mask & (mask.cumsum(1) == 1)
    may_select = (position < row) & (mask & ~first)[:, None, :] & mask[:, keys - queries :, None]
    S = torch.relu(logits[:, selector]).masked_fill(~may_select, 0.0)
    total = initial[:, None] + S.cumsum(1)
    F = torch.cat([initial[:, None], total], 1)[:, :-1]  # of the queries before
    selection = total[:, -1] if queries else initial.clone()

    empty = ~visible.any(-1)[:, None, :, None]
    masked = (logits - F[:, None]).masked_fill(~visible[:, None], float("-inf")).masked_fill(empty, 0.0)
    weights = torch.softmax(masked, -1).masked_fill(empty, 0.0)
    out = (weights @ wide_v).transpose(1, 2).to(q.dtype)
    lse = torch.logsumexp(masked, -1).masked_fill(empty[..., 0], float("-inf"))
    memory = (1.0 - F.clamp(max=tau) / tau).masked_fill(~visible, 0.0).sum(-1)
    return out, lse, selection, memory
