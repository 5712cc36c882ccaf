import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mlreviews.datasets import group_permutations, group_table, group_word_problem

GROUPS = ["Z2", "Z60", "A4xZ5", "A5"]


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


@pytest.mark.parametrize("group", [*GROUPS, "S3", "Z1"])
def test_tables_are_groups(group: str) -> None:
    table = group_table(group)
    order = len(table)
    everything = torch.arange(order)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    for axis in (0, 1):  # every row and column is a rearrangement: closed, and with inverses
        assert torch.equal(table.sort(axis).values, everything.expand(order, order).movedim(-1, axis))
    assert torch.equal(table[table], table[:, table])


def test_only_the_cyclic_groups_commute() -> None:
    commutes = {group: torch.equal(group_table(group), group_table(group).T) for group in GROUPS}
    assert commutes == {"Z2": True, "Z60": True, "A4xZ5": False, "A5": False}
    assert [len(group_table(group)) for group in GROUPS] == [2, 60, 60, 60]


def _commutator_subgroup(table: Tensor) -> set[int]:
    inverse = (table == 0).int().argmax(1)
    product = table[table[:, :], table[inverse][:, inverse]]  # g h g^-1 h^-1
    found = set(product.flatten().tolist())
    while True:
        members = torch.tensor(sorted(found))
        larger = set(table[members][:, members].flatten().tolist())
        if larger == found:
            return found
        found = larger


@pytest.mark.parametrize(("group", "size"), [("Z60", 1), ("A4xZ5", 4), ("A5", 60), ("S3", 3)])
def test_commutators(group: str, size: int) -> None:
    # A5 is perfect: nothing is left when it is made abelian. A4xZ5 is solvable: its commutators are Klein's four-group.
    assert len(_commutator_subgroup(group_table(group))) == size


@pytest.mark.parametrize(
    ("group", "orders"),
    [
        ("A5", {1: 1, 2: 15, 3: 20, 5: 24}),
        ("A4xZ5", {1: 1, 2: 3, 3: 8, 5: 4, 10: 12, 15: 32}),
        ("Z60", {n: sum(math.gcd(i, n) == 1 for i in range(1, n + 1)) for n in range(1, 61) if 60 % n == 0}),
    ],
)
def test_orders_of_elements(group: str, orders: dict[int, int]) -> None:
    table = group_table(group)
    found, powers = [0] * len(table), torch.arange(len(table))
    for exponent in range(1, 61):
        for g in (powers == 0).nonzero().flatten().tolist():
            found[g] = found[g] or exponent
        powers = table[powers, torch.arange(len(table))]
    assert Counter(found) == orders


@pytest.mark.parametrize("group", [*GROUPS, "S3", "A4", "S4xZ3"])
def test_products_compose_permutations(group: str) -> None:
    elements = group_permutations(group)
    # As matrices, which send point i to g(i), so that the product gh applies h first.
    matrices = nn.functional.one_hot(elements, elements.shape[1]).double().mT
    products = torch.einsum("gij,hjk->ghik", matrices, matrices)
    assert torch.equal(products, matrices[group_table(group)])


def test_permutations() -> None:
    assert group_permutations("A3").tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert group_permutations("Z4").tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    assert group_permutations("Z2xS2").tolist() == [[0, 1, 2, 3], [0, 1, 3, 2], [1, 0, 2, 3], [1, 0, 3, 2]]
    for n in range(1, 6):
        symmetric = group_permutations(f"S{n}")
        assert symmetric.tolist() == [list(p) for p in itertools.permutations(range(n))]
        signs = torch.linalg.det(nn.functional.one_hot(symmetric, n).double()).round()
        assert torch.equal(group_permutations(f"A{n}"), symmetric[signs == 1])
    assert group_permutations("A6").shape == (360, 6)
    assert group_permutations("Z1000").shape == (1000, 1000)


def test_tables_can_be_changed_without_harm() -> None:
    group_table("Z2").zero_()
    assert group_table("Z2").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("name", ["", "B3", "a5", "A", "5", "A5x", "A5 ", "Z0", "A05", "A7", "S7", "Z1001", "A5xS7"])
@pytest.mark.parametrize("function", [group_permutations, group_table])
def test_bad_group(function: Callable[[str], object], name: str) -> None:
    with pytest.raises(ValueError, match=r"^group: expected .*, got "):
        function(name)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 8, 9, 33])
def test_products_of_shifts_are_sums(time: int) -> None:
    for order in (2, 60):
        tokens, products = group_word_problem(f"Z{order}", time, 7, generator=_rng())
        assert tokens.shape == products.shape == (7, time)
        assert tokens.dtype == products.dtype == torch.int64
        assert torch.equal(products, tokens.cumsum(1) % order)


@pytest.mark.parametrize("time", [1, 2, 7, 16, 31])
def test_prefix_products(time: int) -> None:
    tokens, products = group_word_problem("A5", time, 3, generator=_rng())
    elements = group_permutations("A5").tolist()
    for row, found in zip(tokens.tolist(), products.tolist(), strict=True):
        points = list(range(5))
        for token, number in zip(row, found, strict=True):
            points = [points[i] for i in elements[token]]
            assert elements[number] == points


def test_elements_are_uniform_and_independent() -> None:
    tokens, _ = group_word_problem("A4", 50, 400, generator=_rng())
    assert stats.chisquare(tokens.flatten().bincount(minlength=12)).pvalue > 1e-5
    pairs = 12 * tokens[:, ::2] + tokens[:, 1::2]
    assert stats.chisquare(pairs.flatten().bincount(minlength=144)).pvalue > 1e-5


@pytest.mark.usefixtures("unchecked")
def test_bad_word_problems() -> None:
    with pytest.raises(ValueError, match=r"group: expected factors .*, got 'M11'"):
        group_word_problem("M11", 3, 2)
    with pytest.raises(ValueError, match="time: expected at least 1, got 0"):
        group_word_problem("A5", 0, 2)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        group_word_problem("A5", 3, 0)
    with pytest.raises(TypeError, match=r"time: expected a whole number, got 3\.0"):
        group_word_problem("A5", 3.0, 2)
