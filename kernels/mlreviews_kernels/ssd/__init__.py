r"""State-space duality (Mamba-2): $h_t = e^{\log a_t} h_{t-1} + B_t x_t^\top$, $y_t = C_t^\top h_t + D x_t$.

One decay per head and step makes the scan a masked matrix product, done in chunks. See ``README.md``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape, check_sizes, offsets_of
from mlreviews_kernels.backends import Core
from mlreviews_kernels.ops import register_scan
from mlreviews_kernels.ssd.reference import Inputs

__all__ = ["ssd", "ssd_step"]

CORE = Core.read(Path(__file__).parent)


def ssd(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs ``h_t = exp(log_a_t) h_{t-1} + B_t x_t^T`` and ``y_t = C_t^T h_t + D x_t`` for every head.

    Args:
        x: ``[batch, time, heads, dim]``.
        log_a: ``[batch, time, heads]``, the logarithm of the decay, in x's dtype or float32; ``-inf`` empties the
            state.
        B: ``[batch, time, groups, state]``, in x's dtype; group g belongs to the heads from ``g * heads / groups`` on.
        C: like B.
        D: ``[heads]``, in x's dtype or float32; no skip if None.
        chunk_size: how many steps become one matrix product; changes cost and rounding only.
        initial_state: ``[batch, heads, state, dim]``; zeros if None. Packed: ``[sequences, ...]``.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where packed sequences begin and end in the one row (batch 1).
            Its numbers are checked on the CPU only: a GPU would have to be waited for.

    Returns:
        y of x's shape and dtype, and the final state ``[batch or sequences, heads, state, dim]``, float32 for
        half-precision inputs. Gradients flow through both.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they don't go together.
        BackendError: the backend asked for by name can't be used; Triton not for float64.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected [batch, time, heads, dim], got {tuple(x.shape)}")
    batch, time, heads, dim = x.shape
    groups, state = _check(x, log_a, B, C, D, axes="batch, time")
    check_sizes("x", x)
    check_sizes("B", B)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    offsets = offsets_of(batch, time, cu_seqlens, x.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = x.new_zeros((sequences, heads, state, dim), dtype=dtype)
    check_shape("initial_state", initial_state, (sequences, heads, state, dim), "[sequences, heads, state, dim]")
    check_floating("initial_state", initial_state)
    check_same("initial_state", initial_state, x, dtype=False)
    y, final, _ = torch.ops.mlreviews.ssd(
        x.reshape(batch * time, heads, dim),
        log_a.reshape(batch * time, heads),
        B.reshape(batch * time, groups, state),
        C.reshape(batch * time, groups, state),
        initial_state.to(dtype),
        D,
        offsets,
        chunk_size,
    )
    return y.reshape(x.shape), final


def ssd_step(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step, for decoding.

    Args:
        x: ``[batch, heads, dim]``.
        log_a: ``[batch, heads]``.
        B: ``[batch, groups, state]``.
        C: like B.
        D: ``[heads]``; no skip if None.
        state: ``[batch, heads, state, dim]``, of the last step, or the final state of `ssd`.

    Returns:
        y ``[batch, heads, dim]`` in x's dtype and the new state in the old one's.
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected [batch, heads, dim], got {tuple(x.shape)}")
    groups, size = _check(x, log_a, B, C, D, axes="batch")
    batch, heads, dim = x.shape
    check_shape("state", state, (batch, heads, size, dim), "[batch, heads, state, dim]")
    check_floating("state", state)
    check_same("state", state, x, dtype=False)
    wide, B, C = (tensor.to(state.dtype) for tensor in (x, B, C))
    grouped = (batch, groups, heads // groups)
    old = state.reshape(*grouped, size, dim) * torch.exp(log_a.to(state.dtype)).reshape(*grouped, 1, 1)
    new = torch.addcmul(old, B[:, :, None, :, None], wide.reshape(*grouped, 1, dim))
    y = torch.matmul(C[:, :, None, None, :], new).reshape(x.shape)
    if D is not None:
        y = torch.addcmul(y, D.to(state.dtype)[:, None], wide)
    return y.to(x.dtype), new.reshape(state.shape)


def _check(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor | None, axes: str) -> tuple[int, int]:
    """Checks what `ssd` and `ssd_step` share; returns the sizes of groups and state."""
    *leading, heads, _ = x.shape
    check_floating("x", x)
    check_shape("log_a", log_a, (*leading, heads), f"[{axes}, heads]")
    if B.ndim != x.ndim or list(B.shape[:-2]) != leading:
        raise ValueError(f"B: expected [{axes}, groups, state] with [{axes}] = {leading}, got {tuple(B.shape)}")
    groups, state = B.shape[-2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides the {heads} heads, got {tuple(B.shape)}")
    check_shape("C", C, tuple(B.shape), "B's shape")
    check_same("B", B, x)
    check_same("C", C, x)
    _check_parameter("log_a", log_a, x)
    if D is not None:
        check_shape("D", D, (heads,), "[heads]")
        _check_parameter("D", D, x)
    return groups, state


def _check_parameter(name: str, tensor: Tensor, x: Tensor) -> None:
    """What may be kept in float32 beside half-precision activations."""
    check_same(name, tensor, x, dtype=False)
    if tensor.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name}: expected {x.dtype} or torch.float32, got {tensor.dtype}")


def _results(given: Inputs) -> tuple[Tensor, Tensor]:
    return given.x.new_empty(given.x.shape), given.initial.new_empty(given.initial.shape)


register_scan(CORE, "ssd", Inputs, "int chunk_size", _results)
