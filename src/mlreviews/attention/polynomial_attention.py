r"""Polynomial attention: a power of the scores, over the square root of the length, in place of softmax.

Paper: Rethinking Softmax: Self-Attention with Polynomial Activations (arXiv:2410.18613; later versions: Rethinking
    Attention: Polynomial Alternatives to Softmax in Transformers).

The paper argues that softmax works because it bounds the Frobenius norm of the attention matrix and of its Jacobian,
not because its rows are probabilities. A power of the scores over the square root of their number is within the same
order, for Gaussian tokens. Weights may be negative and need not sum to one.

Equation:
    $$ O = \frac{1}{\sqrt{n}} \Big( \frac{Q K^\top}{\sqrt{d}} \Big)^{\circ p} V \tag{1} $$
    with the power taken of each entry. For softmax and any logits A (theorem 4.1 of the paper),
    $$ \|\mathrm{softmax}(A)\|_F \le \sqrt{n}, \qquad \|\nabla \mathrm{softmax}(A)\|_F \le 2 \sqrt{n} \tag{2} $$
    and for Gaussian queries and keys the norm of the matrix in (1), and of its Jacobian for Q, is of order
    $\sqrt{n}$. The expected square of the former is exact:
    $$ \mathbb{E} \|\cdot\|_F^2 = n \, (2p - 1)!! \prod_{i < p} \frac{d + 2i}{d} \tag{3} $$
    A power of an inner product is an inner product of tensor powers,
    $$ (q^\top k)^p = \phi(q)^\top \phi(k), \qquad \phi(x) = x^{\otimes p} \in \mathbb{R}^{d^p} \tag{4} $$
    so that (1) is a recurrence with a state of $d^p$ by d numbers: for p = 1, associativity.

Symbols:
    Q, K, V: q, k and v, [batch, time, heads, dim].
    p: degree.
    n: how many keys a query sees.
    d: dim.
    A: [n, n], logits.

Defaults:
    degree: 3 (the best of the paper's for ImageNet, where n = 196 and (1) has the factor 1 / 14).

Deviations:
    1. With a causal mask or padding, n is counted for each query: the keys that it sees. So no query depends on how
       long the sequence becomes; the paper has one n, that of an image.
    2. Blocks of queries are computed one after another, and again in the backward, so that no matrix is kept.

Reduces to:
    linear attention (masked matrix products): for degree 1, before the factor 1 / sqrt(n d) and without a normaliser.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlreviews.common.checks import check_count, check_matrix
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.recurrent_attention import check_heads, repeated
from mlreviews_kernels.ssd import ssd

__all__ = [
    "PolynomialAttention",
    "polynomial_attention",
    "polynomial_features",
    "polynomial_jacobian_norm",
    "polynomial_matrix",
    "recurrent_polynomial_attention",
    "softmax_jacobian_norm",
]

ROWS = 128  # queries of a block


def polynomial_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    *,
    degree: int = 3,
    scale: float | None = None,
    length_power: float = -0.5,
    causal: bool = True,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Equation (1).

    Args:
        q: [batch, q_time, heads, dim]; if causal, the last query is at the last key's position.
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        degree: p.
        scale: of the scores; None is dim^(-1/2).
        length_power: of n, as a factor; 0 leaves the length out.
        causal: a query sees no key after its own position.
        mask: False where a key is padding.

    Returns:
        [batch, q_time, heads, value_dim] in q's dtype, computed in float32 at least; 0 where a query sees nothing.

    Raises:
        ValueError: degree below 1, or shapes that don't go together.
    """
    check_count("degree", degree)
    check_heads(q, k, v, causal=False)
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"q: expected at most {k.shape[1]} queries, one a key, got {q.shape[1]}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
    if causal:
        visible = real.cumsum(1)[:, k.shape[1] - q.shape[1] :]
    else:
        visible = real.sum(1, keepdim=True).expand(-1, q.shape[1])
    of_q, of_k, of_v = (
        x.to(wide).transpose(1, 2) for x in (scale * q, repeated(k, q.shape[2]), repeated(v, q.shape[2]))
    )
    blocks, outs = _blocks(q.shape[1], k.shape[1], causal), []
    for rows, keys in blocks:
        pieces = of_q[:, :, rows], of_k[:, :, keys], of_v[:, :, keys], real[:, keys], degree, causal
        if len(blocks) > 1 and torch.is_grad_enabled():
            outs.append(checkpoint(_power, *pieces, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_power(*pieces))
    out = torch.cat(outs, 2)
    factor = visible.clamp(min=1).to(wide) ** length_power
    return (out.transpose(1, 2) * factor[..., None, None]).to(q.dtype)


def _blocks(q_time: int, k_time: int, causal: bool) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys up to the last that any of them sees."""
    spans = [(start, min(start + ROWS, q_time)) for start in range(0, q_time, ROWS)]
    return [(slice(start, stop), slice(0, k_time - q_time + stop if causal else k_time)) for start, stop in spans]


def _power(q: Tensor, k: Tensor, v: Tensor, real: Tensor, degree: int, causal: bool) -> Tensor:
    """``(q k^T)^degree v``, [batch, heads, time, dim], of a block of queries that ends where the keys do."""
    seen = real[:, None, None]
    if causal:
        places = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
        seen = seen & (torch.arange(k.shape[2], device=q.device) <= places)
    # Hidden entries are 0, and stay so: there is no -inf where there is no exponential.
    return (q @ k.mT).masked_fill(~seen, 0.0) ** degree @ v


def polynomial_features(x: Float[Tensor, "*batch dim"], degree: int) -> Float[Tensor, "*batch features"]:
    """The tensor power (4).

    Args:
        x: [..., dim].
        degree: p.

    Returns:
        [..., dim^p].

    Raises:
        ValueError: degree below 1.
    """
    check_count("degree", degree)
    power = x
    for _ in range(degree - 1):
        power = (power[..., None] * x[..., None, :]).flatten(-2)
    return power


def recurrent_polynomial_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time kv_heads dim"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    degree: int = 1,
    scale: float | None = None,
    state: tuple[Tensor, int] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], tuple[Tensor, int]]:
    """Causal `polynomial_attention` in linear time, by (4). The state grows like dim^degree.

    Args:
        q: [batch, time, heads, dim].
        k: [batch, time, kv_heads, dim].
        v: [batch, time, kv_heads, value_dim].
        degree: p.
        scale: of the scores; None is dim^(-1/2).
        state: of an earlier call: the sum over its keys, [batch, heads, dim^p, value_dim], and how many they were.

    Returns:
        ``(out, state)``: [batch, time, heads, value_dim] in q's dtype, and the state after the last key.

    Raises:
        ValueError: degree below 1, or shapes that don't go together.
    """
    check_heads(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    memory, length = (None, 0) if state is None else state
    time, heads = q.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    of_q, of_k = (polynomial_features(x.to(wide), degree) for x in (scale * q, repeated(k, heads)))
    values = repeated(v, heads).to(wide)
    out, memory = ssd(values, values.new_zeros(values.shape[:3]), of_k, of_q, initial_state=memory)
    n = torch.arange(length + 1, length + time + 1, device=q.device, dtype=wide)
    return (out * n[:, None, None] ** -0.5).to(q.dtype), (memory, length + time)


class PolynomialAttention(CausalAttention):
    """`polynomial_attention` of a language model.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        degree: p.
        length_power: of the number of keys that a query sees; 0 leaves it out.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't go together.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        degree: int = 3,
        length_power: float = -0.5,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_count("degree", degree)
        self.degree, self.length_power = degree, length_power

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """Arguments as of `CausalAttention.mix`."""
        return polynomial_attention(
            q, cache.keys, cache.values, degree=self.degree, length_power=self.length_power, mask=cache.mask
        )


def polynomial_matrix(
    q: Float[Tensor, "q_time dim"], k: Float[Tensor, "k_time dim"], degree: int = 3
) -> Float[Tensor, "q_time k_time"]:
    """The matrix of (1), for looking at.

    Args:
        q: [q_time, dim].
        k: [k_time, dim].
        degree: p.

    Raises:
        ValueError: NaN or infinity, an empty axis, or degree below 1.
        TypeError: not floating-point tensors.
    """
    check_count("degree", degree)
    check_matrix("q", q)
    check_matrix("k", k)
    return (q @ k.T / q.shape[1] ** 0.5) ** degree / k.shape[0] ** 0.5


def polynomial_jacobian_norm(
    q: Float[Tensor, "q_time dim"], k: Float[Tensor, "k_time dim"], degree: int = 3
) -> Float[Tensor, ""]:
    """Frobenius norm of the Jacobian of `polynomial_matrix` for q.

    Args:
        q: [q_time, dim].
        k: [k_time, dim].
        degree: p.

    Raises:
        ValueError: NaN or infinity, an empty axis, or degree below 1.
        TypeError: not floating-point tensors.
    """
    check_count("degree", degree)
    check_matrix("q", q)
    check_matrix("k", k)
    slope = degree * (q @ k.T / q.shape[1] ** 0.5) ** (degree - 1)  # entry (i, j) depends on q_i alone, through k_j
    return (slope.square() @ k.square().sum(1)).sum().sqrt() / (q.shape[1] * k.shape[0]) ** 0.5


def softmax_jacobian_norm(logits: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """Frobenius norm of the Jacobian of softmax over rows, as in (2), for the logits.

    Args:
        logits: [rows, columns].

    Raises:
        ValueError: NaN or infinity, or an empty axis.
        TypeError: not a floating-point tensor.
    """
    check_matrix("logits", logits)
    p = logits.softmax(1)
    squares = p.square().sum(1)
    # |diag(p) - p p^T|^2 = sum p_i^2 - 2 sum p_i^3 + (sum p_i^2)^2
    return (squares - 2 * p.pow(3).sum(1) + squares.square()).clamp(min=0.0).sum().sqrt()
