"""Models whose law is a table, and the exact law of a decoder: the sum over everything that it could have drawn.

::

    model = TableLM.random(vocab=3, seed=0)
    found = exact_law(lambda: speculative_generate(model, draft, ids, 3, sampler=Sampler(1.0)).tokens)
    assert_same_law(found, law_of_chain(model, ids, 3, Sampler(1.0)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mlreviews.models import LMOutput, Sampler

__all__ = ["TableCache", "TableLM", "assert_same_law", "exact_law", "law_of_chain"]


class TableCache(NamedTuple):
    """Tokens with their positions, and which of them are real; [batch, time] each."""

    ids: Tensor
    positions: Tensor
    mask: Tensor

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def crop(self, length: int) -> TableCache:
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        return TableCache(*(x[:, :length] for x in self))

    def rows(self, index: Tensor) -> TableCache:
        return TableCache(*(x[index] for x in self))

    def keep(self, start: int, index: Tensor, mask: Tensor | None = None) -> TableCache:
        first = self.crop(start)
        kept = [x[:, start:].gather(1, index) for x in self]
        if mask is not None:
            kept[2] = kept[2] & mask
        return TableCache(*(torch.cat(pair, 1) for pair in zip(first, kept, strict=True)))


class TableLM(nn.Module):
    """A Markov chain of second order as a `CausalLM`: the logits of a token hang on it and on the one before it.

    The token before is, of those that are seen, the one with the next smaller position, and the positions of these two
    have to differ by 1: a decoder that keeps wrong tokens, or counts positions wrongly, gets an AssertionError.

    Args:
        table: [vocab + 1, vocab, vocab], logits after (token before, token); the last row is for no token before.
        max_length: what decoders take as the context.
    """

    def __init__(self, table: Tensor, max_length: int | None = None) -> None:
        super().__init__()
        self.table, self.max_length, self.vocab_size = table, max_length, table.shape[1]
        self.embed_tokens = nn.Embedding(self.vocab_size, self.vocab_size, _weight=torch.eye(self.vocab_size))
        self.norm, self.lm_head = nn.Identity(), nn.Identity()
        self.calls = 0

    @classmethod
    def random(
        cls, vocab: int, seed: int, *, scale: float = 1.5, near: TableLM | None = None, distance: float = 0.7
    ) -> TableLM:
        """Normal logits of standard deviation `scale`; with `near`, those of another model with noise of `distance`."""
        noise = torch.randn(vocab + 1, vocab, vocab, generator=torch.Generator().manual_seed(seed))
        return cls(scale * noise if near is None else near.table + distance * noise)

    def forward(
        self,
        ids: Tensor,
        cache: TableCache | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        self.calls += 1
        batch, time = ids.shape
        past = 0 if cache is None else cache.length
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        positions = torch.arange(past, past + time) if positions is None else positions
        new = TableCache(ids, positions.expand(batch, time), mask)
        full = new if cache is None else TableCache(*(torch.cat(pair, 1) for pair in zip(cache, new, strict=True)))
        own = torch.ones(time, time, dtype=torch.bool).tril() if tree is None else tree
        seen = torch.cat([torch.ones(batch, time, past, dtype=torch.bool), own.expand(batch, time, time)], 2)
        seen = seen & full.mask[:, None]
        seen[:, torch.arange(time), past + torch.arange(time)] = False  # itself
        place = full.positions[:, None].expand(-1, time, -1).masked_fill(~seen, -1)
        found = place.max(2)
        there = (found.values >= 0) & mask
        assert bool((found.values + 1 == new.positions)[there].all()), "positions of neighbours differ by more than 1"
        before = full.ids.gather(1, found.indices).where(found.values >= 0, torch.tensor(self.vocab_size))
        logits = self.table[before, ids]
        states: Any = (self.embed_tokens(ids), logits) if hidden_states else None
        return LMOutput(logits, full, states)  # type: ignore[arg-type]


def exact_law(run: Callable[[], Tensor | Sequence[Any]]) -> dict[tuple[Any, ...], float]:
    """The law of what a function of random draws returns, by running it once for each way the draws can come out.

    All randomness has to come from `torch.multinomial` (one sample a row) and `torch.bernoulli`, as that of `draw` and
    `flip` of `mlreviews.models` does. Outcomes of probability 0, up to rounding, are not followed.

    Args:
        run: returns a tensor, or nested sequences of numbers.
    """
    law: dict[tuple[Any, ...], float] = {}
    depth, weight = 0, 1.0
    path: list[tuple[list[tuple[int, float]], int]] = []  # of each draw so far: its outcomes, and which of them is on

    def choose(probabilities: Sequence[float]) -> int:
        nonlocal depth, weight
        if depth == len(path):
            path.append(([(i, p) for i, p in enumerate(probabilities) if p > 1e-7], 0))
        options, chosen = path[depth]
        depth += 1
        weight *= options[chosen][1]
        return options[chosen][0]

    def multinomial(p: Tensor, count: int, *_: Any, **__: Any) -> Tensor:
        assert count == 1
        rows = p.double() / p.double().sum(-1, keepdim=True)
        return torch.tensor([choose(row) for row in rows.reshape(-1, p.shape[-1]).tolist()]).reshape(*p.shape[:-1], 1)

    def bernoulli(p: Tensor, *_: Any, **__: Any) -> Tensor:
        drawn = [float(choose([1 - x, x])) for x in p.double().flatten().tolist()]
        return torch.tensor(drawn, dtype=p.dtype).reshape(p.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        patch.setattr(torch, "bernoulli", bernoulli)
        while True:
            depth, weight = 0, 1.0
            found = run()
            key = _frozen(found.tolist() if isinstance(found, Tensor) else found)
            law[key] = law.get(key, 0.0) + weight
            while path and path[-1][1] + 1 == len(path[-1][0]):
                path.pop()
            if not path:
                return law
            path[-1] = path[-1][0], path[-1][1] + 1


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def law_of_chain(
    model: TableLM, ids: Tensor, new: int, sampler: Sampler, stop: int | None = None
) -> dict[tuple[Any, ...], float]:
    """The law of plain decoding of one row [1, time], multiplied out along every sequence of `new` tokens.

    Keys are those of ``exact_law(lambda: decoder(...).tokens)``: ``((a, b, c),)``. Sequences end at the stop token.
    """
    law: dict[tuple[Any, ...], float] = {}

    def follow(tokens: tuple[int, ...], weight: float) -> None:
        if len(tokens) == new or (stop is not None and stop in tokens):
            law[(tokens,)] = weight
            return
        whole = torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], 1)
        logits = model(whole).logits[:, -1].double()
        for token, p in enumerate(sampler.probabilities(logits, whole)[0].tolist()):
            if p > 0:
                follow((*tokens, token), weight * p)

    follow((), 1.0)
    return law


def assert_same_law(found: dict[Any, float], expected: dict[Any, float], tolerance: float = 1e-5) -> None:
    """Same probabilities of all outcomes; what is missing has none."""
    assert abs(sum(found.values()) - 1) < tolerance
    for key in found.keys() | expected.keys():
        assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) < tolerance, (
            f"{key}: {found.get(key)}, not {expected.get(key)}"
        )
