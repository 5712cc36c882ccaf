r"""Efficient attention families: windows, low rank, kernels and recurrences, and learned sparsity, side by side.

Paper: Efficient Attention Mechanisms for Large Language Models: A Survey (arXiv:2507.19595).
Paper: Longformer: The Long-Document Transformer (arXiv:2004.05150), windows, dilation and global tokens.
Paper: Linformer: Self-Attention with Linear Complexity (arXiv:2006.04768).
Paper: Transformers are RNNs (arXiv:2006.16236), linear attention.
Paper: Rethinking Attention with Performers (arXiv:2009.14794), FAVOR+.
Paper: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv:2406.06484).
Paper: Efficient Content-Based Sparse Attention with Routing Transformers (arXiv:2003.05997).
Paper: MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv:2502.13189).

A survey of ways around the quadratic cost of attention; here one layer for each idea, so that they can be compared in
the same model. Which pairs of tokens meet is fixed (a window), or learned (clusters, blocks), or all pairs meet
through a bottleneck: a few summaries of the keys, or a state of fixed size.

Equation:
    Windows: query i sees key j where $0 \le i - j < w d$ and $d$ divides $i - j$, or where i or j is global.

    Low rank, with k learned summaries of N tokens:
    $$ O = \mathrm{softmax}\big( Q (E K)^\top / \sqrt{d} \big) F V \tag{1} $$
    Kernels: a feature map in place of the exponential makes attention a recurrence,
    $$ S_i = a_i S_{i-1} + \phi(k_i) v_i^\top, \quad z_i = a_i z_{i-1} + \phi(k_i), \quad
       o_i = \frac{S_i^\top \phi(q_i)}{z_i^\top \phi(q_i)} \tag{2} $$
    with $\phi(x) = \mathrm{elu}(x) + 1$ and $a = 1$, or with random features that estimate the exponential,
    $$ \phi(x) = \tfrac{1}{\sqrt{m}} \big[ e^{w_r^\top x - |x|^2 / 2} \big]_{r \le m}, \quad
       \mathbb{E}\, \phi(x)^\top \phi(y) = e^{x^\top y}, \quad w_r \sim N(0, I) \text{ orthogonal.} \tag{3} $$
    Recurrences: a decay $a_i < 1$ in (2), without the denominator, or the delta rule
    $$ S_i = S_{i-1} + \beta_i k_i (v_i - S_{i-1}^\top k_i)^\top, \quad o_i = S_i^\top q_i \tag{4} $$
    Learned sparsity: tokens of the same cluster meet, $\arg\max_c x_i^\top \mu_c$ with $q = k = x$; or a query sees its
    own block of keys and the blocks before it with the highest $q_i^\top \bar k_{\text{block}}$.

Symbols:
    q, k, v: [batch, time, heads, dim], queries, keys and values; k and v may have fewer heads.
    w, d: window (visible tokens) and dilation.
    E, F: [rank, time], the projections of keys and values.
    phi: a feature map; [batch, time, heads, features].
    S, z: [batch, heads, features, dim] and [batch, heads, features], the state.
    a: [batch, time, heads], decays, given as log_decay.
    beta: [batch, time, heads], learning rates in [0, 1].
    mu: [heads, clusters, dim], centroids of unit length.

Defaults:
    window: 64 (ours).
    features: 64 for each head (ours).
    clusters: 8 (ours; the Routing Transformer takes about the square root of the length).
    decay of centroids: 0.999 (Routing Transformer, section 4.1).
    block: 16 and top_k: 4 (ours; MoBA takes 512 and 3 for lengths from 8,192 on).
    temperature of the decay: 16, $a = \sigma(\cdot)^{1/16}$ (as gated linear attention has it, arXiv:2312.06635).

Deviations:
    1. Linformer is bidirectional: every summary mixes all tokens, so that a causal language model would see its future.
    2. Positions: in (2) the features of the numerator are rotated (RoFormer, equation 19), not queries and keys: what
       an estimate of the exponential sees of rotated ones would not depend on differences of positions alone.
    3. FAVOR+ is stabilised by the running maximum of the exponents, which enters the recurrence as a decay; so the
       causal form is exact at any length. The features are drawn once, and none is added to them.
    4. Decay and delta rule are two layers; both at once (gated DeltaNet) would need a core of its own. Their outputs
       are normed for each head, as both papers' are.
    5. Clusters: each token goes to its nearest centroid. The Routing Transformer takes the best tokens of each
       centroid, where a later token can displace an earlier one. A token sees itself. With grouped heads, kv_heads
       count the shared queries and keys, and each mixes the values of heads / kv_heads heads.
    6. Blocks are counted from a row's first token that isn't padding. The keys of its blocks are gathered for each
       query: linear in the length, but a fused kernel would be quicker.
    7. The caches of windows keep all tokens, so that they can be cropped.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: with a window as long as the sequence; with as many blocks as
        there are; with one cluster (q = k); and Linformer with E = F = I.
    linear attention (masked matrix products): (2) with a = 1, in whatever pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_probability, check_sequence
from mlreviews.common.layers import linear
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.recurrent_attention import (
    FixedState,
    RecurrentAttention,
    Rotate,
    Tokens,
    check_heads,
    hidden,
    repeated,
)
from mlreviews_kernels.attention import attention, merge_attention
from mlreviews_kernels.delta_rule import delta_rule
from mlreviews_kernels.ssd import ssd

__all__ = [
    "BlockTopKAttention",
    "ClusterCache",
    "DecayAttention",
    "DeltaAttention",
    "FavorAttention",
    "LinearAttention",
    "LinformerAttention",
    "RoutingAttention",
    "WindowAttention",
    "block_topk_attention",
    "cluster_attention",
    "cluster_scores",
    "decay_attention",
    "delta_attention",
    "elu_features",
    "favor_attention",
    "favor_features",
    "favor_projection",
    "linear_attention",
    "linformer_attention",
    "updated_centroids",
    "window_attention",
]

LOWEST = -1e4  # below any exponent of a random feature; -inf - (-inf) would be NaN


# Windows


def window_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    window: int,
    *,
    dilation: int = 1,
    global_tokens: Int[Tensor, "batch globals"] | None = None,
    causal: bool = True,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Softmax attention to every d-th token of a window, and to and from global tokens.

    Args:
        q: [batch, q_time, heads, dim]; the last query is at the last key's position.
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        window: how many keys back a query sees, its own included (forth as well if not causal).
        dilation: steps between these keys.
        global_tokens: positions among the keys that all queries see, and that see all keys, [batch, globals]. A
            position may stand there twice only if the mask hides it.
        causal: a query sees no key after its own position, global or not.
        mask: True where a key may be seen.

    Returns:
        [batch, q_time, heads, value_dim]; 0 for a query that sees nothing.

    Raises:
        ValueError: window or dilation below 1, or shapes that don't go together.
    """
    check_count("window", window)
    check_count("dilation", dilation)
    rest = {"window": window, "causal": causal}
    local, lse = (
        attention(q, k, v, mask=mask, **rest) if dilation == 1 else _dilated(q, k, v, dilation, mask=mask, **rest)  # type: ignore[arg-type]
    )
    if global_tokens is None or global_tokens.shape[1] == 0:
        return local
    q_time = q.shape[1]
    first = k.shape[1] - q_time
    here = first + torch.arange(q_time, device=q.device)
    gap = here[:, None] - global_tokens[:, None]  # [batch, q_time, globals]
    in_window = (gap % dilation == 0) & (gap.abs() < window * dilation) & ((gap >= 0) | (not causal))
    seen = ~in_window & ((gap >= 0) | (not causal))
    if mask is not None:
        seen = seen & mask.gather(1, global_tokens)[:, None]
    columns = [x.take_along_dim(global_tokens[..., None, None], 1) for x in (k, v)]
    found, _ = merge_attention(*zip((local, lse), attention(q, *columns, causal=False, mask=seen), strict=True))
    # The rows of global tokens, for those that are among the queries.
    places = (global_tokens - first).clamp(min=0)
    visible = torch.ones_like(global_tokens[..., None] - torch.arange(k.shape[1], device=q.device), dtype=torch.bool)
    if causal:
        visible = torch.arange(k.shape[1], device=q.device) <= global_tokens[..., None]
    if mask is not None:
        visible = visible & mask[:, None]
    rows, _ = attention(q.take_along_dim(places[..., None, None], 1), k, v, causal=False, mask=visible)
    is_global, which = (gap == 0).max(2)
    return torch.where(is_global[..., None, None], rows.take_along_dim(which[..., None, None], 1), found)


def _dilated(
    q: Tensor, k: Tensor, v: Tensor, dilation: int, *, window: int, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens d apart as a sequence of their own. Zeros in front: the last query stays at the last key's position."""

    def apart(x: Tensor) -> Tensor:
        x = torch.cat([x.new_zeros(x.shape[0], -x.shape[1] % dilation, *x.shape[2:]), x], 1)
        return x.unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)

    def together(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, dilation)).transpose(1, 2).flatten(1, 2)[:, -q.shape[1] :]

    real = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    out, lse = attention(apart(q), apart(k), apart(v), window=window, causal=causal, mask=apart(real))
    return together(out), together(lse.mT).mT


class WindowAttention(CausalAttention):
    """`window_attention` of a language model, in which the first tokens of a sequence may be global.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        window: how many tokens back a query sees, its own included.
        dilation: steps between them.
        global_tokens: how many tokens at the beginning all others see.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1 (global_tokens: 0), or sizes that don't go together.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        window: int = 64,
        dilation: int = 1,
        global_tokens: int = 0,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_count("window", window)
        check_count("dilation", dilation)
        check_count("global_tokens", global_tokens, least=0)
        self.window, self.dilation, self.global_tokens = window, dilation, global_tokens

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """Arguments as of `CausalAttention.mix`."""
        length = cache.keys.shape[1]
        first = _padding(cache)[:, None] + torch.arange(min(self.global_tokens, length), device=q.device)
        # A row that is shorter than that has padding, which is hidden, at 0.
        first = torch.where(first < length, first, 0)
        options = {"dilation": self.dilation, "mask": cache.mask}
        return window_attention(q, cache.keys, cache.values, self.window, global_tokens=first, **options)  # type: ignore[arg-type]


def _padding(cache: KVCache) -> Tensor:
    """How many tokens at the left of each row are padding, [batch]."""
    if cache.mask is None:
        return torch.zeros(cache.keys.shape[0], dtype=torch.int64, device=cache.keys.device)
    return (~cache.mask).sum(1)


# Low rank


def linformer_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    E: Float[Tensor, "rank k_time"],
    F: Float[Tensor, "rank k_time"],
    *,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Equation (1), not causal.

    Args:
        q: [batch, q_time, heads, dim].
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        E: [rank, k_time], projection of the keys.
        F: [rank, k_time], projection of the values.
        mask: False where a key is padding, and enters no summary.

    Returns:
        [batch, q_time, heads, value_dim].

    Raises:
        ValueError: shapes that don't go together.
    """
    for name, projection in (("E", E), ("F", F)):
        if projection.ndim != 2 or projection.shape[1] != k.shape[1]:
            raise ValueError(f"{name}: expected [rank, {k.shape[1]}], got shape {tuple(projection.shape)}")
    k, v = hidden(k, mask), hidden(v, mask)
    keys, values = (torch.einsum("rn,bnhd->brhd", p.to(x.dtype), x) for p, x in ((E, k), (F, v)))
    return attention(q, keys, values, causal=False)[0]


class LinformerAttention(nn.Module):
    """`linformer_attention` over sequences of bounded length. Bidirectional: not for a causal language model.

    Args:
        d_model: size of a token's vector.
        heads: their size is d_model / heads.
        length: the longest sequence.
        rank: how many summaries; shared by the heads.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or heads that don't divide d_model.
    """

    def __init__(
        self, d_model: int, heads: int, *, length: int, rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("heads", heads), ("length", length), ("rank", rank)):
            check_count(name, size)
        if d_model % heads:
            raise ValueError(f"heads: expected a divisor of d_model {d_model}, got {heads}")
        self.d_model, self.heads = d_model, heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linear(d_model, d_model, bias=False, generator=generator) for _ in range(4)
        )
        self.E, self.F = (nn.Parameter(torch.randn(rank, length, generator=generator) / length**0.5) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch time d_model"], *, mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time d_model"]:
        """Of a whole sequence.

        Args:
            x: [batch, time, d_model], time at most `length`.
            mask: [batch, time], False at padding.

        Raises:
            ValueError: x has another shape, or is longer.
        """
        check_sequence(x, self.d_model, mask)
        time = x.shape[1]
        if time > self.E.shape[1]:
            raise ValueError(f"x: expected at most {self.E.shape[1]} tokens, got {time}")
        q, k, v = (proj(x).unflatten(2, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y: Tensor = self.o_proj(linformer_attention(q, k, v, self.E[:, :time], self.F[:, :time], mask=mask).flatten(2))
        return y


# Kernels and recurrences


def elu_features(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """``elu(x) + 1``, positive.

    Args:
        x: [..., dim], queries or keys.
    """
    return nn.functional.elu(x) + 1


def favor_projection(
    features: int, dim: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "features dim"]:
    """Directions of random features (3): each is N(0, I), and those of a block of `dim` are orthogonal.

    Args:
        features: m.
        dim: of queries and keys.
        generator: draws; None is the global one.
        dtype: of the result.

    Raises:
        ValueError: a size below 1.
    """
    check_count("features", features)
    check_count("dim", dim)
    draws = torch.randn(-(-features // dim), dim, dim, generator=generator, dtype=dtype)
    q, r = torch.linalg.qr(draws)
    # Signs that make q uniform among all rotations: the decomposition alone fixes those of r.
    q = q * torch.sign(r.diagonal(dim1=1, dim2=2))[:, None]
    lengths = torch.randn(draws.shape, generator=generator, dtype=dtype).norm(dim=2, keepdim=True)
    return (q.mT * lengths).flatten(0, 1)[:features]


def favor_features(
    x: Float[Tensor, "*batch dim"], projection: Float[Tensor, "features dim"]
) -> Float[Tensor, "*batch features"]:
    """Equation (3): ``E favor_features(x) @ favor_features(y) = exp(x @ y)``. Overflows where exponents are large.

    Args:
        x: [..., dim].
        projection: of `favor_projection`.
    """
    return _exponents(x, projection).exp() / projection.shape[0] ** 0.5


def _exponents(x: Tensor, projection: Tensor) -> Tensor:
    return x @ projection.T.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2


def linear_attention(
    q: Float[Tensor, "batch q_time heads features"],
    k: Float[Tensor, "batch k_time kv_heads features"],
    v: Float[Tensor, "batch k_time kv_heads dim"],
    *,
    causal: bool = True,
    rotated: tuple[Tensor, ...] | None = None,
    log_decay: Float[Tensor, "batch k_time heads"] | None = None,
    state: FixedState | None = None,
) -> tuple[Float[Tensor, "batch q_time heads dim"], FixedState]:
    """Equation (2) for queries and keys that went through a feature map; time and memory are linear in the length.

    Args:
        q: [batch, q_time, heads, features], not negative; as long as k if causal.
        k: [batch, k_time, kv_heads, features], not negative; 0 hides a token.
        v: [batch, k_time, kv_heads, dim].
        causal: whether a query sees its own and earlier keys alone, or all.
        rotated: q and k for the numerator, where they are others (RoPE); the denominator always takes q and k.
        log_decay: [batch, k_time, heads], of causal attention; None is 0.
        state: of an earlier causal call.

    Returns:
        ``(out, state)``: [batch, q_time, heads, dim] in v's dtype, 0 where nothing is seen, and the state after the
        last key.

    Raises:
        ValueError: shapes that don't go together, or a state or decay without causal.
    """
    check_heads(q, k, v, causal=causal)
    if not causal and (state is not None or log_decay is not None):
        raise ValueError("causal: expected True with a state or a decay, got False")
    wide = torch.promote_types(v.dtype, torch.float32)
    one = v.new_ones((*v.shape[:3], 1), dtype=wide)
    above, below = (tuple(x.to(wide) for x in group) for group in ((*(rotated or (q, k)), v), (q, k, one)))
    if causal:
        memory, normaliser = (None, None) if state is None else (state.memory, state.normaliser)
        top, memory = decay_attention(above[0], above[1], above[2], log_decay, state=memory)
        bottom, normaliser = decay_attention(below[0], below[1], below[2], log_decay, state=normaliser)
    else:
        memory, normaliser = (
            torch.einsum("bnhf,bnhd->bhfd", *(repeated(x, q.shape[2]) for x in group[1:])) for group in (above, below)
        )
        top, bottom = (
            torch.einsum("bnhf,bhfd->bnhd", group[0], held) for group, held in ((above, memory), (below, normaliser))
        )
    out = top / bottom.clamp(min=torch.finfo(wide).tiny)
    length = k.shape[1] + (0 if state is None else state.length)
    return out.to(v.dtype), FixedState(memory, length, normaliser)


def favor_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    projection: Float[Tensor, "features dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "batch k_time"] | None = None,
    rotate: Rotate | None = None,
    state: FixedState | None = None,
) -> tuple[Float[Tensor, "batch q_time heads value_dim"], FixedState]:
    """An estimate of softmax attention by `linear_attention` with the features (3) of q and k over dim^(1/4).

    Args:
        q: [batch, q_time, heads, dim]; as long as k if causal.
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        projection: of `favor_projection`.
        causal: whether a query sees its own and earlier keys alone, or all.
        mask: False where a key is padding.
        rotate: from the features of q and k to what the numerator takes in their place (RoPE).
        state: of an earlier causal call.

    Returns:
        ``(out, state)`` as `linear_attention`. Exponents of any size are fine.

    Raises:
        ValueError: shapes that don't go together.
    """
    check_heads(q, k, v, causal=causal)
    if projection.ndim != 2 or projection.shape[1] != q.shape[3]:
        raise ValueError(f"projection: expected [features, {q.shape[3]}], got shape {tuple(projection.shape)}")
    heads, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    of_q, of_k = (_exponents(x.to(wide) / q.shape[3] ** 0.25, projection) for x in (q, repeated(k, heads)))
    if mask is not None:
        of_k = of_k.masked_fill(~mask[..., None, None], LOWEST)
    # A factor of a query's features cancels; one of the keys' does when it is the same for all: their running maximum.
    phi_q = (of_q - of_q.amax(3, keepdim=True)).exp()
    largest = of_k.amax(3)
    if not causal:
        top = largest.amax(1, keepdim=True)
        log_decay = None
    else:
        before = largest.new_full(largest[:, :1].shape, LOWEST) if state is None else _scale_of(state)[:, None]
        tops = torch.cat([before, largest], 1).cummax(1).values
        top, log_decay = tops[:, 1:], tops[:, :-1] - tops[:, 1:]
    phi_k = (of_k - top[..., None]).exp()
    phi_k = hidden(phi_k, mask)
    out, found = linear_attention(
        phi_q,
        phi_k,
        repeated(v, heads),
        causal=causal,
        rotated=None if rotate is None else rotate(phi_q, phi_k),
        log_decay=log_decay,
        state=state,
    )
    return out, found._replace(log_scale=top[:, -1])


def _scale_of(state: FixedState) -> Tensor:
    if state.log_scale is None:
        raise ValueError("state: expected one of favor_attention, got none with a log_scale")
    return state.log_scale


def decay_attention(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time kv_heads features"],
    v: Float[Tensor, "batch time kv_heads dim"],
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    *,
    state: Float[Tensor, "batch heads features dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch heads features dim"]]:
    """The numerator of (2): ``o_i = sum_j (product of the decays after j) (k_j . q_i) v_j`` over j up to i.

    Args:
        q: [batch, time, heads, features].
        k: [batch, time, kv_heads, features].
        v: [batch, time, kv_heads, dim].
        log_decay: [batch, time, heads], logarithms of decays; None is 0.
        state: S before the first token; None is 0.

    Returns:
        ``(out, state)``: [batch, time, heads, dim] in v's dtype, and S after the last token, float32 at least.

    Raises:
        ValueError: shapes that don't go together.
    """
    check_heads(q, k, v)
    k, v = (repeated(x, q.shape[2]) for x in (k, v))
    if log_decay is None:
        log_decay = v.new_zeros(v.shape[:3])
    return ssd(v, log_decay.to(v.dtype), k, q, initial_state=state)


def delta_attention(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time kv_heads features"],
    v: Float[Tensor, "batch time kv_heads dim"],
    beta: Float[Tensor, "batch time heads"],
    *,
    state: Float[Tensor, "batch heads features dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch heads features dim"]]:
    """The delta rule (4): what the state recalls for a key is replaced by its value.

    Args:
        q: [batch, time, heads, features].
        k: [batch, time, kv_heads, features], of length 1.
        v: [batch, time, kv_heads, dim].
        beta: [batch, time, heads], in [0, 1]; 0 leaves the state as it is.
        state: S before the first token; None is 0.

    Returns:
        ``(out, state)``: [batch, time, heads, dim] in v's dtype, and S after the last token, float32 at least.

    Raises:
        ValueError: shapes that don't go together.
    """
    check_heads(q, k, v)
    return delta_rule(q, repeated(k, q.shape[2]), repeated(v, q.shape[2]), beta, initial_state=state)


class LinearAttention(RecurrentAttention):
    """`linear_attention` with the features ``elu(x) + 1``; the state has one size at any length.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding of the numerator's features; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't go together.
    """

    def recur(
        self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None
    ) -> tuple[Float[Tensor, "batch time heads dim"], FixedState]:
        """Arguments as of `RecurrentAttention.recur`."""
        q, k = elu_features(tokens.q), hidden(elu_features(tokens.k), tokens.mask)
        return linear_attention(q, k, tokens.v, rotated=rotate(q, k), state=state)


class FavorAttention(RecurrentAttention):
    """`favor_attention` with features that are drawn once.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        features: random features, shared by the heads; even, for RoPE.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding of the numerator's features; None leaves positions out.
        generator: draws the weights and features; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't go together.
    """

    projection: Tensor

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        features: int = 64,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        if rope_base is not None and features % 2:
            raise ValueError(f"features: expected an even number for RoPE, got {features}")
        self.register_buffer("projection", favor_projection(features, self.head_dim, generator=generator))

    def recur(
        self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None
    ) -> tuple[Float[Tensor, "batch time heads dim"], FixedState]:
        """Arguments as of `RecurrentAttention.recur`."""
        q, k, v = tokens.q, tokens.k, tokens.v
        return favor_attention(q, k, v, self.projection, mask=tokens.mask, rotate=rotate, state=state)


class DecayAttention(RecurrentAttention):
    """`decay_attention` with decays that depend on the token, and a norm for each head.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        temperature: the decays are a sigmoid to the power of its inverse; the higher, the longer the memory.
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
        temperature: float = 16.0,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_number("temperature", temperature, above=0.0)
        self.temperature = temperature
        self.a_proj = linear(d_model, heads, generator=generator)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def recur(
        self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None
    ) -> tuple[Float[Tensor, "batch time heads dim"], FixedState]:
        """Arguments as of `RecurrentAttention.recur`."""
        log_decay = nn.functional.logsigmoid(self.a_proj(tokens.x)) / self.temperature
        q, k = rotate(self.head_dim**-0.5 * tokens.q, hidden(tokens.k, tokens.mask))
        before, length = (None, 0) if state is None else (state.memory, state.length)
        out, memory = decay_attention(q, k, tokens.v, log_decay, state=before)
        return self.norm(out.to(self.norm.weight.dtype)), FixedState(memory, length + q.shape[1])


class DeltaAttention(RecurrentAttention):
    """`delta_attention` with queries and keys of length 1, and a norm for each head.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
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
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        self.b_proj = linear(d_model, heads, bias=False, generator=generator)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def recur(
        self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None
    ) -> tuple[Float[Tensor, "batch time heads dim"], FixedState]:
        """Arguments as of `RecurrentAttention.recur`."""
        beta = hidden(self.b_proj(tokens.x).sigmoid(), tokens.mask)
        q, k = rotate(*(nn.functional.normalize(y, dim=3) for y in (tokens.q, tokens.k)))
        before, length = (None, 0) if state is None else (state.memory, state.length)
        out, memory = delta_attention(q, k, tokens.v, beta, state=before)
        return self.norm(out.to(self.norm.weight.dtype)), FixedState(memory, length + q.shape[1])


# Learned sparsity


def cluster_scores(
    x: Float[Tensor, "batch time heads dim"], centroids: Float[Tensor, "heads clusters dim"]
) -> Float[Tensor, "batch time heads clusters"]:
    """Inner products with the centroids. The largest is the nearest's, as all are of one length.

    Args:
        x: [batch, time, heads, dim].
        centroids: [heads, clusters, dim], of length 1.

    Raises:
        ValueError: shapes that don't go together.
    """
    if x.ndim != 4 or centroids.ndim != 3 or (x.shape[2], x.shape[3]) != (centroids.shape[0], centroids.shape[2]):
        expected = f"[{x.shape[2]}, clusters, {x.shape[3]}]" if x.ndim == 4 else "x of [batch, time, heads, dim]"
        raise ValueError(f"centroids: expected {expected}, got shape {tuple(centroids.shape)}")
    return torch.einsum("bthd,hcd->bthc", x, centroids.to(x.dtype))


def updated_centroids(
    centroids: Float[Tensor, "heads clusters dim"],
    x: Float[Tensor, "batch time heads dim"],
    *,
    decay: float = 0.999,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "heads clusters dim"]:
    """One step of online k-means on the sphere: centroids move towards the mean of the tokens assigned to them.

    Args:
        centroids: [heads, clusters, dim], of length 1.
        x: [batch, time, heads, dim].
        decay: how much of a centroid is kept; 0 is a step of Lloyd's algorithm. Those without tokens stay.
        mask: False at tokens that don't count.

    Raises:
        ValueError: decay outside [0, 1], or shapes that don't go together.
    """
    check_probability("decay", decay)
    member = nn.functional.one_hot(cluster_scores(x, centroids).argmax(3), centroids.shape[1]).to(x.dtype)
    member = hidden(member, mask)
    count = member.sum((0, 1))[..., None]
    mean = torch.einsum("bthc,bthd->hcd", member, x) / count.clamp(min=1)
    moved = nn.functional.normalize(decay * centroids + (1 - decay) * mean.to(centroids.dtype), dim=2)
    return torch.where(count > 0, moved, centroids)


def cluster_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time heads dim"],
    v: Float[Tensor, "batch k_time heads value_dim"],
    q_clusters: Int[Tensor, "batch q_time heads"],
    k_clusters: Int[Tensor, "batch k_time heads"],
    clusters: int,
    *,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Causal softmax attention of each query to the keys of its cluster.

    A whole sequence is sorted by cluster, and each cluster is a sequence of its own. Queries fewer than the keys, as in
    decoding, take a mask.

    Args:
        q: [batch, q_time, heads, dim]; the last query is at the last key's position.
        k: [batch, k_time, heads, dim].
        v: [batch, k_time, heads, value_dim].
        q_clusters: [batch, q_time, heads]. Of a whole sequence, those of the keys are taken for both.
        k_clusters: [batch, k_time, heads].
        clusters: how many there are.
        mask: False where a key is padding.

    Returns:
        [batch, q_time, heads, value_dim]; 0 for a query that sees nothing.
    """
    batch, q_time, heads, _ = q.shape
    time = k.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[:, :, None] for x in (q, k, v))  # [batch * heads, time, 1, dim]
    of_q, of_k = (c.transpose(1, 2).flatten(0, 1) for c in (q_clusters, k_clusters))
    real = None if mask is None else mask.repeat_interleave(heads, 0)
    if q_time < time:
        same = of_q[:, :, None] == of_k[:, None]
        out = attention(q, k, v, mask=same if real is None else same & real[:, None])[0]
    else:
        order = of_k.argsort(dim=1, stable=True)
        sizes = nn.functional.one_hot(of_k, clusters).sum(1).flatten()
        ends = nn.functional.pad(sizes.cumsum(0), (1, 0))
        packed = (x.take_along_dim(order[..., None, None], 1).flatten(0, 1)[None] for x in (q, k, v))
        keys = None if real is None else real.gather(1, order).flatten()[None]
        out = attention(*packed, mask=keys, cu_seqlens=ends)[0][0].unflatten(0, (-1, time))
        out = out.take_along_dim(order.argsort(1)[..., None, None], 1)
    return out[:, :, 0].unflatten(0, (batch, heads)).transpose(1, 2)


class ClusterCache(NamedTuple):
    """A `KVCache`, and how near each token was to each centroid.

    Attributes:
        cache: keys, values and mask.
        scores: [batch, time, heads, clusters], inner products; a token is in the cluster of the largest.
    """

    cache: KVCache
    scores: Tensor

    @property
    def length(self) -> int:
        """How many tokens are held, padding included."""
        return self.cache.length

    def crop(self, length: int) -> ClusterCache:
        """The first tokens alone.

        Args:
            length: how many.
        """
        return ClusterCache(self.cache.crop(length), self.scores[:, :length])

    def rows(self, index: Int[Tensor, " rows"]) -> ClusterCache:
        """The given rows of the batch.

        Args:
            index: [rows], int64.
        """
        return ClusterCache(self.cache.rows(index), self.scores[index])


class RoutingAttention(CausalAttention):
    """`cluster_attention` with shared queries and keys of length sqrt(dim); centroids learn in training mode only.

    Args:
        d_model: size of a token's vector.
        heads: of the values.
        clusters: for each head.
        decay: of the centroids, see `updated_centroids`.
        kv_heads: of the shared queries and keys; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding, after the assignment; None leaves positions out.
        generator: draws the weights and centroids; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't go together.
    """

    centroids: Tensor

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        clusters: int = 8,
        decay: float = 0.999,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_count("clusters", clusters)
        check_probability("decay", decay)
        self.decay = decay
        del self.q_proj
        self.v_proj = linear(d_model, d_model, bias=False, generator=generator)
        drawn = torch.randn(self.kv_heads, clusters, self.head_dim, generator=generator)
        self.register_buffer("centroids", nn.functional.normalize(drawn, dim=2))

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: ClusterCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], ClusterCache]:
        """Arguments, results and errors as of `CausalAttention.forward`; the state is a `ClusterCache`."""
        check_sequence(x, self.d_model, mask)
        shared, v = (proj(x).unflatten(2, (self.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        shared = self.head_dim**0.5 * nn.functional.normalize(shared, dim=3)
        scores = cluster_scores(shared, self.centroids)
        if self.training:
            with torch.no_grad():
                self.centroids.copy_(updated_centroids(self.centroids, shared, decay=self.decay, mask=mask))
        (q,) = self.rotated(shared, start=0 if state is None else state.length, positions=positions)
        if state is None:
            state = ClusterCache(KVCache(q, v, mask), scores)
        else:
            state = ClusterCache(state.cache.append(q, v, mask), torch.cat([state.scores, scores], 1))
        cache, count, clusters = state.cache, self.centroids.shape[1], state.scores.argmax(3)
        out = cluster_attention(q, cache.keys, cache.values, scores.argmax(3), clusters, count, mask=cache.mask)
        return self.o_proj(out.flatten(2)), state


def block_topk_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    block: int,
    top_k: int,
    *,
    padding: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Causal softmax attention to a query's own block of keys, and the blocks before it with the best mean keys.

    Args:
        q: [batch, q_time, heads, dim]; the last query is at the last key's position.
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        block: keys in a block.
        top_k: blocks that a query sees, its own included.
        padding: how many keys at the left of each row are none; blocks are counted from there.

    Returns:
        [batch, q_time, heads, value_dim]; 0 for queries of padding.

    Raises:
        ValueError: block or top_k below 1.
    """
    check_count("block", block)
    check_count("top_k", top_k)
    (batch, q_time, heads, dim), (time, kv_heads) = q.shape, k.shape[1:3]
    padding = torch.zeros(batch, dtype=torch.int64, device=q.device) if padding is None else padding
    steps = torch.arange(time, device=q.device)
    if top_k * block >= time:
        return attention(q, k, v, mask=steps >= padding[:, None])[0]
    # Rows begin at their first token, and end with repetitions that no query has come to yet.
    source = (padding[:, None] + steps).clamp(max=time - 1)[..., None, None]
    k, v = (
        nn.functional.pad(x.take_along_dim(source, 1), (0, 0, 0, 0, 0, -time % block)).unflatten(1, (-1, block))
        for x in (k, v)
    )
    here = steps[time - q_time :] - padding[:, None]  # [batch, q_time]
    own = (here // block)[..., None, None]
    means = repeated(k.mean(2), heads)
    gate = torch.einsum("bthd,bnhd->bthn", q, means)
    number = torch.arange(k.shape[1], device=q.device)
    gate = gate.masked_fill(number >= own, -torch.inf).masked_fill(number == own, torch.inf)
    best = gate.topk(top_k, dim=3)
    row = torch.arange(batch, device=q.device)[:, None, None, None]
    head = (torch.arange(heads, device=q.device) // (heads // kv_heads))[:, None]
    keys, values = (x[row, best.indices, :, head] for x in (k, v))  # [batch, q_time, heads, top_k, block, dim]
    places = best.indices[..., None] * block + torch.arange(block, device=q.device)
    seen = (best.values > -torch.inf)[..., None] & (places <= here[..., None, None, None])
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthd,bthncd->bthnc", q.to(wide), keys.to(wide)) * dim**-0.5
    # A query of padding sees all for a moment: a softmax over nothing is NaN.
    empty = (here < 0)[..., None, None]
    weights = scores.flatten(3).masked_fill(~(seen.flatten(3) | empty), -torch.inf).softmax(3).masked_fill(empty, 0.0)
    return torch.einsum("bthm,bthmd->bthd", weights, values.flatten(3, 4).to(wide)).to(q.dtype)


class BlockTopKAttention(CausalAttention):
    """`block_topk_attention` of a language model.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        block: tokens in a block.
        top_k: blocks that a query sees, its own included.
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
        block: int = 16,
        top_k: int = 4,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_count("block", block)
        check_count("top_k", top_k)
        self.block, self.top_k = block, top_k

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """Arguments as of `CausalAttention.mix`."""
        return block_topk_attention(q, cache.keys, cache.values, self.block, self.top_k, padding=_padding(cache))
