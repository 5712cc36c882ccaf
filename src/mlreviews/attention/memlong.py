r"""MemLong: attention to the nearby tokens, and to chunks of the far past that are retrieved from a bounded memory.

Paper: MemLong: Memory-Augmented Retrieval for Long Text Modeling (arXiv:2408.16967).

Text is read chunk by chunk. Keys and values of a chunk that leaves the local context go into a memory, with an
embedding of the chunk beside them. At the start of a chunk the memory's most similar chunks are fetched, and its tokens
attend to them and to their local context under one softmax. What is stored is frozen: no gradient flows into the
memory, and when it is full, chunks that were seldom retrieved are forgotten.

Equation:
    $$ o_i = \frac{\sum_{j \in \mathcal{R}} e^{q_i \cdot k_j / \sqrt{d}}\, v_j
       + \sum_{j \in \mathcal{L}_i} e^{\tilde q_i \cdot \tilde k_j / \sqrt{d}}\, v_j}
       {\sum_{j \in \mathcal{R}} e^{q_i \cdot k_j / \sqrt{d}}
       + \sum_{j \in \mathcal{L}_i} e^{\tilde q_i \cdot \tilde k_j / \sqrt{d}}} \tag{1} $$
    Tildes are RoPE, which only local tokens get. With a gate g for each head, the two softmaxes stay apart:
    $$ o_i = \sigma(g)\, o^{\mathcal{R}}_i + (1 - \sigma(g))\, o^{\mathcal{L}}_i \tag{2} $$

Symbols:
    R: tokens of the retrieved chunks.
    L_i: tokens of the chunk before and, up to i, of i's own chunk.
    q, k, v: [batch, time, heads or kv_heads, dim].
    g: [heads], gate; minus infinity is local attention alone.

Defaults:
    chunk_size: 32 (ours; the paper's is of some hundred tokens).
    top_k: 4 chunks (ours).
    capacity: 1,024 chunks (ours).
    evict: 0.1, the part of the capacity that is forgotten when it is full (the review).

Deviations:
    1. A chunk's embedding is the mean of what the layer reads of it, normalised, where the paper asks a frozen text
       encoder (BGE-M3). What is retrieved for a chunk depends on the chunk before it, so that nothing looks ahead.
    2. Each retrieving layer has a memory of its own keys and values; in the paper one layer's serve all those above it.
    3. Scores of retrieved keys have no RoPE on either side. The authors rotate the query by its place in the local
       cache, which moves whenever that is cut.
    4. The authors' optional gate multiplies the scores of the two parts by sigmoid(g) and 1 - sigmoid(g), which leaves
       retrieved tokens in at g = -inf; equation (2), which the review describes, is used here.
    5. Forgetting: the newest tenth is safe; of the others, the least retrieved go, the older first. The authors' code
       drops the older half.
    6. Chunk borders are counted from the first token of the batch: padding on the left moves a row's chunks.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: up to chunk_size tokens, or without RoPE and with every chunk
        retrieved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.models.attention import CausalAttention
from mlreviews_kernels.attention import attention, merge_attention

__all__ = ["ChunkMemory", "MemLongAttention", "MemLongState", "freeze_below", "retrieval_attention"]


class ChunkMemory(NamedTuple):
    """Chunks that were read, and how often each was retrieved. A value: each method returns another memory.

    Attributes:
        embeddings: [batch, chunks, features], of length 1, oldest chunk first.
        keys: [batch, chunks, chunk, kv_heads, dim], without RoPE, detached.
        values: [batch, chunks, chunk, kv_heads, value_dim], detached.
        mask: [batch, chunks, chunk], False at padding.
        counts: [batch, chunks], how often a chunk was retrieved.
    """

    embeddings: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, embedding: Tensor, keys: Tensor, values: Tensor) -> ChunkMemory:
        """A memory without chunks, for such as the given one: arguments as of `add`."""
        batch = keys.shape[0]
        none = [x.new_zeros((batch, 0, *x.shape[1:])) for x in (embedding, keys, values)]
        mask = keys.new_zeros((batch, 0, keys.shape[1]), dtype=torch.bool)
        return cls(none[0], none[1], none[2], mask, keys.new_zeros((batch, 0), dtype=torch.int64))

    @property
    def chunks(self) -> int:
        """How many chunks are held."""
        return self.keys.shape[1]

    def add(
        self,
        embedding: Float[Tensor, "batch features"],
        keys: Float[Tensor, "batch chunk kv_heads dim"],
        values: Float[Tensor, "batch chunk kv_heads value_dim"],
        mask: Bool[Tensor, "batch chunk"],
        *,
        capacity: int,
        evict: float = 0.1,
    ) -> ChunkMemory:
        """The memory with one more chunk; first it forgets some if it is full.

        Args:
            embedding: [batch, features], of any length but 0.
            keys: [batch, chunk, kv_heads, dim].
            values: [batch, chunk, kv_heads, value_dim].
            mask: [batch, chunk], False at padding.
            capacity: the most chunks that it may hold.
            evict: which part of the capacity is forgotten at once, at least one chunk.

        Raises:
            ValueError: capacity below 1, or evict outside 0 to 1.
        """
        check_count("capacity", capacity)
        if not 0 <= evict <= 1:
            raise ValueError(f"evict: expected 0 to 1, got {evict}")
        memory = self
        if self.chunks >= capacity:
            most = min(max(1, round(evict * capacity)), capacity)
            memory = self.forget(self.chunks - capacity + most)
        new = (
            nn.functional.normalize(embedding, dim=-1).detach(),
            keys.detach(),
            values.detach(),
            mask,
            self.counts.new_zeros(len(keys)),
        )
        return ChunkMemory(*(torch.cat([old, x[:, None]], 1) for old, x in zip(memory, new, strict=True)))

    def forget(self, number: int) -> ChunkMemory:
        """The memory without so many chunks: the least retrieved, the older first; the newest tenth goes last.

        Args:
            number: 0 to `chunks`.

        Raises:
            ValueError: there are not that many.
        """
        if not 0 <= number <= self.chunks:
            raise ValueError(f"number: expected 0 to {self.chunks}, the chunks held, got {number}")
        counts = self.counts.clone()
        safe = math.ceil(self.chunks / 10)
        counts[:, self.chunks - safe :] += 2**40
        kept = counts.argsort(dim=1, stable=True)[:, number:].sort(dim=1).values
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        return ChunkMemory(*(x[rows, kept] for x in self))

    def search(
        self, query: Float[Tensor, "batch features"], top_k: int
    ) -> tuple[Tensor, Tensor, Tensor, Int[Tensor, "batch found"], ChunkMemory]:
        """The chunks whose embeddings have the largest cosine with the query.

        Args:
            query: [batch, features].
            top_k: how many, where there are as many.

        Returns:
            keys and values [batch, found * chunk, kv_heads, dim] in the order of reading, their mask, the chunks'
            places in the memory [batch, found], and the memory with their counts raised.
        """
        scores = torch.einsum("bcf,bf->bc", self.embeddings, nn.functional.normalize(query, dim=-1).detach())
        found = scores.topk(min(top_k, self.chunks), dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(found), device=found.device)[:, None]
        keys, values, mask = (x[rows, found].flatten(1, 2) for x in (self.keys, self.values, self.mask))
        counts = self.counts.scatter_add(1, found, torch.ones_like(found))
        return keys, values, mask, found, self._replace(counts=counts)


def retrieval_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch local kv_heads dim"],
    v: Float[Tensor, "batch local kv_heads value_dim"],
    memory_q: Float[Tensor, "batch time heads dim"],
    memory_k: Float[Tensor, "batch remembered kv_heads dim"],
    memory_v: Float[Tensor, "batch remembered kv_heads value_dim"],
    *,
    mask: Bool[Tensor, "batch local"] | None = None,
    memory_mask: Bool[Tensor, "batch remembered"] | None = None,
    gate: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Causal attention to local tokens and full attention to remembered ones: eq. (1), or with a gate eq. (2).

    Args:
        q: [batch, time, heads, dim], queries of the last local tokens, after RoPE.
        k: [batch, local, kv_heads, dim], after RoPE.
        v: [batch, local, kv_heads, value_dim].
        memory_q: [batch, time, heads, dim], the queries as the remembered keys are to see them.
        memory_k: [batch, remembered, kv_heads, dim]; none at all is fine.
        memory_v: [batch, remembered, kv_heads, value_dim].
        mask: [batch, local], False at padding.
        memory_mask: [batch, remembered], False at padding.
        gate: [heads], g of eq. (2); None is eq. (1).
    """
    local, local_lse = attention(q, k, v, mask=mask)
    if memory_k.shape[1] == 0:
        return local
    far, far_lse = attention(memory_q, memory_k, memory_v, causal=False, mask=memory_mask)
    if gate is None:
        return merge_attention([local, far], [local_lse, far_lse])[0]
    share = torch.sigmoid(gate)[:, None]
    mixed = torch.lerp(local, far, share.to(local.dtype))
    # nothing remembered in a row: all weight is local
    return torch.where(torch.isneginf(far_lse).mT[..., None], local, mixed)


class MemLongState(NamedTuple):
    """What a `MemLongAttention` remembers: two chunks at most as they are, and the memory.

    Attributes:
        memory: of the chunks before those.
        inputs: [batch, local, d_model], of the last whole chunk and the one that is being read.
        keys: [batch, local, kv_heads, dim], without RoPE.
        values: [batch, local, kv_heads, dim].
        mask: [batch, local], False at padding.
        found: keys, values and mask of what was retrieved for the chunk that is being read.
        length: how many tokens were read in all.
    """

    memory: ChunkMemory
    inputs: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor
    found: tuple[Tensor, Tensor, Tensor]
    length: int

    def rows(self, index: Int[Tensor, " rows"]) -> MemLongState:
        """The given rows of the batch, reordered or repeated."""
        inputs, keys, values, mask = (x[index] for x in self[1:5])
        far_keys, far_values, far_mask = (x[index] for x in self.found)
        memory = ChunkMemory(*(x[index] for x in self.memory))
        return MemLongState(memory, inputs, keys, values, mask, (far_keys, far_values, far_mask), self.length)


class MemLongAttention(CausalAttention):
    """Causal attention to the chunk before and one's own, and to chunks retrieved from the memory of all others.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        chunk_size: tokens of a chunk.
        top_k: chunks that are retrieved; 0 is local attention alone.
        capacity: chunks that the memory may hold.
        gate: whether each head has a learned gate, eq. (2), instead of one softmax, eq. (1).
        rope_base: of the rotary embedding of local tokens; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, a negative top_k, or sizes that don't divide.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        chunk_size: int = 32,
        top_k: int = 4,
        capacity: int = 1024,
        gate: bool = False,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        check_count("chunk_size", chunk_size)
        check_count("top_k", top_k, least=0)
        check_count("capacity", capacity)
        self.chunk_size, self.top_k, self.capacity = chunk_size, top_k, capacity
        self.gate = nn.Parameter(torch.zeros(heads)) if gate else None

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: MemLongState | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], MemLongState]:
        """Runs over a sequence, chunk by chunk.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding on the left of a row. The outputs there have no meaning.
            positions: not used: RoPE counts from the first token of the local context.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x, mask or state has another shape.
        """
        check_sequence(x, self.d_model, mask)
        q = self.q_proj(x).unflatten(2, (self.heads, -1))
        k, v = (proj(x).unflatten(2, (self.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        if state is None:
            state = _nothing(x, k, v, self.chunk_size)
        elif (len(state.keys), *state.keys.shape[2:]) != (len(k), *k.shape[2:]):
            raise ValueError(f"state: expected that of {list(k.shape)} keys, got {list(state.keys.shape)}")
        outputs, start = [], 0
        while start < x.shape[1]:
            within = state.length % self.chunk_size
            if within == 0 and state.length:
                state = self._next_chunk(state)
            stop = min(x.shape[1], start + self.chunk_size - within)
            part = slice(start, stop)
            local = zip(state[1:5], (x, k, v, real), strict=True)
            inputs, keys, values, seen = (torch.cat([old, new[:, part]], 1) for old, new in local)
            state = MemLongState(state.memory, inputs, keys, values, seen, state.found, state.length + stop - start)
            outputs.append(self._mix(q[:, part], state))
            start = stop
        return self.o_proj(torch.cat(outputs, 1).flatten(2)), state

    def _mix(self, q: Tensor, state: MemLongState) -> Tensor:
        """Of the last queries of the chunk that is being read."""
        new, local = q.shape[1], state.keys.shape[1]
        (near,) = self.rotated(q, start=local - new)
        (keys,) = self.rotated(state.keys, start=0)
        far_keys, far_values, far_mask = state.found
        return retrieval_attention(
            near, keys, state.values, q, far_keys, far_values, mask=state.mask, memory_mask=far_mask, gate=self.gate
        )

    def _next_chunk(self, state: MemLongState) -> MemLongState:
        """Before the first token of a chunk: the chunk before the last goes into the memory, which is then searched."""
        memory, size = state.memory, self.chunk_size
        inputs, keys, values, mask = (x[:, -size:] for x in state[1:5])
        if state.keys.shape[1] > size:
            old = (x[:, :size] for x in state[1:5])
            old_inputs, old_keys, old_values, old_mask = old
            memory = memory.add(
                _embedding(old_inputs, old_mask), old_keys, old_values, old_mask, capacity=self.capacity
            )
        far_keys, far_values, far_mask, _, memory = memory.search(_embedding(inputs, mask), self.top_k)
        return MemLongState(memory, inputs, keys, values, mask, (far_keys, far_values, far_mask), state.length)


def _embedding(inputs: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens, [batch, d_model], in float32 at least; where there are none, 0."""
    wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    return wide.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _nothing(x: Tensor, keys: Tensor, values: Tensor, chunk_size: int) -> MemLongState:
    """The state before the first token."""
    mask = torch.ones_like(x[:, :0, 0], dtype=torch.bool)
    none = (keys[:, :0].detach(), values[:, :0].detach(), mask)
    chunk = (t[:, :1].expand(-1, chunk_size, -1, -1) for t in (keys, values))
    embedding = _embedding(x[:, :1], mask.new_ones(len(x), 1))
    memory = ChunkMemory.empty(embedding, *chunk)
    return MemLongState(memory, x[:, :0], keys[:, :0], values[:, :0], mask, none, 0)


def freeze_below(model: nn.Module, layer: int) -> None:
    """Freezes the embedding and the blocks before the given one, as the paper does, so that stored keys stay valid.

    Args:
        model: a `mlreviews.models.TinyLM`, or what has its ``embed_tokens`` and ``layers``.
        layer: the first block that goes on learning; a tied head stays frozen with the embedding.

    Raises:
        ValueError: there is no such block.
    """
    layers = list(model.layers)  # type: ignore[arg-type]
    if not 0 <= layer <= len(layers):
        raise ValueError(f"layer: expected 0 to {len(layers)}, got {layer}")
    for module in (model.embed_tokens, *layers[:layer]):
        module.requires_grad_(False)
