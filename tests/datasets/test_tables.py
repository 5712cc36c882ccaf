import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlreviews.datasets import Table, one_hot, standardised


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table(targets: torch.Tensor, classes: int = 1) -> Table:
    """The first feature of each row is its number."""
    features = torch.stack([torch.arange(len(targets)), torch.ones(len(targets))], dim=1).double()
    names = tuple(f"class {i}" for i in range(classes))
    return Table("made up", features, targets, ("row", "one"), names, "nowhere", "none")


def _classes(*sizes: int) -> Table:
    """So many rows of each class, class after class."""
    targets = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return _table(targets, len(sizes))


def _regression(n: int) -> Table:
    return _table(torch.linspace(-1, 1, n, dtype=torch.float64))


def _rows(table: Table) -> list[int]:
    return [int(row) for row in table.features[:, 0]]


class TestTable:
    def test_length_classes_and_rows(self) -> None:
        table = _classes(2, 3)
        assert len(table) == 5
        assert table.classes == 2
        some = table.rows(torch.tensor([4, 0, 0]))
        assert _rows(some) == [4, 0, 0]
        assert some.targets.tolist() == [1, 0, 0]
        assert some.target_names == ("class 0", "class 1")

    def test_is_frozen_and_compared_by_identity(self) -> None:
        table = _classes(2, 3)
        _, transform = standardised(table)
        for thing, field in ((table, "features"), (transform, "mean")):
            assert thing == thing
            assert thing != dataclasses.replace(thing)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field, torch.zeros(1))

    def test_a_class_may_be_absent(self) -> None:
        assert _table(torch.tensor([2, 0]), 3).classes == 3

    def test_regression_has_no_classes(self) -> None:
        with pytest.raises(ValueError, match="made up: a regression data set has no classes"):
            _ = _regression(3).classes
        with pytest.raises(ValueError, match="no classes"):
            _regression(4).split([2, 2], _rng(), stratified=True)
        with pytest.raises(ValueError, match="no classes"):
            _regression(4).with_label_noise(0.5, _rng())

    def test_regression_on_several_targets(self) -> None:
        table = _table(torch.arange(12.0, dtype=torch.float64).reshape(4, 3))
        (part,) = table.split([2], _rng())
        assert torch.equal(part.targets, table.targets[_rows(part)])

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.zeros(3).long(), "features, targets: expected the same number of rows"),
            (torch.tensor([0, 2]), "targets: expected classes 0 to 1, got 2"),
            (torch.tensor([-1, 0]), "targets: expected classes 0 to 1, got -1"),
            (torch.zeros(2, 1).long(), r"targets: expected one class for each row, got shape \(2, 1\)"),
            (torch.tensor([0.0, math.nan]), "targets: expected finite values"),
            (torch.zeros(2, 1, 1), "targets: expected 1 or 2 dimensions"),
        ],
    )
    def test_bad_targets(self, targets: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Table("made up", torch.ones(2, 1).double(), targets, ("x",), ("a", "b"), "nowhere", "none")

    @pytest.mark.usefixtures("unchecked")
    def test_bad_features(self) -> None:
        targets = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="features: expected finite values"):
            Table("made up", torch.tensor([[1.0], [math.inf]]), targets, ("x",), ("a", "b"), "nowhere", "none")
        with pytest.raises(ValueError, match="feature_names: expected one for each of 1 features, got 2"):
            Table("made up", torch.ones(2, 1), targets, ("x", "y"), ("a", "b"), "nowhere", "none")
        with pytest.raises(TypeError, match=r"targets: expected classes as int64, got torch\.int32"):
            Table("made up", torch.ones(2, 1), targets.int(), ("x",), ("a", "b"), "nowhere", "none")


class TestSplit:
    @pytest.mark.parametrize("stratified", [False, True])
    def test_parts_are_disjoint_and_rows_stay_together(self, stratified: bool) -> None:
        table = _classes(9, 4, 8)
        parts = table.split([10, 3, 5], _rng(), stratified=stratified)
        assert [len(part) for part in parts] == [10, 3, 5]
        rows = list(itertools.chain.from_iterable(map(_rows, parts)))
        assert len(set(rows)) == 18
        for part in parts:
            assert torch.equal(part.targets, table.targets[_rows(part)])

    @pytest.mark.parametrize("stratified", [False, True])
    def test_all_rows_can_be_used(self, stratified: bool) -> None:
        parts = _classes(5, 6).split([0.3, 0.3, 0.4], _rng(), stratified=stratified)
        assert sorted(itertools.chain.from_iterable(map(_rows, parts))) == list(range(11))

    @pytest.mark.parametrize("stratified", [False, True])
    def test_the_seed_decides(self, stratified: bool) -> None:
        table = _classes(40, 40)
        first, again, other = (
            [_rows(part) for part in table.split([30, 20], _rng(seed), stratified=stratified)] for seed in (1, 1, 2)
        )
        assert first == again
        assert all(set(a) != set(b) for a, b in zip(first, other, strict=True))

    @pytest.mark.parametrize("stratified", [False, True])
    def test_each_part_is_in_random_order(self, stratified: bool) -> None:
        # Of 40 + 40 rows class after class, sorted parts would have one change of class; a random order has n / 2 = 20
        # on average with standard deviation about 3.
        for part in _classes(40, 40).split([40, 40], _rng(), stratified=stratified):
            assert part.targets.diff().abs().sum() > 5

    def test_every_row_is_as_likely_in_every_part(self) -> None:
        table, draws = _classes(4, 2), 300
        for stratified in (False, True):
            counts = torch.zeros(6)
            for seed in range(draws):
                (part,) = table.split([3], _rng(seed), stratified=stratified)
                counts[_rows(part)] += 1
            assert (counts - draws / 2).abs().max() < 5 * math.sqrt(draws / 4)

    @pytest.mark.parametrize(
        ("n", "sizes", "expected"),
        [
            (10, [0.7, 0.2, 0.1], [7, 2, 1]),
            (8, [0.5, 0.25], [4, 2]),
            (7, [0.5, 0.5], [4, 3]),
            (10, [1.0], [10]),
            (10, [10], [10]),
            (3, [1, 1, 1], [1, 1, 1]),
            (30, [0.1] * 10, [3] * 10),
        ],
    )
    def test_sizes(self, n: int, sizes: list[int] | list[float], expected: list[int]) -> None:
        assert [len(part) for part in _regression(n).split(sizes, _rng())] == expected

    @given(st.lists(st.floats(1, 9), min_size=1, max_size=5), st.integers(60, 200))
    @settings(max_examples=30)
    def test_fractions_are_met_within_one_row(self, weights: list[float], n: int) -> None:
        fractions = [weight / sum(weights) for weight in weights]
        lengths = [len(part) for part in _regression(n).split(fractions, _rng())]
        assert sum(lengths) == n
        assert all(abs(length - fraction * n) <= 1 + 1e-9 for length, fraction in zip(lengths, fractions, strict=True))

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
    @settings(max_examples=40)
    def test_stratified_counts_are_the_nearest_to_proportional(self, sizes: list[int], data: st.DataObject) -> None:
        table, n = _classes(*sizes), sum(sizes)
        count = data.draw(st.integers(1, n))
        (part,) = table.split([count], _rng(), stratified=True)
        got = part.targets.bincount(minlength=len(sizes)).tolist()
        exact = [size * count / n for size in sizes]
        # Brute force over all ways to take that many rows: none has a smaller squared distance to the exact shares.
        candidates = itertools.product(
            *[{math.floor(e), min(math.ceil(e), s)} for e, s in zip(exact, sizes, strict=True)]
        )
        best = min(math.dist(c, exact) for c in candidates if sum(c) == count)
        assert sum(got) == count
        assert math.dist(got, exact) <= best + 1e-9

    def test_stratified_parts_divide_evenly_where_they_can(self) -> None:
        parts = _classes(30, 60, 10).split([0.5, 0.3, 0.1], _rng(), stratified=True)
        assert [part.targets.bincount().tolist() for part in parts] == [[15, 30, 5], [9, 18, 3], [3, 6, 1]]

    def test_later_parts_are_proportional_to_all_rows(self) -> None:
        for part in _classes(17, 29, 53).split([33, 33, 33], _rng(), stratified=True):
            shares = part.targets.bincount() - torch.tensor([17, 29, 53]) / 3
            assert shares.abs().max() < 1

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ([], "sizes: expected only counts"),
            ([1, 0.5], "sizes: expected only counts"),
            ([True], "sizes: expected only counts"),
            ([0], "sizes: expected at least one row in each part"),
            ([5, -1], "sizes: expected at least one row in each part"),
            ([0.9, 0.01], r"sizes: expected at least one row in each part, got \[0.9, 0.01\] of 10 rows"),
            ([6, 5], "sizes: expected at most all 10 rows"),
            ([0.9, 0.11], "sizes: expected fractions"),
            ([0.0], "sizes: expected fractions"),
            ([1.1], "sizes: expected fractions"),
            ([0.5, math.nan], "sizes: expected fractions"),
            ([-0.5, 0.7], "sizes: expected fractions"),
        ],
    )
    def test_bad_sizes(self, sizes: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _regression(10).split(sizes, _rng())


class TestLabelNoise:
    @pytest.mark.parametrize(("fraction", "wrong"), [(0.0, 0), (0.1, 2), (0.33, 7), (0.5, 10), (1.0, 20)])
    def test_exactly_so_many_labels_are_wrong(self, fraction: float, wrong: int) -> None:
        table = _classes(5, 8, 7)
        before = table.targets.clone()
        noisy = table.with_label_noise(fraction, _rng())
        assert int((noisy.targets != before).sum()) == wrong
        assert torch.equal(table.targets, before)
        assert torch.equal(noisy.features, table.features)

    def test_every_other_class_is_as_likely(self) -> None:
        size = 3000
        noisy = _classes(*[size] * 4).with_label_noise(1.0, _rng())
        for label in range(4):
            counts = noisy.targets[label * size : (label + 1) * size].bincount(minlength=4).double()
            assert counts[label] == 0
            others = counts[torch.arange(4) != label]
            assert (others - size / 3).abs().max() < 5 * math.sqrt(size * (1 / 3) * (2 / 3))

    def test_every_row_is_as_likely(self) -> None:
        table, draws = _classes(3, 3), 300
        counts = torch.zeros(6)
        for seed in range(draws):
            counts += table.with_label_noise(0.5, _rng(seed)).targets != table.targets
        assert (counts - draws / 2).abs().max() < 5 * math.sqrt(draws / 4)

    def test_the_seed_decides(self) -> None:
        first, again, other = (_classes(30, 30).with_label_noise(0.5, _rng(seed)).targets for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_two_classes_swap(self) -> None:
        assert _classes(1, 2).with_label_noise(1.0, _rng()).targets.tolist() == [1, 0, 0]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="fraction: expected a probability"):
            _classes(2, 2).with_label_noise(1.5, _rng())
        with pytest.raises(ValueError, match="needs a second class"):
            _classes(2).with_label_noise(0.5, _rng())


class TestStandardised:
    def _tables(self) -> tuple[Table, Table]:
        x = torch.randn(11, 3, dtype=torch.float64, generator=_rng()) * torch.tensor([2.0, 50.0, 1e-3]) + 5
        y = torch.zeros(11).long()
        table = Table("made up", x, y, ("a", "b", "c"), ("only",), "nowhere", "none")
        return table.rows(torch.arange(7)), table.rows(torch.arange(7, 11))

    def test_statistics_are_those_of_the_training_part(self) -> None:
        train, test = self._tables()
        (new_train, new_test), transform = standardised(train, test)
        x = train.features.numpy()
        np.testing.assert_allclose(new_train.features.numpy().mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(new_train.features.numpy().std(0), 1, rtol=1e-12)
        np.testing.assert_allclose(new_test.features.numpy(), (test.features.numpy() - x.mean(0)) / x.std(0), rtol=1e-9)
        assert torch.equal(transform(test.features), new_test.features)
        assert new_test.targets is test.targets

    def test_the_inverse_gives_the_units_back(self) -> None:
        train, test = self._tables()
        _, transform = standardised(train)
        torch.testing.assert_close(transform.inverse(transform(test.features)), test.features)

    def test_a_constant_feature_becomes_zero(self) -> None:
        # The mean of seven times 0.1 is not 0.1, so the computed deviation is not 0.
        x = torch.full((7, 2), 0.1, dtype=torch.float64)
        x[0, 1] = 3.0
        table = Table("made up", x, torch.zeros(7).long(), ("constant", "not"), ("only",), "nowhere", "none")
        elsewhere = dataclasses.replace(table, features=torch.full((7, 2), 2.1, dtype=torch.float64))
        (new, other), transform = standardised(table, elsewhere)
        assert new.features[:, 0].abs().max() < 1e-15
        assert transform.scale[0] == 1
        assert other.features[0, 0] == pytest.approx(2.0)
        assert new.features[:, 1].std(correction=0) == pytest.approx(1.0)

    def test_keeps_the_dtype_of_what_it_is_given(self) -> None:
        train, test = self._tables()
        _, transform = standardised(train)
        single = transform(test.features.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), transform(test.features), rtol=0.02, atol=1e-3)
        assert transform.inverse(single).dtype == torch.float32

    def test_all_parts_have_the_same_features(self) -> None:
        train, _ = self._tables()
        with pytest.raises(ValueError, match="others: expected 3 features as in train, got 2"):
            standardised(train, _classes(2))


class TestOneHot:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
    def test_rows_of_the_identity(self, dtype: torch.dtype) -> None:
        targets = torch.tensor([3, 0, 3, 1])
        encoded = one_hot(targets, 5, dtype)
        assert encoded.dtype == dtype
        assert torch.equal(encoded, torch.eye(5, dtype=dtype)[targets])

    def test_float64_unless_told_otherwise(self) -> None:
        assert one_hot(torch.tensor([0]), 1).dtype == torch.float64

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got 3"):
            one_hot(torch.tensor([0, 3]), 3)
        with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got -1"):
            one_hot(torch.tensor([-1, 0]), 3)
        with pytest.raises(ValueError, match=r"targets: expected one class for each row, got shape \(1, 1\)"):
            one_hot(torch.tensor([[0]]), 3)
        with pytest.raises(TypeError, match=r"targets: expected classes as int64, got torch\.float32"):
            one_hot(torch.tensor([0.0]), 3)
