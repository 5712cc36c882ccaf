r"""Attention that gives its log-sum-exp too: $o_i = \sum_j e^{s_{ij} - \ell_i} v_j$; and exact merging of such.

With the log-sum-exps, attention over parts of the keys can be merged into attention over all. See ``README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape
from mlreviews_kernels.attention import reference
from mlreviews_kernels.backends import Core
from mlreviews_kernels.ops import backend_of, empty_choice, gradients, implementation
from mlreviews_kernels.softmaxes import (
    check_layout,
    check_scale,
    chosen_for,
    flat_mask,
    offsets_of_both,
    without_autocast,
)

__all__ = ["attention", "merge_attention"]

CORE = Core.read(Path(__file__).parent)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` for every head, and the logarithm of the softmax's denominator.

    Args:
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``, in q's dtype; query head h uses head ``h // (heads / kv_heads)``.
        v: ``[batch, k_time, kv_heads, value_dim]``, in q's dtype.
        causal: a query sees no key after its own position. The last query is at the last key's position.
        scale: of the scores; ``dim ** -0.5`` if None.
        window: how many positions back a query sees, its own included (without ``causal`` as many forward, too).
        mask: boolean, True where a query may attend: ``[batch, k_time]`` for padded keys, or
            ``[batch, q_time, k_time]``.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where packed sequences begin and end in the one row (batch 1),
            the same for queries and keys; then the mask can only be ``[1, k_time]``. Its numbers are checked on the
            CPU only: a GPU would have to be waited for.

    Returns:
        out ``[batch, q_time, heads, value_dim]`` in q's dtype, and lse ``[batch, heads, q_time]``, float32 for
        half-precision inputs. A query that sees nothing gets 0 and -inf. Gradients flow through both.

    Raises:
        ValueError: shapes or devices don't go together, or window is less than 1.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they differ, or the mask isn't boolean.
        BackendError: the backend asked for by name can't be used.
    """
    check_layout(("q", "k", "v"), q, k, v)
    scale = check_scale(scale, q.shape[3])
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    flat = flat_mask(mask, q, k)
    if cu_seqlens is not None and flat is not None and flat.ndim != 1:
        raise ValueError(f"mask: expected [1, k_time] beside cu_seqlens, got {tuple(flat.shape)}")
    q_offsets, k_offsets = offsets_of_both(q, k, cu_seqlens)
    tokens = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out, lse, _ = torch.ops.mlreviews.attention(*tokens, flat, q_offsets, k_offsets, causal, scale, window or 0)
    batch, time, heads, _ = q.shape
    return out.reshape(batch, time, heads, v.shape[3]), lse.reshape(batch, time, heads).transpose(1, 2)


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them, the queries being the same.

    Exact, associative and commutative; parts that see nothing (0 with -inf) change nothing.

    Args:
        outs: of `attention`, one ``[batch, q_time, heads, value_dim]`` for each part, or all in one tensor.
        lses: likewise ``[batch, heads, q_time]``.

    Returns:
        out in the parts' dtype and lse, as `attention` gives them for all keys. Gradients flow through both.

    Raises:
        ValueError: there are no parts, or shapes or devices don't go together.
        TypeError: dtypes aren't floating ones, or they differ.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected one for each of at least one outs, got {len(lses)} for {len(outs)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_floating(f"outs[{i}]", out)
        check_floating(f"lses[{i}]", lse)
        if out.ndim != 4:
            raise ValueError(f"outs[{i}]: expected [batch, q_time, heads, value_dim], got {tuple(out.shape)}")
        check_shape(f"outs[{i}]", out, tuple(outs[0].shape), "the first one's shape")
        batch, time, heads, _ = out.shape
        check_shape(f"lses[{i}]", lse, (batch, heads, time), "[batch, heads, q_time]")
        check_same(f"outs[{i}]", out, outs[0])
        check_same(f"lses[{i}]", lse, lses[0])
    parts = torch.stack(lses)
    empty = torch.isneginf(parts).all(0)
    # where all parts are empty, 0 stands for them: -inf - (-inf) is NaN, as is the gradient
    lse = parts.masked_fill(empty, 0.0).logsumexp(0)
    shares = torch.exp(parts - lse).mT[..., None]
    out = torch.stack([share * out.to(lse.dtype) for share, out in zip(shares, outs, strict=True)]).sum(0)
    return out.to(outs[0].dtype), lse.masked_fill(empty, float("-inf"))


@torch.library.custom_op("mlreviews::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    backend, choice = chosen_for(CORE, q, max(q.shape[2], v.shape[2]))
    run = implementation(CORE, backend).attention
    with without_autocast(q):
        return *run(q, k, v, mask, q_offsets, k_offsets, causal, scale, window), choice


@torch.library.custom_op("mlreviews::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    choice: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (mask, q_offsets, k_offsets, causal, scale, window)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    with without_autocast(q):
        if backend_of(choice) == "reference":
            grads = (grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse)
            found = gradients(partial(_reference, options), (q, k, v), grads)
        else:
            run = implementation(CORE, backend_of(choice)).attention_backward
            found = run(grad_out, grad_lse, q, k, v, out, lse, *options)
    return found[0], found[1], found[2]


def _reference(options: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, *options)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((tokens, heads, v.shape[2])), q.new_empty((tokens, heads), dtype=dtype), empty_choice()


@_attention_backward.register_fake
def _(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, q_offsets, k_offsets, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)  # a log-sum-exp that nobody uses costs nothing
    ctx.save_for_backward(q, k, v, output[0], output[1], mask, q_offsets, k_offsets, output[2])


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.window)
    return *grads, None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
