r"""Log-probabilities of tokens and of answers, from logits or, without ever holding these, from hidden states.

The projection to the vocabulary is done in tiles of some thousand words, and the normaliser is kept as a running
maximum and sum. With l = (h W^T + b) / T and p = softmax(l), the gradient of log p_y for hidden states is
(W_y - E_p[W]) / T, and for the weights (1[v = y] - p_v) h / T:

- where the weights are frozen, the forward pass takes E_p[W] along, as attention takes its values, so that the
  backward pass has no projection left to do: two products of the size of the head in all, as the plain form needs;
- else the backward pass computes each tile again from the saved normaliser: four products instead of three.

Tiles cut the vocabulary and not the tokens: each row of the weights' gradient comes out of a single product over all
tokens, summed in float32 and rounded once, and there is no accumulation into a tensor of the head's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlreviews.common.checks import check_count, check_number
from mlreviews.preference.losses import check_mask, masked_sum

__all__ = ["linear_sequence_logps", "linear_token_logps", "sequence_logps", "shifted", "token_logps"]

# Entries of a tile of logits; benchmarks/bench_logps.py measures what it costs.
TILE = 2**21


def shifted(
    ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> tuple[Int[Tensor, "batch time-1"], Int[Tensor, "batch time-1"], Bool[Tensor, "batch time-1"]]:
    """Cuts sequences into what a causal model reads, what it has to predict, and which predictions count.

    The mask moves with the labels, never with the inputs. Nothing predicts the first token, so it never counts.

    Args:
        ids: [batch, time], prompts with their answers, padded on either side.
        mask: [batch, time], True at the tokens of the answers, their end-of-text token included.

    Returns:
        Inputs, labels and the labels' mask, all [batch, time - 1].

    Raises:
        ValueError: another shape or dtype of the mask, or fewer than two tokens.
    """
    check_mask(mask, ids.shape, like="ids")
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected at least 2 tokens, got shape {tuple(ids.shape)}")
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


def token_logps(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Log-probability of each label.

    Args:
        logits: [batch, time, vocab]. ``logits[:, t]`` predicts ``labels[:, t]``: the caller shifts (see `shifted`) and
            divides by the temperature at which answers were sampled.
        labels: [batch, time], each in [0, vocab), also where it is not going to count.

    Returns:
        [batch, time] in nats, in float32 at least.

    Raises:
        ValueError: shapes that don't fit, or a label outside the vocabulary.
    """
    _check_labels(labels, logits, "logits", logits.shape[-1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, labels.long()[..., None])[..., 0]
    return chosen - wide.logsumexp(-1)


def sequence_logps(
    logits: Float[Tensor, "batch time vocab"],
    labels: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    average: bool = False,
) -> Float[Tensor, " batch"]:
    """Log-probability of each answer: the sum over its tokens.

    Args:
        logits: [batch, time, vocab], aligned with the labels (see `token_logps`), finite also at padding.
        labels: [batch, time]; anything, such as -100, where the mask is False.
        mask: [batch, time], True at the labels that belong to the answer.
        average: divide by the number of tokens, as IPO and SimPO ask for.

    Returns:
        [batch] in nats, or nats per token, in float32 at least; 0, with gradient 0, for an answer without tokens.

    Raises:
        ValueError: shapes that don't fit, a mask that is not of bool, or a label outside the vocabulary.
    """
    check_mask(mask, labels.shape, like="labels")
    logps = token_logps(logits, torch.where(mask, labels, 0))
    return _reduced(logps, mask, average)


def linear_token_logps(
    hidden: Float[Tensor, "batch time dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "batch time"]:
    """Log-probability of each label from hidden states: `token_logps` of ``(hidden @ weight.T + bias) / temperature``.

    The logits are never held, forward or backward. Products are summed in float32 also for half-precision inputs.

    Args:
        hidden: [batch, time, dim], the states that the head projects; ``hidden[:, t]`` predicts ``labels[:, t]``.
        weight: [vocab, dim], of the head.
        labels: [batch, time]; anything, such as -100, where the mask is False.
        mask: [batch, time], True at the labels that count. No work is done for the others, whose states may be NaN.
        bias: [vocab], of the head.
        temperature: what logits are divided by before the softmax.
        chunk: words in a tile; None takes as many as make a tile of 2 million logits, but at least 256. The peak of
            memory is about two tiles (one where nothing needs a gradient) plus the gradients.

    Returns:
        [batch, time] in nats, in float32 at least; 0 where the mask is False.

    Raises:
        ValueError: shapes that don't fit, a mask that is not of bool, a label outside the vocabulary, a temperature
            that is not positive.
        TypeError: `chunk` is not a whole number.
    """
    check_mask(mask, labels.shape, like="labels")
    labels = torch.where(mask, labels, 0)
    _check_labels(labels, hidden, "hidden", weight.shape[0])
    check_number("temperature", temperature, above=0.0)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected [vocab, {hidden.shape[-1]}], got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if chunk is None:
        chunk = max(256, TILE // max(1, int(mask.sum())))
    check_count("chunk", chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _LinearLogps.apply(hidden[mask], weight, bias, labels[mask].long(), temperature, chunk)
    return found.new_zeros(mask.shape).index_put((mask,), found)


def linear_sequence_logps(
    hidden: Float[Tensor, "batch time dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    average: bool = False,
    chunk: int | None = None,
) -> Float[Tensor, " batch"]:
    """Log-probability of each answer from hidden states: `sequence_logps` without the logits.

    Args:
        hidden: [batch, time, dim], the states that the head projects; ``hidden[:, t]`` predicts ``labels[:, t]``.
        weight: [vocab, dim], of the head.
        labels: [batch, time]; anything, such as -100, where the mask is False.
        mask: [batch, time], True at the labels that belong to the answer.
        bias: [vocab], of the head.
        temperature: what logits are divided by before the softmax.
        average: divide by the number of tokens.
        chunk: words in a tile (see `linear_token_logps`).

    Returns:
        [batch] in nats, or nats per token, in float32 at least; 0, with gradient 0, for an answer without tokens.

    Raises:
        ValueError: as `linear_token_logps`.
        TypeError: `chunk` is not a whole number.
    """
    logps = linear_token_logps(hidden, weight, labels, mask, bias=bias, temperature=temperature, chunk=chunk)
    return _reduced(logps, mask, average)


def _reduced(logps: Tensor, mask: Tensor, average: bool) -> Tensor:
    total = masked_sum(logps, mask)
    return total / mask.sum(1).clamp(min=1) if average else total


def _check_labels(labels: Tensor, source: Tensor, name: str, vocab: int) -> None:
    if source.ndim != 3 or labels.shape != source.shape[:2]:
        came = f"{tuple(labels.shape)} and {tuple(source.shape)}"
        raise ValueError(f"labels: expected [batch, time], as {name} has, got shapes {came}")
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"labels: expected values in [0, {vocab}) where they count, got {low} to {high}")


class _LinearLogps(torch.autograd.Function):
    """log softmax((h W^T + b) / T) at the labels, tile by tile; see the top of the file."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        along = needs_hidden and not any(needs_head)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        peak = hidden.new_full(labels.shape, -torch.inf, dtype=dtype)
        total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
        mean = torch.zeros_like(hidden, dtype=dtype) if along else None
        for start, rows, logits in _tiles(hidden, weight, bias, temperature, chunk):
            index, inside = _within(labels, start, len(rows))
            chosen = torch.where(inside, logits.gather(1, index)[:, 0], chosen)
            new_peak = torch.maximum(peak, logits.amax(1))
            shrink = (peak - new_peak).exp_()
            parts = logits.sub_(new_peak[:, None]).exp_()
            total = total * shrink + parts.sum(1)
            if mean is not None:
                mean.mul_(shrink[:, None]).add_(_product(parts, rows))
            peak = new_peak
        normaliser = peak + total.log()
        if mean is not None:  # the gradient for a unit of upstream gradient
            mean.div_(total[:, None]).sub_(weight[labels]).div_(-temperature)
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser, mean)
        ctx.temperature, ctx.chunk = temperature, chunk
        return chosen - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser, direction = ctx.saved_tensors
        if direction is not None:
            return (upstream[:, None] * direction).to(hidden.dtype), None, None, None, None, None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        scaled = (upstream / ctx.temperature)[:, None]
        to_hidden = torch.zeros_like(hidden, dtype=upstream.dtype) if needs_hidden else None
        to_weight = torch.empty_like(weight) if needs_weight else None
        to_bias = torch.empty_like(bias) if needs_bias else None
        for start, rows, logits in _tiles(hidden, weight, bias, ctx.temperature, ctx.chunk):
            index, inside = _within(labels, start, len(rows))
            slopes = logits.sub_(normaliser[:, None]).exp_().mul_(-scaled)
            slopes.scatter_add_(1, index, scaled * inside[:, None])
            part = slice(start, start + len(rows))
            if to_hidden is not None:
                to_hidden += _product(slopes, rows)
            if to_weight is not None:
                to_weight[part] = _product(slopes.mT, hidden)
            if to_bias is not None:
                to_bias[part] = slopes.sum(0)
        return None if to_hidden is None else to_hidden.to(hidden.dtype), to_weight, to_bias, None, None, None


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tiles of the vocabulary: its first word, its rows of the weights, and [tokens, words] logits."""
    for start in range(0, len(weight), chunk):
        rows = weight[start : start + chunk]
        logits = _product(hidden, rows.mT)
        if bias is not None:
            logits += bias[start : start + chunk]
        yield start, rows, logits if temperature == 1 else logits.div_(temperature)


def _within(labels: Tensor, start: int, words: int) -> tuple[Tensor, Tensor]:
    """[tokens, 1] columns of the labels in a tile (any column for those of other tiles), and [tokens] which are its."""
    column = labels - start
    return column.clamp(0, words - 1)[:, None], (column >= 0) & (column < words)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product summed and returned in float32 at least."""
    half = b.dtype in (torch.bfloat16, torch.float16)
    if half and a.is_cuda:  # tensor cores take half precision and sum in float32
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) @ b.to(dtype)
