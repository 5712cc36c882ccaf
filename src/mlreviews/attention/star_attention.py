r"""Star Attention: a long context encoded in blocks that see the first block and themselves, then attended to in full.

Paper: Star Attention: Efficient LLM Inference over Long Sequences (arXiv:2411.17116).

Attention to a long context is spread over hosts in two phases. In the first, each host encodes its blocks of the
context with no word to the others: a block sees itself and a copy of the first block, the anchor, which takes up the
attention that every query gives to the beginning of a text. In the second, the query and the answer attend to all
blocks, exactly: each host's output and its softmax's denominator are all that travels. The model is one that was
trained with full attention; what the blocks don't see of each other is the approximation.

Equation:
    The context is cut into blocks $c_1, \dots, c_n$ of b tokens, and the first a tokens are the anchor. Token t sees
    $$ S_1(t) = \{ s \le t : \lfloor s / b \rfloor = \lfloor t / b \rfloor \ \text{or}\ s < a \} \tag{1} $$
    in phase 1, and every $s \le t$ in phase 2. Host h with the keys $K_h$ finds for the queries Q
    $$ A_h = \operatorname{softmax}(Q K_h^\top / \sqrt{d})\, V_h, \qquad
       s_h = \textstyle\sum_k \exp(Q K_{h,k}^\top / \sqrt{d}) \tag{2} $$
    $$ A = \sum_h \frac{s_h}{\sum_g s_g} A_h. \tag{3} $$
    The copies of the anchor compute, in every layer, what $c_1$ computes on the first host, so that one process needs
    one of them only.

Symbols:
    q, k, v: [batch, time, heads or kv_heads, dim], after RoPE with the positions in the whole context.
    b: block_size, tokens of a block; the last block may be shorter.
    a: anchor_size, tokens of the anchor, at most b.

Defaults:
    anchor_size: None, that of a block, which works best in the paper (section on the anchor block's size).
    block_size: 64 (ours, for small models). The paper takes a quarter of the context, at least 4096 tokens.

Deviations:
    1. The anchor's copies are not computed again within one process; across processes they are, as in the paper.
    2. Keys and values of the query and the answer go to the ranks in turn, not all to one query host, and the sums of
       (3) are an all-reduce, so that every rank has the result. The numbers are the same.
    3. The layer can be trained, which the paper doesn't do; then all tokens are context, and (1) is its mask.

Reduces to:
    mlreviews.models.CausalAttention: with a block as long as the context, or half as long and a whole one as anchor.
    tree-attention: in phase 2, which is its reduction over the hosts' blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.attention.tree_attention import ShardedKVCache
from mlreviews.common.checks import check_count
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.tiny_lm import LMCache, TinyLM
from mlreviews_kernels.attention import attention, merge_attention

__all__ = [
    "StarAttention",
    "StarAttentionCache",
    "encode_context",
    "end_context",
    "star_attention",
    "star_context_mask",
]


def star_context_mask(seq_len: int, block_size: int, anchor_size: int | None = None) -> Bool[Tensor, "seq_len seq_len"]:
    """What each token of a context sees in phase 1, eq. (1): True where the row's token sees the column's.

    Args:
        seq_len: tokens of the context.
        block_size: b, at least 1.
        anchor_size: a, 0 to b; b if None.

    Raises:
        ValueError: a size out of its range.
    """
    check_count("seq_len", seq_len)
    anchor_size = _check_sizes(block_size, anchor_size)
    places = torch.arange(seq_len)
    return _seen(places, places, block_size, anchor_size)


def star_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    block_size: int,
    anchor_size: int | None = None,
    *,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Attention of phase 1, eq. (1), without the mask: time and memory are linear in the length of the context.

    Args:
        q: [batch, q_time, heads, dim], of the last q_time tokens.
        k: [batch, k_time, kv_heads, dim], of all tokens of the context so far.
        v: [batch, k_time, kv_heads, value_dim].
        block_size: b, at least 1.
        anchor_size: a, 0 to b; b if None.
        mask: False at padding on the left of a row. A row's blocks begin at its first real token.

    Returns:
        [batch, q_time, heads, value_dim], in q's dtype; 0 at padding.

    Raises:
        ValueError: a size out of its range, or shapes that don't go together.
    """
    anchor_size = _check_sizes(block_size, anchor_size)
    q_time, k_time = q.shape[1], k.shape[1]
    if not 1 <= q_time <= k_time:
        raise ValueError(f"q: expected 1 to {k_time} queries, as many as there are keys at most, got {q_time}")
    if mask is None:
        return _in_blocks(q, k, v, block_size, anchor_size)
    if q_time == 1:
        places = (mask.cumsum(1) - 1).masked_fill(~mask, k_time)  # padding stands after all other tokens
        seen = _seen(places[:, -1:], places, block_size, anchor_size) & mask[:, None]
        return attention(q, k, v, mask=seen)[0]
    # Rows are turned until their padding stands behind, where a causal query doesn't see it.
    turn = (~mask).sum(1, keepdim=True)
    places = torch.arange(k_time, device=q.device)
    q, k, v = (_take(x, (places + turn) % k_time) for x in (_padded(q, k_time - q_time, 0), k, v))
    out = _take(_in_blocks(q, k, v, block_size, anchor_size), (places - turn) % k_time)
    return (out * mask[..., None, None])[:, -q_time:]


def _check_sizes(block_size: int, anchor_size: int | None) -> int:
    """The anchor's size."""
    check_count("block_size", block_size)
    anchor_size = block_size if anchor_size is None else anchor_size
    check_count("anchor_size", anchor_size, least=0)
    if anchor_size > block_size:
        raise ValueError(f"anchor_size: expected at most the block's {block_size}, got {anchor_size}")
    return anchor_size


def _seen(queries: Tensor, keys: Tensor, block_size: int, anchor_size: int) -> Tensor:
    """Eq. (1) for places [..., q_time] and [..., k_time]."""
    t, s = queries[..., :, None], keys[..., None, :]
    return (s <= t) & ((s // block_size == t // block_size) | (s < anchor_size))


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, block_size: int, anchor_size: int) -> Tensor:
    """Each block by itself, as a row of a batch, and what is after the first block merged with the anchor."""
    batch, q_time, k_time = q.shape[0], q.shape[1], k.shape[1]
    start = k_time - q_time
    first = start - start % block_size  # where the block of the first query begins
    if first + block_size >= k_time:
        out, lse = attention(q, k[:, first:], v[:, first:])
    else:
        behind = -k_time % block_size
        filled = _padded(q, start - first, behind), _padded(k[:, first:], 0, behind), _padded(v[:, first:], 0, behind)
        out, lse = attention(*(x.unflatten(1, (-1, block_size)).flatten(0, 1) for x in filled))
        mine = slice(start - first, start - first + q_time)
        out = out.unflatten(0, (batch, -1)).flatten(1, 2)[:, mine]
        lse = lse.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)[:, :, mine]
    near = max(0, min(block_size - start, q_time))  # queries in the first block, which sees nothing else
    if anchor_size == 0 or near == q_time:
        return out
    far = attention(q[:, near:], k[:, :anchor_size], v[:, :anchor_size], causal=False)
    merged, _ = merge_attention((out[:, near:], far[0]), (lse[:, :, near:], far[1]))
    return torch.cat([out[:, :near], merged], 1)


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    """Zeros before and behind along the time, axis 1."""
    return nn.functional.pad(x, (0, 0, 0, 0, before, behind))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of each row by their places [batch, time]."""
    return x.gather(1, places[..., None, None].expand(-1, -1, *x.shape[2:]))


class StarAttentionCache(NamedTuple):
    """A `KVCache` that knows where the context ends; tokens after that attend to all before them.

    Attributes:
        keys: [batch, time, kv_heads, dim], after RoPE.
        values: [batch, time, kv_heads, value_dim].
        mask: [batch, time], False at padding; None where there is none.
        context: how many of the tokens are the context; None while it goes on.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    context: int | None = None

    @property
    def length(self) -> int:
        """How many tokens are held, padding included."""
        return self.keys.shape[1]

    def end_context(self) -> StarAttentionCache:
        """The same cache with the context at its end: phase 2 begins, if it hasn't yet."""
        return self if self.context is not None else self._replace(context=self.length)

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> StarAttentionCache:
        """The cache with further tokens behind; arguments and errors as of `KVCache.append`."""
        return StarAttentionCache(*KVCache(*self[:3]).append(keys, values, mask), self.context)

    def crop(self, length: int) -> StarAttentionCache:
        """The first tokens alone; phase 1 goes on where a part of the context is cut off.

        Args:
            length: how many, 0 to `length`.

        Raises:
            ValueError: there are not that many.
        """
        ended = self.context is not None and length >= self.context
        return StarAttentionCache(*KVCache(*self[:3]).crop(length), self.context if ended else None)

    def rows(self, index: Int[Tensor, " rows"]) -> StarAttentionCache:
        """The given rows of the batch, in that order.

        Args:
            index: [rows], int64.
        """
        return StarAttentionCache(*KVCache(*self[:3]).rows(index), self.context)


class StarAttention(CausalAttention):
    """`CausalAttention` in the two phases of star attention: phase 1 until `end_context`, phase 2 after it.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        block_size: b, tokens of a block of the context.
        anchor_size: a, tokens of the anchor, 0 to b; b if None.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size out of its range, or as of `CausalAttention`.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        block_size: int = 64,
        anchor_size: int | None = None,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        self.block_size, self.anchor_size = block_size, _check_sizes(block_size, anchor_size)

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: StarAttentionCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], StarAttentionCache]:
        """As of `CausalAttention`; the state is a `StarAttentionCache`."""
        y, cache = super().forward(x, state, mask=mask, positions=positions)
        return y, StarAttentionCache(*cache)

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache | StarAttentionCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """`star_attention` while the context goes on, and attention to everything after it."""
        if isinstance(cache, StarAttentionCache) and cache.context is not None:
            return attention(q, cache.keys, cache.values, mask=cache.mask)[0]
        return star_attention(q, cache.keys, cache.values, self.block_size, self.anchor_size, mask=cache.mask)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{super().extra_repr()}, block_size={self.block_size}, anchor_size={self.anchor_size}"


def end_context(cache: LMCache) -> LMCache:
    """The cache of a model with `StarAttention` after its context: what comes now is the query, phase 2.

    Args:
        cache: at the end of the context.

    Raises:
        TypeError: a state isn't a `StarAttentionCache`.
    """
    for state in cache.layers:
        if not isinstance(state, StarAttentionCache):
            raise TypeError(f"cache: expected states of type StarAttentionCache, got {type(state).__name__}")
    return LMCache(tuple(state.end_context() for state in cache.layers), cache.embedding)


def encode_context(
    model: TinyLM,
    ids: Int[Tensor, "batch time"],
    block_size: int,
    anchor_size: int | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> LMCache:
    """Phase 1 on several processes: each rank encodes successive blocks of the context, and nothing is exchanged.

    Phase 2 is ``model(query, cache)`` on all ranks with the same query, and so on with the cache that it returns.

    Args:
        model: one with `mlreviews.attention.TreeAttention`, without a position embedding; the same on all ranks.
        ids: [batch, time], the whole context, the same on all ranks.
        block_size: b; there has to be a block for each rank.
        anchor_size: a, 0 to b; b if None.
        group: the processes; all if None.

    Returns:
        A cache of `mlreviews.attention.ShardedKVCache` with the keys and values of this rank's blocks, without those
        of the anchor's copies.

    Raises:
        ValueError: a size out of its range, or fewer blocks than ranks.
        TypeError: a state of the model isn't a `KVCache`.
    """
    anchor_size = _check_sizes(block_size, anchor_size)
    rank, world, time = dist.get_rank(group), dist.get_world_size(group), ids.shape[1]
    blocks = -(-time // block_size)
    if blocks < world:
        raise ValueError(f"block_size: expected a block for each of {world} ranks, got {blocks} of {block_size} tokens")
    places = torch.arange(time, device=ids.device)
    parts = []
    for block in range(blocks * rank // world, blocks * (rank + 1) // world):
        own = places[block * block_size : (block + 1) * block_size]
        seen = torch.cat([places[: anchor_size if block else 0], own])
        states = model(ids[:, seen], positions=seen).cache.layers
        for state in states:
            if not isinstance(state, KVCache):
                raise TypeError(f"model: expected states of type KVCache, got {type(state).__name__}")
        parts.append((own, [(s.keys[:, -len(own) :], s.values[:, -len(own) :]) for s in states]))
    positions = torch.cat([own for own, _ in parts])
    shards = []
    for layer in zip(*(states for _, states in parts), strict=True):
        keys, values = (torch.cat(tensors, 1) for tensors in zip(*layer, strict=True))
        shards.append(ShardedKVCache(keys, values, positions, time, None, group))
    return LMCache(tuple(shards))
