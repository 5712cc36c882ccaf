"""The CPU path of `adaptive_temperature_attention`: compiled for float32 and below, PyTorch otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.adaptive_temperature_attention.reference import allowed, inverse_temperature
from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.grouped import by_head, by_token, finite, grouped

SOURCE = Path(__file__).with_name("cpu.cpp")
ROWS = 128  # queries that the PyTorch form takes at a time
FEW = 4  # queries that aren't worth the compiled form's copies of all keys and values


def adaptive_temperature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    library = _library(q)
    if library is None:
        return vectorised(q, k, v, mask, causal, scale, coefficients, threshold)
    inputs = _Inputs(q, k, v, mask, causal, scale, coefficients, threshold)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float32)
    rows = [torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) for _ in range(3)]
    library.sharpened_attention(*inputs.arguments(), *map(pointer, (out, *rows)))
    return out.to(q.dtype), rows[0], rows[1], rows[2]


def adaptive_temperature_attention_backward(
    grad_out: Tensor,
    grad_entropy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    entropy: Tensor,
    lse: Tensor,
    sharp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    library, options = _library(q), (mask, causal, scale, coefficients, threshold)
    if library is None:
        return vectorised_backward(grad_out, grad_entropy, q, k, v, entropy, lse, sharp, *options)
    inputs = _Inputs(q, k, v, *options)
    count = library.sharpened_attention_parts
    count.restype = ctypes.c_int64
    parts = count(*inputs.arguments())
    given = [x.float().contiguous() for x in (grad_out, grad_entropy, entropy, lse, sharp)]
    grad_q = torch.empty(q.shape, dtype=torch.float32)
    grad_k, grad_v = (torch.empty((parts, *x.shape), dtype=torch.float32) for x in (k, v))
    arrays = map(pointer, (*given, grad_q, grad_k, grad_v))
    library.sharpened_attention_backward(*inputs.arguments(), *arrays, ctypes.c_int64(parts))
    return grad_q.to(q.dtype), grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)


def _library(q: Tensor) -> ctypes.CDLL | None:
    return None if q.dtype == torch.float64 or q.device.type != "cpu" or q.shape[1] <= FEW else load(SOURCE)


class _Inputs:
    """The arguments that all compiled functions begin with; keeps the memory that they point to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        coefficients: Sequence[float],
        threshold: float,
    ) -> None:
        masks = (mask, None) if mask is not None and mask.ndim == 2 else (None, mask)
        (batch, queries, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
        self.tensors = (
            *(x.float().contiguous() for x in (q, k, v)),
            *(None if x is None else x.contiguous() for x in masks),
            *(torch.arange(batch + 1) * time for time in (queries, keys)),
        )
        self.coefficients = torch.tensor(coefficients, dtype=torch.float64)
        sizes = (batch, heads, kv_heads, dim, value_dim, int(causal))
        self.numbers = (*map(ctypes.c_int64, sizes), ctypes.c_float(scale), ctypes.c_int(torch.get_num_threads()))
        self.threshold = ctypes.c_float(threshold)

    def arguments(self) -> tuple[object, ...]:
        """For a function called through ctypes."""
        polynomial = (pointer(self.coefficients), ctypes.c_int64(len(self.coefficients)), self.threshold)
        return *map(pointer, self.tensors), *self.numbers, *polynomial


def vectorised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward in PyTorch, on any device, a block of queries at a time."""
    batch, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros((batch, queries, heads, v.shape[3]))
    entropy = q.new_zeros((batch, heads, queries), dtype=dtype)
    lse, sharp = (torch.full_like(entropy, float("-inf")) for _ in range(2))
    for rows, keys in _blocks(queries, k.shape[1], causal):
        scores = _scores(q, k, rows, keys, mask, causal, scale, dtype)
        lse[..., rows] = scores.logsumexp(-1)
        log_p = scores - finite(lse[..., rows])
        p = log_p.exp()
        entropy[..., rows] = -p.mul_(log_p.clamp_(min=torch.finfo(dtype).min)).sum(-1)  # 0 log 0 = 0
        beta, _ = inverse_temperature(entropy[..., rows], coefficients, threshold)
        scores *= beta[..., None]
        sharp[..., rows] = scores.logsumexp(-1)
        weights = scores.sub_(finite(sharp[..., rows])).exp_()
        found = grouped(weights, v.shape[2]) @ v[:, keys].to(dtype).transpose(1, 2)
        out[:, rows] = by_token(found, heads).to(out.dtype)
    return out, entropy, lse, sharp


def vectorised_backward(
    grad_out: Tensor,
    grad_entropy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entropy: Tensor,
    lse: Tensor,
    sharp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward in PyTorch, on any device; the formulas are in ``README.md``."""
    dtype, (heads, kv_heads) = entropy.dtype, (q.shape[2], k.shape[2])
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for rows, keys in _blocks(q.shape[1], k.shape[1], causal):
        beta, slope = (x[..., None] for x in inverse_temperature(entropy[..., rows], coefficients, threshold))
        scores = _scores(q, k, rows, keys, mask, causal, scale, dtype)
        dO = by_head(grad_out[:, rows].to(dtype), kv_heads)
        dP = (dO @ v[:, keys].to(dtype).permute(0, 2, 3, 1)).reshape(scores.shape)
        log_r, log_p = beta * scores - finite(sharp[..., rows]), scores - finite(lse[..., rows])
        r, p = log_r.exp(), log_p.exp()
        for logs in (log_r, log_p):
            logs.clamp_(min=torch.finfo(dtype).min / 4)  # times a probability of 0
        dT = r * (dP - (r * dP).sum(-1, keepdim=True))
        dH = grad_entropy[..., rows, None] + slope * (dT * log_r).sum(-1, keepdim=True) / beta
        dS = (beta * dT - dH * p * (log_p + entropy[..., rows, None])) * scale
        by_kv = grouped(dS, kv_heads)
        grad_q[:, rows] = by_token(by_kv @ k[:, keys].to(dtype).transpose(1, 2), heads)
        grad_k[:, keys] += (by_kv.mT @ by_head(q[:, rows].to(dtype), kv_heads)).transpose(1, 2)
        grad_v[:, keys] += (grouped(r, kv_heads).mT @ dO).transpose(1, 2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that any of them may see."""
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        end = stop + keys - queries if causal else keys
        if end > 0:
            yield slice(start, stop), slice(0, end)


def _scores(
    q: Tensor, k: Tensor, rows: slice, keys: slice, mask: Tensor | None, causal: bool, scale: float, dtype: torch.dtype
) -> Tensor:
    """``[batch, heads, rows, keys]``, -inf where nothing may be seen."""
    batch, _, heads, _ = q.shape
    by_kv = by_head(q[:, rows].to(dtype), k.shape[2]) @ k[:, keys].to(dtype).permute(0, 2, 3, 1)
    scores = by_kv.mul_(scale).reshape(batch, heads, rows.stop - rows.start, -1)
    if not causal and mask is None:
        return scores
    return scores.masked_fill_(~allowed(mask, rows, k.shape[1], q, causal=causal)[..., keys], float("-inf"))
