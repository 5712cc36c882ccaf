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
    Cascade length: 4, of what its second drafter drafts (ours).

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

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.decoding.drafters import Draft, Drafter, Previous, Reader, StopDrafting, as_drafter
from mlreviews.models import CausalLM, GenerationResult, Sampler, Stops, check_prompt, draw, flip, most_likely

__all__ = [
    "acceptance_probability",
    "expected_speedup",
    "expected_tokens",
    "speculative_generate",
    "speculative_verify",
]


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
        draft: a smaller model with the same vocabulary, or another drafter: `PromptLookup`, or both in a `Cascade`.
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
    drafter = as_drafter(draft, target, input_ids, max_new_tokens, stop_drafting)
    batch = len(input_ids)
    stops = Stops(batch, max_new_tokens, stop_tokens, pad=pad)
    reader, session = Reader(target, input_ids), drafter.begin(input_ids, mask, sampler, generator)
    previous = Previous(input_ids, mask) if sampler.repetition_penalty != 1.0 else None
    pending, calls = input_ids, 0
    taken: list[list[int]] = []
    drafted: list[list[int]] = []
    while not stops.done:
        left = [stops.left(row) for row in range(batch)]
        found = session.propose(min(draft_length, max(left) - 1)) if max(left) > 1 else Draft(pending[:, :0])
        length = found.tokens.shape[1]
        offered = [min(n, max(room - 1, 0)) for n, room in zip(found.counts.tolist(), left, strict=True)]
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
