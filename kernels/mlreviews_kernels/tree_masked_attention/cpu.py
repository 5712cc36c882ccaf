"""The CPU path of `tree_masked_attention`: compiled for float32 and below, PyTorch otherwise and for the backward."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.grouped import by_head, by_token, finite, grouped

SOURCE = Path(__file__).with_name("cpu.cpp")
CHUNK = 1024  # keys that the PyTorch form takes at a time
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    """The op's forward; shapes as in `reference`."""
    library = None if q.dtype == torch.float64 or q.device.type != "cpu" else load(SOURCE)
    if library is None:
        return vectorised(q, k, v, tree_mask, k_cache, v_cache, lengths, scale)
    (batch, tree, heads, dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
    caches = [x if x.stride(3) == 1 else x.contiguous() for x in (k_cache, v_cache)]
    inputs = [*(x.float().contiguous() for x in (q, k, v)), tree_mask.contiguous(), lengths.contiguous()]
    out = torch.empty((batch, tree, heads, value_dim), dtype=torch.float32)
    lse = torch.empty((batch, heads, tree), dtype=torch.float32)
    strides = [stride for x in caches for stride in x.stride()[:3]]
    sizes = (*strides, batch, tree, heads, kv_heads, dim, value_dim, KINDS[q.dtype])
    library.tree_masked_attention(
        *map(pointer, inputs),
        *(ctypes.c_void_p(x.data_ptr()) for x in caches),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
        *map(pointer, (out, lse)),
    )
    return out.to(q.dtype), lse


def vectorised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The forward in PyTorch, on any device, a chunk of keys at a time."""
    batch, tree, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = by_head(q.to(dtype), k.shape[2])
    out = queries.new_zeros((batch, k.shape[2], queries.shape[2], v.shape[3]))
    lse = queries.new_full((batch, heads, tree), float("-inf"))
    for keys, values, seen, _ in _chunks(k, v, tree_mask, k_cache, v_cache, lengths, dtype):
        scores = _scores(queries, keys, seen, lse.shape, scale)
        before, lse = lse, torch.logaddexp(lse, scores.logsumexp(-1))
        kept = grouped((before[..., None] - finite(lse)).exp(), k.shape[2])
        weights = grouped((scores - finite(lse)).exp(), k.shape[2])
        out = out * kept + weights @ values.transpose(1, 2)
    return by_token(out, heads).to(q.dtype, memory_format=torch.contiguous_format), lse


def tree_masked_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the caches, in PyTorch on any device."""
    dtype, kv_heads = lse.dtype, k.shape[2]
    queries, dO = (by_head(x.to(dtype), kv_heads) for x in (q, grad_out))
    # a row that sees nothing has no gradient, whatever that of its log-sum-exp is
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    delta = delta - grad_lse.masked_fill(torch.isneginf(lse), 0.0)
    grad_q = torch.zeros_like(queries)
    grad_k, grad_v, *cached = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, k_cache, v_cache))
    for keys, values, seen, place in _chunks(k, v, tree_mask, k_cache, v_cache, lengths, dtype):
        P = (_scores(queries, keys, seen, lse.shape, scale) - finite(lse)).exp()
        dP = (dO @ values.permute(0, 2, 3, 1)).reshape(P.shape)
        dS = grouped(P * (dP - delta[..., None]) * scale, kv_heads)
        grad_q += dS @ keys.transpose(1, 2)
        to_k, to_v = (grad_k, grad_v) if place is None else (x[:, place] for x in cached)
        to_k += (dS.mT @ queries).transpose(1, 2)
        to_v += (grouped(P, kv_heads).mT @ dO).transpose(1, 2)
    grad_q = by_token(grad_q, q.shape[2]).to(q.dtype, memory_format=torch.contiguous_format)
    return grad_q, grad_k, grad_v, *cached


def _chunks(
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor, slice | None]]:
    """Keys and values ``[batch, chunk, kv_heads, ...]``, which of them are seen, and where in the cache they are.

    The last chunk is the tree, which has no place there. A GPU isn't waited for to tell the lengths.
    """
    end = int(lengths.max()) if lengths.device.type == "cpu" else k_cache.shape[1]
    for start in range(0, end, CHUNK):
        place = slice(start, min(start + CHUNK, end))
        used = torch.arange(place.start, place.stop, device=k.device) < lengths[:, None]
        # what is not used may be anything, NaN say, and is multiplied with weights of 0
        keys, values = (x[:, place].to(dtype).masked_fill(~used[:, :, None, None], 0.0) for x in (k_cache, v_cache))
        yield keys, values, used[:, None, None], place
    yield k.to(dtype), v.to(dtype), tree_mask[:, None], None


def _scores(queries: Tensor, keys: Tensor, seen: Tensor, shape: torch.Size, scale: float) -> Tensor:
    """``[batch, heads, tree, chunk]``, -inf where nothing may be seen."""
    scores = (queries @ keys.permute(0, 2, 3, 1)).mul_(scale).reshape(*shape, keys.shape[1])
    return scores.masked_fill_(~seen, float("-inf"))
