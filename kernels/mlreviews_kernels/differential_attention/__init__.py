r"""Differential attention: $(\mathrm{softmax}(q_1 k_1^\top) - \lambda\, \mathrm{softmax}(q_2 k_2^\top))\, v$, fused.

The two softmaxes share v: their difference is one matrix of weights, multiplied with v once. See ``README.md``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_same, check_shape
from mlreviews_kernels.backends import Core
from mlreviews_kernels.differential_attention import reference
from mlreviews_kernels.ops import backend_of, empty_choice, gradients, implementation
from mlreviews_kernels.softmaxes import (
    WIDEST,
    check_layout,
    check_scale,
    chosen_for,
    flat_mask,
    offsets_of_both,
    without_autocast,
)

__all__ = ["differential_attention"]

CORE = Core.read(Path(__file__).parent)


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: float | Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``(softmax(scale q1 k1^T) - lam softmax(scale q2 k2^T)) v`` for every head.

    Args:
        q1: ``[batch, q_time, heads, dim]``.
        k1: ``[batch, k_time, kv_heads, dim]``, in q1's dtype; query head h uses head ``h // (heads / kv_heads)``.
        q2: like q1.
        k2: like k1.
        v: ``[batch, k_time, kv_heads, value_dim]``, in q1's dtype.
        lam: a number, a tensor with one element, or ``[heads]``; a tensor in q1's dtype or float32.
        causal: a query sees no key after its own position. The last query is at the last key's position.
        scale: of the scores; ``dim ** -0.5`` if None.
        mask: boolean, True where a query may attend: ``[batch, k_time]`` for padded keys, or
            ``[batch, q_time, k_time]``.

    Returns:
        ``[batch, q_time, heads, value_dim]`` in q1's dtype; 0 for a query that sees nothing. lam gets a gradient, too.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they don't go together, or the mask isn't
            boolean.
        BackendError: the backend asked for by name can't be used.
    """
    check_layout(("q1", "k1", "v"), q1, k1, v)
    check_shape("q2", q2, tuple(q1.shape), "q1's shape")
    check_shape("k2", k2, tuple(k1.shape), "k1's shape")
    check_same("q2", q2, q1)
    check_same("k2", k2, q1)
    batch, time, heads, dim = q1.shape
    dtype = torch.float64 if q1.dtype == torch.float64 else torch.float32
    weight = _per_head(lam, q1, heads, dtype)
    q_offsets, k_offsets = offsets_of_both(q1, k1, None)
    tokens = (x.reshape(-1, *x.shape[2:]) for x in (q1, k1, q2, k2, v))
    out, _, _ = torch.ops.mlreviews.differential_attention(
        *tokens, weight, flat_mask(mask, q1, k1), q_offsets, k_offsets, causal, check_scale(scale, dim)
    )
    return out.reshape(batch, time, heads, v.shape[3])


def _per_head(lam: float | Tensor, q: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """lambda as ``[heads]``."""
    if not isinstance(lam, Tensor):
        if not isinstance(lam, int | float):
            raise TypeError(f"lam: expected a number or a tensor, got {type(lam).__name__}")
        return q.new_full((heads,), lam, dtype=dtype)
    check_same("lam", lam, q, dtype=False)
    if lam.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"lam: expected {q.dtype} or torch.float32, got {lam.dtype}")
    if lam.numel() != 1:
        check_shape("lam", lam, (heads,), "one element or [heads]")
    return lam.to(dtype).reshape(-1).expand(heads)


@torch.library.custom_op("mlreviews::differential_attention", mutates_args=())
def _differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # v is twice as wide as q and k as a rule, and may be in the Triton kernels
    backend, choice = chosen_for(CORE, q1, max(2 * q1.shape[2], v.shape[2]), 2 * WIDEST)
    run = implementation(CORE, backend).differential_attention
    with without_autocast(q1):
        return *run(q1, k1, q2, k2, v, lam, mask, q_offsets, k_offsets, causal, scale), choice


@torch.library.custom_op("mlreviews::differential_attention_backward", mutates_args=())
def _differential_attention_backward(
    grad_out: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    choice: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, options = (q1, k1, q2, k2, v, lam), (mask, q_offsets, k_offsets, causal, scale)
    with without_autocast(q1):
        if backend_of(choice) == "reference":
            found = gradients(partial(_reference, options), inputs, (grad_out,))
        else:
            run = implementation(CORE, backend_of(choice)).differential_attention_backward
            found = run(grad_out, *inputs, lse, *options)
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _reference(options: tuple[Any, ...], *inputs: Any) -> tuple[Tensor]:
    return (reference.differential_attention(*inputs, *options)[0],)


@_differential_attention.register_fake
def _(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _dim = q1.shape
    return q1.new_empty((tokens, heads, v.shape[2])), lam.new_empty((2, tokens, heads)), empty_choice()


@_differential_attention_backward.register_fake
def _(
    grad_out: Tensor, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q1, k1, q2, k2, v, lam))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:6], output[1], *tensors[6:], output[2])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    grads = _differential_attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


_differential_attention.register_autograd(_differentiate, setup_context=_save)
