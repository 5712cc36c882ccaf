from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mlreviews.preference import (
    dpo_loss,
    first_round_pairs,
    optimal_policy,
    ranker_reward,
    rejection_sample,
    tournament_pairs,
)
from tests.contracts.families import Sample

REWARDS = torch.tensor([0.3, 2.0, -1.0, 1.2, 2.5, 0.9])

CONTRACT = {"rejection_sample": lambda: Sample(rejection_sample, (REWARDS, 4))}


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_reduces_to_best_of_n_in_the_limit_of_beta_0() -> None:
    best = [4, 1, 3, 5]
    for beta in (0.0, 1e-3):
        assert rejection_sample(REWARDS, 4, beta, generator=draw(0)).tolist() == best
    tied = torch.tensor([1.0, 2.0, 2.0])
    assert sorted(rejection_sample(tied, 2, 0.0, generator=draw(0)).tolist()) == [1, 2]


def test_reduces_to_dpo_on_the_samples_as_drawn_with_infinite_beta() -> None:
    for beta in (math.inf, 1e30):
        kept = rejection_sample(REWARDS, 4, beta, generator=draw(0))
        assert kept.tolist() == [0, 1, 2, 3]
    logps, reference = torch.randn(2, 6, generator=draw(1))
    pairs = first_round_pairs(4, lambda i, j: bool(REWARDS[kept[i]] > REWARDS[kept[j]]))
    assert pairs == [(1, 0), (3, 2)]
    better, worse = torch.tensor(pairs).T
    found = dpo_loss(
        logps[kept[better]], logps[kept[worse]], reference[kept[better]], reference[kept[worse]], beta=0.05
    )
    wanted = dpo_loss(logps[[1, 3]], logps[[0, 2]], reference[[1, 3]], reference[[0, 2]], beta=0.05)
    assert torch.equal(found.losses, wanted.losses)


def test_the_first_one_follows_the_tilted_law() -> None:
    """With two candidates the chance of each is known: reject the worse one first, or accept it if it comes first."""
    beta, gap, runs = 0.5, 0.4, 800
    accepted = math.exp(-gap / beta)
    generator = draw(3)
    first = sum(int(rejection_sample(torch.tensor([0.0, gap]), 1, beta, generator=generator)) == 0 for _ in range(runs))
    assert abs(first / runs - accepted) < 4 * math.sqrt(accepted * (1 - accepted) / runs)
    first = sum(int(rejection_sample(torch.tensor([gap, 0.0]), 1, beta, generator=generator)) for _ in range(100))
    assert first == 0  # the best one is always accepted when it is come to


def test_large_pools_give_the_optimal_policy() -> None:
    """Chi-square of one sample from each of many pools of 200 candidates, over 4 answers."""
    logps = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rewards, beta, runs, generator = torch.tensor([0.0, 0.5, 1.0, 1.5]), 0.7, 500, draw(4)
    wanted = optimal_policy(logps, rewards, beta)
    by_hand = [p * math.exp(r / beta) for p, r in zip([0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 1.0, 1.5], strict=True)]
    assert wanted.tolist() == pytest.approx([value / sum(by_hand) for value in by_hand])
    pools = torch.multinomial(logps.exp(), runs * 200, replacement=True, generator=generator).view(runs, 200)
    counts = Counter(int(pool[rejection_sample(rewards[pool], 1, beta, generator=generator)]) for pool in pools)
    expected = runs * wanted
    chi_square = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in range(4))
    assert chi_square < 16.3  # 99.9 % point with 3 degrees of freedom


def test_distinct_and_free_of_the_rewards_zero() -> None:
    for seed in range(20):
        kept = rejection_sample(REWARDS, 6, 0.5, generator=draw(seed))
        assert sorted(kept.tolist()) == list(range(6))
        assert torch.equal(kept, rejection_sample(REWARDS + 64, 6, generator=draw(seed)))


def test_ranker_rewards_are_log_odds() -> None:
    rates = torch.tensor([[0.5, 0.9], [0.2, 0.75]], dtype=torch.float64)
    assert ranker_reward(rates).flatten().tolist() == pytest.approx([0, math.log(9), -math.log(4), math.log(3)])


@pytest.mark.parametrize("samples", [2, 5, 8])
def test_pairs_of_both_rankings(samples: int) -> None:
    """The ranker prefers larger numbers: the best one wins the tournament, and everyone else loses once."""
    played: list[tuple[int, int]] = []

    def beats(i: int, j: int) -> bool:
        played.append((i, j))
        return i > j

    first = first_round_pairs(samples, beats)
    assert first == [(i + 1, i) for i in range(0, samples - 1, 2)]
    played.clear()
    pairs = tournament_pairs(samples, beats)
    assert all(winner > loser for winner, loser in pairs)
    assert sorted(loser for _, loser in pairs) == list(range(samples - 1))
    assert pairs[: len(first)] == first
    assert len(played) == samples - 1
    assert tournament_pairs(samples, lambda i, j: i < j)[-1][0] == 0


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at most the 6"):
        rejection_sample(REWARDS, 7)
    with pytest.raises(ValueError, match="num_samples"):
        rejection_sample(REWARDS, 0)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="beta"):
            rejection_sample(REWARDS, 1, wrong)
    with pytest.raises(ValueError, match="rewards"):
        rejection_sample(REWARDS * math.inf, 1)
    with pytest.raises(ValueError, match="beta"):
        optimal_policy(REWARDS, REWARDS, 0.0)
    for edge in (0.0, 1.0):
        with pytest.raises(ValueError, match="win_rates"):
            ranker_reward(torch.tensor([0.5, edge]))
    for pairs in (first_round_pairs, tournament_pairs):
        with pytest.raises(ValueError, match="samples: expected at least 2"):
            pairs(1, lambda i, j: True)
