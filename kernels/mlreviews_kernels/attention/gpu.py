"""The Triton path of `attention`: the kernels of ``softmaxes_gpu`` with one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from mlreviews_kernels import softmaxes_gpu
from mlreviews_kernels.static import Launch


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
    out, lse = softmaxes_gpu.forward(
        (q,), (k,), v, None, mask, (q_offsets, k_offsets), causal=causal, scale=scale, window=window
    )
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
    deltas = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        # a row that sees nothing has no gradient, whatever that of its log-sum-exp is
        deltas -= torch.where(torch.isneginf(lse), 0.0, grad_lse)
    (grad_q,), (grad_k,), grad_v, _ = softmaxes_gpu.backward(
        grad_out, deltas[None], (q,), (k,), v, None, lse[None], mask, (q_offsets, k_offsets),
        causal=causal, scale=scale, window=window,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    return softmaxes_gpu.launches(double=False)
