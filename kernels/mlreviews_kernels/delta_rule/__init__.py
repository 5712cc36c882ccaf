r"""The delta rule: $W_t = W_{t-1} + \beta_t k_t (v_t - W_b^\top k_t)^\top$, read by $o_t = W_t^\top q_t$.

A linear map from keys to values that learns while it reads, by one step of gradient descent a token on
$\tfrac12 |W^\top k_t - v_t|^2$, taken at W_b: the last map (the delta rule) or the one at the start of a mini-batch
(TTT-Linear). See ``README.md`` for the dual form.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape, check_sizes, offsets_of
from mlreviews_kernels.backends import Core
from mlreviews_kernels.delta_rule.reference import Inputs
from mlreviews_kernels.ops import register_scan

__all__ = ["delta_rule", "delta_rule_step"]

CORE = Core.read(Path(__file__).parent)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    mini_batch: int = 1,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs ``W_t = W_{t-1} + beta_t k_t (v_t - W_base^T k_t)^T`` and ``out_t = W_t^T q_t`` for every head.

    A sequence may be split, with the state carried over, after a multiple of ``mini_batch`` steps: inside a
    mini-batch, the state alone doesn't tell W_base.

    Args:
        q: ``[batch, time, heads, dim_k]``, the queries.
        k: like q, the keys. Keys of length 1 and beta in [0, 2] keep the state bounded, others may not.
        v: ``[batch, time, heads, dim_v]``, the values, in q's dtype.
        beta: ``[batch, time, heads]``, the learning rates, in q's dtype or float32. TTT-Linear's loss has no factor
            1/2: there beta is 2 eta.
        mini_batch: W_base is the state before the first of so many steps, counted from the start of each sequence.
            1: the delta rule. The length of the sequence: gradient descent on all of it, from one point.
        chunk_size: how many steps become one matrix product; changes cost and rounding only.
        initial_state: ``[batch, heads, dim_k, dim_v]``; zeros if None. Packed: ``[sequences, ...]``.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where packed sequences begin and end in the one row (batch 1).
            Its numbers are checked on the CPU only: a GPU would have to be waited for.

    Returns:
        out ``[batch, time, heads, dim_v]`` in v's dtype, and the final state ``[batch or sequences, heads, dim_k,
        dim_v]``, float32 for half-precision inputs. Gradients flow through both.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they don't go together.
        BackendError: the backend asked for by name can't be used; Triton not for float64.
    """
    if q.ndim != 4:
        raise ValueError(f"q: expected [batch, time, heads, dim_k], got {tuple(q.shape)}")
    batch, time, heads, dim_k = q.shape
    dim_v = _check(q, k, v, beta, axes="batch, time")
    check_sizes("q", q)
    check_sizes("v", v)
    for name, value in (("mini_batch", mini_batch), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    offsets = offsets_of(batch, time, cu_seqlens, q.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = q.new_zeros((sequences, heads, dim_k, dim_v), dtype=dtype)
    check_shape("initial_state", initial_state, (sequences, heads, dim_k, dim_v), "[sequences, heads, dim_k, dim_v]")
    check_floating("initial_state", initial_state)
    check_same("initial_state", initial_state, q, dtype=False)
    out, final, _ = torch.ops.mlreviews.delta_rule(
        q.reshape(batch * time, heads, dim_k),
        k.reshape(batch * time, heads, dim_k),
        v.reshape(batch * time, heads, dim_v),
        beta.reshape(batch * time, heads),
        initial_state.to(dtype),
        offsets,
        mini_batch,
        chunk_size,
    )
    return out.reshape(v.shape), final


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step, for decoding.

    Args:
        q: ``[batch, heads, dim_k]``.
        k: like q.
        v: ``[batch, heads, dim_v]``.
        beta: ``[batch, heads]``.
        state: ``[batch, heads, dim_k, dim_v]``, of the last step, or the final state of `delta_rule`.
        base: the state before the mini-batch's first step, like state; None: the state itself (mini-batches of 1).

    Returns:
        out ``[batch, heads, dim_v]`` in v's dtype and the new state in the old one's.
    """
    if q.ndim != 3:
        raise ValueError(f"q: expected [batch, heads, dim_k], got {tuple(q.shape)}")
    dim_v = _check(q, k, v, beta, axes="batch")
    for name, tensor in (("state", state), ("base", base)):
        if tensor is not None:
            check_shape(name, tensor, (*q.shape, dim_v), "[batch, heads, dim_k, dim_v]")
            check_floating(name, tensor)
            check_same(name, tensor, q, dtype=False)
    wide_q, wide_k, wide_v, rate = (tensor.to(state.dtype) for tensor in (q, k, v, beta))
    error = wide_v - torch.einsum("bhkv,bhk->bhv", state if base is None else base.to(state.dtype), wide_k)
    state = torch.addcmul(state, (rate[..., None] * wide_k)[..., None], error[..., None, :])
    return torch.einsum("bhkv,bhk->bhv", state, wide_q).to(v.dtype), state


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, axes: str) -> int:
    """Checks what `delta_rule` and `delta_rule_step` share; returns the width of the values."""
    *leading, _ = q.shape
    check_floating("q", q)
    check_shape("k", k, tuple(q.shape), "q's shape")
    check_same("k", k, q)
    if v.ndim != q.ndim or list(v.shape[:-1]) != leading:
        raise ValueError(f"v: expected [{axes}, heads, dim_v] with [{axes}, heads] = {leading}, got {tuple(v.shape)}")
    check_same("v", v, q)
    check_shape("beta", beta, tuple(leading), f"[{axes}, heads]")
    check_same("beta", beta, q, dtype=False)
    if beta.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"beta: expected {q.dtype} or torch.float32, got {beta.dtype}")
    return v.shape[-1]


def _results(given: Inputs) -> tuple[Tensor, Tensor]:
    return given.v.new_empty(given.v.shape), given.initial.new_empty(given.initial.shape)


register_scan(CORE, "delta_rule", Inputs, "int mini_batch, int chunk_size", _results)
