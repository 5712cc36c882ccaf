"""What proposes tokens to `mlreviews.decoding.speculative_generate`: models, copies of the text, one after the other.

::

    speculative_generate(target, draft, ids, 200)                           # any CausalLM
    speculative_generate(target, PromptLookup(), ids, 200, draft_length=10)
    speculative_generate(target, Cascade(PromptLookup(shortest=8), draft), ids, 200, draft_length=10)

A drafter of one's own is a class with `Drafter`'s method, whose sessions have those of `DraftSession`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.models import CausalLM, Sampler, check_prompt, draw, most_likely

__all__ = ["Cascade", "Draft", "DraftSession", "Drafter", "PromptLookup"]

StopDrafting = Callable[[Tensor], Tensor]


class Draft(NamedTuple):
    """What a drafter proposes.

    Attributes:
        tokens: [batch, k], int64; k may be 0.
        q: [batch, k, vocab], what they were drawn from; None: they were not drawn but certain.
        offered: [batch], how many of a row's tokens count, the first ones; None: all.
    """

    tokens: Int[Tensor, "batch drafted"]
    q: Float[Tensor, "batch drafted vocab"] | None = None
    offered: Int[Tensor, " batch"] | None = None

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """[batch], how many of a row's tokens count."""
        if self.offered is not None:
            return self.offered
        return self.tokens.new_full(self.tokens.shape[:1], self.tokens.shape[1])


@runtime_checkable
class DraftSession(Protocol):
    """A drafter at work on one batch; see `Drafter`."""

    def propose(self, length: int) -> Draft:
        """At most so many tokens for each row."""

    def accept(self, new: list[list[int]], accepted: list[int]) -> None:
        """What became of it: each row's new tokens, the accepted drafted ones and the one behind these.

        Also called of steps without a `propose` before, with 0 accepted.
        """


@runtime_checkable
class Drafter(Protocol):
    """Anything that proposes tokens: `PromptLookup` is one, and any `mlreviews.models.CausalLM` is made one."""

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        """Starts on a batch of prompts [batch, time], False in `mask` at padding on the left."""


def as_drafter(
    draft: CausalLM | Drafter,
    target: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    stop_drafting: StopDrafting | None = None,
) -> Drafter:
    """A drafter for this target and prompt; arguments as of `mlreviews.decoding.speculative_generate`.

    Raises:
        ValueError: a draft model has another vocabulary, or doesn't see so many tokens.
        TypeError: `stop_drafting` with a drafter that isn't a model.
    """
    if isinstance(draft, Cascade):
        return replace(draft, then=as_drafter(draft.then, target, input_ids, max_new_tokens, stop_drafting))
    if not isinstance(draft, CausalLM):
        if stop_drafting is not None:
            raise TypeError(f"stop_drafting: expected a draft model, whose logits it asks, got {type(draft).__name__}")
        return draft
    if draft.vocab_size != target.vocab_size:
        raise ValueError(f"draft: expected the target's vocabulary of {target.vocab_size}, got {draft.vocab_size}")
    check_prompt(draft, input_ids, max_new_tokens, name="draft")
    return ModelDrafter(draft, stop_drafting)


def texts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row [batch, time], without its padding."""
    return [(row if mask is None else row[mask[i]]).tolist() for i, row in enumerate(ids)]


class Reader:
    """A model with a cache of rows that have read different numbers of tokens."""

    def __init__(self, model: CausalLM, input_ids: Tensor) -> None:
        self.model, self.batch = model, len(input_ids)
        self.cache: Any = None
        self.place = input_ids.new_zeros(self.batch, 1)  # the next token's position

    @property
    def length(self) -> int:
        """Tokens in the cache, those included that are nobody's."""
        return 0 if self.cache is None else self.cache.length

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits after each of some more tokens; `mask` [batch, up to time] is False at what is no token."""
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(self.batch, ids.shape[1] - mask.shape[1])], 1)
        positions = None
        if self.batch > 1:
            number = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None] if mask is None else mask.cumsum(1)
            # rows that have ended run on, and tokens that don't count may stand beyond the last position
            limit = None if self.model.max_length is None else self.model.max_length - 1
            positions = (self.place + number - 1).clamp(0, limit).expand(self.batch, -1)
            self.place = self.place + number[:, -1:]
        out = self.model(ids, self.cache, mask=mask, positions=positions)
        self.cache = out.cache
        return out.logits

    def rewind(self, mark: int, kept: list[int]) -> None:
        """Of the tokens after the first `mark` in the cache only so many stay in each row."""
        read, most = self.length - mark, max(kept)
        if self.batch == 1:
            self.cache = self.cache.crop(mark + most)
            return
        count = torch.tensor(kept, device=self.place.device)[:, None]
        if min(kept) == most:
            self.cache = self.cache.crop(mark + most)
        else:
            index = torch.arange(most, device=self.place.device)
            self.cache = self.cache.keep(mark, index.expand(self.batch, -1), index < count)
        self.place = self.place - read + count


class Previous:
    """The tokens before each place, for the repetition penalty; -1 is none."""

    def __init__(self, input_ids: Tensor, mask: Tensor | None) -> None:
        self.ids = input_ids if mask is None else input_ids.masked_fill(~mask, -1)

    def add(self, new: list[list[int]]) -> None:
        """New tokens of each row."""
        longest = max(map(len, new))
        filled = torch.tensor([row + [-1] * (longest - len(row)) for row in new], device=self.ids.device)
        self.ids = torch.cat([self.ids, filled], 1)

    def after(self, drafted: Tensor) -> Tensor:
        """[batch, k + 1, time]: what comes before each of the drafted tokens, and before the one after them."""
        count = drafted.shape[1] + 1
        place = torch.arange(count, device=drafted.device)
        later = place[:-1] >= place[:, None]
        own = drafted[:, None].expand(-1, count, -1).masked_fill(later, -1)
        return torch.cat([self.ids[:, None].expand(-1, count, -1), own], 2)


class ModelDrafter:
    """A model as a drafter."""

    def __init__(self, model: CausalLM, stop: StopDrafting | None = None) -> None:
        self.model, self.stop = model, stop

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        return _ModelSession(self, input_ids, mask, sampler, generator)


class _ModelSession:
    def __init__(
        self,
        drafter: ModelDrafter,
        input_ids: Tensor,
        mask: Tensor | None,
        sampler: Sampler,
        generator: torch.Generator | None,
    ) -> None:
        self.stop, self.sampler, self.generator = drafter.stop, sampler, generator
        self.reader, self.device = Reader(drafter.model, input_ids), input_ids.device
        self.unread = texts(input_ids, mask)
        self.previous = Previous(input_ids, mask) if sampler.repetition_penalty != 1.0 else None
        self.mark: int | None = None  # length of the cache before the draft, while there is one

    def propose(self, length: int) -> Draft:
        ids, mask = self._pending()
        self.mark = self.reader.length + ids.shape[1]
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        offered: Tensor | None = None
        for step in range(length):
            logits = self.reader.read(ids, mask if step == 0 else None)[:, -1]
            if self.sampler.greedy and self.previous is None:
                ids = most_likely(logits)[:, None]
            else:
                before = None
                if self.previous is not None:
                    before = torch.cat([self.previous.ids, *drafted], 1)
                laws.append(self.sampler.probabilities(logits, before))
                ids = draw(laws[-1], self.generator)[:, None]
            drafted.append(ids)
            if self.stop is not None:
                ends = self.stop(logits)
                if offered is None:
                    offered = torch.full_like(ids[:, 0], length)
                offered = torch.where(ends & (offered == length), step + 1, offered)
                if bool((offered < length).all()):
                    break
        tokens = torch.cat(drafted, 1)
        if offered is not None:
            offered = offered.clamp(max=tokens.shape[1])
        return Draft(tokens, torch.stack(laws, 1) if laws else None, offered)

    def accept(self, new: list[list[int]], accepted: list[int]) -> None:
        if self.mark is not None:
            # of a draft that was accepted whole, the draft model has not read the last token
            read = self.reader.length - self.mark
            accepted = [min(n, read) for n in accepted]
            self.reader.rewind(self.mark, accepted)
            self.unread = [row[n:] for row, n in zip(new, accepted, strict=True)]
            self.mark = None
        else:  # it was not asked for a draft
            self.unread = [[*before, *row] for before, row in zip(self.unread, new, strict=True)]
        if self.previous is not None:
            self.previous.add(new)

    def _pending(self) -> tuple[Tensor, Tensor | None]:
        """The unread tokens [batch, time] with padding on the left, and where they are real (None: everywhere)."""
        longest = max(map(len, self.unread))
        filled = [[0] * (longest - len(row)) + row for row in self.unread]
        mask = None
        if any(len(row) < longest for row in self.unread):
            mask = torch.tensor([[i >= longest - len(row) for i in range(longest)] for row in self.unread])
        return torch.tensor(filled, device=self.device), None if mask is None else mask.to(self.device)


class PromptLookup:
    """Drafts what followed the last tokens where they stood before: n-grams, no model.

    The longest n-gram that has been seen counts, and of several places the last one. Where the copy reaches the end of
    the text it goes on with itself, as periodic text does.

    Args:
        longest: tokens that are compared at most.
        shortest: tokens that have to agree.

    Raises:
        ValueError: a number below 1, or the wrong way round.
    """

    def __init__(self, longest: int = 12, shortest: int = 2) -> None:
        check_count("shortest", shortest)
        check_count("longest", longest, least=shortest)
        self.longest, self.shortest = longest, shortest

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        """Reads the prompts [batch, time]; nothing is drawn."""
        return _LookupSession(self, texts(input_ids, mask), input_ids.device)


class _LookupSession:
    def __init__(self, drafter: PromptLookup, rows: list[list[int]], device: torch.device) -> None:
        self.lengths, self.device = range(drafter.longest, drafter.shortest - 1, -1), device
        self.rows: list[list[int]] = [[] for _ in rows]
        self.seen: list[dict[tuple[int, ...], int]] = [{} for _ in rows]  # n-gram -> place of what followed it last
        self.accept(rows, [0] * len(rows))

    def propose(self, length: int) -> Draft:
        found = [self._continued(row, seen, length) for row, seen in zip(self.rows, self.seen, strict=True)]
        longest = max(map(len, found))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in found], dtype=torch.int64)
        offered = None if min(map(len, found)) == longest else torch.tensor(list(map(len, found))).to(self.device)
        return Draft(tokens.to(self.device), None, offered)

    def _continued(self, row: list[int], seen: dict[tuple[int, ...], int], length: int) -> list[int]:
        for n in self.lengths:
            place = seen.get(tuple(row[-n:])) if n <= len(row) else None
            if place is not None:
                found = row[place : place + length]
                period = len(row) - place
                while len(found) < length:
                    found.append(found[len(found) - period])
                return found
        return []

    def accept(self, new: list[list[int]], accepted: list[int]) -> None:
        for row, seen, tokens in zip(self.rows, self.seen, new, strict=True):
            for token in tokens:
                for n in self.lengths:
                    if n <= len(row):
                        seen[tuple(row[-n:])] = len(row)
                row.append(token)


@dataclass(frozen=True)
class Cascade:
    """Two drafters in one: where the first has nothing to offer, the second drafts.

    Which of them does depends on nothing but the text so far, so every draft is tested like any other of its drafter,
    and the tokens keep the target's law.

    Attributes:
        first: cheap, and silent where it is not sure, such as a `PromptLookup` of long n-grams.
        then: a model, or another drafter. It is only asked in steps in which the first leaves a row without a draft.
        length: tokens that `then` drafts at most; the ``draft_length`` of the call is for `first`.

    Raises:
        ValueError: a length below 1.
    """

    first: Drafter
    then: CausalLM | Drafter
    length: int = 4

    def __post_init__(self) -> None:
        check_count("length", self.length)

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        """Both start on the batch of prompts."""
        then = ModelDrafter(self.then) if isinstance(self.then, CausalLM) else self.then
        return _CascadeSession(self.length, *(d.begin(input_ids, mask, sampler, generator) for d in (self.first, then)))


class _CascadeSession:
    def __init__(self, length: int, first: DraftSession, then: DraftSession) -> None:
        self.length, self.first, self.then = length, first, then
        self.mine: list[bool] = []  # rows that the first one drafted for

    def propose(self, length: int) -> Draft:
        first = self.first.propose(length)
        self.mine = (first.counts > 0).tolist()
        if all(self.mine):
            return first
        then = self.then.propose(min(length, self.length))
        return _by_row(torch.tensor(self.mine, device=then.tokens.device), first, then) if any(self.mine) else then

    def accept(self, new: list[list[int]], accepted: list[int]) -> None:
        self.first.accept(new, [n if mine else 0 for n, mine in zip(accepted, self.mine, strict=True)])
        self.then.accept(new, [0 if mine else n for n, mine in zip(accepted, self.mine, strict=True)])


def _by_row(choose: Tensor, one: Draft, other: Draft) -> Draft:
    """Row by row the first draft (True) or the other one."""
    length = max(one.tokens.shape[1], other.tokens.shape[1])
    laws = [d.q for d in (one, other) if d.q is not None]
    q = None
    if laws:
        q = torch.where(choose[:, None, None], _laws(one, length, laws[0]), _laws(other, length, laws[0]))
    first, second = (nn.functional.pad(d.tokens, (0, length - d.tokens.shape[1])) for d in (one, other))
    return Draft(torch.where(choose[:, None], first, second), q, torch.where(choose, one.counts, other.counts))


def _laws(draft: Draft, length: int, like: Tensor) -> Tensor:
    """What the tokens were drawn from, [batch, length, vocab]: where they were certain, a distribution that says so."""
    q = nn.functional.one_hot(draft.tokens, like.shape[2]).to(like.dtype) if draft.q is None else draft.q
    return nn.functional.pad(q, (0, 0, 0, length - q.shape[1]))
