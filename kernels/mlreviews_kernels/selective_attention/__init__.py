r"""Selective attention: $\mathrm{softmax}(L_h - F) V_h$, where tokens between i and j have decided that j is of no use.

F is the running sum of one head's rectified logits, shared by all heads. Never a time x time tensor. See ``README.md``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mlreviews_kernels.arguments import check_floating, check_same, check_shape
from mlreviews_kernels.backends import Core
from mlreviews_kernels.ops import backend_of, empty_choice, gradients, implementation
from mlreviews_kernels.selective_attention import reference
from mlreviews_kernels.softmaxes import chosen_for, without_autocast

__all__ = ["selective_attention", "selective_attention_with_memory"]

CORE = Core.read(Path(__file__).parent)


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selector: int = 0,
    scale: float | None = None,
    initial_selection: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention in which one head's logits tell all heads which tokens to leave out from then on.

    With ``L_h = scale q_h k^T``, ``S[i, j] = relu(L_selector[i, j])`` for ``j < i``, except that no token selects
    the first one, and ``F[i, j] = initial_selection[j] + sum of S[i', j] over i' < i``:
    ``out_h = softmax(L_h - F) v_h``. The queries are the last ``q_time`` tokens of the keys.

    Args:
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``, of q's dtype; query head h uses kv head ``h // (heads / kv_heads)``.
        v: ``[batch, k_time, kv_heads, v_dim]``, of q's dtype.
        selector: the head that selects.
        scale: of the logits; ``dim ** -0.5`` if None.
        initial_selection: ``[batch, k_time - q_time]``, what earlier queries have selected of the keys before the
            queries: the selection that the call before this one returned. Zeros if None.
        mask: ``[batch, k_time]``, True for the tokens that count (padding: False). The others aren't attended to and
            don't select, and the first one that counts is the one that is never selected. All of them if None.

    Returns:
        out ``[batch, q_time, heads, v_dim]`` in q's dtype, zeros where a query sees nothing; and the selection
        ``[batch, k_time]`` after the last query, float32 (float64 for float64). Gradients flow through both.

    Raises:
        ValueError: shapes or devices don't go together, there are more queries than keys, or no such head.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they differ, or mask is not boolean.
        BackendError: the backend asked for by name can't be used.
    """
    return _call(q, k, v, selector, scale, initial_selection, mask, 1.0)[:2]


def selective_attention_with_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 1.0,
    selector: int = 0,
    scale: float | None = None,
    initial_selection: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selective_attention` and, from the same passes, how many tokens each query still has in memory.

    Args:
        q: as in `selective_attention`, and so are k, v, selector, scale, initial_selection and mask.
        k: the keys.
        v: the values.
        tau: a token of which ``F >= tau`` counts as forgotten; positive.
        selector: the head that selects.
        scale: of the logits.
        initial_selection: of earlier calls.
        mask: the tokens that count.

    Returns:
        out, selection, and the memory ``M_i = sum of 1 - min(F[i, j], tau) / tau`` over the tokens j that query i
        sees, ``[batch, q_time]``, float32 (float64 for float64). Gradients flow through all three.

    Raises:
        ValueError: tau is not positive, or as in `selective_attention`.
        TypeError: as in `selective_attention`.
        BackendError: as in `selective_attention`.
    """
    if not (tau > 0.0 and math.isfinite(tau)):
        raise ValueError(f"tau: expected a positive number, got {tau}")
    return _call(q, k, v, selector, scale, initial_selection, mask, tau)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: int,
    scale: float | None,
    initial: Tensor | None,
    mask: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments and makes the optional ones concrete."""
    _check(q, k, v, selector)
    (batch, queries, _, dim), keys = q.shape, k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial is None:
        initial = q.new_zeros((batch, keys - queries), dtype=dtype)
    check_shape("initial_selection", initial, (batch, keys - queries), "[batch, k_time - q_time]")
    check_floating("initial_selection", initial)
    check_same("initial_selection", initial, q, dtype=False)
    if mask is None:
        mask = torch.ones((batch, keys), dtype=torch.bool, device=q.device)
    check_shape("mask", mask, (batch, keys), "[batch, k_time]")
    check_same("mask", mask, q, dtype=False)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    scale = dim**-0.5 if scale is None else float(scale)
    initial = pad(initial.to(dtype), (0, queries))
    out, _, selection, memory, _ = torch.ops.mlreviews.selective_attention(
        q, k, v, initial, mask, selector, scale, float(tau)
    )
    return out, selection, memory


def _check(q: Tensor, k: Tensor, v: Tensor, selector: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            axis = "heads" if name == "q" else "kv_heads"
            raise ValueError(f"{name}: expected [batch, time, {axis}, dim], got {tuple(tensor.shape)}")
    check_floating("q", q)
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    check_shape("k", k, (batch, keys, kv_heads, dim), "[batch, k_time, kv_heads, dim]")
    check_shape("v", v, (batch, keys, kv_heads, v.shape[3]), "[batch, k_time, kv_heads, v_dim]")
    check_same("k", k, q)
    check_same("v", v, q)
    if dim < 1 or v.shape[3] < 1:
        raise ValueError(f"q, v: expected a dim of at least 1, got {tuple(q.shape)} and {tuple(v.shape)}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"k: expected a number of kv_heads that divides the {heads} heads, got {tuple(k.shape)}")
    if queries > keys:
        raise ValueError(f"q: expected no more queries than the {keys} keys, whose last ones they are, got {queries}")
    if not 0 <= selector < heads:
        raise ValueError(f"selector: expected a head from 0 to {heads - 1}, got {selector}")


@torch.library.custom_op("mlreviews::selective_attention", mutates_args=())
def _selective_attention(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor, selector: int, scale: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, choice = chosen_for(CORE, q, max(q.shape[3], v.shape[3]))
    run = implementation(CORE, backend).selective_attention
    with without_autocast(q):
        return *run(q, k, v, initial, mask, selector, scale, tau), choice


@torch.library.custom_op("mlreviews::selective_attention_backward", mutates_args=())
def _selective_attention_backward(
    grad_out: Tensor,
    grad_selection: Tensor,
    grad_memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    choice: Tensor,
    selector: int,
    scale: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads, inputs = (grad_out, grad_selection, grad_memory), (q, k, v, initial)
    if backend_of(choice) == "reference":

        def differentiable(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
            found = reference.selective_attention(q, k, v, initial, mask, selector, scale, tau)
            return found[0], found[2], found[3]

        with without_autocast(q):
            found = gradients(differentiable, inputs, grads)
    else:
        run = implementation(CORE, backend_of(choice)).selective_attention_backward
        with without_autocast(q):
            found = run(*grads, *inputs, mask, out, lse, selector, scale, tau)
    return found[0], found[1], found[2], found[3]


@_selective_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial: Tensor, *rest: object) -> tuple[Tensor, ...]:
    batch, queries, heads = q.shape[:3]
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    lse, memory = initial.new_empty((batch, heads, queries)), initial.new_empty((batch, queries))
    return out, lse, initial.new_empty(initial.shape), memory, empty_choice()


@_selective_attention_backward.register_fake
def _(grad_out: Tensor, grad_selection: Tensor, grad_memory: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.selector, ctx.scale, ctx.tau = inputs
    out, lse, _, _, choice = output
    ctx.save_for_backward(*tensors, out, lse, choice)


def _differentiate(
    ctx: Any, grad_out: Tensor, _: Tensor, grad_selection: Tensor, grad_memory: Tensor, __: object
) -> tuple[Tensor | None, ...]:
    grads = (grad_out, grad_selection, grad_memory)
    found = _selective_attention_backward(*grads, *ctx.saved_tensors, ctx.selector, ctx.scale, ctx.tau)
    return *found, None, None, None, None


_selective_attention.register_autograd(_differentiate, setup_context=_save)
