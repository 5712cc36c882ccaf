"""A data set in a table: seeded splits, label noise, standardisation by the training part alone.

::

    generator = torch.Generator().manual_seed(0)
    train, test = digits().split([0.8, 0.2], generator, stratified=True)
    (train, test), transform = standardised(train, test)     # statistics of train alone
    noisy = train.with_label_noise(0.1, generator)
    targets = one_hot(noisy.targets, noisy.classes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from mlreviews.common.checks import check_matrix, check_probability, check_same_length

__all__ = ["Standardisation", "Table", "one_hot", "standardised"]


@dataclass(frozen=True, eq=False)
class Table:
    """A data set for classification (int64 targets) or regression (float64 targets).

    Attributes:
        name: short name, for tables and figures.
        features: float64 [n, d], unscaled.
        targets: int64 [n], class 0 to classes - 1; or float64 [n] or [n, outputs] for regression.
        feature_names: d names, with units where the source gives them.
        target_names: the name of each class, or of each regression target.
        source: who collected the data, and where it is described.
        licence: of the data.
    """

    name: str
    features: Float64[Tensor, "n d"]
    targets: Int64[Tensor, " n"] | Float64[Tensor, " n"] | Float64[Tensor, "n outputs"]
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    source: str
    licence: str

    def __post_init__(self) -> None:
        check_matrix("features", self.features)
        check_same_length(features=self.features, targets=self.targets)
        if len(self.feature_names) != self.features.shape[1]:
            d, names = self.features.shape[1], len(self.feature_names)
            raise ValueError(f"feature_names: expected one for each of {d} features, got {names}")
        if self.targets.is_floating_point():
            check_matrix("targets", self.targets, dims=(1, 2))
        else:
            _check_classes("targets", self.targets, len(self.target_names))

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def classes(self) -> int:
        """The number of classes.

        Raises:
            ValueError: the targets are numbers to regress on.
        """
        if self.targets.is_floating_point():
            raise ValueError(f"{self.name}: a regression data set has no classes")
        return len(self.target_names)

    def rows(self, index: Int64[Tensor, " m"]) -> Table:
        """The table of some rows, in the order of the index."""
        return dataclasses.replace(self, features=self.features[index], targets=self.targets[index])

    def split(
        self, sizes: Sequence[int] | Sequence[float], generator: torch.Generator, *, stratified: bool = False
    ) -> tuple[Table, ...]:
        """Disjoint parts of randomly chosen rows, each part in random order.

        Args:
            sizes: the number of rows of each part (all ints), or its fraction of all rows (all floats). They may
                leave rows over, which are then in no part. Fractions that add up to 1 use every row.
            generator: the same seed gives the same parts.
            stratified: give every part the classes in the proportions of the rows, as nearly as whole numbers allow.

        Returns:
            one table for each size.

        Raises:
            ValueError: sizes are empty, mixed, or more than there is; a part would have no rows; stratified
                without classes.
        """
        counts = _counts(sizes, len(self))
        order = torch.randperm(len(self), generator=generator)
        if not stratified:
            return tuple(self.rows(part) for part in order[: sum(counts)].split(counts))
        classes = self.classes
        parts = []
        for count in counts:
            labels = self.targets[order]
            shares = _apportion(torch.bincount(labels, minlength=classes), count)
            # A row is chosen when fewer rows of its class come earlier in the random order than the class is to give.
            earlier = one_hot(labels, classes, dtype=torch.int64).cumsum(0).gather(1, labels[:, None]).squeeze(1) - 1
            chosen = earlier < shares[labels]
            parts.append(self.rows(order[chosen]))
            order = order[~chosen]
        return tuple(parts)

    def with_label_noise(self, fraction: float, generator: torch.Generator) -> Table:
        """The table with wrong labels in exactly ``round(fraction * n)`` rows.

        The rows are chosen at random without replacement, and each gets one of the other classes, all equally
        likely. Compare ``targets`` before and after to see which rows those are.

        Args:
            fraction: of the rows, in [0, 1].
            generator: the same seed gives the same noise.

        Raises:
            ValueError: the fraction is outside [0, 1], or there are fewer than two classes (as in regression).
        """
        check_probability("fraction", fraction)
        if self.classes < 2:
            raise ValueError(f"{self.name}: a wrong label needs a second class")
        wrong = torch.randperm(len(self), generator=generator)[: round(fraction * len(self))]
        step = torch.randint(1, self.classes, wrong.shape, generator=generator)
        targets = self.targets.clone()
        targets[wrong] = (targets[wrong] + step) % self.classes
        return dataclasses.replace(self, targets=targets)


def _counts(sizes: Sequence[int] | Sequence[float], n: int) -> list[int]:
    """The rows in each part."""
    kinds = {type(size) for size in sizes}
    if kinds == {int}:
        counts = [int(size) for size in sizes]
    elif kinds == {float}:
        if not all(0.0 < size <= 1.0 for size in sizes) or sum(sizes) > 1.0 + 1e-9:
            raise ValueError(f"sizes: expected fractions in (0, 1] of at most 1 together, got {list(sizes)}")
        # Rounding the running total keeps every part within one row of its fraction, and the whole exact.
        ends = [round(sum(sizes[:i]) * n) for i in range(len(sizes) + 1)]
        counts = [end - start for start, end in pairwise(ends)]
    else:
        raise ValueError(f"sizes: expected only counts (int) or only fractions (float), got {list(sizes)}")
    if min(counts) < 1:
        raise ValueError(f"sizes: expected at least one row in each part, got {list(sizes)} of {n} rows")
    if sum(counts) > n:
        raise ValueError(f"sizes: expected at most all {n} rows, got {list(sizes)}")
    return counts


def _apportion(available: Int64[Tensor, " classes"], count: int) -> Int64[Tensor, " classes"]:
    """How many of ``count`` rows each class gives: proportional, rounded by largest remainders."""
    total = int(available.sum())
    shares = available * count // total
    remainders = available * count % total
    extra = remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]
    shares[extra] += 1
    return shares


@dataclass(frozen=True, eq=False)
class Standardisation:
    """The map to zero mean and unit variance over the rows it was made from. Made by `standardised`.

    Attributes:
        mean: float64 [d], subtracted.
        scale: float64 [d], divided by: the standard deviation (divisor n), or 1 for a feature that is constant in
            those rows.
    """

    mean: Float64[Tensor, " d"]
    scale: Float64[Tensor, " d"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The standardised features, in the dtype given."""
        return (features - self.mean.to(features)) / self.scale.to(features)

    def inverse(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The features in their own units again, in the dtype given."""
        return features * self.scale.to(features) + self.mean.to(features)


def standardised(train: Table, *others: Table) -> tuple[tuple[Table, ...], Standardisation]:
    """Tables whose features have zero mean and unit variance in the training part; targets stay as they are.

    Args:
        train: the part the statistics are taken from.
        others: further parts (validation, test), transformed by the same statistics.

    Returns:
        the tables in the order given, and the transform.

    Raises:
        ValueError: the tables have different numbers of features.
    """
    for table in others:
        if table.features.shape[1] != train.features.shape[1]:
            d, came = train.features.shape[1], table.features.shape[1]
            raise ValueError(f"others: expected {d} features as in train, got {came}")
    # Compared exactly: the computed deviation of a constant feature can be 1e-17, which would blow rounding errors up.
    constant = train.features.amax(0) == train.features.amin(0)
    scale = train.features.std(0, correction=0).masked_fill(constant, 1.0)
    transform = Standardisation(train.features.mean(0), scale)
    tables = tuple(dataclasses.replace(t, features=transform(t.features)) for t in (train, *others))
    return tables, transform


def one_hot(
    targets: Int64[Tensor, " n"], classes: int, dtype: torch.dtype = torch.float64
) -> Shaped[Tensor, "n classes"]:
    """Rows that are 1 at the target's class and 0 elsewhere.

    Args:
        targets: int64 [n], class 0 to classes - 1.
        classes: how many there are.
        dtype: of the result.

    Raises:
        TypeError: the targets are not int64.
        ValueError: a target is not a class.
    """
    _check_classes("targets", targets, classes)
    return torch.nn.functional.one_hot(targets, classes).to(dtype)


def _check_classes(name: str, targets: Tensor, classes: int) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"{name}: expected classes as int64, got {targets.dtype}")
    if targets.ndim != 1:
        raise ValueError(f"{name}: expected one class for each row, got shape {tuple(targets.shape)}")
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise ValueError(f"{name}: expected classes 0 to {classes - 1}, got {int(wrong[0])}")
