"""Word problems of groups: given elements one by one, say their product so far (sequences for state tracking)."""

from __future__ import annotations

import itertools
import re
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from mlreviews.common.checks import check_count

__all__ = ["group_permutations", "group_table", "group_word_problem"]

_LARGEST = {"Z": 1000, "A": 6, "S": 6}


def group_permutations(group: str) -> Int[Tensor, "order points"]:
    """The elements of a group as permutations: row g maps point i to ``[g, i]``.

    Args:
        group: cyclic ``Z<n>``, alternating ``A<n>``, symmetric ``S<n>``, or their direct product, such as ``"A4xZ5"``.

    Returns:
        [order, points], in lexicographic order; row 0 is the identity, and in ``Z<n>`` row g is the shift by g.

    Raises:
        ValueError: not such a name, or n is more than 1000 (``Z``) or 6 (``A``, ``S``).
    """
    return torch.tensor(_permutations(group))


@cache
def _permutations(group: str) -> tuple[tuple[int, ...], ...]:
    elements: list[tuple[int, ...]] = [()]
    for factor in group.split("x"):
        if not re.fullmatch(r"[ZAS][1-9]\d*", factor) or int(factor[1:]) > _LARGEST[factor[0]]:
            raise ValueError(f"group: expected factors Z1 to Z1000, A1 to A6, S1 to S6 joined by x, got {group!r}")
        n = int(factor[1:])
        if factor[0] == "Z":
            rows = [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
        else:
            rows = [row for row in itertools.permutations(range(n)) if factor[0] == "S" or _is_even(row)]
        elements = [old + tuple(len(old) + i for i in row) for old in elements for row in rows]
    return tuple(elements)


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(i > j for i, j in itertools.combinations(permutation, 2)) % 2 == 0


def group_table(group: str) -> Int[Tensor, "order order"]:
    """The multiplication table: ``[g, h]`` is the number of the product gh, which applies h first.

    Args:
        group: as for `group_permutations`.

    Returns:
        [order, order], int64.

    Raises:
        ValueError: not a group's name.
    """
    return _table(group).clone()


@cache
def _table(group: str) -> Tensor:
    elements = _permutations(group)
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(g[i] for i in h)] for h in elements] for g in elements])


def group_word_problem(
    group: str, time: int, batch: int, *, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Draws instances of a word problem; ``"Z2"`` is parity.

    Args:
        group: as for `group_permutations`.
        time: elements in a sequence.
        batch: sequences.
        generator: draws the elements, independent and uniform.

    Returns:
        ``(tokens, products)``, int64: the elements g_1, g_2, ... and their prefix products g_1, g_1 g_2, ...

    Raises:
        ValueError: not a group's name, or time or batch below 1.
        TypeError: time or batch is not a whole number.
    """
    check_count("time", time)
    check_count("batch", batch)
    table = _table(group)
    tokens = torch.randint(len(table), (batch, time), generator=generator)
    products, reach = tokens, 1
    while reach < time:  # each entry holds the product of the last `reach` elements, or of all before it
        products = torch.cat([products[:, :reach], table[products[:, :-reach], products[:, reach:]]], dim=1)
        reach *= 2
    return tokens, products
