import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlreviews.preference.regularised_rm_ensembles import (
    RewardEnsemble,
    bt_reward_loss,
    mean_minus_std_reward,
    mean_reward,
    median_reward,
    min_reward,
)
from tests.contracts.families import Sample


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _models(count: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)) for _ in range(count)]


CONTRACT = {"RewardEnsemble": lambda: Sample(RewardEnsemble(_models(3)), (_random(5, 4).float(),))}
AGGREGATES = [mean_reward, median_reward, min_reward, mean_minus_std_reward]


class TestLoss:
    def test_level_of_a_prompt_is_open_without_the_penalty(self) -> None:
        chosen, rejected, level = _random(6), _random(6, seed=1), 5 * _random(6, seed=2)
        moved = bt_reward_loss(chosen + level, rejected + level, center=0.0).losses
        torch.testing.assert_close(moved, bt_reward_loss(chosen, rejected, center=0.0).losses)
        moved = bt_reward_loss(chosen + level, rejected + level).losses
        assert (moved - bt_reward_loss(chosen, rejected).losses).abs().min() > 1e-3

    def test_reduces_to_bradley_terry(self) -> None:
        chosen, rejected = _random(6), _random(6, seed=1)
        found = bt_reward_loss(chosen, rejected, center=0.0)
        expected = -torch.log(chosen.exp() / (chosen.exp() + rejected.exp()))
        torch.testing.assert_close(found.losses, expected)
        penalty = bt_reward_loss(chosen, rejected, center=0.3).losses - found.losses
        torch.testing.assert_close(penalty, 0.3 * (chosen + rejected) ** 2)
        by_default = bt_reward_loss(chosen, rejected).losses - found.losses
        torch.testing.assert_close(by_default, (chosen + rejected) ** 2 / 100)

    def test_of_all_levels_the_one_around_zero_is_best(self) -> None:
        level = torch.linspace(-2, 2, 9, dtype=torch.float64)
        losses = bt_reward_loss(level + 0.7, level - 0.7).losses
        assert losses.argmin() == 4
        torch.testing.assert_close(losses, losses.flip(0))

    def test_rewards_are_detached_and_extremes_finite(self) -> None:
        chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
        found = bt_reward_loss(chosen, -chosen)
        assert not found.chosen_rewards.requires_grad
        assert not found.rejected_rewards.requires_grad
        assert torch.equal(found.rejected_rewards, -chosen.detach())
        assert torch.autograd.grad(found.losses.sum(), chosen)[0].isfinite().all()


class TestAggregates:
    def test_against_numpy(self) -> None:
        for members in (3, 4):
            rewards = _random(members, 2, 5)
            np.testing.assert_allclose(mean_reward(rewards), rewards.numpy().mean(0))
            np.testing.assert_allclose(median_reward(rewards), np.median(rewards.numpy(), 0))
            np.testing.assert_allclose(min_reward(rewards), rewards.numpy().min(0))
            expected = rewards.numpy().mean(0) - 0.7 * rewards.numpy().std(0)
            np.testing.assert_allclose(mean_minus_std_reward(rewards, 0.7), expected)
            assert torch.equal(mean_minus_std_reward(rewards, 0.0), mean_reward(rewards))
            np.testing.assert_allclose(mean_minus_std_reward(rewards), rewards.numpy().mean(0) - rewards.numpy().std(0))

    @pytest.mark.parametrize("aggregate", AGGREGATES)
    def test_single_members_and_members_that_agree(self, aggregate) -> None:  # type: ignore[no-untyped-def]
        rewards = _random(1, 5)
        torch.testing.assert_close(aggregate(rewards), rewards[0])
        same = rewards.expand(3, 5).clone().requires_grad_()
        torch.testing.assert_close(aggregate(same), rewards[0])
        gradient = torch.autograd.grad(aggregate(same).sum(), same)[0]
        torch.testing.assert_close(gradient.sum(0), torch.ones(5, dtype=torch.float64))

    def test_module(self) -> None:
        models, x = _models(3), torch.randn(5, 4)
        rewards = torch.stack([model(x) for model in models])
        assert torch.equal(RewardEnsemble(models).members(x), rewards)
        assert torch.equal(RewardEnsemble(models)(x), rewards.mean(0))
        assert torch.equal(RewardEnsemble(models, min_reward)(x), rewards.amin(0))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(3)
        with pytest.raises(ValueError, match="center: expected at least 0"):
            bt_reward_loss(x, x, center=-1.0)
        with pytest.raises(ValueError, match=r"rejected: expected shape \(3,\)"):
            bt_reward_loss(x, x[:1])
        with pytest.raises(ValueError, match="chosen: expected finite"):
            bt_reward_loss(x * math.inf, x)
        with pytest.raises(ValueError, match="k: expected at least 0"):
            mean_minus_std_reward(x, -1.0)
        with pytest.raises(ValueError, match=r"rewards: expected \[members"):
            min_reward(x[:0])
        with pytest.raises(ValueError, match="models: expected a member"):
            RewardEnsemble([])
