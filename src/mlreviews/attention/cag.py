r"""Cache-augmented generation: all documents in the context, their keys and values computed once for all queries.

Paper: Don't Do RAG: When Cache-Augmented Generation is All You Need for Knowledge Tasks (arXiv:2412.15605).

Where all the documents that questions may be about fit into the context window, nothing has to be retrieved: the model
reads them once, and keeps their keys and values, in memory or in a file. A query is read behind them, the answer is
generated, and the cache is cut back to the documents for the next one. A query then costs its own tokens and those of
the answer, whatever the length of the documents; only attention still looks at all of them.

Equation:
    $$ C = \operatorname{KV}(D), \qquad r = M(q \mid C) = M(D \oplus q), \qquad
       C \oplus q \oplus r \;\mapsto\; C \quad \text{(the first } |D| \text{ tokens)} \tag{1} $$
    Several queries share one copy of C. With the output $o_C$ and log-sum-exp $\ell_C$ of a row's queries over C, and
    $o_s, \ell_s$ over the row's own tokens, cascade attention is
    $$ o = \frac{e^{\ell_C} o_C + e^{\ell_s} o_s}{e^{\ell_C} + e^{\ell_s}}. \tag{2} $$

Symbols:
    D: ids of the documents, one after another.
    C: keys and values of the documents in every layer, after position embedding.
    q: ids of a query.
    r: ids of the answer.

Defaults:
    decoding: greedy, as in the code published with the paper.

Deviations:
    1. The prompt around documents and question is left to the caller.
    2. The paper's cache is cut back in place. Here caches are values, so that a batch can start from one of them.
    3. Several queries at a time, with (2), are not in the paper; the attention over a shared prefix is FlashInfer's.
    4. A cache from a file is compared with what the model computes of the first token, so that one of another model is
       refused; the paper's code takes any.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: (2), over the prefix and the row's own tokens together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.tiny_lm import LMCache
from mlreviews_kernels.attention import attention, merge_attention

__all__ = ["CacheAugmentedGenerator", "CascadeAttention", "PrefixedCache", "cascade_attention"]

FORMAT = "mlreviews cag 1"


def cascade_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    prefix_k: Float[Tensor, "1 prefix kv_heads dim"],
    prefix_v: Float[Tensor, "1 prefix kv_heads value_dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    *,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time heads value_dim"]:
    """Causal attention of each row to a prefix that all rows share and to keys of its own, eq. (2).

    The prefix is read once for all rows: their queries are those of one row there, which makes a matrix product of what
    would be a product with one vector a row.

    Args:
        q: [batch, q_time, heads, dim], of the last q_time tokens.
        prefix_k: [1, prefix, kv_heads, dim].
        prefix_v: [1, prefix, kv_heads, value_dim].
        k: [batch, k_time, kv_heads, dim], of the tokens behind the prefix.
        v: [batch, k_time, kv_heads, value_dim].
        mask: [batch, k_time], False at padding.

    Returns:
        [batch, q_time, heads, value_dim], in q's dtype.

    Raises:
        ValueError: shapes don't go together.
    """
    batch, q_time = q.shape[:2]
    shared, lse = attention(q.flatten(0, 1)[None], prefix_k, prefix_v, causal=False)
    shared, lse = shared.unflatten(1, (batch, q_time))[0], lse.unflatten(2, (batch, q_time))[0].transpose(0, 1)
    own, own_lse = attention(q, k, v, mask=mask)
    return merge_attention((shared, own), (lse, own_lse))[0]


class PrefixedCache(NamedTuple):
    """A `KVCache` for each row of a batch, behind a prefix that is held once for all of them.

    Attributes:
        prefix: of one row, without padding.
        own: of the tokens behind it.
    """

    prefix: KVCache
    own: KVCache

    @property
    def length(self) -> int:
        """Tokens of a row: those of the prefix, and its own, padding included."""
        return self.prefix.length + self.own.length

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> PrefixedCache:
        """The cache with further tokens behind; arguments and errors as of `KVCache.append`."""
        return PrefixedCache(self.prefix, self.own.append(keys, values, mask))

    def crop(self, length: int) -> PrefixedCache:
        """The first tokens alone.

        Args:
            length: how many, from the prefix's to `length`.

        Raises:
            ValueError: fewer than the prefix, or more than there are.
        """
        if not self.prefix.length <= length <= self.length:
            raise ValueError(f"length: expected {self.prefix.length}, the prefix, to {self.length}, got {length}")
        return PrefixedCache(self.prefix, self.own.crop(length - self.prefix.length))

    def rows(self, index: Int[Tensor, " rows"]) -> PrefixedCache:
        """The given rows of the batch, in that order.

        Args:
            index: [rows], int64.
        """
        return PrefixedCache(self.prefix, self.own.rows(index))


class CascadeAttention(CausalAttention):
    """`CausalAttention`, with the same weights, that can also go on from a `PrefixedCache`.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.
    """

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache | PrefixedCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """As of `CausalAttention`, or by eq. (2) where rows share a prefix."""
        if isinstance(cache, PrefixedCache):
            prefix, own = cache
            return cascade_attention(q, prefix.keys, prefix.values, own.keys, own.values, mask=own.mask)
        return super().mix(q, cache)


class CacheAugmentedGenerator:
    """Answers queries behind documents that the model has read once.

    `generate` and `reset` are the paper's: the cache grows with each query and answer, as in a conversation, until it
    is cut back. `answer` takes a batch of queries that don't see each other.

    Args:
        model: called as ``model(ids, cache) -> (logits, cache, ...)`` with ids [batch, time] and a cache that has
            ``length``, ``crop`` and ``rows``, such as a `TinyLM` in evaluation mode. With `CascadeAttention` in it,
            a batch shares the documents' cache; else each row has a copy. Queries of unequal lengths in a batch are
            padded on the left, and need ``mask=`` and ``positions=`` of `TinyLM`.
        documents: ids [time] of each, which are put one after another.
        eos: the id that ends an answer; None if there is none.
        window: tokens of the longest context that the model can take; None if any.

    Raises:
        ValueError: no documents, an empty one, or more tokens than the window has.
        TypeError: ids are not integers.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        documents: Sequence[Tensor],
        *,
        eos: int | None = None,
        window: int | None = None,
    ) -> None:
        if not documents:
            raise ValueError("documents: expected at least one, got none")
        for i, document in enumerate(documents):
            _check_ids(f"documents[{i}]", document)
        self.model, self.eos, self.window = model, eos, window
        self.documents = torch.cat(list(documents))[None]
        self.cache: Any = None
        self.forwarded = 0  # tokens that went through the model, padding included
        self._check_room("documents", 0, self.documents.shape[1], 0)

    def preload(self) -> None:
        """Reads the documents; called by the first query where nobody has done so before."""
        self.cache = None
        _, self.cache = self._forward(self.documents, None)

    def reset(self) -> None:
        """Cuts the cache back to the documents."""
        if self.cache is not None:
            self.cache = self.cache.crop(self.documents.shape[1])

    def generate(self, query: Int[Tensor, " time"], max_new_tokens: int) -> Int[Tensor, " new"]:
        """The answer to a query behind what the cache holds, to which both are added.

        Args:
            query: ids [time].
            max_new_tokens: of the answer.

        Returns:
            ids [new], ending with `eos` where that came.

        Raises:
            ValueError: an empty query, no tokens to generate, or no room in the window.
            TypeError: ids are not integers.
        """
        _check_ids("query", query)
        check_count("max_new_tokens", max_new_tokens)
        if self.cache is None:
            self.preload()
        self._check_room("query", self.cache.length, len(query), max_new_tokens)
        logits, cache = self._forward(query[None], self.cache)
        answer: list[Tensor] = []
        while len(answer) < max_new_tokens and not (answer and answer[-1].item() == self.eos):
            answer.append(logits[0, -1].argmax())
            logits, cache = self._forward(answer[-1][None, None], cache)
        self.cache = cache
        return torch.stack(answer)

    def answer(self, queries: Sequence[Int[Tensor, " _"]], max_new_tokens: int) -> list[Tensor]:
        """The answers to several queries, each behind the documents alone; the cache stays as it is.

        Args:
            queries: ids [time] of each.
            max_new_tokens: of an answer.

        Returns:
            ids [new] for each query, ending with `eos` where that came.

        Raises:
            ValueError: no queries, an empty one, no tokens to generate, or no room in the window.
            TypeError: ids are not integers.
        """
        if not queries:
            raise ValueError("queries: expected at least one, got none")
        for i, query in enumerate(queries):
            _check_ids(f"queries[{i}]", query)
        check_count("max_new_tokens", max_new_tokens)
        if self.cache is None:
            self.preload()
        read = self.documents.shape[1]
        lengths = torch.tensor([len(query) for query in queries], device=self.documents.device)
        time = int(lengths.max())
        self._check_room("queries", read, time, max_new_tokens)
        ids = torch.stack([nn.functional.pad(query, (time - len(query), 0)) for query in queries])
        padding = (time - lengths)[:, None]
        layout: dict[str, Tensor] = {}
        places = torch.arange(read, read + time + max_new_tokens, device=ids.device) - padding
        if padding.any():
            layout = {"mask": torch.arange(time, device=ids.device) >= padding, "positions": places[:, :time]}
        logits, cache = self._forward(ids, self._shared(len(queries)), **layout)
        found = [logits[:, -1].argmax(-1)]
        while len(found) < max_new_tokens and not all(self._ends(torch.stack(found, 1))):
            now = time + len(found) - 1
            layout = {"positions": places[:, now : now + 1]} if layout else {}
            logits, cache = self._forward(found[-1][:, None], cache, **layout)
            found.append(logits[:, -1].argmax(-1))
        answers = torch.stack(found, 1)
        return [row[: end or None] for row, end in zip(answers, self._ends(answers), strict=True)]

    def save(self, path: str | Path) -> None:
        """Writes the documents and their cache as safetensors.

        Args:
            path: of the file.

        Raises:
            TypeError: the cache is none of `TinyLM` with states of type `KVCache`.
        """
        if self.cache is None:
            self.preload()
        tensors = {"documents": self.documents}
        cache = self.cache.crop(self.documents.shape[1])
        if not isinstance(cache, LMCache) or cache.embedding is not None:
            raise TypeError(f"cache: expected keys and values of every layer alone, got {type(cache).__name__}")
        for i, state in enumerate(cache.layers):
            if not isinstance(state, KVCache):
                raise TypeError(f"cache: expected states of type KVCache, got {type(state).__name__}")
            tensors |= {f"layers.{i}.keys": state.keys, f"layers.{i}.values": state.values}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": FORMAT})

    @classmethod
    def load(
        cls, model: Callable[..., Any], path: str | Path, *, eos: int | None = None, window: int | None = None
    ) -> CacheAugmentedGenerator:
        """A generator with the documents and the cache that `save` wrote. One token goes through the model.

        Args:
            model: the one that the cache was made with.
            path: of the file.
            eos: as of the class.
            window: as of the class.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or that of another model.
        """
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"path: {path} was not written by CacheAugmentedGenerator.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        found = cls(model, list(tensors.pop("documents")), eos=eos, window=window)
        pairs = [(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"]) for i in range(len(tensors) // 2)]
        first = found._forward(found.documents[:, :1], None)[1].layers
        if len(first) != len(pairs) or not all(map(_begins_with, pairs, first)):
            raise ValueError(f"path: {path} holds the cache of another model")
        found.cache = LMCache(tuple(KVCache(*pair) for pair in pairs))
        return found

    @torch.no_grad()
    def _forward(self, ids: Tensor, cache: Any, **layout: Tensor) -> tuple[Tensor, Any]:
        self.forwarded += ids.numel()
        logits, cache, *_ = self.model(ids, cache, **layout)
        return logits, cache

    def _shared(self, rows: int) -> Any:
        """The documents' cache for a batch: held once where the model can use it so, else copied."""
        cache = self.cache.crop(self.documents.shape[1])
        mixers = self.model.modules() if isinstance(self.model, nn.Module) else ()
        if not any(isinstance(mixer, CascadeAttention) for mixer in mixers):
            return cache.rows(self.documents.new_zeros(rows))
        own = (KVCache(*(x[:, :0].expand(rows, -1, -1, -1) for x in state[:2])) for state in cache.layers)
        return LMCache(tuple(map(PrefixedCache, cache.layers, own)), cache.embedding)

    def _ends(self, answers: Tensor) -> list[int]:
        """The length of each answer [rows, time] up to the id that ends it; 0 for one that goes on."""
        return [row.index(self.eos) + 1 if self.eos in row else 0 for row in answers.tolist()]

    def _check_room(self, name: str, held: int, new: int, max_new_tokens: int) -> None:
        if self.window is not None and held + new + max_new_tokens > self.window:
            raise ValueError(
                f"{name}: expected at most {self.window} tokens, the window, got {held} in the cache, {new} new ones"
                f" and {max_new_tokens} to generate"
            )


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}")
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"{name}: expected ids [time], one at least, got shape {tuple(ids.shape)}")


def _begins_with(pair: tuple[Tensor, Tensor], first: KVCache) -> bool:
    """Whether keys and values begin with those of a first token, up to rounding."""
    for mine, theirs in zip(pair, (first.keys, first.values), strict=True):
        if mine.dtype != theirs.dtype or mine[:, :1].shape != theirs.shape:
            return False
        if (mine[:, :1] - theirs).abs().max() > torch.finfo(mine.dtype).eps ** 0.5 * theirs.abs().max():
            return False
    return True
