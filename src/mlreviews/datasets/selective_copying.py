"""Selective copying: repeat the data tokens that are strewn among noise, in their order.

::

    inputs, targets = selective_copying(64, length=256, tokens=16, generator=generator)
    logits = model(inputs)[:, -16:]         # the answer is asked for at the last 16 positions
    accuracy = (logits.argmax(-1) == targets).float().mean()

The task of Gu and Dao (arXiv:2312.00752, section 4.1.1). A layer that treats all inputs alike can't do it, as the gaps
between the data tokens vary: it has to let the data in and keep the noise out.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from mlreviews.common.checks import check_count

__all__ = ["selective_copying"]


def selective_copying(
    batch_size: int, *, length: int = 4096, tokens: int = 16, vocab_size: int = 16, generator: torch.Generator | None
) -> tuple[Int64[Tensor, "batch_size positions"], Int64[Tensor, "batch_size tokens"]]:
    """Draws examples of the task; the defaults are the paper's.

    Id 0 is the noise and ``vocab_size - 1`` the mark that asks for an answer; those between are data.

    Args:
        batch_size: how many examples.
        length: positions with noise and data, before the marks.
        tokens: data tokens to be remembered. All sets of positions are equally likely, and so are all contents.
        vocab_size: number of ids.
        generator: a CPU generator; None is the global one.

    Returns:
        ``(inputs, targets)``: ids [batch_size, length + tokens], with as many marks at the end as there are data
        tokens, and [batch_size, tokens], the data in the order in which they came.

    Raises:
        ValueError: a count below 1, fewer positions than data tokens, or a vocabulary below 3.
    """
    check_count("batch_size", batch_size)
    check_count("tokens", tokens)
    check_count("length", length, least=tokens)
    check_count("vocab_size", vocab_size, least=3)
    targets = torch.randint(1, vocab_size - 1, (batch_size, tokens), generator=generator)
    # The places of the largest of equally distributed numbers are a set drawn without replacement.
    places = torch.rand(batch_size, length, generator=generator).topk(tokens).indices.sort().values
    inputs = torch.zeros(batch_size, length, dtype=torch.int64).scatter(1, places, targets)
    marks = torch.full((batch_size, tokens), vocab_size - 1)
    return torch.cat([inputs, marks], dim=1), targets
