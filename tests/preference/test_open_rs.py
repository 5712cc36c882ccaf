import math

import pytest
import torch
from torch import Tensor

from mlreviews.preference.gspo import group_advantages, gspo_loss
from mlreviews.preference.open_rs import cosine_length_reward, dr_grpo_loss, grpo_loss, reference_kl
from mlreviews.preference.ppo import ppo_clip_loss
from mlreviews.preference.rloo import rloo_loss


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


MASK = torch.tensor([[False, True, True, True, False], [True] * 5, [False, False, False, True, False]])
LENGTHS = torch.tensor([3.0, 5.0, 1.0], dtype=torch.float64)


class TestCosineReward:
    def test_by_hand(self) -> None:
        lengths = torch.tensor([0, 25, 50, 100, 300])
        found = cosine_length_reward(torch.ones(5, dtype=torch.bool), lengths, 100)
        quarter = 0.5 + 0.25 * (1 + math.sqrt(0.5))
        torch.testing.assert_close(found, torch.tensor([1.0, quarter, 0.75, 0.5, 0.5]))
        found = cosine_length_reward(torch.zeros(5, dtype=torch.bool), lengths, 100)
        torch.testing.assert_close(
            found, torch.tensor([-1.0, 0.5 - 1 - 0.25 * (1 + math.sqrt(0.5)), -0.75, -0.5, -0.5])
        )

    def test_short_is_best_if_correct_and_worst_if_wrong_but_correct_always_wins(self) -> None:
        lengths = torch.arange(61)
        good = cosine_length_reward(torch.ones(61, dtype=torch.bool), lengths, 60)
        bad = cosine_length_reward(torch.zeros(61, dtype=torch.bool), lengths, 60)
        assert (good.diff() < 0).all()
        assert (bad.diff() > 0).all()
        assert good.min() > bad.max()
        mixed = cosine_length_reward(torch.tensor([True, False]), torch.tensor([0, 9]), 9, correct=(3, 2), wrong=(1, 0))
        assert mixed.tolist() == [3, 0]

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        correct, lengths = torch.ones(2, dtype=torch.bool), torch.tensor([1, 2])
        with pytest.raises(ValueError, match="max_length: expected at least 1"):
            cosine_length_reward(correct, lengths, 0)
        with pytest.raises(TypeError, match="is_correct: expected bool"):
            cosine_length_reward(correct.float(), lengths, 3)
        with pytest.raises(ValueError, match=r"expected the same \[batch\]"):
            cosine_length_reward(correct, lengths[:1], 3)
        with pytest.raises(ValueError, match="lengths: expected at least 0, got -1"):
            cosine_length_reward(correct, -lengths + 1, 3)
        with pytest.raises(ValueError, match="wrong: expected a finite number"):
            cosine_length_reward(correct, lengths, 3, wrong=(math.nan, 0.0))


class TestLosses:
    def test_at_the_old_and_reference_policy_it_is_reinforce(self) -> None:
        logp, advantages = _random(3, 5).requires_grad_(), _random(3, seed=1)
        same = logp.detach().clone()
        loss, stats = grpo_loss(logp, same, MASK, advantages, logp_ref=same)
        torch.testing.assert_close(loss, -advantages.mean())
        torch.testing.assert_close(_grad(loss, logp), torch.where(MASK, (-advantages / LENGTHS / 3)[:, None], 0.0))
        assert stats["reference_kl"] == 0
        assert stats["clip_fraction"] == 0
        equal = group_advantages(_random(3, seed=2), 3)
        assert grpo_loss(logp, same, MASK, equal, logp_ref=same).loss.abs() < 1e-12

    def test_dr_grpo_gives_all_tokens_one_weight(self) -> None:
        logp, advantages = _random(3, 5).requires_grad_(), _random(3, seed=1)
        same = logp.detach().clone()
        loss = dr_grpo_loss(logp, same, MASK, advantages, max_length=7, logp_ref=same).loss
        torch.testing.assert_close(loss, -(advantages * LENGTHS).sum() / 21)
        torch.testing.assert_close(_grad(loss, logp), torch.where(MASK, (-advantages / 21)[:, None], 0.0))

    def test_off_policy_it_is_the_clipped_loss_of_every_answer(self) -> None:
        logp, old, advantages = _random(3, 5).requires_grad_(), _random(3, 5, seed=1), _random(3, seed=2)
        rows = advantages[:, None].expand(3, 5)
        per_row = [
            ppo_clip_loss(logp[i : i + 1], old[i : i + 1], rows[i : i + 1], MASK[i : i + 1]).loss for i in range(3)
        ]
        torch.testing.assert_close(grpo_loss(logp, old, MASK, advantages).loss, sum(per_row) / 3)
        far = old + torch.tensor([[3.0], [-3.0], [3.0]], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)  # beyond both ends of the range
        at_ends = -(1.2 - 0.8 + 1.2) / 3
        torch.testing.assert_close(grpo_loss(far, old, MASK, signs).loss, torch.tensor(at_ends, dtype=torch.float64))
        weighted = sum(n * loss for n, loss in zip(LENGTHS, per_row, strict=True))
        torch.testing.assert_close(dr_grpo_loss(logp, old, MASK, advantages, max_length=5).loss, weighted / 15)
        stats = grpo_loss(logp, old, MASK, advantages, clip_low=0.1, clip_high=0.3).stats
        ratio = (logp - old).exp()
        clipped = torch.where(rows > 0, ratio > 1.3, ratio < 0.9)[MASK]
        torch.testing.assert_close(stats["clip_fraction"], clipped.double().mean())
        assert "reference_kl" not in stats

    def test_divergence_from_the_reference(self) -> None:
        logp, ref = _random(3, 5).requires_grad_(), _random(3, 5, seed=1)
        found = reference_kl(logp, ref, MASK)
        torch.testing.assert_close(found[MASK], ((ref - logp).exp() - (ref - logp) - 1)[MASK])
        assert (found >= 0).all()
        assert (found[~MASK] == 0).all()
        # Under the policy its mean is the divergence itself.
        p, q = _random(6).log_softmax(0), _random(6, seed=1).log_softmax(0)
        mean = (p.exp() * reference_kl(p[None], q[None], torch.ones(1, 6, dtype=torch.bool))[0]).sum()
        torch.testing.assert_close(mean, (p.exp() * (p - q)).sum())
        for loss, weights in (
            (grpo_loss, 1 / LENGTHS / 3),
            (lambda *a, **k: dr_grpo_loss(*a, max_length=4, **k), 1 / 12),
        ):
            a = torch.zeros(3, dtype=torch.float64)
            total, stats = loss(logp, logp.detach(), MASK, a, logp_ref=ref, beta=0.3)
            torch.testing.assert_close(total, 0.3 * (found * MASK).sum(1).mul(weights).sum())
            torch.testing.assert_close(loss(logp, logp.detach(), MASK, a, logp_ref=ref).loss, total * 0.04 / 0.3)
            torch.testing.assert_close(stats["reference_kl"], found[MASK].mean().detach())
            assert not stats["reference_kl"].requires_grad

    def test_reduces_to_gspo_for_answers_of_one_token(self) -> None:
        logp, old, advantages = _random(7, 1).requires_grad_(), _random(7, 1, seed=1), _random(7, seed=2)
        mask = torch.ones(7, 1, dtype=torch.bool)
        clips = {"clip_low": 0.2, "clip_high": 0.3}
        ours, theirs = grpo_loss(logp, old, mask, advantages, **clips), gspo_loss(logp, old, mask, advantages, **clips)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(_grad(ours.loss, logp), _grad(theirs.loss, logp))

    def test_reduces_to_rloo_times_a_constant(self) -> None:
        logp, rewards = _random(3, 5).requires_grad_(), _random(3, seed=1)
        plain = group_advantages(rewards, 3, normalise_std=False)
        dr = dr_grpo_loss(logp, logp.detach(), MASK, plain, max_length=9).loss
        rloo = rloo_loss((logp * MASK).sum(1), rewards, 3).loss
        torch.testing.assert_close(_grad(dr, logp), _grad(rloo, logp) * (2 / 3) / 9)

    @pytest.mark.parametrize("loss", [grpo_loss, lambda *a, **k: dr_grpo_loss(*a, max_length=6, **k)])
    def test_masked_rows_change_nothing_and_micro_batches_add_up(self, loss) -> None:  # type: ignore[no-untyped-def]
        logp, old, ref, a = _random(3, 5).requires_grad_(), _random(3, 5, seed=1), _random(3, 5, seed=2), _random(3)
        whole = loss(logp, old, MASK, a, logp_ref=ref).loss
        pad = torch.nn.functional.pad
        wide = [pad(x, (1, 2, 0, 2), value=math.nan) for x in (logp, old, ref)]
        again = loss(wide[0], wide[1], pad(MASK, (1, 2, 0, 2)), pad(a, (0, 2), value=9.0), logp_ref=wide[2]).loss
        torch.testing.assert_close(again, whole)
        assert _grad(again, logp).isfinite().all()
        parts = [
            loss(logp[i], old[i], MASK[i], a[i], logp_ref=ref[i], normaliser=3).loss for i in (slice(2), slice(2, 3))
        ]
        torch.testing.assert_close(_grad(sum(parts), logp), _grad(whole, logp))

    def test_no_tokens_and_extremes(self) -> None:
        logp = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
        old = torch.tensor([[0.0, -1e4], [0.0, 0.0]])
        for mask in (torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)):
            up = grpo_loss(logp, old, mask, torch.tensor([1.0, -1.0]), logp_ref=old).loss
            down = dr_grpo_loss(logp, old, mask, torch.tensor([-1.0, 1.0]), max_length=2, logp_ref=old).loss
            for total in (up, down):
                assert total.isfinite()
                assert _grad(total, logp).isfinite().all()

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, a, mask = _random(2, 3), _random(2), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"logp_ref: expected \(2, 3\)"):
            grpo_loss(x, x, mask, a, logp_ref=x[:1])
        with pytest.raises(ValueError, match="beta: expected at least 0"):
            grpo_loss(x, x, mask, a, beta=-1.0)
        with pytest.raises(ValueError, match="advantages: expected one for each"):
            grpo_loss(x, x, mask, a[:1])
        with pytest.raises(ValueError, match="max_length: expected at least 1"):
            dr_grpo_loss(x, x, mask, a, max_length=0)
        with pytest.raises(ValueError, match="normaliser: expected more than 0"):
            dr_grpo_loss(x, x, mask, a, max_length=3, normaliser=0)
        with pytest.raises(ValueError, match="clip: expected more than 0"):
            grpo_loss(x, x, mask, a, clip_low=0.0)
