r"""Tree Attention: exact attention over keys and values that lie on several devices, by three small all-reduces.

Paper: Tree Attention: Topology-Aware Decoding for Long-Context Attention on GPU Clusters (arXiv:2408.04093).

Attention is the gradient of a log-sum-exp, and log-sum-exps of parts combine in any order. So each device attends to
the keys it holds, and what it found, one vector and one number a query and head, is reduced over all devices along a
tree, in a number of steps that grows with the logarithm of the number of devices. Ring attention passes all keys and
values around instead; here the traffic doesn't depend on the length of the context.

Equation:
    $$ F_i(\zeta) = \log \sum_a \exp(\sigma\, q_i \cdot k_a + \zeta_i \cdot v_a), \qquad
       o_i = \left. \frac{\partial F_i}{\partial \zeta_i} \right|_{\zeta = 0}
           = \sum_a \operatorname{softmax}_a(\sigma\, q_i \cdot k_a)\, v_a \tag{1} $$
    Device r has attended to its own keys, with output $o_r$ and log-sum-exp $\ell_r = F_i(0)$ over them. Then
    $$ m = \max_r \ell_r, \qquad n = \sum_r e^{\ell_r - m} o_r, \qquad d = \sum_r e^{\ell_r - m} \tag{2} $$
    $$ o = n / d, \qquad \ell = m + \log d \tag{3} $$
    A rank of p sends, in an all-reduce that wastes nothing and in ring attention with t keys a rank,
    $$ V_\text{tree} = 2\, \tfrac{p - 1}{p}\, b\, h\, (d + 2), \qquad
       V_\text{ring} = 2\, (p - 1)\, b\, t\, h_\text{kv}\, d \quad \text{elements a query.} \tag{4} $$

Symbols:
    q: [batch, q_time, heads, dim], queries, the same on all devices.
    k: [batch, k_time, kv_heads, dim], keys; each device holds some of them.
    v: [batch, k_time, kv_heads, value_dim], values of those keys.
    zeta: [batch, q_time, heads, value_dim], the source of the energy F.
    sigma: scale of the scores, dim^-1/2 where not given.

Defaults:
    scale: None, dim^-1/2 as in every transformer; the paper leaves the scale out of its formulas.

Deviations:
    1. The numerator is n of (2). The code published with the paper multiplies each part by exp(lse) once more, which is
       not attention unless all parts have one log-sum-exp; the reproduction measures the difference.
    2. Numerator and denominator travel in one buffer, so there are two calls instead of three, with the same bytes.
    3. Gradients flow through the reduction; the paper decodes only.
    4. New tokens go to the ranks in turn, so that memory stays even; the paper doesn't say where they go.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: with one shard, and (1) is its output for any keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.tiny_lm import LMCache
from mlreviews_kernels.attention import attention, merge_attention

__all__ = [
    "ShardedKVCache",
    "TreeAttention",
    "attention_energy",
    "distributed_tree_attention",
    "ring_volume",
    "split_cache",
    "tree_attention",
    "tree_volume",
]


def attention_energy(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    zeta: Float[Tensor, "batch q_time heads value_dim"],
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads q_time"]:
    """The generating function of attention, F of eq. (1), with all scores at once: made to be differentiated.

    Its gradient in zeta at 0 is the attention output, its second derivative the covariance of the values under the
    attention weights.

    Args:
        q: [batch, q_time, heads, dim].
        k: [batch, k_time, kv_heads, dim]; query head h uses head h // (heads / kv_heads).
        v: [batch, k_time, kv_heads, value_dim].
        zeta: [batch, q_time, heads, value_dim].
        causal: a query sees no later key; the last query is at the last key's position.
        scale: of the scores; dim^-1/2 if None.

    Raises:
        ValueError: heads is not a multiple of kv_heads, or there are no keys, or fewer than causal queries.
    """
    heads, kv_heads, keys = q.shape[2], k.shape[2], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides the {heads} heads, got {tuple(k.shape)}")
    if keys < (q.shape[1] if causal else 1):
        raise ValueError(f"k: expected a key for every query to see, got {keys} for {q.shape[1]} queries")
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * (q.shape[3] ** -0.5 if scale is None else scale), k)
    scores = scores + torch.einsum("bihd,bjhd->bhij", zeta, v)
    if causal:
        later = torch.ones(q.shape[1], keys, dtype=torch.bool, device=q.device).triu(keys - q.shape[1] + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.logsumexp(-1)


def tree_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch q_time heads value_dim"], Float[Tensor, "batch heads q_time"]]:
    """Attention of every query to the keys of all shards, merged pair by pair along a binary tree, in one process.

    Args:
        q: [batch, q_time, heads, dim].
        keys: [batch, k_time, kv_heads, dim] for each shard, with lengths of their own, in any order.
        values: [batch, k_time, kv_heads, value_dim] for each shard.
        masks: for each shard, True where a query may attend: [batch, k_time] or [batch, q_time, k_time].
        scale: of the scores; dim^-1/2 if None.

    Returns:
        The output in q's dtype, and the log-sum-exp of the scores; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: no shards, not as many keys as values or masks, or shapes that don't go together.
    """
    counts = {"values": len(values), "masks": len(keys) if masks is None else len(masks)}
    if not keys:
        raise ValueError("keys: expected at least one shard, got none")
    for name, count in counts.items():
        if count != len(keys):
            raise ValueError(f"{name}: expected one for each of {len(keys)} shards, got {count}")
    parts = [
        attention(q, k, v, causal=False, mask=mask, scale=scale)
        for k, v, mask in zip(keys, values, [None] * len(keys) if masks is None else masks, strict=True)
    ]
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [merge_attention(*zip(*pair, strict=True)) for pair in pairs]
    return parts[0]


def distributed_tree_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    *,
    mask: Bool[Tensor, "batch ..."] | None = None,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, "batch q_time heads value_dim"], Float[Tensor, "batch heads q_time"]]:
    """Attention of every query to the keys of all ranks, eq. (2) and (3).

    All ranks call it, and the backward of what they got. Gradients are those of the sum of all ranks' losses: what a
    rank's q gets is the part that goes through its own keys, so gradients of a q that all ranks share are summed, as
    those of a parameter in data-parallel training are.

    Args:
        q: [batch, q_time, heads, dim], the same on all ranks.
        k: [batch, k_time, kv_heads, dim], this rank's; the lengths differ as they like, and may be 0.
        v: [batch, k_time, kv_heads, value_dim], this rank's.
        mask: as of `tree_attention`, of this rank's keys.
        scale: of the scores; dim^-1/2 if None.
        group: the processes; all if None.

    Returns:
        output and log-sum-exp over the keys of all ranks, the same on all ranks.

    Raises:
        ValueError: shapes don't go together.
    """
    out, lse = attention(q, k, v, causal=False, mask=mask, scale=scale)
    most = lse.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    empty = torch.isneginf(most)
    most = most.masked_fill(empty, 0.0)  # no rank has a key for the query: -inf - (-inf) is NaN
    share = torch.exp(lse - most).mT[..., None]
    sums = _AllReduce.apply(torch.cat([share * out.to(lse.dtype), share], -1), group)
    total = sums[..., -1:].masked_fill(empty.mT[..., None], 1.0)
    lse = (most + total.squeeze(-1).mT.log()).masked_fill(empty, float("-inf"))
    return (sums[..., :-1] / total).to(q.dtype), lse


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; backward, the sum of what all ranks have to say about it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        found = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class ShardedKVCache(NamedTuple):
    """One rank's part of a `KVCache`, of any positions; new tokens go to the ranks in turn.

    Attributes:
        keys: [batch, held, kv_heads, dim], after RoPE.
        values: [batch, held, kv_heads, value_dim].
        positions: [held], int64, of the tokens held, among those of all ranks.
        length: tokens on all ranks, padding included.
        mask: [batch, held], False at padding; None where there is none.
        group: the processes; all if None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: int
    mask: Tensor | None = None
    group: dist.ProcessGroup | None = None

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> ShardedKVCache:
        """The cache with this rank's share of further tokens; arguments and errors as of `KVCache.append`."""
        positions = torch.arange(self.length, self.length + keys.shape[1], device=keys.device)
        mine = positions % dist.get_world_size(self.group) == dist.get_rank(self.group)
        held = KVCache(self.keys, self.values, self.mask).append(
            keys[:, mine], values[:, mine], None if mask is None else mask[:, mine]
        )
        positions = torch.cat([self.positions, positions[mine]])
        return ShardedKVCache(held.keys, held.values, positions, self.length + len(mine), held.mask, self.group)

    def crop(self, length: int) -> ShardedKVCache:
        """The first tokens alone.

        Args:
            length: how many, 0 to `length`.

        Raises:
            ValueError: there are not that many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the tokens held, got {length}")
        kept = self.positions < length
        mask = None if self.mask is None else self.mask[:, kept]
        return ShardedKVCache(self.keys[:, kept], self.values[:, kept], self.positions[kept], length, mask, self.group)

    def rows(self, index: Int[Tensor, " rows"]) -> ShardedKVCache:
        """The given rows of the batch, in that order.

        Args:
            index: [rows], int64.
        """
        mask = None if self.mask is None else self.mask[index]
        return self._replace(keys=self.keys[index], values=self.values[index], mask=mask)

    def attend(self, q: Float[Tensor, "batch q_time heads dim"]) -> Float[Tensor, "batch q_time heads value_dim"]:
        """What the queries of the last q_time tokens find on all ranks, each up to its own position."""
        mask = self.mask
        if q.shape[1] > 1:  # the last query sees all keys, those before it not the ones after them
            places = torch.arange(self.length - q.shape[1], self.length, device=q.device)
            seen = (self.positions <= places[:, None]).expand(len(q), -1, -1)
            mask = seen if mask is None else seen & mask[:, None]
        return distributed_tree_attention(q, self.keys, self.values, mask=mask, group=self.group)[0]


class TreeAttention(CausalAttention):
    """`CausalAttention` that goes on from a cache split over ranks: `split_cache`, and then as with any other cache.

    All ranks call it with the same tokens, and get the same output.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.
    """

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache | ShardedKVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """As of `CausalAttention`, or by the reduction of eq. (2) where the cache is a `ShardedKVCache`."""
        return cache.attend(q) if isinstance(cache, ShardedKVCache) else super().mix(q, cache)


def split_cache(cache: LMCache, group: dist.ProcessGroup | None = None) -> LMCache:
    """This rank's part of a cache that all ranks have: successive tokens, as many on each rank as possible.

    Args:
        cache: of a `TinyLM` with `TreeAttention`; the same on all ranks.
        group: the processes; all if None.

    Returns:
        A cache whose states are `ShardedKVCache`, with copies of what this rank holds, so that the rest can be freed.

    Raises:
        TypeError: a state isn't a `KVCache`.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def part(state: Any) -> ShardedKVCache:
        if not isinstance(state, KVCache):
            raise TypeError(f"cache: expected states of type KVCache, got {type(state).__name__}")
        start, stop = (state.length * r // world for r in (rank, rank + 1))
        positions = torch.arange(start, stop, device=state.keys.device)
        mine = (None if x is None else x[:, start:stop].clone() for x in state)
        keys, values, mask = mine
        return ShardedKVCache(keys, values, positions, state.length, mask, group)  # type: ignore[arg-type]

    return LMCache(tuple(map(part, cache.layers)), cache.embedding)


def tree_volume(batch: int, heads: int, value_dim: int, ranks: int) -> float:
    """Elements that a rank sends for one query a row by the all-reduces of eq. (2); the first half of eq. (4).

    Args:
        batch: rows.
        heads: of the queries.
        value_dim: size of a head's values.
        ranks: p.
    """
    for name, size in (("batch", batch), ("heads", heads), ("value_dim", value_dim), ("ranks", ranks)):
        check_count(name, size)
    return 2 * (ranks - 1) / ranks * batch * heads * (value_dim + 2)


def ring_volume(batch: int, time: int, kv_heads: int, dim: int, ranks: int) -> float:
    """Elements that a rank sends when keys and values go around a ring instead; the second half of eq. (4).

    Args:
        batch: rows.
        time: keys a rank.
        kv_heads: of keys and values.
        dim: size of a head.
        ranks: p.
    """
    for name, size in (("batch", batch), ("time", time), ("kv_heads", kv_heads), ("dim", dim), ("ranks", ranks)):
        check_count(name, size)
    return 2.0 * (ranks - 1) * batch * time * kv_heads * dim
