"""The CPU path of `attention`: compiled for float32 and below, PyTorch otherwise, a block of queries at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels import softmaxes
from mlreviews_kernels.softmaxes import Geometry, library_for

SOURCE = Path(__file__).with_name("cpu.cpp")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    geometry = Geometry.read(q, k, q_offsets, k_offsets, causal=causal, window=window)
    weights = _weights(q)
    if (library := library_for(SOURCE, q, geometry)) is not None:
        out, lse = softmaxes.compiled(library, "attention", (q,), (k,), v, weights, mask, geometry, scale)
    else:
        out, lse = softmaxes.vectorised((q,), (k,), v, weights, mask, geometry, scale)
    return out, lse.squeeze(0)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    geometry = Geometry.read(q, k, q_offsets, k_offsets, causal=causal, window=window)
    weights, lse = _weights(q), lse[None]
    grad_lse = None if grad_lse is None else grad_lse[None]
    if (library := library_for(SOURCE, q, geometry)) is not None:
        grads = softmaxes.compiled_backward(
            library, "attention", grad_out, grad_lse, (q,), (k,), v, weights, lse, mask, geometry, scale
        )
    else:
        grads = softmaxes.vectorised_backward(grad_out, grad_lse, (q,), (k,), v, weights, lse, mask, geometry, scale)
    (grad_q,), (grad_k,), grad_v, _ = grads
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _weights(q: Tensor) -> Tensor:
    """One softmax of weight 1, in the dtype of the computation."""
    return q.new_ones((1, q.shape[1]), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
