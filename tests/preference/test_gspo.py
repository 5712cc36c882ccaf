import math

import pytest
import torch
from torch import Tensor

from mlreviews.preference.gspo import group_advantages, gspo_loss, gspo_token_loss, sequence_ratio
from mlreviews.preference.ppo import ppo_clip_loss


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


MASK = torch.tensor([[False, True, True, True, False], [True] * 5, [False, False, False, True, False]])
LENGTHS = torch.tensor([3, 5, 1])


class TestGroupAdvantages:
    def test_by_hand(self) -> None:
        found = group_advantages(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), 3, eps=0.0)
        torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
        found = group_advantages(torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0, 9.0]), 3, normalise_std=False)
        torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, -3.0, -3.0, 6.0]))
        for given, eps in (({"eps": 0.5}, 0.5), ({}, 1e-4)):
            found = group_advantages(torch.tensor([0.0, 2.0]), 2, **given)
            torch.testing.assert_close(found[1], torch.tensor(1 / (2**0.5 + eps)))

    @pytest.mark.parametrize("shift", [0.0, 1000.0, 2.0**20])
    def test_single_precision_keeps_its_digits(self, shift: float) -> None:
        rewards = torch.tensor([0.0] + [1.0] * 7) + shift  # mean squares minus squared means give -2000 here
        expected = torch.tensor([-7.0] + [1.0] * 7) / 8**0.5
        torch.testing.assert_close(group_advantages(rewards, 8, eps=0.0), expected)
        nearly = torch.tensor([0.0] + [0.95] * 7) + shift
        assert group_advantages(nearly, 8).abs().max() < 2.5

    @pytest.mark.parametrize("value", [0.1, 1e8, -0.7])
    def test_equal_rewards_give_exactly_nothing(self, value: float) -> None:
        assert torch.equal(group_advantages(torch.full((7,), value), 7, eps=0.0), torch.zeros(7))

    def test_sums_and_scale(self) -> None:
        rewards = _random(15).requires_grad_()
        found = group_advantages(rewards, 5, eps=0.0).view(3, 5)
        torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(found.std(1), torch.ones(3, dtype=torch.float64))
        assert not found.requires_grad

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="group_size: expected at least 2"):
            group_advantages(_random(4), 1)
        with pytest.raises(ValueError, match="group_size: expected a divisor"):
            group_advantages(_random(4), 3)
        with pytest.raises(ValueError, match="rewards: expected finite"):
            group_advantages(_random(4) / 0, 2)
        with pytest.raises(ValueError, match="eps: expected at least 0"):
            group_advantages(_random(4), 2, eps=-1.0)


class TestRatio:
    def test_geometric_mean_whatever_the_length(self) -> None:
        logp, old = _random(3, 5), _random(3, 5, seed=1)
        found = sequence_ratio(logp, old, MASK)
        for i in range(3):
            product = math.prod(((logp - old).exp()[i][MASK[i]]).tolist())
            assert float(found[i]) == pytest.approx(product ** (1 / int(LENGTHS[i])))
        given = old.clone().requires_grad_()
        assert not sequence_ratio(logp, given, MASK).requires_grad
        constant = sequence_ratio(old + math.log(1.3), old, MASK)
        torch.testing.assert_close(constant, torch.full((3,), 1.3, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_spread_falls_with_the_root_of_the_length(self, dtype: torch.dtype) -> None:
        noise = 0.1 * _random(4000, 64, dtype=dtype)
        for length in (1, 16, 64):
            mask = torch.arange(64).expand(4000, 64) < length
            spread = float(sequence_ratio(noise, torch.zeros_like(noise), mask).log().std())
            expected = 0.1 / length**0.5  # known to 1 / sqrt(2 n), about 1 %
            assert abs(spread / expected - 1) < 5 / math.sqrt(2 * 4000)

    def test_extremes_and_empty_answers(self) -> None:
        logp = torch.tensor([[-1e4, -1e4], [0.0, 0.0], [-3.0, 2.0]], requires_grad=True)
        old = torch.tensor([[0.0, 0.0], [-1e4, -1e4], [7.0, 1.0]])
        mask = torch.tensor([[True, True], [True, True], [False, False]])
        for sign in (-1.0, 1.0):
            loss = gspo_loss(logp, old, mask, torch.full((3,), sign)).loss
            assert loss.isfinite()
            assert _grad(loss, logp).isfinite().all()
        assert sequence_ratio(logp, old, mask)[2] == 1


class TestLoss:
    def test_on_policy_it_is_reinforce_with_equal_weight_of_an_answers_tokens(self) -> None:
        logp = _random(3, 5).requires_grad_()
        advantages = _random(3, seed=1)
        loss, stats = gspo_loss(logp, logp.detach().clone(), MASK, advantages)
        torch.testing.assert_close(loss, -advantages.mean())
        expected = torch.where(MASK, (-advantages / LENGTHS / 3)[:, None], 0.0)
        torch.testing.assert_close(_grad(loss, logp), expected)
        assert torch.equal(sequence_ratio(logp, logp, MASK), torch.ones(3, dtype=torch.float64))
        assert stats["clip_fraction"] == 0

    def test_group_advantages_on_policy_give_loss_zero(self) -> None:
        logp, advantages = _random(3, 5), group_advantages(_random(3, seed=1), 3)
        assert abs(float(gspo_loss(logp, logp, MASK, advantages).loss)) < 1e-12

    @pytest.mark.parametrize(
        ("log_ratio", "advantage", "ratio", "followed"),
        [
            (5e-4, 2.0, 1.0004, False),
            (3e-4, 2.0, math.exp(3e-4), True),
            (-4e-4, 2.0, math.exp(-4e-4), True),
            (-4e-4, -2.0, 0.9997, False),
            (5e-4, -2.0, math.exp(5e-4), True),
            (-2e-4, -2.0, math.exp(-2e-4), True),
        ],
    )
    def test_a_clipped_answer_has_no_gradient_at_any_token(
        self, log_ratio: float, advantage: float, ratio: float, followed: bool
    ) -> None:
        old = _random(1, 3)
        noise = torch.tensor([[0.2, -0.5, 0.3]], dtype=torch.float64)  # sums to zero: single tokens are far outside
        logp = (old + log_ratio + noise).requires_grad_()
        advantages = torch.tensor([advantage], dtype=torch.float64)
        mask = torch.ones(1, 3, dtype=torch.bool)
        loss, stats = gspo_loss(logp, old, mask, advantages)
        assert loss.item() == pytest.approx(-ratio * advantage, rel=1e-9)
        slope = -math.exp(log_ratio) * advantage / 3 if followed else 0.0
        torch.testing.assert_close(_grad(loss, logp), torch.full((1, 3), slope, dtype=torch.float64))
        assert stats["clip_fraction"] == (0 if followed else 1)
        by_token, token_stats = gspo_token_loss(logp, old, mask, advantages[:, None].expand(1, 3))
        torch.testing.assert_close(by_token, loss)
        torch.testing.assert_close(_grad(by_token, logp), _grad(loss, logp))
        assert token_stats["clip_fraction"] == stats["clip_fraction"]

    def test_token_variant_is_the_same_with_equal_advantages_and_follows_those_of_tokens(self) -> None:
        logp, old, advantages = _random(3, 5).requires_grad_(), _random(3, 5, seed=1), _random(3, seed=2)
        for clips in ({}, {"clip_low": 0.5, "clip_high": 0.3}):
            one = gspo_loss(logp, old, MASK, advantages, **clips)
            other = gspo_token_loss(logp, old, MASK, advantages[:, None].expand(3, 5), **clips)
            torch.testing.assert_close(other.loss, one.loss)
            torch.testing.assert_close(_grad(other.loss, logp), _grad(one.loss, logp))
        tokens = _random(3, 5, seed=3)
        found = _grad(gspo_token_loss(logp, old, MASK, tokens, clip_low=1e9, clip_high=1e9).loss, logp)
        weight = (sequence_ratio(logp, old, MASK) / LENGTHS / 3).detach()
        torch.testing.assert_close(found, torch.where(MASK, -weight[:, None] * tokens, 0.0))

    def test_reduces_to_ppo_for_answers_of_one_token(self) -> None:
        logp, old, advantages = _random(7, 1).requires_grad_(), _random(7, 1, seed=1), _random(7, seed=2)
        mask = torch.ones(7, 1, dtype=torch.bool)
        ours = gspo_loss(logp, old, mask, advantages, clip_low=0.2, clip_high=0.2)
        theirs = ppo_clip_loss(logp, old, advantages[:, None], mask)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(_grad(ours.loss, logp), _grad(theirs.loss, logp))
        assert all(torch.equal(ours.stats[name], theirs.stats[name]) for name in theirs.stats)

    @pytest.mark.parametrize("token", [False, True])
    def test_padding_and_masked_rows_change_nothing_and_micro_batches_add_up(self, token: bool) -> None:
        loss = gspo_token_loss if token else gspo_loss
        logp, old = _random(3, 5).requires_grad_(), _random(3, 5, seed=1)
        advantages = _random(3, 5, seed=2) if token else _random(3, seed=2)
        whole = loss(logp, old, MASK, advantages).loss
        pad = torch.nn.functional.pad
        wide = [pad(x, (1, 2, 0, 2), value=math.nan) for x in (logp, old)]
        rows = pad(advantages, (1, 2, 0, 2) if token else (0, 2), value=3.0)
        torch.testing.assert_close(loss(*wide, pad(MASK, (1, 2, 0, 2)), rows).loss, whole)
        parts = sum(loss(logp[i], old[i], MASK[i], advantages[i], normaliser=3).loss for i in (slice(1), slice(1, 3)))
        torch.testing.assert_close(_grad(parts, logp), _grad(whole, logp))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, a, mask = _random(2, 3), _random(2), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"logp_old: expected \(2, 3\)"):
            gspo_loss(x, x[:, :1], mask, a)
        with pytest.raises(ValueError, match="mask: expected a boolean"):
            gspo_loss(x, x, mask.long(), a)
        with pytest.raises(ValueError, match="advantages: expected one for each of 2 answers, got 3"):
            gspo_loss(x, x, mask, _random(3))
        with pytest.raises(ValueError, match=r"advantages: expected \[batch\]"):
            gspo_loss(x, x, mask, x)
        with pytest.raises(ValueError, match=r"advantages: expected \(2, 3\)"):
            gspo_token_loss(x, x, mask, a)
        with pytest.raises(ValueError, match="clip: expected more than 0"):
            gspo_loss(x, x, mask, a, clip_high=0.0)
        with pytest.raises(ValueError, match="normaliser: expected more than 0"):
            gspo_loss(x, x, mask, a, normaliser=-1)
