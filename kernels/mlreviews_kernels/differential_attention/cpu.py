"""The CPU path of `differential_attention`: compiled for float32 and below, PyTorch otherwise, in blocks of queries."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels import softmaxes
from mlreviews_kernels.softmaxes import Geometry, library_for

SOURCE = Path(__file__).with_name("cpu.cpp")


def differential_attention(
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
) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    geometry = Geometry.read(q1, k1, q_offsets, k_offsets, causal=causal)
    given = ((q1, q2), (k1, k2), v, _weights(lam), mask, geometry, scale)
    if (library := library_for(SOURCE, q1, geometry)) is not None:
        return softmaxes.compiled(library, "differential_attention", *given)
    return softmaxes.vectorised(*given)


def differential_attention_backward(
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
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of all inputs but the mask."""
    geometry = Geometry.read(q1, k1, q_offsets, k_offsets, causal=causal)
    given = (grad_out, None, (q1, q2), (k1, k2), v, _weights(lam), lse, mask, geometry, scale)
    if (library := library_for(SOURCE, q1, geometry)) is not None:
        found = softmaxes.compiled_backward(library, "differential_attention", *given)
    else:
        found = softmaxes.vectorised_backward(*given)
    (grad_q1, grad_q2), (grad_k1, grad_k2), grad_v, grad_weights = found
    grads = (grad_q1, grad_k1, grad_q2, grad_k2, grad_v)
    return *(grad.to(q1.dtype) for grad in grads), -grad_weights[1]


def _weights(lam: Tensor) -> Tensor:
    """Of the two softmaxes: 1 and -lambda."""
    return torch.stack([torch.ones_like(lam), -lam])
