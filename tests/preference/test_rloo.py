import itertools

import pytest
import torch
from torch import Tensor

from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.rloo import (
    RunningBaseline,
    kl_shaped_rewards,
    raft_loss,
    reinforce_loss,
    rloo_advantages,
    rloo_clip_loss,
    rloo_loss,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


LOGITS = torch.tensor([0.4, -0.3, 1.0], dtype=torch.float64)
REWARDS = torch.tensor([2.0, 3.5, 3.0], dtype=torch.float64)


def _moments(k: int, estimate: str) -> tuple[Tensor, Tensor]:
    """Mean and total variance of a gradient estimate from k draws, over all outcomes of a bandit with three arms."""
    logits = LOGITS.clone().requires_grad_()
    probabilities = logits.detach().softmax(0)
    mean, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=k):
        index = torch.tensor(arms)
        logps, rewards = logits.log_softmax(0)[index], REWARDS[index]
        if estimate == "rloo":
            loss = rloo_loss(logps, rewards, k).loss
        elif estimate == "clip":
            loss = rloo_clip_loss(logps, logps.detach(), rewards, k).loss
        else:
            loss = reinforce_loss(logps, rewards).loss
        gradient, weight = -_grad(loss, logits), probabilities[index].prod()
        mean, second = mean + weight * gradient, second + weight * gradient**2
    return mean, (second - mean**2).sum()


class TestAdvantages:
    def test_two_answers_are_compared_with_each_other(self) -> None:
        found = rloo_advantages(torch.tensor([3.0, 1.0, 0.5, 4.5]), 2)
        assert torch.equal(found, torch.tensor([2.0, -2.0, -4.0, 4.0]))

    @pytest.mark.parametrize("k", [2, 3, 5])
    def test_baseline_is_the_mean_of_the_others(self, k: int) -> None:
        rewards = _random(3 * k)
        found = rloo_advantages(rewards, k).view(3, k)
        groups = rewards.view(3, k)
        for g, i in itertools.product(range(3), range(k)):
            others = [float(groups[g, j]) for j in range(k) if j != i]
            assert float(found[g, i]) == pytest.approx(float(groups[g, i]) - sum(others) / (k - 1))
        torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64))
        shift = _random(3, seed=1).repeat_interleave(k)
        torch.testing.assert_close(rloo_advantages(rewards + shift, k), found.flatten())

    def test_large_rewards_keep_their_differences(self) -> None:
        rewards = 2.0**20 + torch.tensor([0.0, 0.25, 0.5, 0.75])
        torch.testing.assert_close(rloo_advantages(rewards, 4), torch.tensor([-0.5, -1 / 6, 1 / 6, 0.5]))
        assert torch.equal(rloo_advantages(torch.full((3,), 0.1), 3), torch.zeros(3))

    def test_reduces_to_group_advantages_with_their_scale(self) -> None:
        rewards = _random(12)
        spread = rewards.view(3, 4).std(1).repeat_interleave(4)
        expected = group_advantages(rewards, 4, eps=0.0)
        torch.testing.assert_close(rloo_advantages(rewards, 4) * 3 / 4 / spread, expected)


class TestGradient:
    @pytest.mark.parametrize(("k", "estimate"), [(2, "rloo"), (3, "rloo"), (4, "rloo"), (3, "clip"), (2, "reinforce")])
    def test_expectation_is_the_exact_policy_gradient(self, k: int, estimate: str) -> None:
        logits = LOGITS.clone().requires_grad_()
        exact = _grad((logits.softmax(0) * REWARDS).sum(), logits)
        torch.testing.assert_close(_moments(k, estimate)[0], exact)

    def test_variance_is_below_that_without_a_baseline(self) -> None:
        assert _moments(3, "rloo")[1] < 0.5 * _moments(3, "reinforce")[1]

    def test_clip_acts_on_whole_answers(self) -> None:
        old = _random(4).requires_grad_()
        logps = (old.detach() + torch.tensor([0.1, 0.3, -0.3, -0.1], dtype=torch.float64)).requires_grad_()
        rewards = torch.tensor([1.0, 2.0, -5.0, 0.0], dtype=torch.float64)
        loss, stats = rloo_clip_loss(logps, old, rewards, 2)
        ratios = torch.tensor([0.1, 0.3, -0.3, -0.1], dtype=torch.float64).exp()
        objective = -1 * ratios[0] + 1 * 1.2 + -5 * 0.8 + 5 * ratios[3]
        torch.testing.assert_close(loss, -objective / 4)
        expected = torch.stack([ratios[0], 0 * ratios[1], 0 * ratios[2], -5 * ratios[3]]) / 4
        torch.testing.assert_close(_grad(loss, logps), expected)
        assert stats["clip_fraction"] == 0.5
        wider = rloo_clip_loss(logps, old, rewards, 2, clip=1.0, normaliser=8.0).loss
        objective = -ratios[0] + ratios[1] - 5 * ratios[2] + 5 * ratios[3]
        torch.testing.assert_close(wider, -objective / 8)

    def test_micro_batches_with_a_common_normaliser_are_the_one_batch(self) -> None:
        rewards = _random(6, seed=1)
        for loss in (lambda p, r, **n: rloo_loss(p, r, 2, **n), reinforce_loss):
            logps = _random(6).requires_grad_()
            parts = loss(logps[:4], rewards[:4], normaliser=6).loss + loss(logps[4:], rewards[4:], normaliser=6).loss
            torch.testing.assert_close(_grad(parts, logps), _grad(loss(logps, rewards).loss, logps))

    def test_reduces_to_maximum_likelihood(self) -> None:
        logps = _random(5).requires_grad_()
        torch.testing.assert_close(reinforce_loss(logps, torch.ones_like(logps)).loss, -logps.mean())

    def test_rewards_have_no_gradient_and_statistics_are_there(self) -> None:
        logps, rewards = _random(4).requires_grad_(), torch.tensor([1.0, 2.0, 4.0, 0.0]).double().requires_grad_()
        loss, stats = rloo_loss(logps, rewards, 2)
        for total in (loss, reinforce_loss(logps, rewards).loss):
            assert torch.autograd.grad(total, rewards, allow_unused=True, retain_graph=True)[0] is None
        assert stats["baseline_gap"] == 2.5
        assert reinforce_loss(logps, rewards, 1.5).stats["baseline_gap"] == 1.25
        torch.testing.assert_close(_grad(reinforce_loss(logps, rewards, 1.5).loss, logps), (1.5 - rewards).detach() / 4)


class TestAround:
    def test_divergence_lowers_the_reward(self) -> None:
        rewards, logps, ref = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0])
        found = kl_shaped_rewards(rewards, logps.requires_grad_(), ref, beta=0.1)
        torch.testing.assert_close(found, torch.tensor([0.9, 2.3]))
        assert not found.requires_grad

    def test_running_baseline(self) -> None:
        baseline, rewards = RunningBaseline(), 100 + _random(7)
        for part in rewards.split([3, 1, 3]):
            baseline = baseline.update(part)
        assert baseline.count == 7
        assert baseline.mean == pytest.approx(float(rewards.mean()))

    def test_raft_learns_the_best_of_each_group(self) -> None:
        logps = _random(6).requires_grad_()
        loss, stats = raft_loss(logps, torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, -1.0]).double(), 3)
        torch.testing.assert_close(loss, -(logps[1] + logps[3]) / 2)
        assert stats["best_reward"] == 4
        torch.testing.assert_close(raft_loss(logps, logps.detach(), 3, normaliser=4.0).loss, raft_loss(
            logps, logps.detach(), 3).loss / 2)  # fmt: skip
        torch.testing.assert_close(raft_loss(logps, _random(6, seed=1), 1).loss, -logps.mean())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(6)
        with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
            rloo_advantages(x, 1)
        with pytest.raises(ValueError, match="group_size: expected a divisor of the batch of 6, got 4"):
            rloo_loss(x, x, 4)
        with pytest.raises(ValueError, match="rewards: expected finite"):
            raft_loss(x, x / 0, 2)
        with pytest.raises(ValueError, match="group_size: expected a divisor"):
            raft_loss(x, x, 4)
        with pytest.raises(ValueError, match=r"rewards: expected shape \(6,\)"):
            reinforce_loss(x, x[:1])
        with pytest.raises(ValueError, match="baseline: expected a finite number"):
            reinforce_loss(x, x, float("nan"))
        with pytest.raises(ValueError, match="normaliser: expected more than 0"):
            rloo_loss(x, x, 2, normaliser=0)
        with pytest.raises(ValueError, match="clip: expected more than 0"):
            rloo_clip_loss(x, x, x, 2, clip=-0.1)
        with pytest.raises(ValueError, match="beta: expected at least 0"):
            kl_shaped_rewards(x, x, x, beta=-1.0)
        with pytest.raises(ValueError, match="rewards: expected"):
            RunningBaseline().update(x[:0])
