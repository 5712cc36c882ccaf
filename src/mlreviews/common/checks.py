"""Checks of arguments at public entries: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "check_count",
    "check_finite",
    "check_matrix",
    "check_number",
    "check_probability",
    "check_same_length",
    "check_sequence",
]


def check_matrix(name: str, tensor: Tensor, *, dims: tuple[int, ...] = (2,)) -> None:
    """Raises unless the tensor is real floating point, has one of the numbers of dimensions, rows, and finite values.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        dims: the numbers of dimensions that are allowed.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong number of dimensions, an empty axis, NaN or infinity.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {came}")
    if tensor.ndim not in dims:
        wanted = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry along every axis, got shape {tuple(tensor.shape)}")
    check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError when the tensor holds NaN or infinity, and says how many entries do."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in {bad} of {tensor.numel()} entries")


def check_same_length(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors have the same length along the first axis."""
    lengths = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{', '.join(lengths)}: expected the same number of rows, but {found}")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Raises unless the value is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_number(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises ValueError unless the value is finite, at least ``least`` and more than ``above``."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value <= above:
        raise ValueError(f"{name}: expected more than {above}, got {value}")


def check_probability(name: str, value: float) -> None:
    """Raises ValueError unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def check_sequence(x: Tensor, d_model: int, mask: Tensor | None = None, name: str = "x") -> None:
    """Raises ValueError unless x is [batch, time, d_model] with no empty axis, and the mask [batch, time] of bool."""
    if x.ndim != 3 or x.shape[2] != d_model or x.numel() == 0:
        raise ValueError(f"{name}: expected [batch, time, {d_model}] with no empty axis, got shape {tuple(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        wanted = f"{list(x.shape[:2])}, as {name} has, of bool"
        raise ValueError(f"mask: expected {wanted}, got shape {tuple(mask.shape)} of {mask.dtype}")
