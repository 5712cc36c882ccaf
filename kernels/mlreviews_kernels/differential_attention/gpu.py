"""The Triton path of `differential_attention`: the kernels of ``softmaxes_gpu`` with two softmaxes."""

from __future__ import annotations

from torch import Tensor

from mlreviews_kernels import softmaxes_gpu
from mlreviews_kernels.static import Launch


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
    return softmaxes_gpu.forward(
        (q1, q2), (k1, k2), v, lam, mask, (q_offsets, k_offsets), causal=causal, scale=scale, window=0
    )


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
    (grad_q1, grad_q2), (grad_k1, grad_k2), grad_v, deltas = softmaxes_gpu.backward(
        grad_out, None, (q1, q2), (k1, k2), v, lam, lse, mask, (q_offsets, k_offsets),
        causal=causal, scale=scale, window=0,
    )  # fmt: skip
    return grad_q1, grad_k1, grad_q2, grad_k2, grad_v, -deltas[1].sum(0)


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    return softmaxes_gpu.launches(double=True)
