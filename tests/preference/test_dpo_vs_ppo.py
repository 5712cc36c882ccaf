import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.dpo_vs_ppo import (
    dpo_optimal_policy,
    kl_optimal_policy,
    normalise_advantages,
    ppo_rlhf_loss,
    rlhf_advantages,
    token_rewards,
    update_reference,
)
from mlreviews.preference.ppo import gae, ppo_clip_loss, value_clip_loss

MASK = torch.tensor([[False, True, True, True, False], [True] * 5, [False, False, False, True, True], [False] * 5])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestAdvantages:
    def test_rewards_of_tokens(self) -> None:
        rewards, old, ref = _random(4), _random(4, 5, seed=1), _random(4, 5, seed=2)
        found = token_rewards(rewards, old, ref, MASK, beta=0.3)
        expected = -0.3 * (old - ref) * MASK
        for row, last in ((0, 3), (1, 4), (2, 4)):
            expected[row, last] += rewards[row]
        torch.testing.assert_close(found, expected)
        # Summed over an answer: its reward minus beta times its log-ratio.
        torch.testing.assert_close(found[0].sum(), rewards[0] - 0.3 * (old - ref)[0, 1:4].sum())

    def test_padding_on_either_side_never_matters(self) -> None:
        reward, values = (torch.where(MASK, _random(4, 5, seed=i), math.nan) for i in (1, 2))
        advantages, returns = rlhf_advantages(reward, values, MASK, lam=0.7, gamma=0.9, normalise=False)
        for row, part in ((0, slice(1, 4)), (1, slice(5)), (2, slice(3, 5))):
            done = torch.zeros_like(MASK[row : row + 1, part])
            done[:, -1] = True
            alone = gae(reward[row : row + 1, part], values[row : row + 1, part], done, gamma=0.9, lam=0.7)
            torch.testing.assert_close(advantages[row : row + 1, part], alone[0])
            torch.testing.assert_close(returns[row : row + 1, part], alone[1])
        assert (advantages[~MASK] == 0).all()
        assert (returns[~MASK] == 0).all()

    def test_default_discount_is_none_and_lambda_one_is_return_minus_value(self) -> None:
        reward, values = _random(4, 5), _random(4, 5, seed=1)
        advantages, returns = rlhf_advantages(reward, values, MASK, lam=1.0, normalise=False)
        torch.testing.assert_close(returns[1, 1], reward[1, 1:].sum())
        torch.testing.assert_close(advantages[0, 2], reward[0, 2:4].sum() - values[0, 2])

    def test_normalised_over_the_tokens_of_the_batch(self) -> None:
        raw = torch.where(MASK, 3 + 2 * _random(4, 5), math.nan)
        found = normalise_advantages(raw, MASK)
        assert abs(float(found[MASK].mean())) < 1e-12
        assert float(found[MASK].std(correction=0)) == pytest.approx(1, rel=1e-6)
        assert (found[~MASK] == 0).all()
        torch.testing.assert_close(found[MASK], (raw[MASK] - raw[MASK].mean()) / raw[MASK].std(correction=0))
        reward, values = _random(4, 5), _random(4, 5, seed=1)
        plain = rlhf_advantages(reward, values, MASK, normalise=False)
        torch.testing.assert_close(rlhf_advantages(reward, values, MASK)[0], normalise_advantages(plain[0], MASK))
        torch.testing.assert_close(rlhf_advantages(reward, values, MASK)[1], plain[1])
        assert (normalise_advantages(torch.full_like(raw, 0.5), MASK) == 0).all()
        assert normalise_advantages(raw[1:2], MASK[1:2] & (torch.arange(5) == 3)).tolist() == [[0.0] * 5]
        deviation = float(raw[MASK].std(correction=0))
        torch.testing.assert_close(normalise_advantages(raw, MASK, eps=2 * deviation), found / 3)

    def test_nothing_is_learnt_through_rewards_and_advantages(self) -> None:
        old, ref, values = (_random(4, 5, seed=i).requires_grad_() for i in range(3))
        reward = token_rewards(_random(4), old, ref, MASK, beta=0.3)
        assert not reward.requires_grad
        found = rlhf_advantages(reward, values, MASK)
        assert not any(x.requires_grad for x in found)
        for ours, wanted in zip(found, rlhf_advantages(reward, values, MASK, gamma=1.0, lam=0.95), strict=True):
            assert torch.equal(ours, wanted)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, holes = _random(4, 5), MASK.clone()
        holes[1, 2] = False
        with pytest.raises(ValueError, match="mask: expected the tokens of each answer to stand together"):
            token_rewards(_random(4), x, x, holes, beta=0.1)
        with pytest.raises(ValueError, match="rewards: expected one for each of 4 answers"):
            token_rewards(_random(3), x, x, MASK, beta=0.1)
        with pytest.raises(ValueError, match="beta: expected at least 0"):
            token_rewards(_random(4), x, x, MASK, beta=-0.1)
        with pytest.raises(ValueError, match="eps: expected at least 0"):
            normalise_advantages(x, MASK, eps=-1.0)
        with pytest.raises(ValueError, match="value_weight: expected at least 0"):
            ppo_rlhf_loss(x, x, x, x, x, x, MASK, value_weight=-1.0)


class TestLoss:
    def test_reduces_to_ppo_and_its_value_loss(self) -> None:
        logp, old, values, values_old, adv, ret = (_random(4, 5, seed=i).requires_grad_() for i in range(6))
        loss, stats = ppo_rlhf_loss(logp, old, values, values_old, adv, ret, MASK, value_weight=0.3)
        policy, fit = ppo_clip_loss(logp, old, adv, MASK), value_clip_loss(values, values_old, ret, MASK)
        torch.testing.assert_close(loss, policy.loss + 0.3 * fit)
        torch.testing.assert_close(stats["policy_loss"] + 0.3 * stats["value_loss"], loss.detach())
        assert torch.equal(stats["clip_fraction"], policy.stats["clip_fraction"])
        assert not any(x.requires_grad for x in stats.values())
        parts = [
            ppo_rlhf_loss(*(x[i] for x in (logp, old, values, values_old, adv, ret)), MASK[i], normaliser=10).loss
            for i in (slice(2), slice(2, 4))
        ]
        whole = ppo_rlhf_loss(logp, old, values, values_old, adv, ret, MASK).loss
        torch.testing.assert_close(whole, policy.loss + 0.5 * fit)
        for ours, theirs in zip(
            torch.autograd.grad(sum(parts), (logp, values)), torch.autograd.grad(whole, (logp, values)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


class TestReference:
    @pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
    def test_moving_average(self, decay: float) -> None:
        torch.manual_seed(0)
        policy, reference = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
        policy[1].num_batches_tracked += 7
        before = copy.deepcopy(reference.state_dict())
        update_reference(reference, policy, decay)
        for name, tensor in reference.state_dict().items():
            new = policy.state_dict()[name]
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, decay * before[name] + (1 - decay) * new)
            else:
                assert torch.equal(tensor, before[name] if decay == 1 else new)

    def test_tied_weights_move_once(self) -> None:
        policy, reference = (nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}) for _ in range(2))
        for model, value in ((policy, 8.0), (reference, 0.0)):
            model["b"].weight = model["a"].weight
            nn.init.constant_(model["a"].weight, value)
        update_reference(reference, policy, 0.75)
        assert reference["b"].weight is reference["a"].weight
        assert (reference["a"].weight == 2).all()

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="decay: expected a probability"):
            update_reference(nn.Linear(2, 2), nn.Linear(2, 2), 1.5)
        with pytest.raises(ValueError, match="policy: expected tensors of the reference's"):
            update_reference(nn.Linear(2, 2), nn.Linear(2, 3), 0.5)


class TestPolicies:
    REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def _loss(self, policy: Tensor, beta: float) -> float:
        p, r = policy.log()[:, None], self.REFERENCE.log()[:, None]
        return float(dpo_loss(p[0], p[1], r[0], r[1], beta=beta).losses)

    @pytest.mark.parametrize("loss", [0.5, 1e-3])
    def test_dpo_leaves_the_third_answer_open(self, loss: float) -> None:
        for outside in (0.0, 0.01, 0.98):
            policy = dpo_optimal_policy(self.REFERENCE, loss, outside, 2.0)
            assert policy[2] == outside
            assert float(policy.sum()) == pytest.approx(1)
            assert self._loss(policy, 2.0) == pytest.approx(loss)

    def test_kl_optimum_is_where_nothing_improves(self) -> None:
        reference, rewards, beta = _random(4).softmax(0), _random(4, seed=1), 0.4
        best = kl_optimal_policy(reference, rewards, beta)
        logits = best.log().requires_grad_()
        p = logits.softmax(0)
        (gradient,) = torch.autograd.grad((p * (rewards - beta * (p / reference).log())).sum(), logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))
        torch.testing.assert_close(kl_optimal_policy(reference, rewards + 3, beta), best)

    def test_reduces_to_dpo_with_the_reward_that_it_implies(self) -> None:
        policy = dpo_optimal_policy(self.REFERENCE, 0.1, 0.6, 0.5)
        implied = 0.5 * (policy / self.REFERENCE).log()
        torch.testing.assert_close(kl_optimal_policy(self.REFERENCE, implied, 0.5), policy)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for name, value in {"loss": 0.0, "outside": 1.0, "beta": 0.0}.items():
            with pytest.raises(ValueError, match=f"{name}: expected"):
                dpo_optimal_policy(self.REFERENCE, **{"loss": 0.1, "outside": 0.1, "beta": 0.1, name: value})
        with pytest.raises(ValueError, match="rewards: expected shape"):
            kl_optimal_policy(self.REFERENCE, self.REFERENCE[:2], 1.0)
        with pytest.raises(ValueError, match="beta: expected more than 0"):
            kl_optimal_policy(self.REFERENCE, self.REFERENCE, 0.0)
