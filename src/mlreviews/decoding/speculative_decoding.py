r"""Speculative decoding: a cheap draft proposes tokens, the model tests all of them in one pass, and its law is kept.

Paper: Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192).
Paper: Accelerating Large Language Model Decoding with Speculative Sampling (arXiv:2302.01318).
Paper: Prompt Lookup Decoding, for `PromptLookup` (https://github.com/apoorvumang/prompt-lookup-decoding).

A small model draws k tokens one by one; the large model computes its distributions at all of these places in one
forward pass, which takes hardly longer than one for a single token. Tokens are accepted one after the other with a
probability that makes up for the difference of the two distributions; the first that is rejected is replaced by one
from what the draft has too little of. Whatever the draft, the tokens have exactly the law of the large model.

Equation:
    $$ x_i \sim q_i, \qquad \text{accepted with probability } \min\!\left(1, \frac{p_i(x_i)}{q_i(x_i)}\right) \tag{1} $$
    $$ \text{else } x_i \sim \frac{\max(0, p_i - q_i)}{\sum_x \max(0, p_i(x) - q_i(x))}, \text{ and the draft ends}
       \tag{2} $$
    After k accepted tokens one more is drawn from $p_{k+1}$. A token is accepted with probability
    $$ \alpha = \sum_x \min(p(x), q(x)) \tag{3} $$
    and if that is the same everywhere, a pass of the large model yields on average
    $$ \frac{1 - \alpha^{k+1}}{1 - \alpha} \text{ tokens, a speed-up by } \frac{1 - \alpha^{k+1}}{(1 - \alpha)(c k + 1)}
       \tag{4} $$
    where a pass of the draft takes c times as long as one of the large model.

Symbols:
    p: [k + 1, vocab], distributions of the large model (the target) after the drafted tokens, temperature and the
        other settings of the sampler applied.
    q: [k, vocab], distributions that the drafted tokens were drawn from, the same settings applied.
    x: [k], the drafted tokens.
    alpha: acceptance rate, 0 to 1.
    c: cost of a pass of the draft, in passes of the target.

Defaults:
    draft_length: 4 (ours; Leviathan et al. use 3 to 7, Chen et al. 4).
    sampler: greedy; then a token is accepted where it is the target's most likely one.
    PromptLookup longest, shortest: 12 and 2 tokens (ours, for tokens that are bytes).

Deviations:
    1. The first pass of the target reads the prompt and the first draft together.
    2. Rows of a batch accept their own numbers of tokens; the papers treat one row.
    3. The same law means: where both passes compute the same logits. In float32 a pass over k + 1 tokens and one over a
       single token differ in the last bits, so greedy decoding can go another way at ties to about 1e-6 of a logit; in
       bfloat16, whose products round far more coarsely, at near ties that are not rare.

Reduces to:
    plain decoding: max_new_tokens = 1, and wherever nothing is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.models import CausalLM, GenerationResult, Sampler, Stops, check_prompt, draw, flip, most_likely

__all__ = [
    "Draft",
    "Drafter",
    "PromptLookup",
    "acceptance_probability",
    "expected_speedup",
    "expected_tokens",
    "speculative_generate",
    "speculative_verify",
]

StopDrafting = Callable[[Tensor], Tensor]


def speculative_verify(
    p: Float[Tensor, "*batch tested vocab"],
    q: Float[Tensor, "*batch drafted vocab"] | None,
    drafted: Int[Tensor, "*batch drafted"],
    generator: torch.Generator | None = None,
    offered: Int[Tensor, "*batch"] | None = None,
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Accepts drafted tokens by eq. (1), and draws the one after the accepted ones by eq. (2).

    Args:
        p: [..., k + 1, vocab], the target's distributions at the places of the drafted tokens and after them.
        q: [..., k, vocab], what the drafted tokens were drawn from. None: they were not drawn but certain.
        drafted: [..., k].
        generator: decides; None is the global one.
        offered: [...], how many of a row's drafted tokens count, the first ones; None: all.

    Returns:
        ``(accepted, next_token)``: how many tokens were accepted, 0 to k, and the token that follows these.

    Raises:
        ValueError: shapes don't go together.
    """
    length = drafted.shape[-1]
    if p.shape[:-1] != (*drafted.shape[:-1], length + 1) or (
        q is not None and q.shape != (*drafted.shape, p.shape[-1])
    ):
        raise ValueError(
            f"p: expected [..., {length + 1}, vocab] and q [..., {length}, vocab] for {list(drafted.shape)} drafted "
            f"tokens, got {list(p.shape)} and {None if q is None else list(q.shape)}"
        )
    accepted = drafted.new_zeros(drafted.shape[:-1])
    if length == 0:
        return accepted, draw(p[..., 0, :], generator)
    chance = p[..., :-1, :].gather(-1, drafted[..., None])[..., 0]
    if q is not None:
        chance = chance / q.gather(-1, drafted[..., None])[..., 0].clamp(min=torch.finfo(q.dtype).tiny)
    taken = flip(chance, generator)
    if offered is not None:
        taken = taken & (torch.arange(length, device=p.device) < offered[..., None])
    accepted = taken.long().cumprod(-1).sum(-1)
    law = p.take_along_dim(accepted[..., None, None], -2)[..., 0, :]
    at = accepted.clamp(max=length - 1)[..., None]
    if q is None:
        missing = law.scatter(-1, drafted.take_along_dim(at, -1), 0.0)
    else:
        missing = (law - q.take_along_dim(at[..., None], -2)[..., 0, :]).clamp(min=0)
    rejected = accepted < (length if offered is None else offered)
    # where p and q are equal nothing is missing, and only rounding can have rejected
    replaced = rejected & (missing.sum(-1) > 0)
    return accepted, draw(torch.where(replaced[..., None], missing, law), generator)


def acceptance_probability(
    p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Eq. (3): how likely a token drawn from q is accepted; 1 less the total variation distance.

    Args:
        p: [..., vocab], the target's distribution.
        q: [..., vocab], the draft's.
    """
    return torch.minimum(p, q).sum(-1)


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Eq. (4): new tokens for each pass of the target.

    Args:
        acceptance: alpha, 0 to 1, the same for every token.
        draft_length: k.

    Raises:
        ValueError: a number out of range.
    """
    check_probability("acceptance", acceptance)
    check_count("draft_length", draft_length, least=0)
    return float(sum(acceptance**i for i in range(draft_length + 1)))


def expected_speedup(acceptance: float, draft_length: int, cost: float) -> float:
    """Eq. (4): how many times as fast as plain decoding.

    Args:
        acceptance: alpha, 0 to 1.
        draft_length: k.
        cost: c, the time of a pass of the draft in passes of the target.

    Raises:
        ValueError: a number out of range.
    """
    check_number("cost", cost, least=0.0)
    return expected_tokens(acceptance, draft_length) / (draft_length * cost + 1)


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


@runtime_checkable
class DraftSession(Protocol):
    """A drafter at work on one batch; see `Drafter`."""

    def propose(self, length: int) -> Draft:
        """At most so many tokens for each row."""

    def accept(self, new: list[list[int]], accepted: list[int]) -> None:
        """What became of it: each row's new tokens, the accepted drafted ones and the one behind these."""


@runtime_checkable
class Drafter(Protocol):
    """Anything that proposes tokens: `PromptLookup` is one, and any `mlreviews.models.CausalLM` is made one."""

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        """Starts on a batch of prompts [batch, time], False in `mask` at padding on the left."""


@torch.no_grad()
def speculative_generate(
    target: CausalLM,
    draft: CausalLM | Drafter,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    draft_length: int = 4,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
    stop_drafting: StopDrafting | None = None,
    pad: int = 0,
) -> GenerationResult:
    """Continues each row of a batch with tokens of the target's law, several for each of its passes.

    Args:
        target: whose law counts.
        draft: a smaller model with the same vocabulary, or another drafter.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row, 0 or more.
        draft_length: k, tokens that are drafted at most; never more than the budget leaves room for.
        sampler: from logits to distributions, for both models; the default is greedy.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws and decides; None is the global one.
        stop_tokens: ids that end a row.
        stop_drafting: ends drafts early: from the draft's logits [batch, vocab], which the last drafted token was drawn
            from, to the rows [batch] in which it shall be the last one; see `mlreviews.decoding.SVIPPolicy`.
        pad: fills rows that ended earlier.

    Returns:
        The new tokens, with the accepted and the drafted numbers of each step.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, vocabularies that differ, more tokens than either model
            can see, NaN logits.
        TypeError: ids are not int64, or `stop_drafting` beside a drafter without logits.
    """
    check_prompt(target, input_ids, max_new_tokens, mask, "target")
    check_count("draft_length", draft_length)
    if target.max_length is not None and draft_length >= target.max_length:
        raise ValueError(f"draft_length: expected fewer than the {target.max_length} tokens that the target sees")
    drafter = _drafter(target, draft, input_ids, max_new_tokens, stop_drafting)
    batch = len(input_ids)
    stops = Stops(batch, max_new_tokens, stop_tokens, pad=pad)
    reader, session = _Reader(target, input_ids), drafter.begin(input_ids, mask, sampler, generator)
    previous = _Previous(input_ids, mask) if sampler.repetition_penalty != 1.0 else None
    pending, calls = input_ids, 0
    taken: list[list[int]] = []
    drafted: list[list[int]] = []
    while not stops.done:
        left = [stops.left(row) for row in range(batch)]
        found = session.propose(min(draft_length, max(left) - 1)) if max(left) > 1 else Draft(pending[:, :0])
        length = found.tokens.shape[1]
        most = [length] * batch if found.offered is None else found.offered.tolist()
        offered = [min(n, max(room - 1, 0)) for n, room in zip(most, left, strict=True)]
        mark = reader.length + pending.shape[1]
        logits = reader.read(torch.cat([pending, found.tokens], 1), mask)[:, -length - 1 :]
        calls += 1
        if sampler.greedy and previous is None:
            accepted, following = _agreeing(most_likely(logits), found.tokens, offered)
        else:
            p = sampler.probabilities(logits, None if previous is None else previous.after(found.tokens))
            count = None if min(offered) == length else torch.tensor(offered, device=p.device)
            decided = speculative_verify(p, found.q, found.tokens, generator, count)
            accepted, following = (x.tolist() for x in decided)
        tokens = found.tokens.tolist()
        new = [[*row[:n], last] for row, n, last in zip(tokens, accepted, following, strict=True)]
        active = [room > 0 for room in left]
        kept = [stops.add(row, new[row]) for row in range(batch)]
        taken.append([min(n, k) if on else -1 for n, k, on in zip(accepted, kept, active, strict=True)])
        drafted.append([n if on else -1 for n, on in zip(offered, active, strict=True)])
        if stops.done:
            break
        reader.rewind(mark, accepted)
        session.accept(new, accepted)
        if previous is not None:
            previous.add(new)
        pending, mask = torch.tensor(following, device=input_ids.device)[:, None], None
    return stops.result(calls, taken, drafted)


def _drafter(
    target: CausalLM, draft: CausalLM | Drafter, input_ids: Tensor, new: int, stop_drafting: StopDrafting | None
) -> Drafter:
    if not isinstance(draft, CausalLM):
        if stop_drafting is not None:
            raise TypeError(f"stop_drafting: expected a draft model, whose logits it asks, got {type(draft).__name__}")
        return draft
    if draft.vocab_size != target.vocab_size:
        raise ValueError(f"draft: expected the target's vocabulary of {target.vocab_size}, got {draft.vocab_size}")
    check_prompt(draft, input_ids, new, name="draft")
    return _ModelDrafter(draft, stop_drafting)


def _agreeing(best: Tensor, drafted: Tensor, offered: list[int]) -> tuple[list[int], list[int]]:
    """How many drafted tokens [batch, k] of each row are the most likely ones [batch, k + 1], and the next of these."""
    accepted, following = [], []
    for wanted, tokens, most in zip(best.tolist(), drafted.tolist(), offered, strict=True):
        count = 0
        while count < most and wanted[count] == tokens[count]:
            count += 1
        accepted.append(count)
        following.append(wanted[count])
    return accepted, following


class _Reader:
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


class _Previous:
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


class _ModelDrafter:
    """A model as a drafter."""

    def __init__(self, model: CausalLM, stop: StopDrafting | None) -> None:
        self.model, self.stop = model, stop

    def begin(
        self, input_ids: Tensor, mask: Tensor | None, sampler: Sampler, generator: torch.Generator | None
    ) -> DraftSession:
        return _ModelSession(self, input_ids, mask, sampler, generator)


class _ModelSession:
    def __init__(
        self,
        drafter: _ModelDrafter,
        input_ids: Tensor,
        mask: Tensor | None,
        sampler: Sampler,
        generator: torch.Generator | None,
    ) -> None:
        self.stop, self.sampler, self.generator = drafter.stop, sampler, generator
        self.reader = _Reader(drafter.model, input_ids)
        self.pending, self.mask = input_ids, mask
        self.previous = _Previous(input_ids, mask) if sampler.repetition_penalty != 1.0 else None
        self.mark = 0

    def propose(self, length: int) -> Draft:
        self.mark = self.reader.length + self.pending.shape[1]
        ids, mask = self.pending, self.mask
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
        # of a draft that was accepted whole, the draft model has not read the last token
        read = self.reader.length - self.mark
        self.reader.rewind(self.mark, [min(n, read) for n in accepted])
        unread = [row[min(n, read) :] for row, n in zip(new, accepted, strict=True)]
        longest = max(map(len, unread))
        device = self.pending.device
        self.pending = torch.tensor([[0] * (longest - len(row)) + row for row in unread], device=device)
        self.mask = None
        if any(len(row) < longest for row in unread):
            real = [[i >= longest - len(row) for i in range(longest)] for row in unread]
            self.mask = torch.tensor(real, device=device)
        if self.previous is not None:
            self.previous.add(new)


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
        rows = [ids if mask is None else ids[mask[row]] for row, ids in enumerate(input_ids)]
        return _LookupSession(self, [ids.tolist() for ids in rows], input_ids.device)


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
