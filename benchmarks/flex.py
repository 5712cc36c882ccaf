"""Compiled flex_attention as a candidate of the attention benchmarks, forward only: it has no backward on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

__all__ = ["flex"]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@cache
def _causal(q_time: int, k_time: int) -> Any:
    return create_block_mask(lambda b, h, i, j: i + (k_time - q_time) >= j, None, None, q_time, k_time, device="cpu")


def flex(q: Tensor, k: Tensor, v: Tensor, seen: Callable[..., Tensor] | None = None) -> Tensor:
    """Attention of ``[batch, time, heads, dim]``; causal with the last query at the last key, or what `seen` says.

    The block mask is made once for each pair of lengths, as training would; one for `seen` belongs to the call.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q_time, k_time = q.shape[2], k.shape[2]
    mask = _causal(q_time, k_time) if seen is None else create_block_mask(seen, None, None, q_time, k_time, "cpu")
    return _compiled()(q, k, v, block_mask=mask).transpose(1, 2)
