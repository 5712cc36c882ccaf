import itertools
from collections import Counter

import pytest
import torch
from scipy import stats

from mlreviews.datasets import selective_copying


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_targets_are_the_data_in_order_and_marks_come_last() -> None:
    inputs, targets = selective_copying(50, length=30, tokens=4, vocab_size=7, generator=_rng())
    assert inputs.shape == (50, 34)
    assert targets.shape == (50, 4)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, answer in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [token for token in row[:30] if token] == answer
        assert row[30:] == [6] * 4
    assert targets.unique().tolist() == [1, 2, 3, 4, 5]
    assert (inputs[:, :30] == 0).any(1).all()


def test_all_positions_and_contents_are_equally_likely() -> None:
    inputs, targets = selective_copying(6000, length=5, tokens=2, vocab_size=4, generator=_rng())
    places = Counter(tuple(row.nonzero().flatten().tolist()) for row in inputs[:, :5])
    assert set(places) == set(itertools.combinations(range(5), 2))
    assert stats.chisquare(list(places.values())).pvalue > 1e-3
    contents = Counter(map(tuple, targets.tolist()))
    assert set(contents) == set(itertools.product((1, 2), repeat=2))
    assert stats.chisquare(list(contents.values())).pvalue > 1e-3


def test_defaults_are_the_papers() -> None:
    inputs, targets = selective_copying(1, generator=_rng())
    assert inputs.shape == (1, 4096 + 16)
    assert targets.shape == (1, 16)
    assert inputs.max() == 15


def test_extremes() -> None:
    inputs, targets = selective_copying(3, length=4, tokens=4, vocab_size=3, generator=_rng())
    assert torch.equal(inputs[:, :4], targets)
    assert torch.equal(targets, torch.ones_like(targets))
    assert inputs[:, 4:].unique().tolist() == [2]
    assert selective_copying(1, length=1, tokens=1, generator=_rng())[0].shape == (1, 2)


def test_the_generator_decides() -> None:
    before = torch.get_rng_state()
    one, same, other = (selective_copying(4, length=20, generator=_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    torch.manual_seed(1)
    assert torch.equal(selective_copying(4, length=20, generator=None)[0], one[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "least", "value"), [("batch_size", 1, 0), ("tokens", 1, 0), ("length", 16, 15), ("vocab_size", 3, 2)]
)
def test_bad_input(name: str, least: int, value: int) -> None:
    arguments = {"batch_size": 2, "length": 20, "generator": _rng()} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got {value}"):
        selective_copying(**arguments)
