import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor, nn

from mlreviews.generalization import (
    effective_dof,
    ensemble_weights,
    gaussian_noise_amplification,
    gaussian_smallest_singular_value,
    input_sensitivity,
    least_squares_weights,
    min_norm_interpolate,
    noise_amplification,
    prediction_variance,
    sample_solutions,
    sensitivity,
    smoother_errors,
    solution_set_dim,
)
from mlreviews.generalization.double_descent import gaussian_min_norm_risk
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_rng(seed))


def _close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def _weighted_sum(x: Tensor, y: Tensor):  # type: ignore[no-untyped-def]
    """A learner whose predictions are linear in the targets."""
    return lambda new: new @ x.T @ y


CONTRACT = {
    "sample_solutions": lambda: Sample(sample_solutions, (_random(4, 9), _random(4, 2, seed=1), 3)),
    "sensitivity": lambda: Sample(
        partial(sensitivity, _weighted_sum), (_random(4, 3), _random(4, seed=1), _random(5, 3, seed=2), 0.3)
    ),
}


class TestNoiseAmplification:
    @pytest.mark.parametrize(("n", "p"), [(4, 9), (9, 4), (5, 5), (1, 3)])
    def test_is_the_total_variance_of_the_weights(self, n: int, p: int) -> None:
        phi = _random(p, n).T
        inverse = torch.linalg.pinv(phi)
        assert noise_amplification(phi) == pytest.approx(torch.trace(inverse @ inverse.T).item())
        small = phi @ phi.T if n < p else phi.T @ phi
        assert noise_amplification(phi) == pytest.approx(np.trace(np.linalg.inv(small)))
        assert noise_amplification(phi.T) == pytest.approx(noise_amplification(phi))
        assert noise_amplification(10 * phi) == pytest.approx(noise_amplification(phi) / 100)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_directions_at_rounding_level_do_not_count(self, dtype: torch.dtype) -> None:
        eps = torch.finfo(dtype).eps
        phi = torch.diag(torch.tensor([4.0, 2.0, 4 * 2 * eps], dtype=dtype))
        assert noise_amplification(phi) == pytest.approx(1 / 16 + 1 / 4)
        phi[2, 2] = 4 * 4 * eps
        assert noise_amplification(phi) == pytest.approx(1 / 16 + 1 / 4 + 1 / (16 * eps) ** 2, rel=1e-3)
        assert noise_amplification(torch.zeros(2, 3)) == 0

    @given(st.integers(1, 6), st.integers(0, 10_000))
    @settings(max_examples=20)
    def test_rises_up_to_p_equals_n_and_falls_beyond_whatever_the_features(self, n: int, seed: int) -> None:
        phi = _random(n, 3 * n + 2, seed=seed).exp() * torch.linspace(1, 3, 3 * n + 2).double()
        found = [noise_amplification(phi[:, :p]) for p in range(1, phi.shape[1] + 1)]
        assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(found[:n]))
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(found[n - 1 :]))

    @pytest.mark.parametrize(("n", "p"), [(15, 30), (10, 40), (40, 10), (7, 9), (30, 20)])
    def test_the_gaussian_mean_by_quadrature(self, n: int, p: int) -> None:
        k = abs(p - n) + 1
        inverse, _ = integrate.quad(lambda x: stats.chi2.pdf(x, k) / x, 0, math.inf)
        assert gaussian_noise_amplification(n, p) == pytest.approx(min(n, p) * inverse, rel=1e-6)

    @pytest.mark.parametrize(("n", "p"), [(15, 30), (10, 40), (40, 12)])
    def test_the_gaussian_mean_by_simulation(self, n: int, p: int) -> None:
        found = [noise_amplification(_random(n, p, seed=seed)) for seed in range(400)]
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        expected = gaussian_noise_amplification(n, p)
        assert error < 0.01 * expected
        assert abs(np.mean(found) - expected) < 3.5 * error

    @pytest.mark.parametrize(("n", "p"), [(5, 4), (5, 5), (5, 6)])
    def test_the_gaussian_mean_is_infinite_next_to_p_equals_n(self, n: int, p: int) -> None:
        assert gaussian_noise_amplification(n, p) == math.inf
        k = abs(p - n) + 1
        # The part of the integral below 1 grows without bound as its lower end goes to 0.
        parts = [
            integrate.quad(lambda u: stats.chi2.pdf(math.exp(u), k), math.log(low), 0)[0] for low in (1e-4, 1e-8, 1e-12)
        ]
        assert parts[1] - parts[0] > 1
        assert parts[2] - parts[1] > 0.99 * (parts[1] - parts[0])

    def test_inverse_diagonal_entries_are_inverse_chi_squared(self) -> None:
        n, p = 4, 7
        rows = _random(2000, n, p)
        entries = torch.linalg.inv(rows @ rows.mT)[:, 0, 0]
        assert stats.kstest(1 / entries.numpy(), stats.chi2(p - n + 1).cdf).pvalue > 1e-3

    @pytest.mark.parametrize(("n", "p"), [(50, 200), (30, 100), (100, 30)])
    def test_smallest_singular_value_of_gaussian_features(self, n: int, p: int) -> None:
        smallest = torch.linalg.svdvals(_random(40, n, p))[:, -1]
        error = float(smallest.std()) / math.sqrt(40)
        bound = gaussian_smallest_singular_value(n, p)
        assert float(smallest.mean()) > bound - 4 * error
        assert float(smallest.mean()) == pytest.approx(bound, rel=0.1)
        assert gaussian_smallest_singular_value(n, n) == 0

    def test_reduces_to_double_descent_without_a_signal(self) -> None:
        for n, p in [(6, 3), (6, 6), (6, 13)]:
            risk = gaussian_min_norm_risk(p, n, torch.zeros(p), 0.7)
            assert risk == pytest.approx(0.49 * (1 + gaussian_noise_amplification(n, p)))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="features: expected 2 dimensions"):
            noise_amplification(torch.ones(3))
        with pytest.raises(ValueError, match="features: expected finite"):
            noise_amplification(torch.full((2, 2), math.nan))
        for function in (gaussian_noise_amplification, gaussian_smallest_singular_value):
            with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
                function(0, 3)
            with pytest.raises(ValueError, match="p: expected at least 1, got 0"):
                function(3, 0)


class TestSolutions:
    @pytest.mark.parametrize(("n", "p"), [(4, 9), (9, 4), (5, 5)])
    def test_dimension_of_the_solution_set(self, n: int, p: int) -> None:
        assert solution_set_dim(_random(n, p)) == max(0, p - n)

    def test_repeated_rows_and_columns_add_dimensions(self) -> None:
        phi = _random(4, 6)
        assert solution_set_dim(torch.cat([phi, phi[:1]])) == 2
        assert solution_set_dim(torch.cat([phi.T, phi.T[:, :3]], dim=1)) == 3

    def test_reduces_to_parameter_counting(self) -> None:
        for shape in [(3, 8), (8, 3)]:
            phi = _random(*shape)
            assert shape[1] - solution_set_dim(phi) == pytest.approx(effective_dof(phi))

    def test_samples_have_zero_training_error(self) -> None:
        phi, y = _random(4, 9), _random(4, 3, seed=1)
        found = sample_solutions(phi, y, 5, spread=10.0, generator=_rng(2))
        assert found.shape == (5, 9, 3)
        _close(phi @ found, y.expand(5, 4, 3))
        single = sample_solutions(phi.float(), y[:, 0].float(), 5, generator=_rng(2))
        assert single.shape == (5, 9)
        assert single.dtype == torch.float32
        _close(single @ phi.T.float(), y[:, 0].float().expand(5, 4), 1e-5)

    def test_samples_fill_the_null_space_evenly(self) -> None:
        phi, y, spread = _random(2, 5), _random(2, seed=1), 3.0
        steps = sample_solutions(phi, y, 4000, spread=spread, generator=_rng()) - min_norm_interpolate(phi, y)
        null = torch.linalg.svd(phi).Vh[2:]
        coordinates = steps @ null.T / spread
        # Entries of the sample covariance of m standard normals have standard errors of at most sqrt(2 / m).
        _close(coordinates.T @ coordinates / 4000, torch.eye(3).double(), 4 * math.sqrt(2 / 4000))
        _close(coordinates @ null * spread, steps)

    def test_below_the_threshold_there_is_only_one(self) -> None:
        phi, y = _random(7, 3), _random(7, seed=1)
        found = sample_solutions(phi, y, 2, generator=_rng())
        _close(found, torch.linalg.lstsq(phi, y[:, None]).solution[:, 0].expand(2, 3))

    def test_reduces_to_min_norm_interpolation_at_spread_0(self) -> None:
        phi, y = _random(4, 9), _random(4, 2, seed=1)
        _close(sample_solutions(phi, y, 3, spread=0.0), min_norm_interpolate(phi, y).expand(3, 9, 2))

    def test_the_generator_decides(self) -> None:
        phi, y = _random(4, 9), _random(4, seed=1)
        first, again, other = (sample_solutions(phi, y, 2, generator=_rng(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi, y = _random(4, 9), _random(4)
        with pytest.raises(ValueError, match="count: expected at least 1"):
            sample_solutions(phi, y, 0)
        with pytest.raises(ValueError, match="spread: expected at least 0"):
            sample_solutions(phi, y, 1, spread=-1.0)
        with pytest.raises(ValueError, match="same number of rows"):
            sample_solutions(phi, y[:3], 1)
        with pytest.raises(ValueError, match="targets: expected 1 or 2 dimensions"):
            sample_solutions(phi, y[None, None], 1)
        with pytest.raises(ValueError, match="features: expected 2 dimensions"):
            sample_solutions(y, y, 1)


class TestPredictionVariance:
    @pytest.mark.parametrize(("n", "p"), [(5, 12), (12, 5), (6, 6)])
    def test_is_the_norm_of_the_pseudo_inverse_at_the_point(self, n: int, p: int) -> None:
        phi, points, sigma = _random(n, p), _random(7, p, seed=1), 0.3
        expected = [sigma**2 * float((torch.linalg.pinv(phi).T @ point).norm()) ** 2 for point in points]
        found = prediction_variance(least_squares_weights(phi, points), sigma)
        _close(found / torch.tensor(expected).double(), torch.ones(7).double(), 1e-6)

    def test_agrees_with_refitting_on_noisy_targets(self) -> None:
        phi, points, sigma, m = _random(6, 15), _random(8, 15, seed=1), 0.3, 3000
        targets = torch.stack([_random(6, seed=2), 50 * _random(6, seed=3)], dim=1)
        inverse = torch.linalg.pinv(phi)
        found = sensitivity(
            lambda x, y: lambda new: new @ (inverse @ y), phi, targets, points, sigma, repetitions=m, generator=_rng(4)
        )
        expected = prediction_variance(least_squares_weights(phi, points), sigma)
        assert found.shape == (8, 2)
        # A variance from m normal samples has the relative standard error sqrt(2 / (m - 1)).
        _close(found / expected[:, None], torch.ones(8, 2).double(), 4 * math.sqrt(2 / (m - 1)))

    def test_few_repetitions_are_unbiased(self) -> None:
        x, y = torch.zeros(20_000, 1), torch.zeros(20_000)  # each prediction is the noisy target of its own point
        found = sensitivity(lambda x, y: lambda new: y, x, y, x, 2.0, repetitions=3, generator=_rng())
        assert found.dtype == torch.float64
        assert float(found.mean()) == pytest.approx(4, abs=4 * 4 * math.sqrt(1 / 20_000))

    def test_the_generator_decides_and_100_repetitions_are_the_default(self) -> None:
        x, y, calls = _random(3, 2), _random(3), []

        def fit(x, y):  # type: ignore[no-untyped-def]
            calls.append(y)
            return _weighted_sum(x, y)

        first, again, other = (sensitivity(fit, x, y, x, 1.0, generator=_rng(seed)) for seed in (3, 3, 4))
        assert len(calls) == 300
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize(("n", "p"), [(3, 7), (7, 3), (4, 4)])
    def test_of_gaussian_features_follows_an_f_distribution(self, n: int, p: int) -> None:
        least, k = min(n, p), abs(p - n) + 1
        rng = np.random.default_rng(n)
        norms = [
            float(np.sum((np.linalg.pinv(rng.normal(size=(n, p))).T @ rng.normal(size=p)) ** 2)) for _ in range(500)
        ]
        assert stats.kstest(norms, stats.f(least, k, scale=least / k).cdf).pvalue > 1e-3

    def test_peaks_at_p_equals_n_and_falls_beyond(self) -> None:
        n, widths = 20, (5, 10, 15, 20, 30, 60, 200)
        means = {}
        for p in widths:
            draws = [
                float(
                    prediction_variance(
                        least_squares_weights(_random(n, p, seed=s), _random(50, p, seed=s + 99)), 1
                    ).mean()
                )
                for s in range(20)
            ]
            means[p] = float(np.median(draws))
        assert max(means, key=means.__getitem__) == n
        assert means[20] > 5 * means[30] > 5 * means[60] > 5 * means[200]
        assert means[5] < means[10] < means[15] < means[20]
        # Away from the peak the mean is the exact one.
        assert means[60] == pytest.approx(gaussian_noise_amplification(n, 60), rel=0.15)

    def test_reduces_to_fixed_vs_random_design(self) -> None:
        weights = least_squares_weights(_random(6, 9), _random(11, 9, seed=1))
        errors = smoother_errors(weights, torch.zeros(6).double(), torch.zeros(11).double(), 0.4)
        assert float(prediction_variance(weights, 0.4).mean()) == pytest.approx(errors.variance)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, y = _random(3, 2), _random(3)

        def fit(x: Tensor, y: Tensor):  # type: ignore[no-untyped-def]
            return lambda new: new.sum(dim=1)

        with pytest.raises(ValueError, match="weights: expected finite"):
            prediction_variance(x / 0, 1.0)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            prediction_variance(x, -1.0)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            sensitivity(fit, x, y, x, -1.0)
        with pytest.raises(ValueError, match="repetitions: expected at least 2"):
            sensitivity(fit, x, y, x, 1.0, repetitions=1)
        with pytest.raises(ValueError, match="x_train has 3, y_train has 2"):
            sensitivity(fit, x, y[:2], x, 1.0)
        with pytest.raises(ValueError, match="predictions of fit: expected finite"):
            sensitivity(lambda x, y: lambda new: new[:, 0] / 0, x, y, x, 1.0)
        with pytest.raises(ValueError, match="x has 3, predictions has 2"):
            sensitivity(lambda x, y: lambda new: new[:2], x, y, x, 1.0)
        for bad, name in [((x / 0, y, x), "x_train"), ((x, y / 0, x), "y_train"), ((x, y, x / 0), "x")]:
            with pytest.raises(ValueError, match=f"^{name}: expected finite"):
                sensitivity(fit, *bad, 1.0)


class TestEnsembles:
    def test_weights_give_the_average_prediction(self) -> None:
        y, sizes = _random(6, seed=9), (4, 6, 11)
        train = [_random(6, p, seed=p) for p in sizes]
        test = [_random(5, p, seed=p + 50) for p in sizes]
        each = [new @ torch.linalg.pinv(phi) @ y for phi, new in zip(train, test, strict=True)]
        _close(ensemble_weights(train, test) @ y, sum(each) / 3)
        _close(ensemble_weights(train[:1], test[:1]), least_squares_weights(train[0], test[0]))

    def test_the_part_of_the_variance_that_comes_from_the_features_is_divided_by_their_number(self) -> None:
        models = [(_random(5, 7, seed=s), _random(1, 7, seed=s + 50)) for s in range(4)]

        def mean_variance(m: int) -> float:
            """Exactly, over all draws of m models out of the four with replacement."""
            draws = itertools.product(models, repeat=m)
            found = [prediction_variance(ensemble_weights(*zip(*draw, strict=True)), 0.5) for draw in draws]
            return float(torch.cat(found).mean())

        one, limit = mean_variance(1), float(prediction_variance(ensemble_weights(*zip(*models, strict=True)), 0.5))
        assert limit < 0.9 * one
        for m in (2, 3):
            assert mean_variance(m) == pytest.approx(limit + (one - limit) / m)

    @pytest.mark.parametrize(("p", "models", "degrees"), [(5, 1, 3), (3, 1, 1), (3, 10, 1)])
    def test_gaussian_models_have_t_weights_and_at_p_equals_n_averaging_changes_nothing(
        self, p: int, models: int, degrees: int
    ) -> None:
        phi, at = _random(1000, models, 3, p), _random(1000, models, p, 1, seed=1)
        weights = (torch.linalg.pinv(phi).mT @ at)[..., 0].mean(dim=1)
        first = ensemble_weights(list(phi[0]), list(at[0].mT))
        _close(first[0], weights[0])
        for target in range(3):
            found = math.sqrt(degrees) * weights[:, target].numpy()
            assert stats.kstest(found, stats.t(degrees).cdf).pvalue > 1e-3

    def test_away_from_p_equals_n_averaging_removes_the_peak(self) -> None:
        n, x, new = 20, _random(20, 3), _random(40, 3, seed=1)

        def relu_features(width: int, seed: int) -> tuple[Tensor, ...]:
            first = _random(4, width, seed=seed)
            return tuple(torch.relu(nn.functional.pad(z, (0, 1), value=1.0) @ first) for z in (x, new))

        def variance(width: int, models: int) -> float:
            draws = [relu_features(width, seed) for seed in range(models)]
            return float(prediction_variance(ensemble_weights(*zip(*draws, strict=True)), 1.0).median())

        assert variance(n + 5, 40) < variance(n + 5, 1) / 3
        assert variance(n + 5, 40) < 3 * variance(10 * n, 1)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi = _random(3, 2)
        with pytest.raises(ValueError, match="got 0 and 0"):
            ensemble_weights([], [])
        with pytest.raises(ValueError, match="got 2 and 1"):
            ensemble_weights([phi, phi], [phi])
        with pytest.raises(ValueError, match="same number of columns"):
            ensemble_weights([phi], [phi.T])


class TestInputSensitivity:
    def test_of_a_linear_function_is_the_norm_of_its_weights(self) -> None:
        matrix, x = _random(3, 2), _random(5, 3, seed=1)
        _close(input_sensitivity(lambda z: z @ matrix, x), matrix.norm().expand(5))
        _close(input_sensitivity(lambda z: z @ matrix[:, 0], x), matrix[:, 0].norm().expand(5))

    def test_agrees_with_finite_differences(self) -> None:
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        with torch.no_grad():
            for seed, parameter in enumerate(net.parameters()):
                parameter.copy_(_random(*parameter.shape, seed=seed))
        x, step = _random(4, 3, seed=7), 1e-6
        with torch.no_grad():
            slopes = [(net(x + step * unit) - net(x - step * unit)) / (2 * step) for unit in torch.eye(3).double()]
            found = input_sensitivity(net, x)
        _close(found, torch.stack(slopes).square().sum(dim=(0, 2)).sqrt(), 1e-7)
        assert not found.requires_grad
        assert not x.requires_grad
        assert all(parameter.grad is None for parameter in net.parameters())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(4, 3)
        with pytest.raises(ValueError, match="x: expected 2 dimensions"):
            input_sensitivity(torch.sin, x[0])
        with pytest.raises(ValueError, match="x has 4, values has 2"):
            input_sensitivity(lambda z: z[:2], x)
        with pytest.raises(ValueError, match="values of predict: expected finite"):
            input_sensitivity(lambda z: z.sum(dim=1) / 0, x)
