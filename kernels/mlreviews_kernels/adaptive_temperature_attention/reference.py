"""The equations of `adaptive_temperature_attention`, with all scores at once; autograd gives the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Attention whose scores are multiplied by a function of their softmax's entropy.

    Args:
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``.
        v: ``[batch, k_time, kv_heads, value_dim]``.
        mask: True where a query may attend: ``[batch, k_time]``, or ``[batch, q_time, k_time]``.
        causal: no key after the query's own position, which is counted from the last key.
        scale: of the scores.
        coefficients: of the polynomial, the highest power first.
        threshold: entropy up to which the temperature stays 1.

    Returns:
        out ``[batch, q_time, heads, value_dim]`` in q's dtype; in the dtype of the computation and of shape ``[batch,
        heads, q_time]``: the entropy, and the log-sum-exps of the scores and of the sharpened scores.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(dtype), k)
    seen = allowed(mask, slice(0, q.shape[1]), k.shape[1], q, causal=causal).expand(scores.shape)
    empty = ~seen.any(-1)
    # an empty row sees everything for a moment, and what is hidden is filled in twice: else gradients are NaN
    hidden = ~(seen | empty[..., None])
    lse = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    log_p = (scores - lse[..., None]).masked_fill(hidden, 0.0)
    p = log_p.exp().masked_fill(hidden, 0.0)
    entropy = -(p * log_p).sum(-1).masked_fill(empty, 0.0)
    beta, _ = inverse_temperature(entropy, coefficients, threshold)
    sharpened = (beta[..., None] * scores).masked_fill(hidden, float("-inf"))
    sharp = sharpened.logsumexp(-1)
    weights = torch.exp(sharpened - sharp[..., None]).masked_fill(empty[..., None], 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    lse, sharp = (x.masked_fill(empty, float("-inf")) for x in (lse, sharp))
    return out.to(q.dtype), entropy, lse, sharp


def inverse_temperature(entropy: Tensor, coefficients: Sequence[float], threshold: float) -> tuple[Tensor, Tensor]:
    """What scores of this entropy are multiplied by, and its derivative with respect to the entropy.

    The polynomial is taken in float64: large powers of the entropy cancel.
    """
    H = entropy.double()
    value, slope = torch.zeros_like(H), torch.zeros_like(H)
    for coefficient in coefficients:
        value, slope = value * H + coefficient, slope * H + value
    sharpens = (entropy > threshold) & (value > 1.0)
    beta, slope = torch.where(sharpens, value, 1.0), torch.where(sharpens, slope, 0.0)
    return beta.to(entropy.dtype), slope.to(entropy.dtype)


def allowed(mask: Tensor | None, rows: slice, keys: int, q: Tensor, *, causal: bool) -> Tensor:
    """Which of all keys some rows of q see: ``[batch or 1, 1, rows, keys]``."""
    row, column = (torch.arange(n, device=q.device) for n in (q.shape[1], keys))
    visible = column <= row[rows, None] + (keys - q.shape[1])
    seen = (visible if causal else torch.ones_like(visible))[None, None]
    if mask is None:
        return seen
    return seen & (mask[:, None, None] if mask.ndim == 2 else mask[:, None, rows])
