"""Plain generation: one token a step, in batches with padding on the left, with a cache, streaming if wanted.

::

    result = generate(model, ids, 200)                                      # greedy
    sampler = Sampler(temperature=0.8, top_p=0.95)
    result = generate(model, ids, 200, sampler=sampler, generator=torch.Generator().manual_seed(0))
    print(tokenizer.decode(result.row(0)))

    for tokens in stream(model, ids, 200):                                  # [batch], as they come
        ...

`Sampler` and `Stops` serve every other decoder as well: what a decoder calls the distribution of a model is what the
sampler makes of its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
from mlreviews.models.causal_lm import CausalLM

__all__ = [
    "GenerationResult",
    "Sampler",
    "Stops",
    "check_prompt",
    "column_major",
    "draw",
    "flip",
    "generate",
    "most_likely",
    "stream",
]

Model = TypeVar("Model", bound=nn.Module)
NOT_FINITE = "logits: expected numbers, with a finite one in each row, got NaN or infinity"


@dataclass(frozen=True)
class Sampler:
    """From logits to the distribution that tokens are drawn from. The defaults are greedy decoding.

    Applied in this order, as transformers does: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: the logits are divided by it; 0 puts everything on the largest one.
        top_k: only so many of the most likely tokens; ties with the last of them stay.
        top_p: only the fewest of the most likely tokens that have at least this probability together.
        min_p: only tokens with at least this part of the largest probability.
        repetition_penalty: logits of tokens that came before are divided by it where positive, multiplied where
            negative (Keskar et al. 2019); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0.0)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number above 0, and 1 at most, got {value}")
        check_number("repetition_penalty", self.repetition_penalty, above=0.0)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def probabilities(
        self, logits: Float[Tensor, "*batch vocab"], previous: Int[Tensor, "*batch time"] | None = None
    ) -> Float[Tensor, "*batch vocab"]:
        """The distribution that tokens are drawn from, float32 (float64 of float64 logits).

        Args:
            logits: [..., vocab].
            previous: [..., time], what came before, for the repetition penalty; negative ids are no tokens.

        Raises:
            ValueError: NaN among the logits, or no token has a finite one.
        """
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        if self.repetition_penalty != 1.0 and previous is not None:
            logits = self._penalised(logits, previous)
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, most_likely(logits)[..., None], 1.0)
        if self.temperature != 1:
            # the largest logit is moved to 0, which no temperature can make infinite
            logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        p = logits.softmax(-1)
        # a single NaN or infinity among the logits, or none that is finite, makes all of a row NaN
        if bool(p[..., 0].isnan().any()):
            raise ValueError(NOT_FINITE)
        return self._filtered(p)

    def _penalised(self, logits: Tensor, previous: Tensor) -> Tensor:
        seen = torch.zeros_like(logits).scatter_add_(-1, previous.clamp(min=0), (previous >= 0).to(logits.dtype)) > 0
        changed = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, changed, logits)

    def _filtered(self, p: Tensor) -> Tensor:
        if self.top_k is not None and self.top_k < p.shape[-1]:
            p = _renormalised(p, p >= p.topk(self.top_k, -1).values[..., -1:])
        if self.top_p is not None and self.top_p < 1:
            ordered = p.sort(-1, descending=True)
            # a token stays where those before it have less than top_p together
            stays = ordered.values.cumsum(-1) - ordered.values < self.top_p
            p = _renormalised(p, torch.zeros_like(stays).scatter_(-1, ordered.indices, stays))
        if self.min_p is not None:
            p = _renormalised(p, p >= self.min_p * p.amax(-1, keepdim=True))
        return p

    def sample(
        self, logits: Float[Tensor, "batch vocab"], previous: Tensor | None, generator: torch.Generator | None
    ) -> Int[Tensor, " batch"]:
        """One token for each row; arguments as of `probabilities` and `draw`."""
        if self.greedy and self.repetition_penalty == 1.0:  # no distribution is needed
            return most_likely(logits)
        return draw(self.probabilities(logits, previous), generator)


def _renormalised(p: Tensor, stays: Tensor) -> Tensor:
    p = p.masked_fill(~stays, 0.0)
    return p / p.sum(-1, keepdim=True)


def most_likely(logits: Float[Tensor, "*batch vocab"]) -> Int[Tensor, "*batch"]:
    """The largest logit's index, the first of several.

    Args:
        logits: [..., vocab].

    Raises:
        ValueError: NaN or infinity among the logits, or no token has a finite one.
    """
    best = logits.max(-1)
    # NaN is the largest of any numbers, so the largest ones tell; as Python's numbers, which takes a decoder less time
    if not all(map(math.isfinite, best.values.flatten().tolist())):
        raise ValueError(NOT_FINITE)
    return best.indices


def draw(p: Float[Tensor, "*batch vocab"], generator: torch.Generator | None = None) -> Int[Tensor, "*batch"]:
    """One index for each distribution.

    Args:
        p: [..., vocab], probabilities; need not be normalised.
        generator: on p's device; None is the global one.
    """
    return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])


def flip(p: Float[Tensor, "*batch"], generator: torch.Generator | None = None) -> Bool[Tensor, "*batch"]:
    """True with the given probability, each by itself.

    Args:
        p: probabilities; above 1 is always, below 0 never.
        generator: on p's device; None is the global one.
    """
    return torch.bernoulli(p.clamp(0, 1), generator=generator).bool()


class GenerationResult(NamedTuple):
    """What a decoder returns.

    Attributes:
        tokens: [batch, longest], the new tokens, int64; rows that ended earlier are filled with the pad token.
        lengths: [batch], how many of them are real; a stop token counts.
        target_calls: forward passes of the model, the prompt's included.
        accepted: for decoders that draft: [steps, batch], how many drafted tokens each step took; -1 for rows that
            had ended. None for plain decoding.
        drafted: likewise, how many were offered.
    """

    tokens: Int[Tensor, "batch longest"]
    lengths: Int[Tensor, " batch"]
    target_calls: int
    accepted: Int[Tensor, "steps batch"] | None = None
    drafted: Int[Tensor, "steps batch"] | None = None

    def row(self, index: int) -> Int[Tensor, " length"]:
        """The real tokens of a row."""
        return self.tokens[index, : int(self.lengths[index])]

    @property
    def tokens_per_call(self) -> float:
        """New tokens of a row per forward pass, mean over the rows."""
        return float(self.lengths.double().mean()) / self.target_calls

    @property
    def acceptance_rate(self) -> float:
        """Drafted tokens that were taken, of those that were offered; NaN where none were."""
        if self.accepted is None or self.drafted is None:
            return float("nan")
        return float(self.accepted.clamp(min=0).sum() / self.drafted.clamp(min=0).sum())


@dataclass
class Stops:
    """Gathers the new tokens of each row, and tells which rows have ended: a stop token, a stop string, the budget.

    Attributes:
        batch: rows.
        budget: tokens at most, each row.
        tokens: ids that end a row; the row keeps it.
        strings: texts that end a row as soon as it contains one; whole tokens are kept.
        decode: from ids [time] to text, for stop strings.
        pad: fills rows that ended earlier.
        rows: the new tokens so far.
        ended: which rows have ended.
    """

    batch: int
    budget: int
    tokens: Sequence[int] = ()
    strings: Sequence[str] = ()
    decode: Callable[[Tensor], str] | None = None
    pad: int = 0
    rows: list[list[int]] = field(init=False)
    ended: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.budget, least=0)
        if self.strings and self.decode is None:
            raise ValueError("decode: stop strings need the function that turns ids into text")
        if not all(self.strings):
            raise ValueError("stop_strings: expected no empty one")
        self.rows = [[] for _ in range(self.batch)]
        self.ended = [self.budget == 0] * self.batch

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(self.ended)

    def left(self, row: int) -> int:
        """How many more tokens a row may get."""
        return 0 if self.ended[row] else self.budget - len(self.rows[row])

    def add(self, row: int, new: Sequence[int]) -> int:
        """Takes the tokens up to the first that ends the row.

        Args:
            row: which.
            new: ids, in order.

        Returns:
            How many were taken; 0 of a row that has ended.
        """
        for taken, token in enumerate(new):
            if self.ended[row]:
                return taken
            self.rows[row].append(token)
            self.ended[row] = (
                len(self.rows[row]) >= self.budget or token in self.tokens or (bool(self.strings) and self._text(row))
            )
        return len(new)

    def _text(self, row: int) -> bool:
        assert self.decode is not None
        # a token is a byte at least, so a string that has just been completed lies in as many tokens as it has bytes
        tail = self.rows[row][-max(len(s.encode()) for s in self.strings) :]
        text = self.decode(torch.tensor(tail))
        return any(s in text for s in self.strings)

    def result(
        self, calls: int, accepted: list[list[int]] | None = None, drafted: list[list[int]] | None = None
    ) -> GenerationResult:
        """What has been gathered; arguments are fields of `GenerationResult`."""
        longest = max(map(len, self.rows))
        filled = [row + [self.pad] * (longest - len(row)) for row in self.rows]
        shape = (-1, self.batch)
        counts = (None if x is None else torch.tensor(x, dtype=torch.int64).reshape(shape) for x in (accepted, drafted))
        tokens = torch.tensor(filled, dtype=torch.int64).reshape(self.batch, longest)
        return GenerationResult(tokens, torch.tensor(list(map(len, self.rows))), calls, *counts)


def check_prompt(
    model: CausalLM, input_ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, name: str = "model"
) -> None:
    """Raises where a prompt can't be continued by so many tokens.

    Args:
        model: that continues it.
        input_ids: [batch, time].
        max_new_tokens: the budget.
        mask: [batch, time], False at padding on the left.
        name: of the model, for the message.

    Raises:
        TypeError: ids are not int64.
        ValueError: an empty prompt, an id outside the vocabulary, padding elsewhere than on the left, or more tokens
            than the model can see.
    """
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: expected int64, got {input_ids.dtype}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: expected [batch, time] with a token at least, got shape {tuple(input_ids.shape)}")
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < model.vocab_size:
        raise ValueError(f"input_ids: expected ids from 0 to {model.vocab_size - 1} of the {name}")
    check_count("max_new_tokens", max_new_tokens, least=0)
    if model.max_length is not None and input_ids.shape[1] + max_new_tokens > model.max_length:
        raise ValueError(
            f"max_new_tokens: the {name} sees {model.max_length} tokens; a prompt of {input_ids.shape[1]} and "
            f"{max_new_tokens} more are too many"
        )
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != input_ids.shape:
            raise ValueError(f"mask: expected booleans {tuple(input_ids.shape)}, got {mask.dtype} {tuple(mask.shape)}")
        if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError("mask: expected padding (False) on the left of a row alone, and a token at least")


@torch.no_grad()
def stream(
    model: CausalLM,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stops: Stops | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yields the next token of each row, [batch], until all rows have ended. Arguments as of `generate`.

    Args:
        stops: gathers the tokens and tells when to end; rows that have ended go on, to no use. None: the budget alone.
    """
    check_prompt(model, input_ids, max_new_tokens, mask)
    stops = Stops(len(input_ids), max_new_tokens) if stops is None else stops
    previous = input_ids if mask is None else input_ids.masked_fill(~mask, -1)
    ids, cache = input_ids, None
    while not stops.done:
        out = model(ids, cache, mask=mask if cache is None else None)
        token = sampler.sample(out.logits[:, -1], previous, generator)
        for row, new in enumerate(token.tolist()):
            stops.add(row, [new])
        yield token
        ids, cache = token[:, None], out.cache
        if sampler.repetition_penalty != 1.0:
            previous = torch.cat([previous, ids], 1)


def generate(
    model: CausalLM,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[Tensor], str] | None = None,
    pad: int = 0,
) -> GenerationResult:
    """Continues each row of a batch, one token a step.

    Args:
        model: any `mlreviews.models.CausalLM`.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row, 0 or more.
        sampler: from logits to the distribution; the default is greedy.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws the tokens; None is the global one.
        stop_tokens: ids that end a row.
        stop_strings: texts that end a row as soon as it contains one.
        decode: from ids [time] to text, for stop strings, such as ``ByteTokenizer().decode``.
        pad: fills rows that ended earlier.

    Returns:
        The new tokens, without the prompt.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, more tokens than the model can see, NaN logits.
        TypeError: ids are not int64.
    """
    stops = Stops(len(input_ids), max_new_tokens, stop_tokens, stop_strings, decode, pad)
    calls = 0
    for _ in stream(model, input_ids, max_new_tokens, sampler=sampler, mask=mask, generator=generator, stops=stops):
        calls += 1
    return stops.result(calls)


def column_major(model: Model) -> Model:
    """Lays the weights of a model's `torch.nn.Linear` layers out by columns in memory, in place, for decoding on a CPU.

    A small model (matrices of 100 to 500 rows) then takes a tenth less time over the 2 to 16 tokens of a pass that
    verifies a draft; large models don't gain. Nothing but the strides changes: values, shapes and state dict stay.
    Code that calls `torch.Tensor.view` on a weight, as `torch.nn.utils.parameters_to_vector` does, then fails.

    Args:
        model: any module, of this library or another.

    Returns:
        the same model.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    return model
