r"""Intruder dimensions: directions of a fine-tuned matrix that its pre-trained matrix doesn't have.

Paper: LoRA vs Full Fine-tuning: An Illusion of Equivalence (arXiv:2410.21228).

Fine-tuning changes the singular vectors of a weight matrix. After full fine-tuning each leading singular vector still
resembles one from before; LoRA adds leading vectors that resemble none of them. These intruders are counted here, and
can be scaled down afterwards, which the paper says brings back what was forgotten at little cost to the new task.

Equation:
    $$ W_0 = U_0 S_0 V_0^\top, \qquad W = U S V^\top, \qquad c_j = \max_i \lvert \langle u_j(W), u_i(W_0) \rangle \rvert
       \tag{1} $$
    Of the leading k singular vectors of W, those with $c_j < \epsilon$ are intruders.
    $$ W_\lambda = W + (\lambda - 1) \sum_{j \text{ intruder}} s_j\, u_j v_j^\top \tag{2} $$
    $$ \operatorname{erank}(\Delta) = \exp\Bigl(-\sum_i p_i \log p_i\Bigr), \qquad
       p_i = \frac{s_i(\Delta)}{\sum_j s_j(\Delta)} \tag{3} $$

Symbols:
    W_0: [out, in], the matrix before fine-tuning.
    W: [out, in], the matrix after it, adapters merged.
    c_j: how much the j-th left singular vector resembles the closest one from before, in [0, 1].
    lambda: scale, what the singular values of intruders are multiplied by.
    Delta: [out, in], W - W_0.

Defaults:
    top_k: 10 (section 3).
    eps: 0.5 (section 3; the paper's figures sweep it from 0 to 1).
    scale: 0.75 (as in peft).

Deviations:
    1. The review defines an intruder the other way round, as a vector of W_0 without counterpart in W. Here it is as in
       the paper.
    2. The effective rank of eq. (3) is Roy and Vetterli's; a matrix of zeros has rank 0.

Reduces to:
    plain fine-tuning: scale = 1, where eq. (2) gives W back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_probability

__all__ = [
    "count_intruders",
    "effective_update_rank",
    "intruder_dimensions",
    "low_rank_update",
    "mitigate_intruders",
    "singular_similarity",
]


def singular_similarity(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"]
) -> Float[Tensor, "singular singular_before"]:
    """Absolute cosines between the left singular vectors after and before fine-tuning.

    Args:
        before: [out, in], W_0.
        after: [out, in], W.

    Returns:
        [min(out, in), min(out, in)] in float32 or wider: row j belongs to the j-th largest singular value of W.

    Raises:
        ValueError: no matrices, different shapes, NaN or infinity.
    """
    w0, w1 = _matrices(before, after)
    u0, u1 = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w1))
    return (u1.mT @ u0).abs()


def intruder_dimensions(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], top_k: int = 10, eps: float = 0.5
) -> Int64[Tensor, " intruders"]:
    """Which of the leading singular vectors of W are intruders, below eq. (1).

    Args:
        before: [out, in], W_0.
        after: [out, in], W.
        top_k: how many leading singular vectors are looked at; all of them where there are fewer.
        eps: the cosine below which a vector has no counterpart.

    Returns:
        Their places, ascending: 0 is the vector of the largest singular value.

    Raises:
        ValueError: no matrices, different shapes, NaN or infinity, top_k below 1, or eps outside [0, 1].
    """
    check_count("top_k", top_k)
    check_probability("eps", eps)
    return (singular_similarity(before, after)[:top_k].amax(1) < eps).nonzero().flatten()


def count_intruders(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], top_k: int = 10, eps: float = 0.5
) -> dict[str, int]:
    """How many intruders each matrix of a model has.

    Args:
        before: names and tensors before fine-tuning, such as a state dict.
        after: after fine-tuning; tensors that aren't matrices are passed over.
        top_k: see `intruder_dimensions`.
        eps: see `intruder_dimensions`.

    Returns:
        A count for each name of `after` that belongs to a matrix.

    Raises:
        ValueError: a matrix of `after` isn't in `before`, and as `intruder_dimensions`.
    """
    matrices = {name: tensor for name, tensor in after.items() if tensor.ndim == 2 and tensor.is_floating_point()}
    missing = sorted(matrices.keys() - before.keys())
    if missing:
        raise ValueError(f"before: expected the matrices of after, {missing[0]!r} is missing")
    return {name: len(intruder_dimensions(before[name], w, top_k, eps)) for name, w in matrices.items()}


def mitigate_intruders(
    before: Float[Tensor, "out in"],
    after: Float[Tensor, "out in"],
    scale: float = 0.75,
    top_k: int = 10,
    eps: float = 0.5,
) -> Float[Tensor, "out in"]:
    """W with the singular values of its intruders scaled, eq. (2).

    Args:
        before: [out, in], W_0.
        after: [out, in], W.
        scale: lambda; 0 removes intruders, 1 changes nothing.
        top_k: see `intruder_dimensions`.
        eps: see `intruder_dimensions`.

    Returns:
        [out, in] in the dtype of `after`.

    Raises:
        ValueError: the scale isn't finite, and as `intruder_dimensions`.
    """
    check_number("scale", scale)
    found = intruder_dimensions(before, after, top_k, eps)
    u, s, vh = torch.linalg.svd(_wide(after), full_matrices=False)
    return (_wide(after) + (scale - 1) * (u[:, found] * s[found]) @ vh[found]).to(after.dtype)


def low_rank_update(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The best factors of W - W_0 of a given rank, singular values shared equally: what goes back into an adapter.

    Args:
        before: [out, in], W_0.
        after: [out, in], W, for instance of `mitigate_intruders`.
        rank: of the adapter, at most min(out, in).

    Returns:
        ``(b, a)``, [out, rank] and [rank, in], in float32 or wider. The adapter's own scale is for the caller to
        divide by.

    Raises:
        ValueError: no matrices, different shapes, NaN or infinity, or a rank that isn't possible.
    """
    w0, w1 = _matrices(before, after)
    check_count("rank", rank)
    if rank > min(w0.shape):
        raise ValueError(f"rank: expected at most {min(w0.shape)} for shape {tuple(w0.shape)}, got {rank}")
    u, s, vh = torch.linalg.svd(w1 - w0, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def effective_update_rank(before: Float[Tensor, "out in"], after: Float[Tensor, "out in"]) -> float:
    """Effective rank of what fine-tuning added, eq. (3).

    Args:
        before: [out, in], W_0.
        after: [out, in], W.

    Returns:
        From 1, when one direction was added, to min(out, in), when all were equally; 0 when nothing was.

    Raises:
        ValueError: no matrices, different shapes, NaN or infinity.
    """
    w0, w1 = _matrices(before, after)
    s = torch.linalg.svdvals(w1 - w0)
    if not s.any():
        return 0.0
    return float(torch.special.entr(s / s.sum()).sum().exp())


def _wide(matrix: Tensor) -> Tensor:
    """In float32 at least: LAPACK has no half precision."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _matrices(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("before", before)
    check_matrix("after", after)
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {tuple(before.shape)}, as before has, got {tuple(after.shape)}")
    return _wide(before), _wide(after)
