import numpy as np
import pytest
import torch
from torch import Tensor

from mlreviews.preference.regularised_rm_ensembles import min_reward
from mlreviews.preference.reward_robust_rlhf import (
    BayesianRewardEnsemble,
    assign_heads,
    brme_loss,
    gaussian_rewards,
    nominal_reward,
    robust_reward,
)
from tests.contracts.families import Sample


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator(seed))


CONTRACT = {
    "BayesianRewardEnsemble": lambda: Sample(
        BayesianRewardEnsemble(4, 3, generator=_generator()), (_random(5, 4).float(),)
    ),
    "assign_heads": lambda: Sample(assign_heads, (9, 4)),
    "brme_loss": lambda: Sample(
        brme_loss, (_random(3, 5), _random(3, 5, seed=1).exp(), torch.tensor([0, 2, 1, 1, 0]), _random(5, seed=2))
    ),
}


class TestRobustReward:
    def test_against_a_loop(self) -> None:
        mu, sigma = _random(4, 2, 5), _random(4, 2, 5, seed=1).exp()
        means, spreads = mu.numpy(), sigma.numpy()
        for i, j in np.ndindex(2, 5):
            surest = min(range(4), key=lambda m: spreads[m, i, j])
            expected = 0.3 * means[surest, i, j] + 0.7 * min(means[:, i, j])
            assert float(robust_reward(mu, sigma, 0.3)[i, j]) == pytest.approx(expected)
            assert float(nominal_reward(mu, sigma)[i, j]) == means[surest, i, j]

    def test_lam_trades_off_and_never_exceeds_the_nominal_reward(self) -> None:
        mu, sigma = _random(4, 30), _random(4, 30, seed=1).exp()
        assert torch.equal(robust_reward(mu, sigma, 1.0), nominal_reward(mu, sigma))
        last = robust_reward(mu, sigma, 0.0)
        for lam in (0.2, 0.5, 0.9, 1.0):
            assert (robust_reward(mu, sigma, lam) - last).min() > -1e-12
            last = robust_reward(mu, sigma, lam)

    def test_reduces_to_minimum_over_members(self) -> None:
        mu, sigma = _random(4, 30), _random(4, 30, seed=1).exp()
        assert torch.equal(robust_reward(mu, sigma, 0.0), min_reward(mu))

    def test_reduces_to_a_single_reward_model(self) -> None:
        mu = _random(1, 6)
        for heads in (mu, mu.expand(3, 6)):
            torch.testing.assert_close(robust_reward(heads, torch.zeros_like(heads)), mu[0])


class TestLoss:
    def test_without_spread_it_is_the_squared_error_of_the_assigned_head(self) -> None:
        mu, reference, heads = _random(3, 4), _random(4, seed=1), torch.tensor([2, 0, 0, 1])
        expected = [(float(mu[m, i]) - float(reference[i])) ** 2 for i, m in enumerate(heads.tolist())]
        mu.requires_grad_()
        reference.requires_grad_()
        found = brme_loss(mu, torch.zeros(3, 4).double(), heads, reference)
        assert found.tolist() == pytest.approx(expected)
        found.sum().backward()
        assert reference.grad is None
        assert mu.grad is not None
        assert (mu.grad != 0).nonzero().tolist() == [[0, 1], [0, 2], [1, 3], [2, 0]]

    def test_expectation_is_squared_bias_plus_variance(self) -> None:
        """Eq. (2), and its gradient 2 sigma, within 4 standard errors over 40 000 samples."""
        count, gap, spread = 40_000, 0.7, 1.3
        sigma = torch.tensor([[spread]]).double().requires_grad_()
        losses = brme_loss(
            torch.full((1, count), gap).double(),
            sigma.expand(1, count),
            torch.zeros(count, dtype=torch.long),
            torch.zeros(count).double(),
            generator=_generator(3),
        )
        error = 4 * float(losses.detach().std()) / count**0.5
        assert losses.mean().item() == pytest.approx(gap**2 + spread**2, abs=error)
        slope = torch.autograd.grad(losses.mean(), sigma)[0]
        # d/d sigma (gap + sigma eps)^2 = 2 gap eps + 2 sigma eps^2 has variance 4 gap^2 + 8 sigma^2.
        error = 4 * (4 * gap**2 + 8 * spread**2) ** 0.5 / count**0.5
        assert float(slope) == pytest.approx(2 * spread, abs=error)


def test_assignment_is_even() -> None:
    counts = assign_heads(4000, 4, generator=_generator(1)).bincount(minlength=4)
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_module() -> None:
    model = BayesianRewardEnsemble(4, 3, generator=_generator()).double()
    h = _random(5, 4)
    found = model(h)
    for m in range(3):
        row = model.heads.weight[2 * m : 2 * m + 2], model.heads.bias[2 * m : 2 * m + 2]
        torch.testing.assert_close(found.mu[m], h @ row[0][0] + row[1][0])
        torch.testing.assert_close(found.sigma[m], torch.log1p((h @ row[0][1] + row[1][1]).exp()))
    assert BayesianRewardEnsemble(4).n_heads == 5


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    mu, sigma, heads = _random(3, 4), _random(3, 4).exp(), torch.tensor([2, 0, 0, 1])
    with pytest.raises(ValueError, match="lam: expected a probability"):
        robust_reward(mu, sigma, 1.1)
    with pytest.raises(ValueError, match="sigma: expected standard deviations"):
        nominal_reward(mu, -sigma)
    with pytest.raises(ValueError, match="mu, sigma: expected"):
        nominal_reward(mu, sigma[:1])
    with pytest.raises(ValueError, match="mu, sigma: expected"):
        nominal_reward(mu[:0], sigma[:0])
    with pytest.raises(ValueError, match="mu: expected finite"):
        robust_reward(mu / 0, sigma)
    with pytest.raises(ValueError, match="sigma: expected finite"):
        robust_reward(mu, sigma / 0)
    for wrong in (heads + 1, heads - 1):
        with pytest.raises(ValueError, match="heads: expected numbers from 0 to 2"):
            brme_loss(mu, sigma, wrong, mu[0])
    with pytest.raises(ValueError, match="mu, heads, reference: expected"):
        brme_loss(mu, sigma, heads, mu[0, :1])
    with pytest.raises(ValueError, match="mu, heads, reference: expected"):
        brme_loss(mu, sigma, heads[:1], mu[0])
    with pytest.raises(ValueError, match="reference: expected finite"):
        brme_loss(mu, sigma, heads, mu[0] / 0)
    with pytest.raises(ValueError, match="outputs: expected"):
        gaussian_rewards(mu)
    with pytest.raises(ValueError, match="h: expected"):
        BayesianRewardEnsemble(4)(mu[:, :3].float())
    with pytest.raises(ValueError, match="d_model: expected at least 1"):
        BayesianRewardEnsemble(0)
    with pytest.raises(ValueError, match="n_heads: expected at least 1"):
        BayesianRewardEnsemble(4, 0)
    with pytest.raises(ValueError, match="n_heads: expected at least 1"):
        assign_heads(4, 0)
    with pytest.raises(ValueError, match="batch: expected at least 1"):
        assign_heads(0, 4)
