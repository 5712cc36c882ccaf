"""Heads that share keys and values, as one matrix product: shapes for attention in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["by_head", "by_token", "finite", "grouped"]


def grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[batch, heads, rows, width]`` as ``[batch, kv_heads, heads of a group * rows, width]``."""
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def by_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[batch, rows, heads, dim]`` as ``[batch, kv_heads, heads of a group * rows, dim]``."""
    return grouped(tensor.transpose(1, 2), kv_heads)


def by_token(tensor: Tensor, heads: int) -> Tensor:
    """The way back of `by_head`."""
    batch, kv_heads, rows, dim = tensor.shape
    return tensor.reshape(batch, heads, rows * kv_heads // heads, dim).transpose(1, 2)


def finite(lse: Tensor) -> Tensor:
    """What is subtracted from scores, with an axis for the keys: 0 where a row sees nothing, as exp(-inf - 0) = 0."""
    return lse.masked_fill(torch.isneginf(lse), 0.0)[..., None]
