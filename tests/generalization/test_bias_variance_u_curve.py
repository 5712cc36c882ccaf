import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre
from torch import Generator, Tensor

from mlreviews.generalization import (
    BiasVariance,
    bias_variance_decompose,
    bias_variance_on_data,
    fixed_design,
    legendre_features,
    polynomial_curve,
    random_design,
    squared_bias_and_variance,
    subsets,
)
from tests.contracts.families import Sample

DOMAIN = (0.0, 1.0)
N, SIGMA, REPS = 15, 0.4, 80
DEGREES = (0, 1, 2, 3, 5, 7, 10, 13)  # up to n - 2, all below the interpolation threshold


def _rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _sine(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x)


def _uniform(generator: Generator | None) -> Tensor:
    return torch.rand(N, dtype=torch.float64, generator=generator)


def _mean_fit(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda inputs: y.mean().expand(len(inputs))


def _decomposition() -> Sample:
    """The quickest use of the functions that refit: the mean of random labels."""
    args = (_mean_fit, random_design(_uniform, _sine, SIGMA), torch.linspace(0, 1, 4, dtype=torch.float64), _sine)
    return Sample(bias_variance_decompose, args, {"sigma": SIGMA, "n_rep": 3})


def _on_data() -> Sample:
    args = (_mean_fit, subsets(_random(30), _random(30, seed=1), 5), _random(4), _random(4, seed=2))
    return Sample(bias_variance_on_data, args, {"n_rep": 3})


CONTRACT = {"bias_variance_decompose": _decomposition, "bias_variance_on_data": _on_data}


@pytest.fixture(scope="module")
def in_sample() -> tuple[Tensor, BiasVariance]:
    """Fixed design with errors at the training inputs: there the parts are known in closed form."""
    x = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    parts = bias_variance_decompose(
        polynomial_curve(DEGREES, DOMAIN),
        fixed_design(x, _sine, SIGMA),
        x,
        _sine,
        sigma=SIGMA,
        n_rep=REPS,
        generator=_rng(),
    )
    return x, parts


@pytest.fixture(scope="module")
def out_of_sample() -> BiasVariance:
    """Random design, errors at new inputs."""
    return bias_variance_decompose(
        polynomial_curve(DEGREES, DOMAIN),
        random_design(_uniform, _sine, SIGMA),
        torch.linspace(0, 1, 40, dtype=torch.float64),
        _sine,
        sigma=SIGMA,
        n_rep=REPS,
        generator=_rng(),
    )


class TestSquaredBiasAndVariance:
    @pytest.mark.parametrize("n_rep", [2, 3, 5])
    def test_both_are_unbiased_for_any_number_of_fits(self, n_rep: int) -> None:
        # A model that predicts one of three values with equal probability: all outcomes of n_rep fits, enumerated.
        values, truth = [0.2, 1.0, 2.5], 0.7
        outcomes = torch.tensor(list(itertools.product(values, repeat=n_rep)), dtype=torch.float64).T
        bias2, variance = squared_bias_and_variance(
            outcomes, torch.full(outcomes.shape[1:], truth, dtype=outcomes.dtype)
        )
        assert bias2.mean().item() == pytest.approx((np.mean(values) - truth) ** 2, rel=1e-12)
        assert variance.mean().item() == pytest.approx(np.var(values), rel=1e-12)
        plain = (outcomes.mean(0) - truth).square().mean().item()
        assert plain - bias2.mean().item() == pytest.approx(np.var(values) / n_rep, rel=1e-12)

    def test_every_model_is_measured_by_itself(self) -> None:
        predictions, truth = _random(4, 5, 3), _random(5, seed=1)
        bias2, variance = squared_bias_and_variance(predictions, truth)
        assert bias2.shape == variance.shape == (5, 3)
        for model in range(3):
            alone = squared_bias_and_variance(predictions[..., model], truth)
            torch.testing.assert_close((bias2[:, model], variance[:, model]), alone)

    @settings(max_examples=20)
    @given(n_rep=st.integers(2, 6), points=st.integers(1, 7), seed=st.integers(0, 99))
    def test_they_add_up_to_the_mean_squared_error_for_any_targets(self, n_rep: int, points: int, seed: int) -> None:
        predictions, labels = _random(n_rep, points, seed=seed), _random(points, seed=seed + 100)
        bias2, variance = squared_bias_and_variance(predictions, labels)
        torch.testing.assert_close(bias2 + variance, (predictions - labels).square().mean(0))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="number of fits: expected at least 2, got 1"):
            squared_bias_and_variance(torch.ones(1, 3), torch.ones(3))
        with pytest.raises(ValueError, match="predictions has 4, truth has 1"):
            squared_bias_and_variance(torch.ones(2, 4), torch.ones(1))
        with pytest.raises(ValueError, match="truth: expected 1 dimensions"):
            squared_bias_and_variance(torch.ones(2, 4), torch.ones(4, 1))
        with pytest.raises(ValueError, match="predictions: expected finite"):
            squared_bias_and_variance(torch.ones(2, 4) / 0, torch.ones(4))
        with pytest.raises(ValueError, match="truth: expected finite"):
            squared_bias_and_variance(torch.ones(2, 4), torch.ones(4) / 0)
        with pytest.raises(ValueError, match="predictions: expected 2 or 3 dimensions"):
            squared_bias_and_variance(torch.ones(4), torch.ones(4))


class TestClosedForms:
    def test_fixed_design_variance_is_sigma2_p_over_n(self, in_sample: tuple[Tensor, BiasVariance]) -> None:
        measured = in_sample[1].means()["variance"]
        for column, degree in enumerate(DEGREES):
            p = degree + 1
            # The mean over the training points is sigma^2 / n times a chi^2 of p (M - 1) degrees of freedom / (M - 1).
            standard_error = SIGMA**2 / N * math.sqrt(2 * p / (REPS - 1))
            assert measured[column].item() == pytest.approx(SIGMA**2 * p / N, abs=5 * standard_error)

    def test_fixed_design_bias_is_what_the_projection_leaves(self, in_sample: tuple[Tensor, BiasVariance]) -> None:
        x, parts = in_sample
        truth = np.sin(2 * np.pi * x.numpy())
        measured = parts.means()["bias2"]
        for column, degree in enumerate(DEGREES):
            p = degree + 1
            left = truth - np.polynomial.Polynomial.fit(x.numpy(), truth, degree)(x.numpy())
            # The mean of the fits is off by sigma^2 / (n M) times a chi^2 of p degrees of freedom, less its estimate.
            standard_error = SIGMA**2 / (N * REPS) * math.sqrt(2 * p + 2 * p / (REPS - 1))
            assert measured[column].item() == pytest.approx(np.mean(left**2), abs=5 * standard_error)

    def test_fixed_design_bias_falls_and_variance_rises_with_the_degree(
        self, in_sample: tuple[Tensor, BiasVariance]
    ) -> None:
        x, parts = in_sample
        assert (parts.means()["variance"].diff() > 0).all()  # nested projections: true of every sample
        exact = bias_variance_decompose(
            polynomial_curve(DEGREES, DOMAIN), fixed_design(x, _sine, 0.0), x, _sine, sigma=0.0, n_rep=2
        ).means()
        assert (exact["bias2"].diff() <= 1e-15).all()
        assert exact["bias2"][0].item() == pytest.approx(0.5)
        assert exact["bias2"][-1] < 1e-9
        torch.testing.assert_close(exact["mse"], exact["train_mse"])

    def test_interpolation_in_fixed_design_costs_twice_the_noise(self) -> None:
        x = -torch.cos(math.pi * (torch.arange(5, dtype=torch.float64) + 0.5) / 5)
        curve = polynomial_curve([4, 9])
        means = bias_variance_decompose(
            curve, fixed_design(x, _sine, 1.0), x, _sine, sigma=1.0, n_rep=100, generator=_rng()
        ).means()
        # (label - noisy label)^2 is 2 chi^2 of one degree of freedom; the two parts have to be 0 and 1.
        torch.testing.assert_close(means["mse"], torch.full((2,), 2.0).double(), rtol=0, atol=5 * math.sqrt(8 / 500))
        torch.testing.assert_close(means["variance"], torch.ones(2).double(), rtol=0, atol=5 * math.sqrt(2 / 500))
        assert (means["train_mse"] < 1e-20).all()

    def test_constant_predictor_has_var_y_over_n(
        self, in_sample: tuple[Tensor, BiasVariance], out_of_sample: BiasVariance
    ) -> None:
        relative_error = math.sqrt(2 / (REPS - 1))  # of the variance of a nearly normal mean
        fixed, random = in_sample[1].variance[:, 0], out_of_sample.variance[:, 0]
        assert fixed.std() < 1e-15
        assert random.std() < 1e-15
        assert fixed[0].item() == pytest.approx(SIGMA**2 / N, rel=5 * relative_error)
        assert random[0].item() == pytest.approx((SIGMA**2 + 0.5) / N, rel=5 * relative_error)

    @pytest.mark.parametrize("design", ["fixed", "random"])
    def test_the_parts_add_up_to_the_measured_error(
        self, design: str, in_sample: tuple[Tensor, BiasVariance], out_of_sample: BiasVariance
    ) -> None:
        parts = in_sample[1] if design == "fixed" else out_of_sample
        assert (parts.noise == SIGMA**2).all()
        # Given the fits, the measured error differs from the sum by the mean of e^2 - sigma^2 - 2 e (f_m - f^*).
        reducible = (parts.bias2 + parts.variance).double()
        variance = (2 * SIGMA**4 + 4 * SIGMA**2 * reducible.mean(0)) / (REPS * len(reducible))
        gap = (parts.mse - reducible - parts.noise).mean(0)
        assert (gap.abs() <= 5 * variance.sqrt()).all()
        assert (gap != 0).all()  # measured, not added up
        per_point = (parts.mse - reducible - parts.noise).abs()
        assert (per_point <= 5 * ((2 * SIGMA**4 + 4 * SIGMA**2 * reducible) / REPS).sqrt()).all()

    def test_subsets_of_a_pool_have_the_finite_population_variance(self) -> None:
        y = _random(9)
        n, reps = 4, 300
        parts = bias_variance_on_data(
            _mean_fit, subsets(y, y, n), y[:2], torch.tensor([3.0, 5.0]), n_rep=reps, generator=_rng(1)
        )
        means = [float(y[list(rows)].mean()) for rows in itertools.combinations(range(9), n)]
        assert np.var(means) == pytest.approx(float(y.var()) / n * (1 - n / 9))
        fourth = np.mean((np.array(means) - np.mean(means)) ** 4)
        standard_error = math.sqrt((fourth - np.var(means) ** 2) / reps)
        assert parts.variance[0].item() == pytest.approx(np.var(means), abs=5 * standard_error)
        slack = 5 * math.sqrt(np.var(means) / reps)
        assert math.sqrt(parts.bias2_and_noise[1].item()) == pytest.approx(5 - np.mean(means), abs=slack)
        torch.testing.assert_close(parts.mse, parts.bias2_and_noise + parts.variance)


class TestUCurve:
    def test_the_best_degree_is_inside_and_training_error_only_falls(self, out_of_sample: BiasVariance) -> None:
        means = out_of_sample.means()
        best = int(means["mse"].argmin())
        assert 0 < best < len(DEGREES) - 1
        assert means["mse"][0] > 2 * means["mse"][best]
        assert means["mse"][-1] > 2 * means["mse"][best]
        assert (out_of_sample.train_mse.diff(dim=1) <= 1e-12).all()  # on every training set
        assert out_of_sample.train_mse.shape == (REPS, len(DEGREES))

    def test_training_error_is_sigma2_times_one_minus_p_over_n(self, in_sample: tuple[Tensor, BiasVariance]) -> None:
        # Residuals of a degree that holds the truth (bias below 1e-5) are sigma^2 chi^2 of n - p degrees of freedom.
        measured = in_sample[1].means()["train_mse"]
        for column, degree in enumerate(DEGREES):
            if degree < 7:
                continue
            dof = N - degree - 1
            standard_error = SIGMA**2 / N * math.sqrt(2 * dof / REPS)
            assert measured[column].item() == pytest.approx(SIGMA**2 * dof / N, abs=5 * standard_error)

    def test_reduces_to_mean_as_minimal_model(self) -> None:
        x, y = _random(7).tanh(), _random(7, seed=1)
        predicted = polynomial_curve([0])(x, y)(torch.linspace(-1, 1, 4))
        torch.testing.assert_close(predicted, y.mean().expand(4, 1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_reduces_to_numpy_legfit(self, dtype: torch.dtype) -> None:
        x, y = _random(2, 11, dtype=dtype).tanh().T[:, 0], _random(11, 2, seed=1, dtype=dtype)[:, 1]
        grid = torch.linspace(-1, 1, 9, dtype=dtype)
        predicted = polynomial_curve([6, 1])(x, y)(grid)
        assert predicted.dtype == torch.float64
        for column, degree in enumerate([6, 1]):
            expected = legendre.legval(
                grid.double().numpy(), legendre.legfit(x.double().numpy(), y.double().numpy(), degree)
            )
            np.testing.assert_allclose(predicted[:, column].numpy(), expected, rtol=1e-9)

    @pytest.mark.parametrize("degree", [4, 5, 12, 60])
    def test_reduces_to_min_norm_interpolation(self, degree: int) -> None:
        x, y = torch.tensor([-0.9, -0.2, 0.1, 0.5, 1.0]).double(), _random(5)
        predict = polynomial_curve([degree])(x, y)
        torch.testing.assert_close(predict(x)[:, 0], y, rtol=0, atol=1e-11)
        norms = np.sqrt(2 * np.arange(degree + 1) + 1)
        coefficients = np.linalg.pinv(legendre.legvander(x.numpy(), degree) * norms) @ y.numpy()
        grid = np.linspace(-1, 1, 8)
        expected = (legendre.legvander(grid, degree) * norms) @ coefficients
        np.testing.assert_allclose(predict(torch.from_numpy(grid))[:, 0].numpy(), expected, rtol=1e-8)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_degrees(self) -> None:
        with pytest.raises(ValueError, match="degrees: expected at least one"):
            polynomial_curve([])
        with pytest.raises(ValueError, match="degrees: expected at least 0, got -1"):
            polynomial_curve([2, -1])
        with pytest.raises(TypeError, match="degrees: expected a whole number"):
            polynomial_curve([1.5])
        with pytest.raises(ValueError, match="x: expected values from 0"):
            polynomial_curve([1], DOMAIN)(torch.tensor([-0.5, 0.5]), torch.ones(2))


class TestLegendreFeatures:
    @pytest.mark.parametrize("domain", [(-1.0, 1.0), (2.0, 5.0), (-7.0, -6.5)])
    def test_orthonormal_on_the_domain(self, domain: tuple[float, float]) -> None:
        nodes, weights = legendre.leggauss(12)
        low, high = domain
        x = torch.from_numpy((low + high) / 2 + (high - low) / 2 * nodes)
        phi = legendre_features(x, 9, domain).numpy()
        np.testing.assert_allclose(phi.T @ (weights[:, None] / 2 * phi), np.eye(10), atol=1e-12)

    @pytest.mark.parametrize("degree", [0, 1, 2, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_values_at_the_ends(self, degree: int, dtype: torch.dtype) -> None:
        phi = legendre_features(torch.tensor([-1.0, 1.0], dtype=dtype), degree)
        k = torch.arange(degree + 1)
        expected = torch.stack([(-1.0) ** k, 1.0**k]) * (2 * k + 1) ** 0.5
        assert phi.shape == (2, degree + 1)
        torch.testing.assert_close(phi, expected.to(dtype))

    def test_the_ends_of_the_domain_are_inside_whatever_the_rounding(self) -> None:
        low, high = 0.1, 0.1 + 0.7
        ends = torch.tensor([low, high], dtype=torch.float64)
        torch.testing.assert_close(
            legendre_features(ends, 3, (low, high)).abs()[0], torch.arange(1, 8, 2).double() ** 0.5
        )

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = torch.tensor([0.0, 0.5])
        with pytest.raises(ValueError, match=r"x: expected values from 0\.1 to 1\.0, got 0\.0 to 0\.5"):
            legendre_features(x, 2, (0.1, 1.0))
        with pytest.raises(ValueError, match=r"x: expected values from -1\.0 to 0\.4, got 0\.0 to 0\.5"):
            legendre_features(x, 2, (-1.0, 0.4))
        for domain in [(1.0, 1.0), (1.0, -1.0), (-math.inf, 1.0), (0.0, math.nan)]:
            with pytest.raises(ValueError, match="domain: expected finite ends in ascending order"):
                legendre_features(x, 2, domain)
        with pytest.raises(ValueError, match="degree: expected at least 0, got -1"):
            legendre_features(x, -1)
        with pytest.raises(ValueError, match="x: expected finite"):
            legendre_features(x / 0, 2)
        with pytest.raises(ValueError, match="x: expected at least one entry"):
            legendre_features(x[:0], 2)


class TestSamplers:
    def test_fixed_design_keeps_the_inputs_and_random_design_does_not(self) -> None:
        generator = _rng()
        fixed, random = fixed_design(torch.ones(4), _sine, 0.1), random_design(_uniform, _sine, 0.1)
        (x, y), (x_again, y_again) = fixed(generator), fixed(generator)
        assert torch.equal(x, x_again)
        assert not torch.equal(y, y_again)
        assert not torch.equal(random(generator)[0], random(generator)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_labels_are_the_truth_and_noise(self, dtype: torch.dtype) -> None:
        n = 20_000
        x, y = fixed_design(torch.full((n,), 0.25, dtype=dtype), _sine, 0.3)(_rng())
        assert x.dtype == y.dtype == dtype
        assert y.mean().item() == pytest.approx(1.0, abs=5 * 0.3 / math.sqrt(n))
        assert y.var().item() == pytest.approx(0.09, rel=5 * math.sqrt(2 / n))
        assert torch.equal(fixed_design(x, _sine, 0.0)(_rng())[1], _sine(x))

    def test_subsets_are_rows_of_the_pool_without_repetition(self) -> None:
        x, y = _random(6, 2), torch.arange(6.0)
        sample, generator, seen = subsets(x, y, 5), _rng(), set()
        for _ in range(40):
            rows, labels = sample(generator)
            assert len(set(labels.tolist())) == 5
            assert torch.equal(rows, x[labels.long()])
            seen |= set(labels.tolist())
        assert seen == set(range(6))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, y = _random(6, 2), _random(6)
        with pytest.raises(ValueError, match="n_train: expected fewer than the 6 rows of the pool, got 6"):
            subsets(x, y, 6)
        with pytest.raises(ValueError, match="n_train: expected at least 1, got 0"):
            subsets(x, y, 0)
        with pytest.raises(ValueError, match="x has 6, y has 5"):
            subsets(x, y[:5], 2)
        with pytest.raises(ValueError, match="y: expected finite"):
            subsets(x, y / 0, 2)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            random_design(_uniform, _sine, -1.0)
        with pytest.raises(ValueError, match="sigma: expected a finite number"):
            fixed_design(x, _sine, math.nan)


class TestAnyFit:
    def test_takes_matrices_and_any_model(self) -> None:
        coefficients = torch.tensor([1.0, -2.0, 0.5])
        x = _random(2, 3, 8, dtype=torch.float32)[0].T  # [8, 3], not contiguous

        def plane(inputs: Tensor) -> Tensor:
            return inputs @ coefficients

        def fit(inputs: Tensor, labels: Tensor) -> torch.nn.Module:
            model = torch.nn.Linear(3, 1, bias=False)
            solution = np.linalg.lstsq(inputs.numpy(), labels.numpy(), rcond=None)[0]
            model.weight.data[0] = torch.from_numpy(solution)
            return torch.nn.Sequential(model, torch.nn.Flatten(0))

        reps, sigma = 60, 0.7
        parts = bias_variance_decompose(
            fit, fixed_design(x, plane, sigma), x, plane, sigma=sigma, n_rep=reps, generator=_rng()
        )
        assert not parts.mse.requires_grad  # although the model's weights do
        with pytest.raises(dataclasses.FrozenInstanceError):
            parts.mse = parts.bias2
        means = parts.means()
        assert set(means) == {"bias2", "variance", "noise", "mse", "train_mse"}
        assert all(value.shape == () and value.dtype == torch.float64 for value in means.values())
        assert parts.bias2.shape == parts.variance.shape == parts.noise.shape == parts.mse.shape == (8,)
        expected = sigma**2 * 3 / 8
        assert means["variance"].item() == pytest.approx(expected, rel=5 * math.sqrt(2 / (3 * (reps - 1))))
        assert abs(means["bias2"].item()) < 5 * expected / reps

    def test_a_model_alone_is_measured_as_among_others(self) -> None:
        x, y = _uniform(_rng()), _random(N)
        pool = subsets(x, y, 6)

        def alone(inputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda at: polynomial_curve([2], DOMAIN)(inputs, labels)(at)[:, 0]

        one = bias_variance_on_data(alone, pool, x, y, n_rep=5, generator=_rng())
        two = bias_variance_on_data(polynomial_curve([4, 2], DOMAIN), pool, x, y, n_rep=5, generator=_rng())
        assert one != two
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.mse = two.mse
        assert one.mse.shape == (N,)
        assert two.mse.shape == (N, 2)
        for name in ("bias2_and_noise", "variance", "mse", "train_mse"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name)[:, 1])

    def test_the_generator_decides_and_200_training_sets_are_drawn(self) -> None:
        def measure(seed: int) -> BiasVariance:
            sampler = random_design(_uniform, _sine, SIGMA)
            return bias_variance_decompose(
                _mean_fit, sampler, torch.rand(3, generator=_rng(1)), _sine, sigma=1.0, generator=_rng(seed)
            )

        first, again, other = measure(0), measure(0), measure(1)
        assert torch.equal(first.mse, again.mse)
        assert first != again  # objects that hold tensors are compared by identity, without an error
        assert not torch.equal(first.mse, other.mse)
        assert not torch.equal(first.variance, other.variance)
        assert first.train_mse.shape == (200,)
        data = bias_variance_on_data(_mean_fit, subsets(torch.ones(5), torch.ones(5), 2), torch.ones(3), torch.ones(3))
        assert data.train_mse.shape == (200,)
        assert set(data.means()) == {"bias2_and_noise", "variance", "mse", "train_mse"}

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, sampler = torch.rand(4), fixed_design(torch.rand(5), _sine, 0.1)

        def run(**changes: object) -> None:
            arguments = {"fit": _mean_fit, "sampler": sampler, "x_test": x, "f_true": _sine, "sigma": 1.0, "n_rep": 2}
            bias_variance_decompose(**(arguments | changes))

        run()
        with pytest.raises(ValueError, match="n_rep: expected at least 2, got 1"):
            run(n_rep=1)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            run(sigma=-0.1)
        with pytest.raises(ValueError, match="x_test: expected finite"):
            run(x_test=x / 0)
        with pytest.raises(ValueError, match="x_test: expected at least one entry"):
            run(x_test=x[:0])
        with pytest.raises(ValueError, match="x_test has 4, labels of x_test has 3"):
            run(f_true=lambda inputs: torch.ones(3))
        with pytest.raises(ValueError, match="inputs has 4, predictions has 1"):
            run(fit=lambda inputs, labels: lambda at: torch.ones(1))
        with pytest.raises(ValueError, match="predictions: expected 1 or 2 dimensions"):
            run(fit=lambda inputs, labels: lambda at: torch.tensor(1.0))
        with pytest.raises(ValueError, match="predictions: expected finite"):
            run(fit=lambda inputs, labels: lambda at: at / 0)
        with pytest.raises(ValueError, match="y: expected finite"):
            run(sampler=lambda generator: (x, x / 0))
        with pytest.raises(ValueError, match="x has 4, y has 3"):
            run(sampler=lambda generator: (x, x[1:]))
        with pytest.raises(ValueError, match="labels of x_test: expected finite"):
            bias_variance_on_data(_mean_fit, sampler, x, x / 0)
        with pytest.raises(ValueError, match="n_rep: expected at least 2"):
            bias_variance_on_data(_mean_fit, sampler, x, x, n_rep=0)
