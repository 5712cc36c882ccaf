import math

import pytest
import torch
from torch import Tensor

from mlreviews.preference.ppo import (
    adapt_kl_coefficient,
    categorical_kl,
    clipped_surrogate,
    entropy_bonus,
    gae,
    policy_stats,
    ppo_clip_loss,
    ppo_kl_loss,
    value_clip_loss,
    value_loss,
)

NAN = math.nan


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


MASK = torch.tensor([[False, True, True, True], [True, True, False, False], [False, False, False, True]])


class TestGae:
    def test_two_steps_by_hand(self) -> None:
        # delta = (1 + 0.5 * 4 - 3, 2 + 0.5 * 8 - 4) = (0, 2); A_1 = 0 + 0.5 * 0.25 * 2
        done = torch.tensor([[False, False]])
        advantages, returns = gae(_row(1, 2), _row(3, 4), done, last_value=_row(8)[0], gamma=0.5, lam=0.25)
        torch.testing.assert_close(advantages, _row(0.25, 2))
        torch.testing.assert_close(returns, _row(3.25, 6))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_against_the_sum_over_later_errors(self, dtype: torch.dtype) -> None:
        rewards, values, last = (_random(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 7), (3, 7), (3,)]))
        dones = _random(3, 7, seed=4) > 1
        assert dones.any()
        advantages, returns = gae(rewards.mT.contiguous().mT, values, dones, last_value=last, gamma=0.9, lam=0.7)
        for b in range(3):
            for t in range(7):
                total, weight = 0.0, 1.0
                for s in range(t, 7):
                    ended = bool(dones[b, s])
                    after = 0.0 if ended else float(values[b, s + 1] if s < 6 else last[b])
                    total += weight * (float(rewards[b, s]) + 0.9 * after - float(values[b, s]))
                    weight *= 0.9 * 0.7
                    if ended:
                        break
                assert float(advantages[b, t]) == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(returns, advantages + values)
        assert advantages.dtype == dtype

    def test_lambda_one_is_return_minus_value_and_zero_the_one_step_error(self) -> None:
        rewards, values = _random(2, 5), _random(2, 5, seed=1).requires_grad_()
        dones = torch.zeros(2, 5, dtype=torch.bool)
        dones[:, -1] = True
        advantages, returns = gae(rewards, values, dones, gamma=0.8, lam=1.0)
        discounted = sum(0.8**k * rewards[:, 2 + k] for k in range(3))
        torch.testing.assert_close(returns[:, 2], discounted)
        assert not advantages.requires_grad
        advantages, _ = gae(rewards, values, dones, gamma=0.8, lam=0.0)
        torch.testing.assert_close(advantages[:, 1], rewards[:, 1] + 0.8 * values[:, 2] - values[:, 1])

    def test_nothing_leaks_from_behind_the_end(self) -> None:
        rewards, values = _random(1, 6), _random(1, 6, seed=1)
        dones = torch.tensor([[False, False, True, False, False, False]])
        whole = gae(rewards, values, dones, last_value=torch.full((1,), 5.0, dtype=torch.float64))
        part = gae(rewards[:, :3], values[:, :3], dones[:, :3])
        torch.testing.assert_close(whole[0][:, :3], part[0])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, dones = _random(2, 3), torch.zeros(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="dones: expected a boolean"):
            gae(x, x, dones.double())
        with pytest.raises(ValueError, match=r"values: expected \(2, 3\), as dones has"):
            gae(x, x[:, :2], dones)
        with pytest.raises(ValueError, match="rewards: expected finite"):
            gae(x / 0, x, dones)
        with pytest.raises(ValueError, match="gamma: expected a probability"):
            gae(x, x, dones, gamma=1.1)
        with pytest.raises(ValueError, match="lam: expected a probability"):
            gae(x, x, dones, lam=-0.1)
        with pytest.raises(ValueError, match=r"last_value: expected shape \(2,\)"):
            gae(x, x, dones, last_value=x[0])


class TestClip:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "value", "slope"),
        [
            (1.1, 2.0, 2.2, 2.0),
            (1.3, 2.0, 2.4, 0.0),  # gained enough
            (0.6, 2.0, 1.2, 2.0),  # lost: always followed back
            (0.9, -2.0, -1.8, -2.0),
            (0.6, -2.0, -1.4, 0.0),
            (1.5, -2.0, -3.0, -2.0),
        ],
    )
    def test_surrogate_and_slope_in_every_region(
        self, ratio: float, advantage: float, value: float, slope: float
    ) -> None:
        rho = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        objective = clipped_surrogate(rho, torch.tensor(advantage, dtype=torch.float64), 0.3, 0.2)
        assert objective.item() == pytest.approx(value)
        assert _grad(objective, rho).item() == slope

    def test_on_policy_it_is_the_policy_gradient_and_the_ratio_exactly_one(self) -> None:
        logits = _random(3, 4, 5).requires_grad_()
        actions = torch.arange(12).view(3, 4, 1) % 5
        logp = (logits / 0.7).log_softmax(-1).gather(-1, actions)[..., 0]  # drawn at a temperature of 0.7
        advantages = _random(3, 4, seed=2)
        loss, stats = ppo_clip_loss(logp, logp.detach().clone(), advantages, MASK)
        assert loss.item() == pytest.approx(-float(advantages[MASK].mean()))
        expected = _grad(-(advantages * logp)[MASK].mean(), logits)
        torch.testing.assert_close(_grad(loss, logits), expected)
        assert stats["clip_fraction"] == 0
        assert stats["approx_kl"] == 0
        old = logp.detach().clone().requires_grad_()
        assert not ppo_clip_loss(logp.detach(), old, advantages, MASK).loss.requires_grad

    def test_reduces_to_importance_weights_without_a_clip(self) -> None:
        logp, old, advantages = (_random(3, 4, seed=i) for i in range(3))
        logp = logp.requires_grad_()
        loss = ppo_clip_loss(logp, old, advantages, MASK, clip=math.inf).loss
        expected = -((logp - old).exp() * advantages)[MASK].mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(_grad(loss, logp), _grad(expected, logp))

    def test_statistics(self) -> None:
        ratio, advantages = _row(1.3, 1.3, 0.7, 0.7, 1.1, 5.0), _row(1, -1, -1, 1, 1, 1)
        mask = torch.tensor([[True] * 5 + [False]])
        stats = ppo_clip_loss(ratio.log().requires_grad_(), torch.zeros_like(ratio), advantages, mask).stats
        assert stats["clip_fraction"].item() == pytest.approx(2 / 5)
        terms = [1.3 - 1 - math.log(1.3)] * 2 + [0.7 - 1 - math.log(0.7)] * 2 + [1.1 - 1 - math.log(1.1)]
        assert stats["approx_kl"].item() == pytest.approx(sum(terms) / 5)
        assert not any(s.requires_grad for s in stats.values())
        # At the edge of the range, and where there is no advantage, the clip takes no gradient away.
        edge = policy_stats(
            _row(1.25, 0.75, 1.5, 0.5), _row(1, -1, 0, 0), torch.ones(1, 4, dtype=torch.bool), 0.25, 0.25
        )
        assert edge["clip_fraction"] == 0

    def test_what_is_masked_never_matters(self) -> None:
        logp, old, advantages = (torch.where(MASK, _random(3, 4, seed=i), NAN) for i in range(3))
        logp = logp.requires_grad_()
        loss, stats = ppo_clip_loss(logp, old, advantages, MASK)
        gradient = _grad(loss, logp)
        assert torch.equal(gradient == 0, ~MASK | (gradient == 0))
        assert gradient.isfinite().all()
        padded = [torch.nn.functional.pad(x, (2, 0, 0, 1), value=NAN) for x in (logp, old, advantages)]
        again = ppo_clip_loss(*padded, torch.nn.functional.pad(MASK, (2, 0, 0, 1)))
        torch.testing.assert_close(again.loss, loss)
        assert all(torch.equal(again.stats[name], stats[name]) for name in stats)

    def test_micro_batches_with_a_common_normaliser_are_the_one_batch(self) -> None:
        logp, old, advantages = (_random(3, 4, seed=i) for i in range(3))
        logp = logp.requires_grad_()
        whole = _grad(ppo_clip_loss(logp, old, advantages, MASK).loss, logp)
        count = float(MASK.sum())
        parts = [
            ppo_clip_loss(logp[i], old[i], advantages[i], MASK[i], normaliser=count).loss
            for i in (slice(1), slice(1, 3))
        ]
        torch.testing.assert_close(_grad(sum(parts), logp), whole)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extremes_are_finite(self, dtype: torch.dtype) -> None:
        logp = torch.tensor([[-1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
        old = torch.tensor([[0.0, -1e4, -1e4]], dtype=dtype)
        for sign in (-1.0, 1.0):
            mask = torch.ones(1, 3, dtype=torch.bool)
            loss, stats = ppo_clip_loss(logp, old, torch.full((1, 3), sign, dtype=dtype), mask)
            assert loss.isfinite()
            assert _grad(loss, logp).isfinite().all()
            assert all(s.isfinite() for s in stats.values())

    def test_no_tokens_at_all(self) -> None:
        logp = _random(2, 3).requires_grad_()
        loss = ppo_clip_loss(logp, logp.detach(), _random(2, 3), torch.zeros(2, 3, dtype=torch.bool)).loss
        assert loss == 0
        assert torch.equal(_grad(loss, logp), torch.zeros(2, 3, dtype=torch.float64))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, mask = _random(2, 3), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"logp_old: expected \(2, 3\), as mask has"):
            ppo_clip_loss(x, x[:1], x, mask)
        with pytest.raises(ValueError, match="mask: expected a boolean"):
            ppo_clip_loss(x, x, x, mask.long())
        with pytest.raises(ValueError, match="clip: expected more than 0"):
            ppo_clip_loss(x, x, x, mask, clip=0.0)
        with pytest.raises(ValueError, match="normaliser: expected more than 0"):
            ppo_clip_loss(x, x, x, mask, normaliser=0)
        with pytest.raises(ValueError, match="advantages: expected finite"):
            ppo_clip_loss(x, x, x / 0, mask)
        with pytest.raises(ValueError, match=r"advantages: expected shape \(2, 3\)"):
            clipped_surrogate(x, x[0], 0.2, 0.2)
        with pytest.raises(ValueError, match="beta: expected at least 0"):
            ppo_kl_loss(x, x, x, x, mask, beta=-1.0)
        with pytest.raises(ValueError, match="target: expected more than 0"):
            adapt_kl_coefficient(1.0, 0.1, 0.0)
        with pytest.raises(ValueError, match="logits: expected"):
            categorical_kl(x, x[:1])


class TestOtherTerms:
    def test_kl_penalty(self) -> None:
        logits, old = _random(3, 4, 5).requires_grad_(), _random(3, 4, 5, seed=1)
        kl = categorical_kl(old, logits)
        reference = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=logits)
        )
        torch.testing.assert_close(kl, reference)
        logp, logp_old = logits.log_softmax(-1)[..., 2], old.log_softmax(-1)[..., 2]
        advantages = _random(3, 4, seed=2)
        loss, stats = ppo_kl_loss(logp, logp_old, advantages, kl, MASK, beta=0.3)
        expected = -((logp - logp_old).exp() * advantages)[MASK].mean() + 0.3 * reference[MASK].mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(_grad(loss, logits), _grad(expected, logits))
        torch.testing.assert_close(stats["kl"], reference[MASK].mean().detach())
        assert not stats["kl"].requires_grad
        half = ppo_kl_loss(logp, logp_old, advantages, kl, MASK, beta=0.3, normaliser=2 * float(MASK.sum())).loss
        torch.testing.assert_close(half, loss / 2)

    @pytest.mark.parametrize(("kl", "expected"), [(0.019, 1.5), (0.0201, 3.0), (0.044, 3.0), (0.0451, 6.0)])
    def test_coefficient_follows_the_target(self, kl: float, expected: float) -> None:
        assert adapt_kl_coefficient(3.0, kl, 0.03) == expected

    def test_coefficient_stays_at_the_edges(self) -> None:
        assert [adapt_kl_coefficient(1.0, kl, 3.0) for kl in (2.0, 4.5)] == [1.0, 1.0]

    def test_entropy(self) -> None:
        logits = _random(3, 4, 5).requires_grad_()
        expected = torch.distributions.Categorical(logits=logits).entropy()[MASK].mean()
        torch.testing.assert_close(entropy_bonus(logits, MASK), expected)
        torch.testing.assert_close(entropy_bonus(logits, MASK, normaliser=3.0), expected * MASK.sum() / 3)

    def test_value_losses(self) -> None:
        values, returns = _random(3, 4).requires_grad_(), _random(3, 4, seed=1)
        plain = value_loss(values, returns, MASK)
        torch.testing.assert_close(plain, torch.nn.functional.mse_loss(values[MASK], returns[MASK]) / 2)
        torch.testing.assert_close(value_clip_loss(values, returns, returns, MASK, clip=1e9), plain)
        old = returns.clone().requires_grad_()
        assert not value_clip_loss(values.detach(), old, returns, MASK).requires_grad
        torch.testing.assert_close(value_loss(values, returns, MASK, normaliser=2.0), plain * MASK.sum() / 2)

    @pytest.mark.parametrize(
        ("value", "loss", "slope"), [(0.1, 0.405, -0.9), (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (2.5, 1.125, 1.5)]
    )
    def test_value_clip(self, value: float, loss: float, slope: float) -> None:
        v = _row(value).requires_grad_()  # the old value is 0, the return 1
        found = value_clip_loss(v, _row(0), _row(1), torch.ones(1, 1, dtype=torch.bool))
        assert found.item() == pytest.approx(loss)
        assert _grad(found, v).item() == pytest.approx(slope)
