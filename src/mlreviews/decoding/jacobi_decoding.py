r"""Jacobi decoding: all tokens of a block are guessed at once, and guessed again until nothing changes.

Paper: Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (arXiv:2002.03629).
Paper: Accelerating Transformer Inference for Translation via Parallel Decoding (arXiv:2305.10427).

A computation in which each part needs those before it is a triangular system of equations. Jacobi's iteration updates
all unknowns in parallel from the last guess; the first k are right after k iterations, and often many more. Greedy
decoding is such a system, with one unknown a token, and so is sampling when the noise of each place is drawn
beforehand. Gauss and Seidel's way is the ordinary one, one unknown after the other; blocks combine the two.

Equation:
    $$ s_t = h_t(s_1, \dots, s_{t-1}), \qquad s^{k+1}_t = h_t(s^k_1, \dots, s^k_{t-1}) \text{ for all } t \tag{1} $$
    $$ h_t(s) = \arg\max_v \big[ \log p(v \mid s_{<t}) + g_{t v} \big], \qquad
       g = -\log e,\quad e \sim \mathrm{Exp}(1) \tag{2} $$
    With g = 0 that is greedy decoding; with Gumbel noise g its argmax has the law p.

Symbols:
    s: [batch, time, ...], the unknowns; for decoding the new tokens.
    h_t: the update of unknown t, here one place of the model's output.
    g: [batch, time, vocab], noise, the same in all iterations.

Defaults:
    block_size: 16 tokens (ours; CLLM's is 16 to 128).
    init: "random", tokens of the prompt at random places, as the authors of CLLM and lookahead decoding do.
    max_iters: the number of unknowns, after which the solution is exact.

Deviations:
    1. Tokens that are known to be right leave the iteration at once and stay in the cache; the paper computes the
       whole block until it stands still. The tokens are the same.
    2. The rows of a batch go on together, by what all of them know.

Reduces to:
    torch.linalg.solve_triangular: `jacobi_solve` on a linear triangular system.
    plain decoding: block_size = 1, one token a pass, for greedy decoding and for sampling with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mlreviews.common.checks import check_count, check_number
from mlreviews.models import CausalLM, GenerationResult, Sampler, Stops, check_prompt

__all__ = ["gs_jacobi_solve", "jacobi_decode", "jacobi_gs_solve", "jacobi_solve"]

Step = Callable[[Tensor], Tensor]


def jacobi_solve(
    step: Step, init: Shaped[Tensor, "batch time *rest"], *, max_iters: int | None = None, atol: float = 0.0
) -> tuple[Shaped[Tensor, "batch time *rest"], int]:
    """Solves $s = h(s)$ where each $h_t$ depends on earlier unknowns alone, all unknowns in parallel.

    Args:
        step: h, from all unknowns to all unknowns.
        init: [batch, time, ...], the first guess.
        max_iters: calls of `step` at most; None is `time`, which always suffices.
        atol: stop when no unknown changes by more; 0 asks for equality.

    Returns:
        ``(solution, iterations)``: the unknowns, and how often `step` was called, the call that found no change
        included.

    Raises:
        ValueError: an empty guess, or a number out of range.
    """
    _check(init, atol)
    time = init.shape[1]
    if max_iters is not None:
        check_count("max_iters", max_iters)
    most, iterations = time if max_iters is None else max_iters, 0
    while iterations < most:
        before, init, iterations = init, step(init), iterations + 1
        if _unchanged(before, init, atol):
            break
    return init, iterations


def gs_jacobi_solve(
    step: Step, init: Shaped[Tensor, "batch time *rest"], block_size: int, *, atol: float = 0.0
) -> tuple[Shaped[Tensor, "batch time *rest"], int]:
    """Blocks one after the other (Gauss-Seidel), Jacobi's iteration within a block: how language models decode.

    Args:
        step: as of `jacobi_solve`.
        init: [batch, time, ...], the first guess.
        block_size: unknowns in a block; 1 is the sequential computation, `time` is `jacobi_solve`.
        atol: as of `jacobi_solve`, for each block.

    Returns:
        ``(solution, iterations)``: the unknowns, and the calls of `step`.

    Raises:
        ValueError: an empty guess, or a number out of range.
    """
    _check(init, atol, block_size)
    solution, total = init, 0
    for start in range(0, init.shape[1], block_size):
        block = slice(start, min(start + block_size, init.shape[1]))

        def within(unknowns: Tensor, block: slice = block, whole: Tensor = solution) -> Tensor:
            return step(_replaced(whole, block, unknowns))[:, block]

        found, iterations = jacobi_solve(within, solution[:, block], atol=atol)
        solution, total = _replaced(solution, block, found), total + iterations
    return solution, total


def jacobi_gs_solve(
    step: Step, init: Shaped[Tensor, "batch time *rest"], block_size: int, *, atol: float = 0.0
) -> tuple[Shaped[Tensor, "batch time *rest"], int]:
    """All blocks in parallel (Jacobi), the unknowns of a block one after the other (Gauss-Seidel).

    Each block works on its own copy of the unknowns, a row of the batch, and sees of other blocks what the last
    iteration left.

    Args:
        step: as of `jacobi_solve`; rows of the batch don't depend on each other.
        init: [batch, time, ...], the first guess; time is a multiple of `block_size`.
        block_size: unknowns in a block; 1 is `jacobi_solve`, `time` is the sequential computation.
        atol: as of `jacobi_solve`, between iterations over all blocks.

    Returns:
        ``(solution, iterations)``: the unknowns, and iterations over all blocks, each of them `block_size` calls of
        `step` after each other; never more than there are blocks.

    Raises:
        ValueError: an empty guess, a number out of range, or blocks of unequal size.
    """
    _check(init, atol, block_size)
    batch, time = init.shape[:2]
    if time % block_size:
        raise ValueError(f"block_size: expected a divisor of the {time} unknowns, got {block_size}")
    blocks, iterations = time // block_size, 0
    own = torch.arange(blocks, device=init.device)
    while iterations < blocks:
        before, iterations = init, iterations + 1
        copies = init.repeat_interleave(blocks, 0).unflatten(0, (batch, blocks)).clone()
        for i in range(block_size):
            place = own * block_size + i
            updated = step(copies.flatten(0, 1)).unflatten(0, (batch, blocks))
            copies[:, own, place] = updated[:, own, place]
        init = copies.unflatten(2, (blocks, block_size))[:, own, own].flatten(1, 2)
        if _unchanged(before, init, atol):
            break
    return init, iterations


def _check(init: Tensor, atol: float, block_size: int = 1) -> None:
    if init.ndim < 2 or init.numel() == 0:
        raise ValueError(f"init: expected [batch, time, ...] with no empty axis, got shape {tuple(init.shape)}")
    check_number("atol", atol, least=0.0)
    check_count("block_size", block_size)


def _unchanged(before: Tensor, after: Tensor, atol: float) -> bool:
    return bool((before == after).all()) if atol == 0 else float((before - after).abs().max()) <= atol


def _replaced(x: Tensor, block: slice, part: Tensor) -> Tensor:
    return torch.cat([x[:, : block.start], part, x[:, block.stop :]], 1)


@torch.no_grad()
def jacobi_decode(
    model: CausalLM,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    block_size: int = 16,
    sampler: Sampler = Sampler(),
    init: Literal["random", "last"] = "random",
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
    pad: int = 0,
) -> GenerationResult:
    """Continues each row of a batch, block by block, with Jacobi's iteration within a block. The law is the model's.

    Greedy tokens are those of plain decoding, up to ties that are closer than the rounding of a pass over several
    tokens (1e-6 in float32, where they don't occur in practice; about 1e-2 in bfloat16, where they do).

    Args:
        model: any `mlreviews.models.CausalLM`.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row, 0 or more.
        block_size: tokens that are guessed at once.
        sampler: from logits to the distribution; the default is greedy.
        init: the first guess of a block: tokens of the prompt at "random" places, or the "last" token repeated.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws noise and guesses; None is the global one. The noise of a token doesn't depend on the blocks.
        stop_tokens: ids that end a row.
        pad: fills rows that ended earlier.

    Returns:
        The new tokens; `accepted` and `drafted` count the guesses of each pass, and which of them were right.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, more tokens than the model can see, NaN logits.
        TypeError: ids are not int64.
    """
    check_prompt(model, input_ids, max_new_tokens, mask)
    check_count("block_size", block_size)
    if init not in ("random", "last"):
        raise ValueError(f"init: expected 'random' or 'last', got {init!r}")
    stops = Stops(len(input_ids), max_new_tokens, stop_tokens, pad=pad)
    guesses = _child(generator, input_ids.device)
    context = input_ids if mask is None else input_ids.masked_fill(~mask, -1)
    known, cache, left = input_ids, None, max_new_tokens
    accepted: list[list[int]] = []
    drafted: list[list[int]] = []
    while not stops.done:
        size = min(block_size, left)
        left -= size
        place = torch.randint(input_ids.shape[1], (len(input_ids), size), generator=guesses, device=input_ids.device)
        guess = input_ids.gather(1, place) if init == "random" else known[:, -1:].expand(-1, size)
        noise = None if sampler.greedy else _noise(size, len(input_ids), model.vocab_size, generator, input_ids.device)
        while guess.shape[1] and not stops.done:
            ids = torch.cat([known, guess[:, :-1]], 1)
            out = model(ids, cache, mask=_extended(mask, ids) if cache is None else None)
            size = guess.shape[1]
            said = _said(out.logits[:, -size:], guess, context, sampler, noise)
            matched = (said == guess).cumprod(1).sum(1).tolist()
            # what follows right guesses is right, in all rows that still run
            right = min(min(n + 1, size) for n, ended in zip(matched, stops.ended, strict=True) if not ended)
            accepted.append([-1 if end else min(n, right) for n, end in zip(matched, stops.ended, strict=True)])
            drafted.append([-1 if end else size for end in stops.ended])
            for row, new in enumerate(said[:, :right].tolist()):
                stops.add(row, new)
            cache = out.cache.crop(out.cache.length - (size - right))
            context = torch.cat([context, said[:, :right]], 1) if sampler.repetition_penalty != 1.0 else context
            known, guess = said[:, right - 1 : right], said[:, right:]
            noise = None if noise is None else noise[:, right:]
    return stops.result(len(accepted), accepted, drafted)


def _said(logits: Tensor, guess: Tensor, context: Tensor, sampler: Sampler, noise: Tensor | None) -> Tensor:
    """Equation (2), [batch, block]."""
    if sampler.greedy and sampler.repetition_penalty == 1.0:
        if not bool(logits.amax().isfinite()):
            raise ValueError("logits: expected finite numbers, got NaN or infinity")
        return logits.argmax(-1)
    previous = None
    if sampler.repetition_penalty != 1.0:
        # each place of the block sees the guesses before it
        before = torch.ones(guess.shape[1], guess.shape[1], dtype=torch.bool, device=guess.device).tril(-1)
        inside = guess[:, None].masked_fill(~before, -1)
        previous = torch.cat([context[:, None].expand(-1, guess.shape[1], -1), inside], 2)
    p = sampler.probabilities(logits, previous)
    return (p if noise is None else p / noise.to(p)).argmax(-1)


def _noise(size: int, batch: int, vocab: int, generator: torch.Generator | None, device: Any) -> Tensor:
    """[batch, size, vocab], exponential; p / e is largest where log p + g is. Drawn place by place."""
    drawn = [torch.empty(batch, vocab, device=device).exponential_(generator=generator) for _ in range(size)]
    return torch.stack(drawn, 1).clamp_(min=1e-30)


def _child(generator: torch.Generator | None, device: Any) -> torch.Generator:
    """A generator of its own for the guesses, so that they don't move the noise."""
    where = device if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=where))
    return torch.Generator(device).manual_seed(seed)


def _extended(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if mask is None else torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
