import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from mlreviews.preference.bon_aware_sft import (
    bon_distribution,
    bon_sft_loss,
    bon_tilt,
    centred_pass_weights,
    pass_weights,
)
from mlreviews.preference.rloo import reinforce_loss

P = torch.tensor([0.1, 0.3, 0.25, 0.15, 0.2], dtype=torch.float64)
SCORES = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0], dtype=torch.float64)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestDistribution:
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_against_all_draws(self, n: int) -> None:
        expected = torch.zeros(5, dtype=torch.float64)
        for draws in itertools.product(range(5), repeat=n):
            best = max(draws, key=lambda i: float(SCORES[i]))  # the first drawn of equals
            expected[best] += P[list(draws)].prod()
        torch.testing.assert_close(bon_distribution(P, SCORES, n), expected)

    def test_one_draw_and_equal_scores_are_the_policy(self) -> None:
        assert torch.equal(bon_distribution(P, SCORES, 1), P)
        torch.testing.assert_close(bon_distribution(P, torch.zeros_like(P), 7), P)

    def test_batches_zeros_and_gradients(self) -> None:
        p = torch.stack([P, P.flip(0), torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)]).requires_grad_()
        found = bon_distribution(p, SCORES.expand(3, 5), 6)
        torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(found[1], bon_distribution(p[1], SCORES, 6))
        assert torch.autograd.grad(found[:, 4].sum(), p)[0].isfinite().all()


class TestTilt:
    @pytest.mark.parametrize("n", [2, 8, 32, 1000])
    def test_divergence_is_that_of_the_best_of_n(self, n: int) -> None:
        tilt = bon_tilt(n)
        z = integrate.quad(lambda u: math.exp(tilt * (u - 1)), 0, 1, points=[1 - 5 / tilt], epsabs=0)[0]
        kl = integrate.quad(
            lambda u: math.exp(tilt * (u - 1)) / z * (tilt * (u - 1) - math.log(z)), 0, 1, points=[1 - 5 / tilt]
        )[0]
        best = integrate.quad(lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)), 1e-12 ** (1 / n), 1)[0]
        assert kl == pytest.approx(best, rel=1e-6)

    def test_grows_from_zero(self) -> None:
        tilts = [bon_tilt(n) for n in (1, 2, 3, 10, 10**6)]
        assert tilts[0] == 0
        assert tilts == sorted(tilts)
        assert tilts[-1] == pytest.approx(1e6, rel=1e-3)


def _exact(logits: Tensor, expert: int, n: int) -> Tensor:
    """The loss of eq. (4) with exact win rates, on a bandit."""
    p = logits.softmax(0)
    wins = ((SCORES[:, None] >= SCORES) * p).sum(1)
    tilt = bon_tilt(n)
    return -p[expert].log() - tilt * wins[expert] + (p * (tilt * wins).exp()).sum().log()


class TestSft:
    @pytest.mark.parametrize(("n", "expert"), [(2, 0), (8, 1), (8, 2)])
    def test_value_and_gradient_where_samples_are_the_law(self, n: int, expert: int) -> None:
        logits = P.log().requires_grad_()
        samples = torch.arange(5).repeat_interleave((20 * P).round().long())  # each answer as often as it is likely
        logp = logits.log_softmax(0)
        loss, stats = bon_sft_loss(logp[[expert]], SCORES[[expert]], logp[samples][None], SCORES[samples][None], n)
        exact = _exact(logits, expert, n)
        torch.testing.assert_close(loss, exact)
        for ours, theirs in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(exact, logits), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not stats["win_rate"].requires_grad
        assert stats["win_rate"].item() == pytest.approx(float(P[SCORES[expert] >= SCORES].sum()))

    def test_reduces_to_likelihood_at_one_draw_and_means_over_the_batch(self) -> None:
        logp, samples = _random(3).requires_grad_(), _random(3, 4, seed=1).requires_grad_()
        args = (logp, _random(3, seed=2), samples, _random(3, 4, seed=3))
        loss = bon_sft_loss(*args, 1).loss
        torch.testing.assert_close(loss, -logp.mean())
        torch.testing.assert_close(torch.autograd.grad(loss, samples)[0], torch.zeros_like(samples))
        parts = [bon_sft_loss(*(x[i : i + 1] for x in args), 5).loss for i in range(3)]
        torch.testing.assert_close(bon_sft_loss(*args, 5).loss, torch.stack(parts).mean())


class TestPassWeights:
    @pytest.mark.parametrize("weights", [pass_weights, centred_pass_weights])
    @pytest.mark.parametrize(("n", "size"), [(1, 2), (2, 3), (3, 4), (4, 4)])
    def test_expectation_is_the_gradient_of_pass_at_n(self, weights, n: int, size: int) -> None:  # type: ignore[no-untyped-def]
        logits = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64).requires_grad_()
        verdicts = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        p = logits.softmax(0)
        (exact,) = torch.autograd.grad(1 - (1 - (p * verdicts).sum()) ** n, logits)
        draws = torch.tensor(list(itertools.product(range(3), repeat=size)))
        chances = p.detach()[draws].prod(1)
        logp = logits.log_softmax(0)[draws]
        weight = weights(verdicts[draws].flatten(), size, n).view_as(logp)
        (found,) = torch.autograd.grad((chances * (weight * logp).mean(1)).sum(), logits)
        torch.testing.assert_close(found, exact)

    def test_by_hand(self) -> None:
        verdicts = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
        np.testing.assert_allclose(
            pass_weights(verdicts, 4, 2), [4 / 3, 0, 0, 4 / 3, 2 / 3, 2 / 3, 2 / 3, 0], rtol=1e-6
        )
        assert pass_weights(verdicts, 4, 4).tolist() == [0] * 8
        found = centred_pass_weights(verdicts, 4, 2)[:2]
        np.testing.assert_allclose(found, [2 * 2 / 3 * (1 - 1 / 3), 2 * (1 / 3) * (0 - 2 / 3)], rtol=1e-6)

    def test_reduces_to_reinforce_at_one_draw(self) -> None:
        verdicts, logps = torch.tensor([1.0, 0, 1, 1]).double(), _random(4)
        torch.testing.assert_close(-(pass_weights(verdicts, 2, 1) * logps).mean(), reinforce_loss(logps, verdicts).loss)


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    x = torch.tensor([0.0, 1, 1, 0])
    with pytest.raises(ValueError, match="n: expected at least 1"):
        bon_tilt(0)
    with pytest.raises(ValueError, match="scores: expected shape"):
        bon_distribution(x, x[:2], 2)
    with pytest.raises(ValueError, match="scores: expected finite"):
        bon_distribution(x, x / 0, 2)
    with pytest.raises(ValueError, match="verdicts: expected 0 or 1"):
        pass_weights(x / 2, 2, 1)
    with pytest.raises(ValueError, match="group_size: expected at least 3, got 2"):
        pass_weights(x, 2, 3)
    with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
        centred_pass_weights(x, 1, 1)
    with pytest.raises(ValueError, match="sample_logps: expected 4 rows"):
        bon_sft_loss(x, x, x[None], x[None], 2)
    with pytest.raises(ValueError, match=r"sample_logps: expected \[batch, time\]"):
        bon_sft_loss(x, x, x, x, 2)
