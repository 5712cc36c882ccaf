r"""Differential attention: the difference of two softmaxes weighs the values, so that what both attend to cancels.

Paper: Differential Transformer (arXiv:2410.05258)

Softmax gives some weight to every token, and over a long context the weights of irrelevant tokens add up to noise.
Here each head has two queries and two keys; the second map of weights, times a learned number, is subtracted from the
first, as a differential amplifier subtracts what its two inputs share. Weights can become negative. Everything else of
the transformer stays, with half as many heads of twice the value size, hence the same number of parameters.

Equation:
    $$ [Q_1; Q_2] = X W_Q, \quad [K_1; K_2] = X W_K, \quad V = X W_V, \qquad
       A = \operatorname{softmax}\Bigl(\frac{Q_1 K_1^\top}{\sqrt d}\Bigr)
         - \lambda \operatorname{softmax}\Bigl(\frac{Q_2 K_2^\top}{\sqrt d}\Bigr), \qquad
       \operatorname{DiffAttn}(X) = A V \tag{1} $$
    Rows of A sum to $1 - \lambda$. The number is shared by the heads of a layer, and learned through four vectors:
    $$ \lambda = \exp(\lambda_{q1} \cdot \lambda_{k1}) - \exp(\lambda_{q2} \cdot \lambda_{k2}) + \lambda_{init},
       \qquad \lambda_{init} = 0.8 - 0.6\, e^{-0.3\, l} \tag{2} $$
    Each head is normed by itself, and scaled so that gradients have the size they have in a standard transformer:
    $$ \operatorname{head}_i = (1 - \lambda_{init}) \operatorname{RMSNorm}(\operatorname{DiffAttn}_i(X)), \qquad
       Y = [\operatorname{head}_1; \dots; \operatorname{head}_h]\, W_O \tag{3} $$

Symbols:
    X: [batch, time, d_model].
    Q_1, Q_2: [batch, time, h, d], after RoPE; K_1, K_2 likewise, with h_kv heads.
    V: [batch, time, h_kv, 2 d].
    h: heads / 2, where `heads` is that of a standard transformer of the same size; h_kv: kv_heads / 2.
    d: d_model / heads.
    l: index of the layer, 0 for the first.
    \lambda_{q1}, \lambda_{k1}, \lambda_{q2}, \lambda_{k2}: [d], learned.

Defaults:
    heads: those of the standard transformer to compare with, even; h is half of it (authors' code).
    lambda vectors: drawn from N(0, 0.1^2) (authors' code).
    eps: 1e-5, of the RMSNorm (authors' code).

Deviations:
    1. The layer index counts from 0, as in the authors' code. The paper counts from 1 and has l - 1 in eq. (2): the
       values are the same, 0.2 in the first layer.
    2. The paper calls the norm of eq. (3) GroupNorm, without saying whether it has weights. There is one weight for
       each of the 2 d entries, shared by the heads, as in the authors' code since October 2024 (none before).
    3. With fewer heads of keys and values, the authors' eager listing lets both maps of a head use one key; their
       FlashAttention listings pair $Q_1$ with $K_1$ and $Q_2$ with $K_2$, as eq. (1) does, and as is done here.
    4. RoPE pairs entries as Llama does; the authors' code pairs neighbours. The weights differ by a permutation.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: eq. (1) with lambda = 0; and, times 1 - lambda, where the two maps
        are the same.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews_kernels.attention import attention
from mlreviews_kernels.differential_attention import differential_attention

__all__ = ["DifferentialAttention", "differential_map", "initial_lambda", "learned_lambda", "two_call_attention"]

Queries = Float[Tensor, "batch q_time heads dim"]
Keys = Float[Tensor, "batch k_time kv_heads dim"]


def initial_lambda(layer: int) -> float:
    r"""$\lambda_{init}$ of eq. (2): 0.2 in the first layer, towards 0.8 in deep ones.

    Args:
        layer: index of the layer, from 0 on.

    Raises:
        ValueError: layer is negative.
    """
    check_count("layer", layer, least=0)
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def learned_lambda(
    q1: Float[Tensor, " dim"],
    k1: Float[Tensor, " dim"],
    q2: Float[Tensor, " dim"],
    k2: Float[Tensor, " dim"],
    initial: float,
) -> Float[Tensor, ""]:
    r"""$\lambda$ of eq. (2), computed in float32 at least.

    Args:
        q1: [d], one factor of the first exponent.
        k1: [d], the other.
        q2: [d], one factor of the second exponent.
        k2: [d], the other.
        initial: $\lambda_{init}$.
    """
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q1, k1, q2, k2)]
    return (wide[0] * wide[1]).sum().exp() - (wide[2] * wide[3]).sum().exp() + initial


def differential_map(
    q1: Queries, k1: Keys, q2: Queries, k2: Keys, lam: float | Float[Tensor, ""], *, causal: bool = True
) -> Float[Tensor, "batch heads q_time k_time"]:
    r"""The matrix A of eq. (1), written out: for reading, measuring and drawing. The layer never forms it.

    Args:
        q1: [batch, q_time, heads, dim]; the last query is at the last key's position.
        k1: [batch, k_time, kv_heads, dim]; query head i uses head i // (heads / kv_heads).
        q2: of q1's shape.
        k2: of k1's shape.
        lam: $\lambda$.
        causal: whether a query sees no key after its own position.

    Returns:
        [batch, heads, q_time, k_time], in float32 at least; rows sum to $1 - \lambda$.

    Raises:
        ValueError: q2 or k2 has another shape than q1 or k1, or there are fewer keys than queries.
    """
    for name, x, other in (("q2", q2, q1), ("k2", k2, k1)):
        if x.shape != other.shape:
            raise ValueError(f"{name}: expected shape {tuple(other.shape)}, as {name[0]}1 has, got {tuple(x.shape)}")
    return _softmax(q1, k1, causal) - lam * _softmax(q2, k2, causal)


def _softmax(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[3]
    if queries > keys:
        raise ValueError(f"q1: expected at most {keys} queries, as many as keys, got {queries}")
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * dim**-0.5
    if causal:
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)


def two_call_attention(
    q1: Queries,
    k1: Keys,
    q2: Queries,
    k2: Keys,
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    lam: float | Float[Tensor, ""],
    *,
    causal: bool = True,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    r"""Eq. (1) out of two ordinary attentions, for any implementation of those; the layer uses one fused pass instead.

    Args:
        q1: [batch, q_time, heads, dim]; the last query is at the last key's position.
        k1: [batch, k_time, kv_heads, dim].
        q2: of q1's shape.
        k2: of k1's shape.
        v: [batch, k_time, kv_heads, value_dim].
        lam: $\lambda$.
        causal: whether a query sees no key after its own position.
    """
    one, other = (attention(q, k, v, causal=causal)[0] for q, k in ((q1, k1), (q2, k2)))
    return (one - lam * other).to(q1.dtype)


class DifferentialAttention(CausalAttention):
    """A layer of eq. (1) to (3), with the parameters and the cache of a standard layer of as many `heads`.

    Args:
        d_model: size of a token's vector.
        heads: of a standard layer, whose size they have: an even number. There are heads / 2 differential heads.
        kv_heads: likewise, an even divisor of `heads`; None is `heads`.
        layer: which block of a model this is, from 0 on: it decides lambda's first value.
        rope_base: of the rotary embedding, which both queries and both keys get; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, sizes that don't divide, an odd number of heads, or an odd head size with RoPE.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        for name, count in (("heads", self.heads), ("kv_heads", self.kv_heads)):
            if count % 2:
                raise ValueError(f"{name}: expected an even number, two for each differential head, got {count}")
        self.lambda_init = initial_lambda(layer)
        drawn = (torch.empty(self.head_dim).normal_(std=0.1, generator=generator) for _ in range(4))
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = map(nn.Parameter, drawn)
        self.subln = nn.RMSNorm(2 * self.head_dim, eps=1e-5)

    @property
    def lam(self) -> Float[Tensor, ""]:
        """The present lambda, a number."""
        vectors = self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2
        return learned_lambda(*vectors, self.lambda_init)

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time half value_dim"]:
        """What the differential heads give, normed and scaled.

        Args:
            q: [batch, time, heads, dim], after RoPE: both queries of a head beside each other.
            cache: of all tokens, these included; keys and values as in a standard layer.
        """
        v = cache.values.unflatten(2, (-1, 2)).flatten(3)
        out = differential_attention(*_pairs(q, cache.keys), v, self.lam, mask=cache.mask)
        normed: Tensor = self.subln(out.to(self.subln.weight.dtype))
        return ((1.0 - self.lambda_init) * normed).to(out.dtype)

    def maps(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch half time time"]:
        """The matrices A of a sequence, [batch, heads / 2, time, time], to look at.

        Args:
            x: [batch, time, d_model], as of `forward` without a state.
        """
        q, k, _ = self.project(x, 0)
        return differential_map(*_pairs(q, k), self.lam)


def _pairs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q1, k1, q2, k2 from heads that lie beside each other in pairs."""
    return q[:, :, ::2], k[:, :, ::2], q[:, :, 1::2], k[:, :, 1::2]
