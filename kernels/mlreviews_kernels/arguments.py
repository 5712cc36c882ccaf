"""Checks that the cores share: an error names the argument, what was expected, and what came."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["check_floating", "check_offsets", "check_same", "check_shape", "check_sizes", "offsets_of"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is float32, float64, bfloat16 or float16."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless the tensor has this shape.

    Args:
        name: of the argument.
        tensor: its value.
        expected: the shape.
        meaning: of the shape's axes, for the message, such as ``"[batch, time, channels]"``.
    """
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {meaning} = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_same(name: str, tensor: Tensor, reference: Tensor, *, dtype: bool = True) -> None:
    """Raises unless the tensor is on the reference's device and, if asked, of its dtype."""
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected a tensor on {reference.device}, got one on {tensor.device}")
    if dtype and tensor.dtype != reference.dtype:
        raise TypeError(f"{name}: expected {reference.dtype}, got {tensor.dtype}")


def check_sizes(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless ``[batch, time, ...]`` has at least one of everything; there may be no time at all."""
    batch, _, *rest = tensor.shape
    if 0 in (batch, *rest):
        raise ValueError(f"{name}: expected at least 1 along every axis but time, got {tuple(tensor.shape)}")


def offsets_of(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Where each sequence begins in the tokens laid out one after another, and where the last one ends.

    Args:
        batch: number of rows; 1 where sequences are packed.
        time: length of a row.
        cu_seqlens: ``[sequences + 1]``, int32 or int64, from 0 to ``time``; None when every row is one sequence.
        device: of the result.

    Returns:
        ``[sequences + 1]``, int64.

    Raises:
        ValueError: packed sequences in more than one row, or ``cu_seqlens`` has another shape or device.
        TypeError: it isn't int32 or int64.
    """
    if cu_seqlens is None:
        return torch.arange(batch + 1, device=device) * time
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected [sequences + 1], got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed sequences lie in one row, batch 1; got batch {batch}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected a tensor on {device}, got one on {cu_seqlens.device}")
    return cu_seqlens.to(torch.int64, copy=True)


def check_offsets(offsets: Tensor, tokens: int) -> list[int]:
    """The offsets as numbers, where they can be looked at without waiting for a GPU.

    Raises:
        ValueError: they don't rise from 0 to the number of tokens.
    """
    found: list[int] = offsets.tolist()
    if found[0] != 0 or found[-1] != tokens or any(a > b for a, b in pairwise(found)):
        raise ValueError(f"cu_seqlens: expected numbers that rise from 0 to the time length {tokens}, got {found[:9]}")
    return found
