"""A small decoder-only language model: RMSNorm, attention with RoPE, SwiGLU, and everything that others build on.

::

    config = TinyLMConfig(d_model=128, layers=4, heads=4)
    model = TinyLM(config)                                          # or TinyLM(config, attention=SelectiveAttention)

    logits = model(window[:, :-1]).logits                               # training: ids [batch, time]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    out = model(prompt)                                                 # decoding
    while ...:
        out = model(out.logits[:, -1:].argmax(-1), out.cache)
    cache = out.cache.crop(prompt.shape[1])                             # back to the prompt; also .rows(index)

The attention is one argument: any class called as ``attention(d_model, heads, kv_heads=..., layer=..., generator=...)``
whose instances are mixers (see `mlreviews.models.SequenceModel`); further options through `functools.partial`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
from mlreviews.common.layers import linear
from mlreviews.models.attention import CausalAttention

__all__ = ["LMCache", "LMOutput", "TinyLM", "TinyLMConfig"]


@dataclass(frozen=True)
class TinyLMConfig:
    """Sizes of a `TinyLM`.

    Attributes:
        vocab_size: number of ids; 259 are those of `mlreviews.datasets.ByteTokenizer`.
        d_model: size of a token's vector.
        layers: number of blocks.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        hidden: units of the SwiGLU; None is 8/3 d_model, rounded up to a multiple of 16.
        norm_eps: of RMSNorm.
        tied: whether the head is the embedding's matrix.
        context: how many tokens it was trained to see; decoders don't go beyond. None: no limit is known.
    """

    vocab_size: int = 259
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    context: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "layers", "heads"):
            check_count(name, getattr(self, name))
        for name in ("kv_heads", "hidden", "context"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_number("norm_eps", self.norm_eps, above=0.0)


class LMCache(NamedTuple):
    """What a model remembers of the tokens so far: a state of each block, and one of the position embedding.

    A value, like the states in it: `crop`, `rows` and `keep` return another cache, and the old one stays valid.
    """

    layers: tuple[Any, ...]
    embedding: Any = None

    @property
    def length(self) -> int:
        """How many tokens it has seen, padding included."""
        return int(self.layers[0].length)

    def crop(self, length: int) -> LMCache:
        """The cache after the first `length` tokens.

        Raises:
            ValueError: there are not that many.
            TypeError: a state cannot be taken back, such as that of a recurrence.
        """
        return self._each("crop", length)

    def rows(self, index: Int[Tensor, " rows"]) -> LMCache:
        """The given rows of the batch, reordered or repeated.

        Args:
            index: [rows], int64.

        Raises:
            TypeError: a state doesn't know its rows.
        """
        return self._each("rows", index)

    def keep(
        self, start: int, index: Int[Tensor, "batch kept"], mask: Bool[Tensor, "batch kept"] | None = None
    ) -> LMCache:
        """The first `start` tokens, and of the others the given ones: what a verified tree or ragged batch leaves.

        Args:
            start: how many stay in any case.
            index: [batch, kept], int64, of the tokens after those, counted from `start`.
            mask: [batch, kept], False where a row keeps fewer; nothing sees these. None: all are real.

        Raises:
            TypeError: a state cannot leave tokens out.
        """
        return self._each("keep", start, index, mask)

    def _each(self, method: str, *arguments: Any) -> LMCache:
        def apply(state: Any) -> Any:
            if not hasattr(state, method):
                raise TypeError(f"cache: a state of type {type(state).__name__} has no {method}()")
            return getattr(state, method)(*arguments)

        return LMCache(tuple(map(apply, self.layers)), None if self.embedding is None else apply(self.embedding))


class LMOutput(NamedTuple):
    """What a language model returns.

    Attributes:
        logits: [batch, time, vocab_size], of the next token.
        cache: goes into the call with the tokens that follow.
        hidden_states: on request: [batch, time, d_model] before the first block and after each; the last is normed.
    """

    logits: Tensor
    cache: LMCache
    hidden_states: tuple[Tensor, ...] | None = None


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202), with Llama's names.

    Args:
        d_model: size of a token's vector.
        hidden: units.
        generator: draws the weights; None is the global one.
    """

    def __init__(self, d_model: int, hidden: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gate_proj = linear(d_model, hidden, bias=False, generator=generator)
        self.up_proj = linear(d_model, hidden, bias=False, generator=generator)
        self.down_proj = linear(hidden, d_model, bias=False, generator=generator)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Of each vector by itself."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: TinyLMConfig, attention: nn.Module, generator: torch.Generator | None) -> None:
        super().__init__()
        d_model = config.d_model
        hidden = -(-8 * d_model // 48) * 16 if config.hidden is None else config.hidden
        self.input_layernorm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.self_attn: Any = attention
        self.post_attention_layernorm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(d_model, hidden, generator=generator)

    def forward(self, x: Tensor, state: Any, carried: Any, layout: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        normed = self.input_layernorm(x)
        if getattr(self.self_attn, "cross_layer", False):
            mixed, state, carried = self.self_attn(normed, state, carried=carried, **layout)
        else:
            mixed, state = self.self_attn(normed, state, **layout)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), state, carried


class TinyLM(nn.Module):
    """Embedding, pre-norm blocks of attention and SwiGLU, norm, head. Parameters have the names of a Llama model's.

    Args:
        config: sizes.
        attention: called as ``attention(d_model, heads, kv_heads=..., layer=..., generator=...)`` for each block. An
            instance with ``cross_layer = True`` is called with ``carried=`` as well, what the block before it returned
            as a third value (None for the first), as sharing between layers needs.
        position_embedding: added to the embedding of the tokens; called as ``(ids, state) -> (vectors, state)``, with
            state None before the first token. None leaves positions to the attention.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: sizes that don't go together.
    """

    def __init__(
        self,
        config: TinyLMConfig,
        attention: Callable[..., nn.Module] = CausalAttention,
        *,
        position_embedding: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        vocab_size, d_model = config.vocab_size, config.d_model
        # An empty weight that is filled below: the constructor would draw from the global generator.
        self.embed_tokens = nn.Embedding(vocab_size, d_model, _weight=torch.empty(vocab_size, d_model))
        # With the head tied, entries of this size give the logits of a normed vector unit variance.
        nn.init.normal_(self.embed_tokens.weight, std=d_model**-0.5, generator=generator)
        self.position_embedding: Any = position_embedding
        made = (
            attention(d_model, config.heads, kv_heads=config.kv_heads, layer=layer, generator=generator)
            for layer in range(config.layers)
        )
        self.layers = nn.ModuleList(Block(config, mixer, generator) for mixer in made)
        self.norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.lm_head = linear(
            d_model, vocab_size, bias=False, generator=torch.Generator() if config.tied else generator
        )
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_config(cls, config: TinyLMConfig | Mapping[str, Any], **options: Any) -> TinyLM:
        """A model with random weights from a config, or from a mapping with the same names (a JSON file's, say).

        Args:
            config: sizes; names that are missing have their defaults.
            options: further arguments of the class.

        Raises:
            TypeError: a name that a config doesn't have.
        """
        return cls(config if isinstance(config, TinyLMConfig) else TinyLMConfig(**config), **options)

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        cache: LMCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*rows time"] | None = None,
        tree: Bool[Tensor, "*trees time time"] | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over the tokens that follow those of the cache.

        Args:
            ids: [batch, time], int64 or int32.
            cache: of an earlier call; None before the first token. It stays as it is.
            mask: [batch, time], False at padding on the left of a row; logits there have no meaning.
            positions: [time] or [batch, time], where they are not simply counted on.
            tree: [time, time] or [batch, time, time], True where one of these tokens (row) sees another one (column);
                all of them see the cache. None: each sees those before it. For attention layers that take it.
            hidden_states: whether the hidden states are returned as well.

        Returns:
            logits, the cache after the last token, and the hidden states.

        Raises:
            ValueError: a wrong shape, or a cache of another model.
            TypeError: ids are not integers.
            IndexError: an id outside the vocabulary.
        """
        self._check(ids, cache)
        given = (("mask", mask), ("positions", positions), ("tree", tree))
        layout: dict[str, Any] = {name: x for name, x in given if x is not None}
        x = self.embed_tokens(ids)
        position_state = None
        if self.position_embedding is not None:
            vectors, position_state = self.position_embedding(ids, None if cache is None else cache.embedding)
            x = x + vectors
        hidden, states, carried = [x], [], None
        before = (None,) * len(self.layers) if cache is None else cache.layers
        mixers: list[Any] = [block.self_attn for block in self.layers]
        if mixers and all(type(m) is CausalAttention and m.rope_base == mixers[0].rope_base for m in mixers):
            layout["shared"] = mixers[0].shared(x, before[0], **layout)
        for block, state in zip(self.layers, before, strict=True):
            x, state, carried = block(x, state, carried, layout)
            hidden.append(x)
            states.append(state)
        x = self.norm(x)
        found = (*hidden[:-1], x) if hidden_states else None
        return LMOutput(self.lm_head(x), LMCache(tuple(states), position_state), found)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """How many tokens decoders may let it see; None: no limit is known."""
        return self.config.context

    def save(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``; an attention other than the standard one isn't named there.

        Args:
            folder: made where it doesn't exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        weights = {name: x.contiguous() for name, x in self.state_dict().items()}
        if self.config.tied:
            del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> TinyLM:
        """The model that `save` wrote.

        Args:
            folder: with ``config.json`` and ``model.safetensors``.
            options: further arguments of the class, the same as when it was saved.

        Raises:
            FileNotFoundError: there is no such file.
            RuntimeError: the weights are those of another model.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls.from_config(config, generator=torch.Generator(), **options)
        load_model(model, str(folder / "model.safetensors"))
        return model

    def _check(self, ids: Tensor, cache: LMCache | None) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids: expected [batch, time] with no empty axis, got shape {tuple(ids.shape)}")
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"cache: expected a state for each of {len(self.layers)} blocks, got {len(cache.layers)}")
