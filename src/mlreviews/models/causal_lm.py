"""What decoders, losses and interpretability code ask of a language model: `CausalLM`, and two ways to one.

::

    model = load_pretrained("python-target")                # trained by us, ships with the package
    model = from_transformers(AutoModelForCausalLM.from_pretrained(folder))
    out = model(ids)                                        # out.logits, out.cache, on request out.hidden_states
    out = model(ids_t, out.cache)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mlreviews.models.attention import KVCache
from mlreviews.models.tiny_lm import LMOutput, TinyLM

__all__ = ["Cache", "CausalLM", "TransformersLM", "WrappedLM", "from_transformers", "load_pretrained"]

PRETRAINED = Path(__file__).parent / "pretrained"


class Cache(Protocol):
    """What a model remembers of the tokens so far: a value. See `mlreviews.models.LMCache`."""

    @property
    def length(self) -> int:
        """How many tokens it has seen, padding included."""

    def crop(self, length: int) -> Any:
        """The cache after the first `length` tokens."""

    def rows(self, index: Tensor) -> Any:
        """The given rows of the batch."""

    def keep(self, start: int, index: Tensor, mask: Tensor | None = None) -> Any:
        """The first `start` tokens, and of the others the given ones."""


@runtime_checkable
class CausalLM(Protocol):
    """A language model: `mlreviews.models.TinyLM` is one, and so is what `from_transformers` returns.

    Attributes:
        vocab_size: number of ids.
        max_length: how many tokens it can see; None: no limit is known.
        embed_tokens: from ids to vectors.
        norm: what the last hidden state has passed and the others have not.
        lm_head: from the last hidden state to logits.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def max_length(self) -> int | None:
        """How many tokens it can see."""

    embed_tokens: Any
    norm: Any
    lm_head: Any

    def __call__(
        self,
        ids: Tensor,
        cache: Any = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over the tokens that follow those of the cache; arguments as of `mlreviews.models.TinyLM.forward`."""


class WrappedLM:
    """A language model made of another one, with its vocabulary, embedding and head; a subclass has ``__call__``.

    Args:
        model: any `CausalLM`.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.embed_tokens, self.norm, self.lm_head = model.embed_tokens, model.norm, model.lm_head

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        """How many tokens the model can see."""
        return self.model.max_length


class TransformersCache(NamedTuple):
    """Keys and values of each layer, as `KVCache` with the axes in transformers' order moved to ours."""

    layers: tuple[KVCache, ...]

    @property
    def length(self) -> int:
        """How many tokens it has seen, padding included."""
        return self.layers[0].length

    def crop(self, length: int) -> TransformersCache:
        """The cache after the first `length` tokens."""
        return TransformersCache(tuple(layer.crop(length) for layer in self.layers))

    def rows(self, index: Tensor) -> TransformersCache:
        """The given rows of the batch."""
        return TransformersCache(tuple(layer.rows(index) for layer in self.layers))

    def keep(self, start: int, index: Tensor, mask: Tensor | None = None) -> TransformersCache:
        """The first `start` tokens, and of the others the given ones."""
        return TransformersCache(tuple(layer.keep(start, index, mask) for layer in self.layers))


class TransformersLM(nn.Module):
    """A causal language model of transformers behind our interface; see `from_transformers`.

    Args:
        model: with a decoder-only architecture whose cache is keys and values of all tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.embed_tokens = model.get_input_embeddings()
        self.lm_head = model.get_output_embeddings()
        names = [name for name in ("norm", "ln_f", "final_layer_norm") if hasattr(model.base_model, name)]
        if not names:
            raise TypeError(f"model: expected a norm before the head, {type(model).__name__} has none that is known")
        self.norm = getattr(model.base_model, names[0])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self.model.config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """The config's number of positions."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def forward(
        self,
        ids: Tensor,
        cache: TransformersCache | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over the tokens that follow those of the cache.

        Args:
            ids: [batch, time], int64.
            cache: of an earlier call; it stays as it is.
            mask: [batch, time], False at padding.
            positions: [time] or [batch, time]; None counts the real tokens of each row.
            tree: [time, time] or [batch, time, time], True where one of these tokens sees another one.
            hidden_states: whether these are returned as well.

        Raises:
            ValueError: a wrong shape, or a cache of another model.
        """
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids: expected [batch, time] with no empty axis, got shape {tuple(ids.shape)}")
        past = 0 if cache is None else cache.length
        before = None if cache is None else cache.layers[0].mask
        if mask is None and before is not None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        real = None if mask is None else _with_past(mask, before, past)
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)
            if real is not None:
                positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        given = {} if real is None and tree is None else {"attention_mask": self._mask(ids, past, real, tree)}
        out = self.model(
            input_ids=ids,
            past_key_values=self._to_transformers(cache),
            position_ids=positions.expand(ids.shape[0], -1),
            use_cache=True,
            output_hidden_states=hidden_states,
            **given,
        )
        layers = tuple(
            KVCache(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), real)
            for layer in out.past_key_values.layers
        )
        return LMOutput(out.logits, TransformersCache(layers), out.hidden_states if hidden_states else None)  # type: ignore[arg-type]

    def _mask(self, ids: Tensor, past: int, real: Tensor | None, tree: Tensor | None) -> Tensor:
        """What is added to the scores, [batch, 1, time, past + time]: the lowest number where nothing is seen."""
        batch, time = ids.shape
        if tree is None:
            tree = torch.ones(time, time, dtype=torch.bool, device=ids.device).tril()
        seen = torch.cat([tree.new_ones(batch, time, past), tree.expand(batch, time, time)], dim=2)
        if real is not None:
            seen = seen & real[:, None]
        dtype = self.embed_tokens.weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def _to_transformers(self, cache: TransformersCache | None) -> Any:
        from transformers import DynamicCache

        found = DynamicCache()
        if cache is None:
            return found
        if len(cache.layers) != self.model.config.num_hidden_layers:
            raise ValueError(
                f"cache: expected a state for each of {self.model.config.num_hidden_layers} layers, "
                f"got {len(cache.layers)}"
            )
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if tuple(cache.layers[0].keys.shape[2:]) != (heads, dim):
            raise ValueError(
                f"cache: expected keys [batch, time, {heads}, {dim}], got {list(cache.layers[0].keys.shape)}"
            )
        for i, layer in enumerate(cache.layers):
            found.update(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), i)
        return found


def _with_past(mask: Tensor, before: Tensor | None, past: int) -> Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], past) if before is None else before, mask], dim=1)


def from_transformers(model: Any) -> TransformersLM:
    """Makes a causal language model of transformers a `CausalLM`, with a cache that is a value.

    Args:
        model: such as a ``LlamaForCausalLM``, ``GPT2LMHeadModel`` or ``Qwen2ForCausalLM``; it is used as it is, in
            its mode, dtype and device. Models whose memory isn't keys and values of all tokens (recurrent layers,
            sliding windows) are not supported.

    Raises:
        TypeError: it is no causal language model, or its memory is of another kind.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    if not kinds and getattr(config, "sliding_window", None) is not None:  # Mistral's, say, has no types
        kinds = ("sliding_attention",)
    if other := sorted(set(kinds) - {"full_attention"}):
        raise TypeError(f"model: expected layers of full attention alone, got {', '.join(other)}")
    return TransformersLM(model)


def load_pretrained(name: str) -> TinyLM:
    """One of the models that ship with the package, in evaluation mode, or one that `pretraining` wrote to a folder.

    Byte-level models of Python source, ids of `mlreviews.datasets.ByteTokenizer`: "python-target" (3.3 million
    parameters), "python-draft" (0.3 million), and "python-draft-distilled", the same draft after further training on
    what the target expects, for speculative decoding. Their folders under ``mlreviews/models/pretrained`` hold the
    recipe, the loss curve and the validation loss (``training.json``).

    Args:
        name: of a shipped model, or a folder.

    Raises:
        ValueError: there is no such model.
    """
    shipped = PRETRAINED / name
    folder = shipped if shipped.is_dir() else Path(name)
    if not (folder / "model.safetensors").is_file():
        names = ", ".join(sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir()))
        raise ValueError(f"name: expected one of {names}, or a folder that TinyLM.save wrote, got {name!r}")
    return TinyLM.load(folder).eval()
