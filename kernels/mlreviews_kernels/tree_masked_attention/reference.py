"""The equation of `tree_masked_attention`, over cache and tree laid side by side; autograd gives the backward."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a tree's tokens to the cache and to those tokens of the tree that the mask lets them see.

    Args:
        q: ``[batch, tree, heads, dim]``.
        k: ``[batch, tree, kv_heads, dim]``.
        v: ``[batch, tree, kv_heads, value_dim]``.
        tree_mask: ``[batch, tree, tree]``, True where a token may attend to another one.
        k_cache: ``[batch, context, kv_heads, dim]``.
        v_cache: ``[batch, context, kv_heads, value_dim]``.
        lengths: ``[batch]``, int64: how many tokens of the cache count.
        scale: of the scores.

    Returns:
        out ``[batch, tree, heads, value_dim]`` in q's dtype and lse ``[batch, heads, tree]`` in the dtype of the
        computation.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    used = torch.arange(k_cache.shape[1], device=q.device) < lengths[:, None]
    # whatever lies past the lengths, NaN say, must not be multiplied with a weight of 0
    cached = [x.masked_fill(~used[:, :, None, None], 0.0) for x in (k_cache, v_cache)]
    keys, values = (
        torch.cat([old, new], 1).to(dtype).repeat_interleave(q.shape[2] // k.shape[2], 2)
        for old, new in zip(cached, (k, v), strict=True)
    )
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(dtype), keys)
    seen = torch.cat([used[:, None].expand(-1, q.shape[1], -1), tree_mask], 2)[:, None]
    empty = ~seen.any(-1, keepdim=True)
    # an empty row sees everything for a moment: the gradient of a log-sum-exp over nothing is NaN
    scores = scores.masked_fill(~(seen | empty), float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(empty, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    return out.to(q.dtype), lse.masked_fill(empty, float("-inf")).squeeze(-1)
