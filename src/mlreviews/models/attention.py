"""Causal self-attention as a layer: projections, RoPE, grouped heads, and a cache of keys and values.

`CausalAttention` is the standard layer, and the base of variants that differ only in how queries, keys and values are
mixed. Such a variant is one method, and can be handed to `mlreviews.models.TinyLM` as it is::

    class UniformAttention(CausalAttention):
        def mix(self, q, cache):                # the mean of all values so far
            ...

    model = TinyLM(config, attention=UniformAttention)

Like every mixer of `mlreviews.models.SequenceModel`, a layer is called as ``layer(x, state) -> (y, state)`` and has a
``step``; the state is a `KVCache`, or whatever else a variant remembers of the past.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.common.layers import linear
from mlreviews.common.rotary import apply_rotary, rotary_angles, rotary_factors, rotate
from mlreviews_kernels.attention import attention
from mlreviews_kernels.tree_masked_attention import tree_masked_attention

__all__ = ["CausalAttention", "KVCache", "SharedLayout"]

# Up to so many queries over so many keys, without gradients, are one call of PyTorch: what a decoder does in each step.
# The kernels' ops cost a layer a tenth of a millisecond or more before they begin.
FEW_QUERIES, FEW_KEYS = 64, 4096


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. A value, not a container: each method returns another cache.

    Attributes:
        keys: [batch, time, kv_heads, dim], after RoPE.
        values: [batch, time, kv_heads, value_dim].
        mask: [batch, time], False at padding; None where there is none.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens are held, padding included."""
        return self.keys.shape[1]

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> KVCache:
        """The cache with further tokens behind.

        Args:
            keys: [batch, new, kv_heads, dim].
            values: [batch, new, kv_heads, value_dim].
            mask: [batch, new], of the new tokens; None where all of them are real.

        Raises:
            ValueError: another batch, or other heads.
        """
        if (keys.shape[0], *keys.shape[2:]) != (self.keys.shape[0], *self.keys.shape[2:]):
            raise ValueError(
                f"state: expected a cache of keys [{keys.shape[0]}, time, {keys.shape[2]}, {keys.shape[3]}], "
                f"got {list(self.keys.shape)}"
            )
        if self.mask is not None or mask is not None:
            masks = (self.mask, self.keys), (mask, keys)
            mask = torch.cat([_all_real(x) if m is None else m for m, x in masks], dim=1)
        return KVCache(torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1), mask)

    def crop(self, length: int) -> KVCache:
        """The first tokens alone, as if the others had never come.

        Args:
            length: how many, 0 to `length`.

        Raises:
            ValueError: there are not that many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the tokens held, got {length}")
        mask = None if self.mask is None else self.mask[:, :length]
        return KVCache(self.keys[:, :length], self.values[:, :length], mask)

    def rows(self, index: Int[Tensor, " rows"]) -> KVCache:
        """The given rows of the batch, in that order; a row may be taken several times, as beam search does.

        Args:
            index: [rows], int64.
        """
        return KVCache(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]

    def keep(
        self, start: int, index: Int[Tensor, "batch kept"], mask: Bool[Tensor, "batch kept"] | None = None
    ) -> KVCache:
        """The first `start` tokens, and of the others the given ones.

        Args:
            start: how many stay in any case.
            index: [batch, kept], int64, of the tokens after those, counted from `start`.
            mask: [batch, kept], False at what is only there to fill a row.
        """
        rows = torch.arange(index.shape[0], device=index.device)[:, None]
        first = self.crop(start)
        return first.append(
            self.keys[rows, start + index], self.values[rows, start + index], _both(self._mask_at(start, index), mask)
        )

    def _mask_at(self, start: int, index: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask[:, start:].gather(1, index)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a & b if a is not None and b is not None else a if b is None else b


def _all_real(keys: Tensor) -> Tensor:
    return keys.new_ones(keys.shape[:2], dtype=torch.bool)


class SharedLayout(NamedTuple):
    """What is the same for all layers of a model in one pass; see `CausalAttention.shared`.

    Attributes:
        rotation: cosines and sines of RoPE, [..., time, 1, dim]; None without RoPE.
        few: whether there are few queries, and no gradients are wanted.
        unseen: for few queries: added to the scores, [batch or 1, 1, time * group, past + time], the lowest number
            where a query doesn't see a key. None where all see all.
    """

    rotation: tuple[Tensor, Tensor] | None
    few: bool
    unseen: Tensor | None


class CausalAttention(nn.Module):
    """Softmax attention of every token to itself and those before it. Weights have Llama's names.

    Args:
        d_model: size of a token's vector.
        heads: of the queries; their size is d_model / heads.
        kv_heads: of keys and values; `heads` is a multiple of it. None is `heads`.
        layer: which block of a model this is, from 0 on, for variants that depend on it.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, sizes that don't divide, or an odd head size with RoPE.
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
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, size in (("d_model", d_model), ("heads", heads), ("kv_heads", kv_heads)):
            check_count(name, size)
        check_count("layer", layer, least=0)
        if d_model % heads:
            raise ValueError(f"heads: expected a divisor of d_model {d_model}, got {heads}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads {heads}, got {kv_heads}")
        self.d_model, self.heads, self.kv_heads, self.layer = d_model, heads, kv_heads, layer
        self.head_dim, self.rope_base = d_model // heads, rope_base
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"heads: expected an even head size for RoPE, got {d_model} / {heads} = {self.head_dim}")
        self.q_proj = linear(d_model, d_model, bias=False, generator=generator)
        self.k_proj = linear(d_model, kv_heads * self.head_dim, bias=False, generator=generator)
        self.v_proj = linear(d_model, kv_heads * self.head_dim, bias=False, generator=generator)
        self.o_proj = linear(d_model, d_model, bias=False, generator=generator)

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """What the heads give for each query; the method that variants replace.

        Args:
            q: [batch, time, heads, dim], after RoPE, the queries of the last `time` tokens of the cache.
            cache: of all tokens, these included.
        """
        return attention(q, cache.keys, cache.values, mask=cache.mask)[0]

    def mix_tree(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache, tree: Bool[Tensor, "*trees time time"]
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """What the heads give for each token of a tree, the last of the cache.

        Args:
            q: [batch, time, heads, dim].
            cache: of all tokens, these included.
            tree: True where a token of the tree sees another one.

        Raises:
            TypeError: a variant with another `mix`, which knows no trees.
        """
        if type(self).mix is not CausalAttention.mix:
            raise TypeError(f"tree: {type(self).__name__} takes tokens in a row, not in a tree")
        context = cache.length - q.shape[1]
        if cache.mask is None:
            return tree_masked_attention(
                q,
                cache.keys[:, context:],
                cache.values[:, context:],
                tree,
                k_cache=cache.keys[:, :context],
                v_cache=cache.values[:, :context],
            )[0]
        before = cache.mask[:, None, :context].expand(-1, q.shape[1], -1)
        seen = torch.cat([before, tree.expand(q.shape[0], -1, -1) & cache.mask[:, None, context:]], dim=2)
        return attention(q, cache.keys, cache.values, causal=False, mask=seen)[0]

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*rows time"] | None = None,
        tree: Bool[Tensor, "*trees time time"] | None = None,
        shared: SharedLayout | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """Runs over a sequence.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding on the left of a row. The outputs there have no meaning.
            positions: [time] or [batch, time], for RoPE; None counts on from the state. Padding on the left needs no
                positions of its own, since only differences count.
            tree: [time, time] or [batch, time, time], True where one of these tokens sees another one; all of them
                see the state. The standard layer only.
            shared: what `shared` returned of these arguments, for several layers of one kind; None computes it here.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x, mask or state has another shape.
        """
        check_sequence(x, self.d_model, mask)
        if type(self) is not CausalAttention:
            q, k, v = self.project(x, 0 if state is None else state.length, positions)
            cache = KVCache(k, v, mask) if state is None else state.append(k, v, mask)
            mixed = self.mix(q, cache) if tree is None else self.mix_tree(q, cache, tree)
            return self.o_proj(mixed.flatten(2)), cache
        if shared is None:
            shared = self.shared(x, state, mask=mask, positions=positions, tree=tree)
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)
        if shared.rotation is not None:
            if shared.few:  # calls count, not copies
                rotated = rotate(torch.cat([q, k], 2), *shared.rotation)
                q, k = rotated[:, :, : self.heads], rotated[:, :, self.heads :]
            else:
                q, k = rotate(q, *shared.rotation), rotate(k, *shared.rotation)
        cache = KVCache(k, v, mask) if state is None else state.append(k, v, mask)
        if shared.few:
            mixed = _few_queries(q, cache, shared.unseen)
        else:
            mixed = self.mix(q, cache) if tree is None else self.mix_tree(q, cache, tree)
        return self.o_proj(mixed.flatten(2)), cache

    def shared(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: KVCache | None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*rows time"] | None = None,
        tree: Bool[Tensor, "*trees time time"] | None = None,
    ) -> SharedLayout:
        """What a pass over these arguments of `forward` needs in every layer of this kind.

        Args:
            x: [batch, time, d_model]; its values don't matter.
            state: of any of the layers.
            mask: as of `forward`.
            positions: as of `forward`.
            tree: as of `forward`.
        """
        past, time = 0 if state is None else state.length, x.shape[1]
        few = time <= FEW_QUERIES and past + time <= FEW_KEYS and not torch.is_grad_enabled()
        rotation = None
        if self.rope_base is not None and positions is None and few:
            cos, sin = _first_rotations(self.head_dim, self.rope_base, x.device)
            rotation = cos[past : past + time], sin[past : past + time]
        elif self.rope_base is not None:
            if positions is None:
                positions = torch.arange(past, past + time, device=x.device)
            rotation = rotary_factors(rotary_angles(positions, self.head_dim, base=self.rope_base))
        before = None if state is None else state.mask
        if not few or (time == 1 and mask is None and before is None):
            return SharedLayout(rotation, few, None)
        # the lowest number and not -inf: a token that sees nothing, padding, stays finite
        lowest, group = torch.finfo(x.dtype).min, self.heads // self.kv_heads
        if tree is None and mask is None and before is None:
            unseen = x.new_full((1, time, past + time), lowest).triu_(past + 1)
            return SharedLayout(rotation, few, unseen.repeat_interleave(group, 1)[:, None])
        if tree is None:
            tree = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()
        seen = torch.cat([tree.new_ones(*tree.shape[:-1], past), tree], -1).expand(-1 if tree.ndim == 3 else 1, -1, -1)
        if mask is not None or before is not None:
            real = [m if m is not None else seen.new_ones(len(x), n) for m, n in ((before, past), (mask, time))]
            seen = seen & torch.cat(real, 1)[:, None]
        unseen = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, lowest)
        return SharedLayout(rotation, few, unseen.repeat_interleave(group, 1)[:, None])

    def step(
        self, x_t: Float[Tensor, "batch d_model"], state: Any = None
    ) -> tuple[Float[Tensor, "batch d_model"], Any]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t: expected [batch, {self.d_model}], got shape {tuple(x_t.shape)}")
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def project(self, x: Tensor, start: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, time, heads or kv_heads, dim]; queries and keys after RoPE.

        Args:
            x: [batch, time, d_model].
            start: position of the first token, where `positions` are None.
            positions: as of `forward`.
        """
        q = self.q_proj(x).unflatten(2, (self.heads, -1))
        k, v = (proj(x).unflatten(2, (self.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return *self.rotated(q, k, start=start, positions=positions), v

    def rotated(self, *tensors: Tensor, start: int, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Each of the tensors [batch, time, heads, dim] after RoPE; arguments as of `project`."""
        if self.rope_base is None:
            return tensors
        if positions is None:
            positions = torch.arange(start, start + tensors[0].shape[1], device=tensors[0].device)
        angles = rotary_angles(positions, tensors[0].shape[3], base=self.rope_base)
        return tuple(apply_rotary(x, angles) for x in tensors)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, layer={self.layer}"


@lru_cache(maxsize=16)
def _first_rotations(dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `FEW_KEYS` positions, which would cost each step of a decoder a dozen calls."""
    with torch.inference_mode(False):
        return rotary_factors(rotary_angles(torch.arange(FEW_KEYS, device=device), dim, base=base))


def _few_queries(q: Tensor, cache: KVCache, unseen: Tensor | None) -> Tensor:
    """Attention of the last tokens [batch, time, heads, dim]; heads that share keys are rows of one matrix."""
    (batch, time, _, dim), kv_heads = q.shape, cache.keys.shape[2]
    rows = q.view(batch, time, kv_heads, -1, dim).transpose(1, 2).flatten(2, 3)
    keys, values = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
    mask = None if unseen is None else unseen.to(q.dtype)
    mixed = nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return mixed.view(batch, kv_heads, time, -1, mixed.shape[3]).transpose(1, 2).flatten(2, 3)
