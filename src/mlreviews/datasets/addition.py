"""Addition of long numbers, digit by digit: ``27+9=36`` written backwards, as ``72+9=63`` and an end mark.

::

    lengths = torch.tensor([[2, 1], [5, 3]])            # digits of the two operands, of each problem
    ids = addition_problems(lengths, generator=generator)
    loss = answer_loss(model(ids[:, :-1]).logits, ids)
    right = exact_match(model(ids[:, :-1]).logits, ids)

The task of McLeish et al. (arXiv:2405.17399, section 3): numbers begin with their least significant digit, only the
answer is learned, and an answer counts if all of it is right, its end included.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from mlreviews.common.checks import check_count

__all__ = ["ADDITION_IDS", "addition_problems", "answer_loss", "exact_match"]

#: id -> symbol; a digit is its own id. ``$`` ends the answer, and a blank fills a row up.
ADDITION_IDS = "0123456789+=$ "
_PLUS, _EQUALS, _END, _BLANK = (ADDITION_IDS.index(symbol) for symbol in "+=$ ")


def addition_problems(
    lengths: Int[Tensor, "batch 2"], *, generator: torch.Generator | None
) -> Int64[Tensor, "batch time"]:
    """Draws problems with their answers, all numbers of the given lengths being equally likely.

    Args:
        lengths: [batch, 2], how many digits the two operands of each problem have; the highest is not 0, except in
            numbers of one digit.
        generator: a CPU generator; None is the global one.

    Returns:
        ids of `ADDITION_IDS`, [batch, time]: rows begin at the left and are filled up with blanks to the longest, which
        has place for a carry into one more digit.

    Raises:
        ValueError: not two lengths a problem, none at all, or a length below 1.
    """
    if lengths.ndim != 2 or lengths.shape[1] != 2 or lengths.shape[0] == 0:
        raise ValueError(f"lengths: expected [batch, 2] with at least one problem, got shape {tuple(lengths.shape)}")
    check_count("lengths", int(lengths.min()))
    places = int(lengths.max())
    place, batch = torch.arange(places), len(lengths)
    inside = place < lengths[..., None]
    digits = torch.randint(10, (batch, 2, places), generator=generator)
    highest = (place == lengths[..., None] - 1) & (lengths[..., None] > 1)
    digits = torch.where(highest, torch.randint(1, 10, (batch, 2, 1), generator=generator), digits) * inside
    answer, answer_length = _sum(digits.sum(1), lengths.max(1).values)
    time = int((lengths.sum(1) + lengths.max(1).values).max()) + 4
    ids = torch.full((batch, time + 1), _BLANK)  # what is no part of a row is written into the last column
    start = torch.zeros(batch, 1, dtype=torch.int64)
    for number, length, mark in (
        (digits[:, 0], lengths[:, :1], _PLUS),
        (digits[:, 1], lengths[:, 1:], _EQUALS),
        (answer, answer_length, _END),
    ):
        columns = torch.arange(number.shape[1])
        ids.scatter_(1, torch.where(columns < length, start + columns, time), number)
        ids.scatter_(1, start + length, mark)
        start = start + length + 1
    return ids[:, :time]


def _sum(columns: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
    """Digits of the sums [batch, places + 1] and how many they have [batch, 1], from the sums of each place."""
    carry, found = torch.zeros_like(longest), []
    for column in columns.T:
        found.append((column + carry) % 10)
        carry = (column + carry) // 10
    digits = torch.stack([*found, carry], 1)
    return digits, (longest + digits.gather(1, longest[:, None])[:, 0])[:, None]


def answer_loss(logits: Float[Tensor, "batch inputs vocab"], ids: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of the ids of the answers, end marks included.

    Args:
        logits: [batch, time - 1, vocab], of the next id, for all ids but the last.
        ids: [batch, time], of `addition_problems`.
    """
    asked = _asked(ids)
    return nn.functional.cross_entropy(logits[asked], ids[:, 1:][asked])


def exact_match(logits: Float[Tensor, "batch inputs vocab"], ids: Int[Tensor, "batch time"]) -> Bool[Tensor, " batch"]:
    """Whether greedy decoding from the equals sign on gives the whole answer and its end.

    It does if and only if the most likely id is the right one after each right beginning, so that one pass over the
    problems with their answers decides it.

    Args:
        logits: [batch, time - 1, vocab], of the next id, for all ids but the last.
        ids: [batch, time], of `addition_problems`.

    Returns:
        [batch], of each problem.
    """
    return ((logits.argmax(-1) == ids[:, 1:]) | ~_asked(ids)).all(1)


def _asked(ids: Tensor) -> Tensor:
    """[batch, time - 1], which of the ids from the second on belong to an answer."""
    return (ids == _EQUALS).cumsum(1)[:, :-1].bool() & (ids[:, 1:] != _BLANK)
