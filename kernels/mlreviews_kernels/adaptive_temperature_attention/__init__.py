r"""Attention whose temperature falls with its entropy: $\mathrm{softmax}(\beta(H_i)\, s_i)\, V$, from two sweeps.

The entropy of every query comes with it. Never a time x time tensor. See ``README.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlreviews_kernels.adaptive_temperature_attention import reference
from mlreviews_kernels.backends import Core
from mlreviews_kernels.ops import backend_of, empty_choice, gradients, implementation
from mlreviews_kernels.softmaxes import check_layout, check_scale, chosen_for, flat_mask, without_autocast

__all__ = ["COEFFICIENTS", "adaptive_temperature_attention"]

CORE = Core.read(Path(__file__).parent)
COEFFICIENTS = (-0.037, 0.481, -2.3, 4.917, -1.791)  # the paper's fit, the highest power first


def adaptive_temperature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    entropy_threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """``softmax(beta s) v`` with ``s = scale q k^T`` and an inverse temperature for each query and head.

    ``beta`` is the polynomial of the entropy H of ``softmax(s)``, in nats, where H is above the threshold and the
    polynomial above 1; otherwise beta is 1: attention is sharpened, never softened.

    Args:
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``, in q's dtype; query head h uses head ``h // (heads / kv_heads)``.
        v: ``[batch, k_time, kv_heads, value_dim]``, in q's dtype.
        causal: a query sees no key after its own position. The last query is at the last key's position.
        scale: of the scores; ``dim ** -0.5`` if None.
        mask: boolean, True where a query may attend: ``[batch, k_time]`` for padded keys, or
            ``[batch, q_time, k_time]``.
        coefficients: of the polynomial, the highest power first; the default is the paper's.
        entropy_threshold: H (nats) up to which beta is 1.

    Returns:
        out ``[batch, q_time, heads, value_dim]`` in q's dtype, and the entropy H ``[batch, heads, q_time]`` of the
        softmax that was not sharpened, float32 (float64 for float64). Both are 0 for a query that sees nothing.
        Gradients flow through both, and through beta, whose limits have gradient 0.

    Raises:
        ValueError: shapes or devices don't go together, there are no coefficients, or one is not finite, or the
            threshold is NaN.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they differ, or the mask isn't boolean.
        BackendError: the backend asked for by name can't be used.
    """
    check_layout(("q", "k", "v"), q, k, v)
    flat_mask(mask, q, k)  # its checks
    coefficients = [float(c) for c in coefficients]
    if not coefficients or not all(map(math.isfinite, coefficients)):
        raise ValueError(f"coefficients: expected at least one finite number, got {coefficients}")
    if math.isnan(entropy_threshold):
        raise ValueError("entropy_threshold: expected a number, got nan")
    options = (causal, check_scale(scale, q.shape[3]), coefficients, float(entropy_threshold))
    found: tuple[Tensor, ...] = torch.ops.mlreviews.adaptive_temperature_attention(q, k, v, mask, *options)
    return found[0], found[1]


@torch.library.custom_op("mlreviews::adaptive_temperature_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, choice = chosen_for(CORE, q, max(q.shape[3], v.shape[3]))
    run = implementation(CORE, backend).adaptive_temperature_attention
    with without_autocast(q):
        return *run(q, k, v, mask, causal, scale, coefficients, threshold), choice


@torch.library.custom_op("mlreviews::adaptive_temperature_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor | None,
    grad_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    entropy: Tensor,
    lse: Tensor,
    sharp: Tensor,
    choice: Tensor,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (mask, causal, scale, coefficients, threshold)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_entropy = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy
    with without_autocast(q):
        if backend_of(choice) == "reference":
            found = gradients(partial(_reference, options), (q, k, v), (grad_out, grad_entropy))
        else:
            run = implementation(CORE, backend_of(choice)).adaptive_temperature_attention_backward
            found = run(grad_out, grad_entropy, q, k, v, out, entropy, lse, sharp, *options)
    return found[0], found[1], found[2]


def _reference(options: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.adaptive_temperature_attention(q, k, v, *options)[:2]


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, heads, _dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = [q.new_empty((batch, heads, time), dtype=dtype) for _ in range(3)]
    return q.new_empty((batch, time, heads, v.shape[3])), rows[0], rows[1], rows[2], empty_choice()


@_attention_backward.register_fake
def _(
    grad_out: Tensor | None, grad_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[4:]
    ctx.set_materialize_grads(False)  # the entropy is for diagnosis: mostly nobody differentiates it
    ctx.save_for_backward(*inputs[:4], *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_entropy: Tensor | None, *_: object) -> tuple[Any, ...]:
    grads = _attention_backward(grad_out, grad_entropy, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
