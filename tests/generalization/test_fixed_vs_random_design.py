import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from mlreviews.generalization.fixed_vs_random_design import (
    DesignErrors,
    design_errors,
    effective_parameters,
    knn_weights,
    least_squares_weights,
    smoother_bias_decomposition,
    smoother_errors,
)
from mlreviews.generalization.parameter_counting import effective_dof
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _wavy(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 0]


def _linear(x: Tensor) -> Tensor:
    return 3 * x[:, 0] - 0.5 * x[:, 1] + 2


def _nearest(k: int) -> Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]:
    return lambda x_train, y: lambda x: knn_weights(x_train, x, k) @ y


CONTRACT = {
    "design_errors": lambda: Sample(
        functools.partial(design_errors, _nearest(2), _wavy, repetitions=3),
        (_random(5, 2), _random(3, 2, seed=1), 0.5),
    )
}


class TestKnnWeights:
    @pytest.mark.parametrize("k", [1, 2, 5, 11])
    def test_reduces_to_sklearn_without_ties(self, k: int) -> None:
        x_train, x, y = _random(11, 3), _random(6, 3, seed=1), _random(11, seed=2)
        expected = KNeighborsRegressor(k).fit(x_train.numpy(), y.numpy()).predict(x.numpy())
        np.testing.assert_allclose((knn_weights(x_train, x, k) @ y).numpy(), expected, rtol=1e-12)

    def test_a_training_point_is_its_own_nearest_neighbour(self) -> None:
        # Far from the origin, distances by way of a matrix product would be rounding noise.
        x = 1e6 + _random(9, 4)
        assert torch.equal(knn_weights(x, x, 1), torch.eye(9, dtype=torch.float64))

    def test_ties_for_the_last_place_share_it(self) -> None:
        x_train = torch.tensor([[0.0], [1.0], [-1.0], [3.0]])
        expected = [[1.0, 0, 0, 0], [1 / 2, 1 / 4, 1 / 4, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4]
        for k, row in enumerate(expected, start=1):
            torch.testing.assert_close(knn_weights(x_train, torch.zeros(1, 1), k), torch.tensor([row]))

    def test_ties_up_to_rounding_are_ties(self) -> None:
        # 0.1 + 0.2 is not 0.3 in binary, so the distances from 0.3 differ in the last place.
        x_train = torch.tensor([[0.1 + 0.2 + 0.1], [0.3 - 0.1]], dtype=torch.float64)
        x = torch.tensor([[0.3]], dtype=torch.float64)
        assert abs(x_train[0] - x).item() != abs(x_train[1] - x).item()
        assert torch.equal(knn_weights(x_train, x, 1), torch.full((1, 2), 0.5, dtype=torch.float64))
        # ... and a difference that is not rounding decides, on either side.
        for shift in (1e-9, -1e-9):
            nearer = knn_weights(x_train + torch.tensor([[shift], [shift]]), x, 1)
            assert torch.equal(nearer, torch.tensor([[float(shift < 0), float(shift > 0)]], dtype=torch.float64))

    def test_repeated_points_are_all_neighbours_at_distance_zero(self) -> None:
        x_train = torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 1.0]])
        assert torch.equal(knn_weights(x_train, x_train, 1)[0], torch.tensor([0.5, 0, 0.5]))
        assert torch.equal(knn_weights(x_train, x_train, 2)[0], torch.tensor([0.5, 0, 0.5]))

    @settings(max_examples=25)
    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(-4, 4), st.integers(1, 9))
    def test_is_the_mean_over_all_ways_to_break_ties(self, points: list[int], at: int, k: int) -> None:
        k = min(k, len(points))
        x_train = torch.tensor([[float(p)] for p in points], dtype=torch.float64)
        weights = knn_weights(x_train, torch.tensor([[float(at)]], dtype=torch.float64), k)[0]
        distances = [abs(p - at) for p in points]
        # All sets of k points with the smallest possible distances.
        nearest = sorted(distances)[:k]
        sets = [c for c in itertools.combinations(range(len(points)), k) if sorted(distances[i] for i in c) == nearest]
        expected = torch.zeros(len(points), dtype=torch.float64)
        for chosen in sets:
            expected[list(chosen)] += 1 / (k * len(sets))
        torch.testing.assert_close(weights, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_and_strides(self, dtype: torch.dtype) -> None:
        x_train, x = _random(3, 7, dtype=dtype), _random(3, 5, seed=1, dtype=dtype)
        weights = knn_weights(x_train.T, x.T, 3)
        assert weights.dtype == dtype
        assert torch.equal(weights, knn_weights(x_train.T.contiguous(), x.T.contiguous(), 3))

    def test_reduces_to_mean_as_minimal_model(self) -> None:
        x_train, y = _random(8, 2), _random(8, seed=1)
        weights = knn_weights(x_train, _random(5, 2, seed=2), 8)
        torch.testing.assert_close(weights @ y, y.mean().expand(5))
        assert effective_parameters(weights) == pytest.approx(1)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(4, 2)
        with pytest.raises(ValueError, match="k: expected at most the 4 training points, got 5"):
            knn_weights(x, x, 5)
        with pytest.raises(ValueError, match="k: expected at least 1"):
            knn_weights(x, x, 0)
        with pytest.raises(ValueError, match="x_train: expected finite"):
            knn_weights(x / 0, x, 1)
        with pytest.raises(ValueError, match="x: expected finite"):
            knn_weights(x, x / 0, 1)
        with pytest.raises(ValueError, match=r"x and x_train: expected the same number of columns, got 3 and 2"):
            knn_weights(x, _random(4, 3), 1)


class TestLeastSquaresWeights:
    @pytest.mark.parametrize(("n", "p"), [(9, 4), (4, 9), (6, 6)])
    def test_reduces_to_min_norm_interpolation(self, n: int, p: int) -> None:
        train, new, y = _random(n, p), _random(5, p, seed=1), _random(n, seed=2)
        expected = new.numpy() @ (np.linalg.pinv(train.numpy()) @ y.numpy())
        np.testing.assert_allclose((least_squares_weights(train, new) @ y).numpy(), expected, rtol=1e-9)

    @pytest.mark.parametrize(("n", "p"), [(9, 4), (4, 9)])
    def test_ridge_is_least_squares_with_p_more_observations_of_zero(self, n: int, p: int) -> None:
        train, new, y, ridge = _random(n, p), _random(5, p, seed=1), _random(n, seed=2), 0.3
        rows = np.vstack([train.numpy(), math.sqrt(ridge) * np.eye(p)])
        expected = new.numpy() @ np.linalg.lstsq(rows, np.append(y.numpy(), np.zeros(p)), rcond=None)[0]
        np.testing.assert_allclose((least_squares_weights(train, new, ridge=ridge) @ y).numpy(), expected, rtol=1e-9)

    def test_float32_features_are_solved_in_float64(self) -> None:
        # Condition number 1e5: its square would lose all digits of float32.
        train = torch.diag(torch.tensor([1.0, 1e-5])) @ _random(2, 2, dtype=torch.float32)
        weights = least_squares_weights(train, train)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, torch.eye(2), rtol=0, atol=1e-7)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(4, 3)
        with pytest.raises(ValueError, match=r"features and features_train: expected the same number of columns"):
            least_squares_weights(x, _random(4, 2))
        with pytest.raises(ValueError, match="ridge: expected at least 0"):
            least_squares_weights(x, x, ridge=-1.0)
        with pytest.raises(ValueError, match="features_train: expected finite"):
            least_squares_weights(x / 0, x)
        with pytest.raises(ValueError, match="features: expected finite"):
            least_squares_weights(x, x / 0)


class TestEffectiveParameters:
    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_of_nearest_neighbours_is_n_over_k_in_both_designs(self, k: int) -> None:
        x_train, x = _random(21, 2), _random(5, 2, seed=1)
        for at in (x_train, x):
            weights = knn_weights(x_train, at, k)
            assert effective_parameters(weights) == pytest.approx(21 / k)
            # ... and with it the variance sigma**2 / k.
            assert smoother_errors(weights, _wavy(x_train), _wavy(at), 0.4).variance == pytest.approx(0.16 / k)

    @pytest.mark.parametrize(("n", "p"), [(9, 4), (6, 6), (4, 9)])
    def test_reduces_to_parameter_counting(self, n: int, p: int) -> None:
        features = _random(n, p)
        assert effective_parameters(least_squares_weights(features, features)) == pytest.approx(effective_dof(features))

    @pytest.mark.parametrize(("n", "p"), [(9, 4), (4, 9)])
    def test_of_least_squares_at_new_inputs(self, n: int, p: int) -> None:
        # With test features of second moment I, the mean of |s|^2 is the sum of the inverse squared singular values.
        train = _random(n, p)
        new = math.sqrt(p) * torch.linalg.qr(_random(p, p, seed=1)).Q
        inverse = 1 / np.linalg.svd(train.numpy(), compute_uv=False) ** 2
        assert effective_parameters(least_squares_weights(train, new)) == pytest.approx(n * inverse.sum())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="weights: expected 2 dimensions"):
            effective_parameters(torch.ones(3))


class TestSmootherErrors:
    def test_by_hand(self) -> None:
        weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [2.0, -1.0]])
        # Predictions 1, 2, -1 of 2, 2, 1: bias 1, 0, 2. Squared weights 1, 1/2, 5.
        errors = smoother_errors(weights, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0, 1.0]), 3.0)
        assert (errors.bias2, errors.variance, errors.noise) == pytest.approx((5 / 3, 9 * 6.5 / 3, 9))
        assert errors.error == pytest.approx(5 / 3 + 19.5 + 9)

    @pytest.mark.parametrize("sigma", [0.0, 0.7])
    @pytest.mark.parametrize(
        "weights",
        [
            knn_weights(_random(8, 2), _random(8, 2), 1),
            least_squares_weights(_random(8, 8), _random(8, 8)),
            least_squares_weights(_random(8, 30), _random(8, 30)),
        ],
        ids=["1-NN", "p = n", "p > n"],
    )
    def test_every_interpolator_has_twice_the_noise_in_fixed_design(self, weights: Tensor, sigma: float) -> None:
        f = _wavy(_random(8, 2))
        errors = smoother_errors(weights, f, f, sigma)
        assert errors.bias2 == pytest.approx(0, abs=1e-20)
        assert errors.variance == pytest.approx(sigma**2)
        assert errors.error == pytest.approx(2 * sigma**2)

    def test_fixed_design_has_a_plateau_where_random_design_has_a_second_descent(self) -> None:
        n, sigma = 30, 0.5
        train, new = _random(n, 600), _random(200, 600, seed=1)
        beta = _random(600, seed=2) / 600**0.5
        fixed, random = {}, {}
        for p in (6, 15, n, 60, 600):
            weights = [least_squares_weights(train[:, :p], x[:, :p]) for x in (train, new)]
            fixed[p] = smoother_errors(weights[0], train @ beta, train @ beta, sigma)
            random[p] = smoother_errors(weights[1], train @ beta, new @ beta, sigma)
        for p, errors in fixed.items():
            assert errors.variance == pytest.approx(sigma**2 * min(p, n) / n)
            if p >= n:
                assert errors.error == pytest.approx(2 * sigma**2)
        assert random[n].error > 10 * max(random[15].error, random[600].error)
        assert random[n].error > random[60].error > random[600].error

    def test_nearest_neighbour_has_no_bias_in_fixed_design_only(self) -> None:
        x_train, x = _random(12, 2), _random(9, 2, seed=1)
        f_train = _wavy(x_train)
        assert smoother_errors(knn_weights(x_train, x_train, 1), f_train, f_train, 1.0).bias2 == 0
        assert smoother_errors(knn_weights(x_train, x, 1), f_train, _wavy(x), 1.0).bias2 > 0.01

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        weights, f_train, f_x = _random(3, 4), _random(4), _random(3)
        with pytest.raises(ValueError, match="weights has 3, f_x has 4"):
            smoother_errors(weights, f_train, f_train, 1.0)
        with pytest.raises(ValueError, match="weights: expected one column for each of 3 rows of f_train, got 4"):
            smoother_errors(weights, f_x, f_x, 1.0)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            smoother_errors(weights, f_train, f_x, -1.0)
        with pytest.raises(ValueError, match="f_train: expected finite"):
            smoother_errors(weights, f_train / 0, f_x, 1.0)
        with pytest.raises(ValueError, match="f_x: expected finite"):
            smoother_errors(weights, f_train, f_x / 0, 1.0)


class TestBiasDecomposition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("weights", [knn_weights(_random(9, 2), _random(4, 2, seed=1), 3), _random(4, 9, seed=5)])
    def test_adds_up_to_the_bias(self, weights: Tensor, dtype: torch.dtype) -> None:
        x_train, x = _random(9, 2, dtype=dtype), _random(4, 2, seed=1, dtype=dtype)
        matching, averaging = smoother_bias_decomposition(weights.to(dtype), x_train, x, _wavy)
        bias = _wavy(x.double()) - weights.to(dtype).double() @ _wavy(x_train.double())
        torch.testing.assert_close(matching + averaging, bias, rtol=1e-12, atol=1e-12)
        assert matching.abs().min() > 1e-3
        assert averaging.abs().min() > 1e-3
        mean_squared = smoother_errors(weights.to(dtype), _wavy(x_train.double()), _wavy(x.double()), 0.0).bias2
        assert (matching + averaging).square().mean().item() == pytest.approx(mean_squared)

    @pytest.mark.parametrize("k", [1, 3, 9])
    def test_averaging_is_free_for_a_linear_function(self, k: int) -> None:
        x_train, x = _random(9, 2), _random(4, 2, seed=1)
        matching, averaging = smoother_bias_decomposition(knn_weights(x_train, x, k), x_train, x, _linear)
        torch.testing.assert_close(averaging, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
        assert matching.abs().min() > 1e-3

    def test_one_neighbour_averages_nothing(self) -> None:
        x_train, x = _random(9, 2), _random(4, 2, seed=1)
        matching, averaging = smoother_bias_decomposition(knn_weights(x_train, x, 1), x_train, x, _wavy)
        assert torch.equal(averaging, torch.zeros(4, dtype=torch.float64))
        nearest = [min(x_train, key=lambda t: float((t - at).norm())) for at in x]
        torch.testing.assert_close(matching, _wavy(x) - _wavy(torch.stack(nearest)))

    def test_matching_is_free_at_the_weighted_mean_of_the_neighbours(self) -> None:
        x_train, weights = _random(9, 2), torch.softmax(_random(4, 9, seed=1), dim=1)
        matching, averaging = smoother_bias_decomposition(weights, x_train, weights @ x_train, _wavy)
        torch.testing.assert_close(matching, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
        assert averaging.abs().min() > 1e-3

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x_train, x, weights = _random(9, 2), _random(4, 2, seed=1), _random(4, 9)
        with pytest.raises(ValueError, match="weights has 4, x has 9"):
            smoother_bias_decomposition(weights, x_train, x_train, _wavy)
        with pytest.raises(ValueError, match="weights: expected one column for each of 4 rows of x_train, got 9"):
            smoother_bias_decomposition(weights, x, x, _wavy)
        with pytest.raises(ValueError, match=r"f_star: expected 4 values for 4 inputs, got 1"):
            smoother_bias_decomposition(weights, x_train, x, lambda at: at[:1, 0])
        with pytest.raises(ValueError, match="f_star: expected finite"):
            smoother_bias_decomposition(weights, x_train, x, lambda at: at[:, 0] / 0)
        with pytest.raises(ValueError, match="f_star: expected 1 dimensions"):
            smoother_bias_decomposition(weights, x_train, x, lambda at: at)


class TestDesignErrors:
    def test_agrees_with_the_exact_errors_of_a_smoother(self) -> None:
        x_train, new, k, sigma = _random(15, 2), _random(10, 2, seed=1), 4, 0.6
        for x in (x_train, new):
            exact = smoother_errors(knn_weights(x_train, x, k), _wavy(x_train), _wavy(x), sigma)
            runs = [
                design_errors(_nearest(k), _wavy, x_train, x, sigma, repetitions=50, generator=_rng(seed))
                for seed in range(12)
            ]
            assert {run.noise for run in runs} == {exact.noise}
            for part in ("bias2", "variance", "error"):
                values = np.array([getattr(run, part) for run in runs])
                error = values.std(ddof=1) / math.sqrt(len(runs))
                assert abs(values.mean() - getattr(exact, part)) < 4 * error
                assert error < 0.15 * getattr(exact, part)

    def test_an_interpolator_has_twice_the_noise_in_fixed_design(self) -> None:
        x_train, sigma, repetitions = _random(20, 2), 0.6, 200
        errors = design_errors(_nearest(1), _wavy, x_train, x_train, sigma, repetitions=repetitions, generator=_rng())
        # A mean of n * repetitions squared normal deviates has the relative standard error sqrt(2 / (n * repetitions)).
        standard_error = sigma**2 * math.sqrt(2 / (20 * repetitions))
        assert abs(errors.error - 2 * sigma**2) < 4 * standard_error
        assert abs(errors.bias2) < 4 * standard_error / math.sqrt(repetitions)

    def test_the_error_is_the_mean_squared_deviation_plus_noise(self) -> None:
        x_train, x, predictions = _random(6, 2), _random(4, 2, seed=1), _random(5, 4, seed=2)
        draws = iter(predictions)

        def fit(inputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
            drawn = next(draws)
            return lambda at: drawn

        errors = design_errors(fit, _wavy, x_train, x, 0.3, repetitions=5)
        deviation = (predictions - _wavy(x)).square().mean().item()
        assert errors.error == pytest.approx(deviation + 0.09)
        assert errors.variance == pytest.approx(np.var(predictions.numpy(), axis=0, ddof=1).mean())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_labels_are_the_function_plus_noise_of_standard_deviation_sigma(self, dtype: torch.dtype) -> None:
        x_train, seen = _random(40, 2, dtype=dtype), []

        def fit(inputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
            assert inputs is x_train
            assert labels.dtype == dtype
            seen.append(labels)
            return _wavy

        errors = design_errors(fit, _wavy, x_train, x_train, 0.3, generator=_rng())
        assert errors == DesignErrors(0.0, 0.0, 0.3**2)
        noise = torch.stack(seen) - _wavy(x_train)
        assert noise.shape == (100, 40)
        assert abs(noise.mean().item()) < 4 * 0.3 / 4000**0.5
        assert noise.std().item() == pytest.approx(0.3, rel=4 / 8000**0.5)

    def test_the_generator_decides(self) -> None:
        x = _random(7, 2)
        first, again, other = (
            design_errors(_nearest(2), _wavy, x, x, 0.3, repetitions=2, generator=_rng(seed)) for seed in (3, 3, 4)
        )
        assert first == again
        assert first != other

    def test_a_fit_with_gradients(self) -> None:
        x = _random(5, 2)
        weight = _random(2).requires_grad_()
        errors = design_errors(lambda inputs, labels: lambda at: at @ weight, _linear, x, x, 1.0, repetitions=2)
        assert errors.bias2 == pytest.approx((_linear(x) - x @ weight.detach()).square().mean().item())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(5, 2)
        with pytest.raises(ValueError, match="x_train: expected finite"):
            design_errors(_nearest(1), _wavy, x / 0, x, 1.0)
        with pytest.raises(ValueError, match="x: expected finite"):
            design_errors(_nearest(1), _wavy, x, x / 0, 1.0)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            design_errors(_nearest(1), _wavy, x, x, -1.0)
        with pytest.raises(ValueError, match="repetitions: expected at least 2"):
            design_errors(_nearest(1), _wavy, x, x, 1.0, repetitions=1)
        with pytest.raises(ValueError, match="the prediction of fit: expected 5 values for 5 inputs, got 1"):
            design_errors(lambda inputs, labels: lambda at: at[:1, 0], _wavy, x, x, 1.0)
