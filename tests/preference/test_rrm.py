import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlreviews.preference.regularised_rm_ensembles import bt_reward_loss
from mlreviews.preference.rrm import rrm_augment, rrm_filter, rrm_loss, rrm_permutations
from tests.contracts.families import Sample

CONTRACT = {"rrm_permutations": lambda: Sample(rrm_permutations, (7, 2))}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestAugmentation:
    def test_permutations_agree_nowhere(self) -> None:
        for examples, count in ((3, 2), (5, 4), (9, 1)):
            rows = rrm_permutations(examples, count, generator=torch.Generator().manual_seed(1))
            assert rows.shape == (count, examples)
            table = torch.cat([torch.arange(examples)[None], rows])
            assert all(len(set(column)) == count + 1 for column in table.T.tolist())
            assert all(sorted(row) == list(range(examples)) for row in table.tolist())

    @pytest.mark.parametrize(("count", "strict", "ties"), [(1, 4, 1), (2, 8, 6)])
    def test_pairs_of_every_example(self, count: int, strict: int, ties: int) -> None:
        """By enumeration: own answers beat strangers, strangers tie, no pair comes twice."""
        examples = 5
        rows = rrm_permutations(examples, count)
        found = rrm_augment(rows)
        assert len(found.target) == (strict + ties) * examples
        assert set(found.target[: strict * examples].tolist()) == {1.0}
        assert set(found.target[strict * examples :].tolist()) == {0.5}
        for i in range(examples):
            mine = found.prompts == i
            others = {int(row[i]) + kind * examples for row in rows for kind in (0, 1)}
            pairs = list(zip(found.first[mine].tolist(), found.second[mine].tolist(), strict=True))
            preferred = {pair for pair, c in zip(pairs, found.target[mine].tolist(), strict=True) if c == 1}
            assert preferred == {(own, other) for own in (i, i + examples) for other in others}
            tied = [frozenset(pair) for pair in pairs if pair not in preferred]
            assert len(tied) == len(set(tied)) == ties
            assert all(len(pair) == 2 and pair <= others for pair in tied)

    def test_an_artefact_decides_nothing(self) -> None:
        """A reward that only knows preferred answers from others is right on new pairs as often as wrong."""
        found = rrm_augment(rrm_permutations(6, 2))
        artefact = (torch.arange(12) < 6).double()
        margin = (artefact[found.first] - artefact[found.second])[found.target == 1]
        assert margin.sum() == 0
        assert (margin != 0).sum() == 24  # half of them


class TestLoss:
    def test_against_cross_entropy(self) -> None:
        first, second, target = _random(7), _random(7, seed=1), _random(7, seed=2).sigmoid()
        p = first.exp().numpy() / (first.exp() + second.exp()).numpy()
        c = target.numpy()
        found = rrm_loss(first, second, target)
        np.testing.assert_allclose(found.losses, -c * np.log(p) - (1 - c) * np.log1p(-p))
        assert torch.equal(found.chosen_rewards, first)
        assert torch.equal(found.rejected_rewards, second)

    def test_tie_is_best_at_equal_rewards(self) -> None:
        margin = torch.linspace(-3, 3, 7, dtype=torch.float64)
        losses = rrm_loss(margin, torch.zeros(7, dtype=torch.float64), torch.full((7,), 0.5).double()).losses
        assert losses.argmin() == 3
        assert float(losses[3]) == pytest.approx(math.log(2))

    def test_reduces_to_bradley_terry(self) -> None:
        first, second = _random(6), _random(6, seed=1)
        torch.testing.assert_close(
            rrm_loss(first, second, torch.ones(6).double()).losses, bt_reward_loss(first, second, center=0.0).losses
        )

    def test_extremes_are_finite_and_rewards_detached(self) -> None:
        first = torch.tensor([-1e4, 1e4, 1e4], requires_grad=True)
        found = rrm_loss(first, -first.detach(), torch.tensor([1.0, 0.0, 0.5]))
        assert not found.chosen_rewards.requires_grad
        gradient = torch.autograd.grad(found.losses.sum(), first)[0]
        torch.testing.assert_close(gradient, torch.tensor([-1.0, 1.0, 0.5]))


def test_filter() -> None:
    odds = torch.tensor([0.85, 0.75, 0.65, 0.75, 0.1]).logit()
    target = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5])
    kept = rrm_filter(odds + 2, torch.full((5,), 2.0), target)
    assert kept.tolist() == [False, True, False, True, True]
    assert rrm_filter(odds, torch.zeros(5), target, threshold=0.0).all()


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    x, c = _random(3), torch.ones(3).double()
    with pytest.raises(ValueError, match="examples: expected at least 3, got 2"):
        rrm_permutations(2)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        rrm_permutations(2, 0)
    with pytest.raises(ValueError, match=r"permutations: expected \[count"):
        rrm_augment(torch.arange(3))
    with pytest.raises(ValueError, match="permutations: expected each of 3"):
        rrm_augment(torch.tensor([[1, 2, 1]]))
    with pytest.raises(ValueError, match="leave no example in place"):
        rrm_augment(torch.arange(3)[None])
    with pytest.raises(ValueError, match="agree nowhere"):
        rrm_augment(torch.tensor([[1, 2, 0], [1, 2, 0]]))
    with pytest.raises(ValueError, match="target: expected probabilities"):
        rrm_loss(x, x, c + 0.1)
    with pytest.raises(ValueError, match="target: expected probabilities"):
        rrm_filter(x, x, c - 2)
    with pytest.raises(ValueError, match=r"second: expected shape \(3,\)"):
        rrm_loss(x, x[:1], c)
    with pytest.raises(ValueError, match="threshold: expected at least 0"):
        rrm_filter(x, x, c, threshold=-0.1)
