import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mlreviews.generalization import (
    MemorizingNet,
    effective_dof,
    interpolation_threshold,
    memorize_construct,
)
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


CONTRACT = {
    "MemorizingNet": lambda: Sample(
        MemorizingNet(_random(3), _random(7, seed=1), _random(7, seed=2)), (_random(5, 3),)
    ),
    "memorize_construct": lambda: Sample(memorize_construct, (_random(7, 3), _random(7, seed=1))),
}


class TestEffectiveDof:
    @pytest.mark.parametrize(("n", "p"), [(7, 3), (3, 7), (5, 5)])
    def test_without_penalty_it_is_the_rank(self, n: int, p: int) -> None:
        assert effective_dof(_random(n, p)) == pytest.approx(min(n, p))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_repeated_columns_do_not_count(self, dtype: torch.dtype) -> None:
        x = _random(9, 2, dtype=dtype)
        mixture = torch.tensor([[0.3], [-1.7]], dtype=dtype)
        assert effective_dof(torch.cat([x, x @ mixture, x], dim=1)) == pytest.approx(2)

    def test_equals_the_trace_of_the_hat_matrix(self) -> None:
        x, ridge = _random(8, 5), 0.7
        # Column i of the hat matrix is the fit to the i-th unit vector, here as an augmented least-squares problem.
        augmented = np.vstack([x.numpy(), math.sqrt(ridge) * np.eye(5)])
        units = np.vstack([np.eye(8), np.zeros((5, 8))])
        hat = x.numpy() @ np.linalg.lstsq(augmented, units, rcond=None)[0]
        assert effective_dof(x, ridge) == pytest.approx(np.trace(hat), rel=1e-12)

    def test_falls_with_the_penalty_towards_zero(self) -> None:
        x = _random(6, 4)
        counts = [effective_dof(x, ridge) for ridge in (0.0, 0.1, 1.0, 10.0, 1e9)]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == 5
        assert counts[-1] < 1e-6

    def test_reduces_to_mean_as_minimal_model(self) -> None:
        assert effective_dof(torch.ones(7, 1)) == pytest.approx(1)

    def test_a_singular_value_just_above_rounding_counts(self) -> None:
        x = torch.diag(torch.tensor([1.0, 1e-13], dtype=torch.float64))
        assert effective_dof(x) == pytest.approx(2)
        x[1, 1] = 1e-17
        assert effective_dof(x) == pytest.approx(1)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="features: expected 2 dimensions"):
            effective_dof(torch.ones(3))
        with pytest.raises(TypeError, match=r"features: expected a floating-point tensor, got torch\.int64"):
            effective_dof(torch.ones(3, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="ridge: expected at least 0"):
            effective_dof(torch.ones(3, 1), -1.0)
        with pytest.raises(ValueError, match="features: expected finite values, got NaN or infinity in 1 of 4"):
            effective_dof(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
        with pytest.raises(ValueError, match="features: expected at least one entry"):
            effective_dof(torch.ones(0, 3))


def _polynomial_error(x: np.ndarray, y: np.ndarray) -> Callable[[int], float]:
    """Mean squared training error of the polynomial with so many coefficients."""

    def train_error(width: int) -> float:
        fit = np.polynomial.Polynomial.fit(x, y, width - 1)
        return float(np.mean((fit(x) - y) ** 2))

    return train_error


class TestInterpolationThreshold:
    def test_a_line_passes_through_two_points_and_not_through_a_third(self) -> None:
        x, y = np.array([1.0, 2.0, 4.0]), np.array([0.3, -1.0, 2.0])
        assert interpolation_threshold(_polynomial_error(x[:2], y[:2]), range(1, 3)) == 2
        assert interpolation_threshold(_polynomial_error(x, y), range(1, 3)) is None

    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_polynomials_memorise_as_many_points_as_they_have_coefficients(self, n: int) -> None:
        rng = np.random.default_rng(n)
        error = _polynomial_error(np.linspace(-1, 1, n + 2)[1:-1], rng.normal(size=n))
        assert interpolation_threshold(error, range(1, n + 1)) == n

    def test_takes_the_first_width_at_or_below_the_tolerance(self) -> None:
        errors = {1: 1.0, 2: 0.5, 3: 0.1, 4: 0.0}
        assert interpolation_threshold(errors.__getitem__, errors, tolerance=0.5) == 2
        assert interpolation_threshold(errors.__getitem__, errors, tolerance=0.05) == 4
        assert interpolation_threshold(errors.__getitem__, errors) == 4
        assert interpolation_threshold(lambda width: 1e-10 * width, [3, 2, 1]) == 1

    def test_bad_tolerance(self) -> None:
        with pytest.raises(ValueError, match="tolerance: expected at least 0"):
            interpolation_threshold(lambda width: 0.0, [1], tolerance=-1e-3)


class TestMemorizeConstruct:
    @pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (17, 4), (200, 5)])
    def test_passes_through_random_targets_with_2n_plus_d_weights(self, n: int, d: int) -> None:
        x, y = _random(n, d), _random(n, seed=1)
        net = memorize_construct(x, y, generator=_rng(2))
        torch.testing.assert_close(net(x), y, rtol=0, atol=1e-9)
        assert sum(p.numel() for p in net.parameters()) == 2 * n + d

    def test_is_the_linear_spline_along_its_direction(self) -> None:
        x, y = _random(9, 3), _random(9, seed=1)
        net = memorize_construct(x, y, generator=_rng())
        along = (x @ net.direction).detach()
        at = torch.linspace(float(along.min()), float(along.max()), 41, dtype=torch.float64)
        probe = at[:, None] * net.direction.detach() / net.direction.detach().square().sum()
        order = along.argsort()
        expected = np.interp(at.numpy(), along[order].numpy(), y[order].numpy())
        np.testing.assert_allclose(net(probe).detach().numpy(), expected, atol=1e-11)

    def test_forward_is_equation_2(self) -> None:
        net = MemorizingNet(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0, 3.0]), torch.tensor([2.0, 1.0, -3.0]))
        # <a, x> = 3 - 2 = 1: units max(0.5, 0), max(2, 0), max(-2, 0).
        assert net(torch.tensor([3.0, 1.0])).item() == 2 * 0.5 + 1 * 2
        assert net(torch.ones(4, 5, 2)).shape == (4, 5)

    def test_all_weights_are_trainable_and_survive_a_round_trip(self) -> None:
        x, y = _random(5, 3), _random(5, seed=1)
        net = memorize_construct(x, y, generator=_rng())
        (net(x + 0.1).square().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        other = memorize_construct(x, 2 * y, generator=_rng(7))
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)

    def test_the_generator_decides(self) -> None:
        x, y = _random(5, 3, dtype=torch.float32), _random(5, seed=1, dtype=torch.float32)
        first, again, other = (memorize_construct(x, y, generator=_rng(s)) for s in (3, 3, 4))
        assert torch.equal(first.weights, again.weights)
        assert not torch.equal(first.weights, other.weights)
        assert first.weights.dtype == torch.float64

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, y = _random(4, 2), _random(4, seed=1)
        with pytest.raises(ValueError, match="expected distinct rows"):
            memorize_construct(x[[0, 1, 0, 2]], y)
        with pytest.raises(ValueError, match="same number of rows, but inputs has 4, targets has 3"):
            memorize_construct(x, y[:3])
        with pytest.raises(ValueError, match="targets: expected 1 dimensions"):
            memorize_construct(x, y[:, None])
        with pytest.raises(ValueError, match="targets: expected finite"):
            memorize_construct(x, y / 0)
        with pytest.raises(ValueError, match="inputs: expected finite"):
            memorize_construct(x / 0, y)
