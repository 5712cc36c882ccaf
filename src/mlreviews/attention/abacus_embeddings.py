r"""Abacus embeddings: a digit's place in its number, as a vector added to its token's.

Paper: Transformers Can Do Arithmetic with the Right Embeddings (arXiv:2405.17399).

Each digit gets a learned vector for its place within the run of digits that it belongs to, whatever the text around it.
Numbers are written with the least significant digit first, so that digits of the same significance share a vector and a
model can align the operands of a sum. In training all places are shifted by one random number a batch: then the vectors
of places beyond the longest number in the training data are trained, too, and longer numbers can be computed with.

Equation:
    For the digit that is the j-th of its run of digits (j = 1, 2, ...), and for all else,
    $$ p = j + k, \qquad p = 0 \tag{1} $$
    $$ x = e_{\text{token}} + E_p, \qquad k \sim \mathcal{U}\{0, \dots, k_{\max}\}
       \text{ in training, } k = 0 \text{ otherwise.} \tag{2} $$

Symbols:
    j: [batch, time], place of a digit in its number, 1 for the first.
    k: one number for a whole batch, the offset.
    E: [max_length, dim], the table; row 0 is shared by everything that is not a digit.
    e: [batch, time, dim], the embedding of the tokens.

Defaults:
    max_offset: 99 (authors' abacus.py; the paper draws the place of the first digit from 1 to 100).
    max_length: 1024 (authors' abacus.py).

Deviations:
    1. Each vector is drawn with variance 1 / dim, as `TinyLM` draws those of tokens; the authors' standalone module
       leaves it at 1.
    2. A place that the table has no row for is an error that says so.
    3. Input injection, looped layers and the progressive loss (in the authors' code a random number of loops, with
       gradients through the last of them) are left out: they are changes of the model around the embedding.

Reduces to:
    torch.nn.Embedding: learned absolute positions, for one number that begins with the row, evaluated; row t + 1 of the
        table is added to token t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from mlreviews.common.checks import check_count

__all__ = ["AbacusEmbedding", "AbacusState", "abacus_positions"]


def abacus_positions(
    ids: Int[Tensor, "batch time"], digit_ids: Int[Tensor, " digits"], run: Int[Tensor, " batch"] | None = None
) -> Int64[Tensor, "batch time"]:
    """The place of each digit in its number, j of eq. (1).

    Args:
        ids: [batch, time].
        digit_ids: [digits], those that are digits.
        run: [batch], how many digits come immediately before the first id; None is none.

    Returns:
        [batch, time], 1 for the first digit of a number, and 0 for what is not a digit.
    """
    digit = torch.isin(ids, digit_ids)
    index = torch.arange(ids.shape[1], device=ids.device)
    border = torch.where(digit, -1, index).cummax(1).values  # the last id up to here that is not a digit
    place = index - border
    if run is not None:
        place = place + torch.where(border < 0, run[:, None], 0)
    return place * digit


class AbacusState(NamedTuple):
    """The places of the tokens so far. A value, not a container: each method returns another state.

    Attributes:
        positions: [batch, time], int16, without the offset; 0 at what is not a digit.
        offset: k of eq. (2), which the whole of a sequence shares.
    """

    positions: Tensor
    offset: Tensor

    @property
    def length(self) -> int:
        """How many tokens it has seen."""
        return self.positions.shape[1]

    def crop(self, length: int) -> AbacusState:
        """The state after the first tokens alone.

        Args:
            length: how many, 0 to `length`.

        Raises:
            ValueError: there are not that many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the tokens held, got {length}")
        return AbacusState(self.positions[:, :length], self.offset)

    def rows(self, index: Int[Tensor, " rows"]) -> AbacusState:
        """The given rows of the batch, in that order; a row may be taken several times.

        Args:
            index: [rows], int64.
        """
        return AbacusState(self.positions[index], self.offset)


class AbacusEmbedding(nn.Module):
    """Eq. (2), in the form that `mlreviews.models.TinyLM` takes as its ``position_embedding``.

    Padding must not be a digit's id, since it would count as a place.

    Args:
        digit_ids: the ids of the digits, such as ``range(10)``.
        dim: size of a token's vector.
        max_length: rows of the table, one more than the highest place plus offset.
        max_offset: k_max.
        generator: draws the table, and the offsets as well, each call going on where the last one stopped; None is
            the global one.

    Raises:
        ValueError: no digits, a size below 1, or a table that is too short for the offsets.
    """

    digit_ids: Tensor

    def __init__(
        self,
        digit_ids: list[int] | range,
        dim: int,
        *,
        max_length: int = 1024,
        max_offset: int = 99,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("max_offset", max_offset, least=0)
        check_count("max_length", max_length, least=max_offset + 2)
        if not digit_ids:
            raise ValueError("digit_ids: expected at least one id, got none")
        self.max_length, self.max_offset, self.generator = max_length, max_offset, generator
        # An empty weight that is filled below: the constructor would draw from the global generator.
        self.embedding = nn.Embedding(max_length, dim, _weight=torch.empty(max_length, dim))
        nn.init.normal_(self.embedding.weight, std=dim**-0.5, generator=generator)
        self.register_buffer("digit_ids", torch.tensor(list(digit_ids)), persistent=False)

    def forward(
        self, ids: Int[Tensor, "batch time"], state: AbacusState | None = None
    ) -> tuple[Float[Tensor, "batch time dim"], AbacusState]:
        """The vectors to be added to those of the tokens.

        Args:
            ids: [batch, time].
            state: of the tokens before these; None before the first token, which is where an offset is drawn.

        Returns:
            ``(vectors, state)``: [batch, time, dim], and the state after the last token.

        Raises:
            ValueError: a number has more digits than the table has rows for, or the state has another batch.
        """
        if state is None:
            state = AbacusState(ids.new_empty(len(ids), 0, dtype=torch.int16), self._offset().to(ids.device))
        if len(state.positions) != len(ids):
            raise ValueError(f"state: expected a batch of {len(ids)}, as ids have, got {len(state.positions)}")
        run = state.positions[:, -1].long() if state.positions.shape[1] else None
        places = abacus_positions(ids, self.digit_ids, run)
        rows = torch.where(places > 0, places + state.offset, 0)
        # Shapes say that all is well until a text is as long as the table; only then are the numbers looked at.
        if (
            state.positions.shape[1] + ids.shape[1] + self.max_offset >= self.max_length
            and int(rows.max()) >= self.max_length
        ):
            most, offset = self.max_length - 1 - int(state.offset), int(state.offset)
            raise ValueError(
                f"ids: expected numbers of at most {most} digits (max_length {self.max_length}, offset {offset}), "
                f"got {int(places.max())}"
            )
        held = torch.cat([state.positions, places.to(torch.int16)], 1)
        return self.embedding(rows), AbacusState(held, state.offset)

    def _offset(self) -> Tensor:
        if not self.training:
            return torch.zeros((), dtype=torch.int64)
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randint(self.max_offset + 1, (), generator=self.generator, device=device)

    def extra_repr(self) -> str:
        """The largest offset."""
        return f"max_offset={self.max_offset}"
