import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize
from torch import Tensor

from mlreviews.common.least_squares import ridge_solve
from mlreviews.generalization import (
    cosine_features,
    gap_interpolant,
    gd_interpolate,
    gd_limit,
    gradient_flow,
    min_norm_interpolate,
    natural_cubic_spline,
    roughness,
)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=tolerance)


class TestMinNorm:
    def test_every_other_interpolant_is_longer(self) -> None:
        phi, y = _random(4, 7), _random(4, 3, seed=1)
        weights = min_norm_interpolate(phi, y)
        _close(phi @ weights, y)
        null = torch.linalg.svd(phi).Vh[4:].T
        for seed in range(5):
            other = weights + 1e-3 * null @ _random(3, 3, seed=seed)
            _close(phi @ other, y)
            assert (other.norm(dim=0) > weights.norm(dim=0)).all()

    def test_weighted_norm_is_the_constrained_minimum(self) -> None:
        phi, y, penalty = _random(3, 5), _random(3, seed=1), torch.tensor([0.2, 5.0, 1.0, 30.0, 0.7]).double()
        found = minimize(
            lambda w: (penalty.numpy() * w**2).sum(),
            np.zeros(5),
            jac=lambda w: 2 * penalty.numpy() * w,
            constraints={"type": "eq", "fun": lambda w: phi.numpy() @ w - y.numpy(), "jac": lambda w: phi.numpy()},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        _close(min_norm_interpolate(phi, y, penalty=penalty), found.x, 1e-6)
        several = min_norm_interpolate(phi, torch.stack([y, -2 * y], dim=1), penalty=penalty)
        _close(several[:, 1], -2 * several[:, 0])
        _close(several[:, 0], found.x, 1e-6)

    def test_a_common_factor_of_the_penalties_changes_nothing(self) -> None:
        phi, y = _random(3, 5), _random(3, seed=1)
        _close(min_norm_interpolate(phi, y, penalty=torch.full((5,), 7.0)), min_norm_interpolate(phi, y))

    def test_reduces_to_pinv(self) -> None:
        for n, p in [(4, 7), (7, 4), (5, 5)]:
            phi, y = _random(p, n).T, _random(n, seed=1)
            _close(min_norm_interpolate(phi, y), torch.linalg.pinv(phi) @ y)

    def test_reduces_to_ridge_regression_in_the_limit(self) -> None:
        phi, y = _random(4, 7), _random(4, seed=1)
        limit = min_norm_interpolate(phi, y)
        gaps = [float((ridge_solve(phi, y, ridge) - limit).norm()) for ridge in (1e-3, 1e-4, 1e-5)]
        assert gaps[0] < 1e-2
        assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.01)  # the distance is linear in the ridge
        assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.01)

    def test_reduces_to_kernel_interpolation(self) -> None:
        phi, phi_new, y, penalty = _random(4, 9), _random(6, 9, seed=2), _random(4, seed=1), _random(9, seed=3).exp()
        kernel = np.einsum("ip,p,jp->ij", phi, 1 / penalty, phi)
        across = np.einsum("ip,p,jp->ij", phi_new, 1 / penalty, phi)
        predictions = phi_new @ min_norm_interpolate(phi, y, penalty=penalty)
        _close(predictions, across @ np.linalg.solve(kernel, y.numpy()))

    def test_reduces_to_mean_as_minimal_model(self) -> None:
        y = _random(5)
        _close(min_norm_interpolate(torch.ones(5, 1).double(), y), y.mean()[None])

    @given(st.integers(1, 6), st.integers(0, 10_000))
    @settings(max_examples=20)
    def test_the_norm_never_rises_with_nested_features(self, n: int, seed: int) -> None:
        phi, y, penalty = _random(n, 3 * n + 2, seed=seed), _random(n, seed=seed + 1), _random(3 * n + 2, seed=2).exp()
        for d in (None, penalty):
            sizes = []
            for width in range(n, phi.shape[1] + 1):
                weights = min_norm_interpolate(phi[:, :width], y, penalty=None if d is None else d[:width])
                sizes.append(float((weights.square() * (1 if d is None else d[:width])).sum()))
            assert all(b <= a * (1 + 1e-9) for a, b in pairwise(sizes))

    def test_dtype_of_the_features(self) -> None:
        phi, y = _random(3, 5), _random(3, seed=1)
        exact = min_norm_interpolate(phi, y, penalty=torch.arange(1.0, 6.0))
        single = min_norm_interpolate(phi.float(), y, penalty=torch.arange(1.0, 6.0))
        assert exact.dtype == torch.float64
        assert single.dtype == torch.float32
        _close(single.double(), exact, 1e-5)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi, y = _random(3, 5), _random(3)
        with pytest.raises(ValueError, match="penalty: expected a positive number for each of 5 features"):
            min_norm_interpolate(phi, y, penalty=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
        with pytest.raises(ValueError, match=r"penalty: .* got shape \(4,\)"):
            min_norm_interpolate(phi, y, penalty=torch.ones(4))
        with pytest.raises(ValueError, match="penalty: expected 1 dimensions"):
            min_norm_interpolate(phi, y, penalty=torch.ones(5, 1))
        with pytest.raises(ValueError, match="features: expected finite"):
            min_norm_interpolate(phi / 0, y, penalty=torch.ones(5))
        with pytest.raises(ValueError, match="same number of rows"):
            min_norm_interpolate(phi, y[:2], penalty=torch.ones(5))


class TestGradientDescent:
    @pytest.mark.parametrize(("n", "p", "k"), [(4, 9, 2), (9, 4, 3)])
    def test_ends_at_the_solution_nearest_to_its_start(self, n: int, p: int, k: int) -> None:
        phi, y, start = _random(p, n).T, _random(n, k, seed=1), _random(p, k, seed=2)
        inverse = torch.linalg.pinv(phi)
        from_zero, _ = gd_interpolate(phi, y, 3000)
        _close(from_zero, inverse @ y, 1e-9)
        weights, _ = gd_interpolate(phi, y, 3000, start=start)
        limit = start + inverse @ (y - phi @ start)
        _close(weights, limit, 1e-9)
        _close(gd_limit(phi, y, start), limit)

    def test_steps_follow_the_gradient(self) -> None:
        phi, y, start = _random(3, 5), _random(3, 2, seed=1), _random(5, 2, seed=2)
        expected, errors = start, []
        for _ in range(5):
            w = expected.clone().requires_grad_()
            loss = (phi @ w - y).square().sum() / 2
            errors.append(loss.item() / 3)  # twice the loss, over the 3 x 2 entries
            loss.backward()
            assert w.grad is not None
            expected, last = expected - 0.02 * w.grad, expected
        weights, history = gd_interpolate(phi, y, 4, start=start, step_size=0.02)
        _close(weights, last)
        _close(history, torch.tensor(errors, dtype=torch.float64))

    def test_the_default_step_is_half_the_largest_stable_one(self) -> None:
        phi, y = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.ones(2).double()
        weights, errors = gd_interpolate(phi, y, 1)
        _close(weights, torch.tensor([1 / 4, 1 / 16]).double())  # done in one step along the largest singular value
        _close(errors, torch.tensor([1.0, (15 / 16) ** 2 / 2]).double())
        for fraction in (1e-3, 0.999):
            _, errors = gd_interpolate(phi, y, 20, step_size=fraction * 2 / 16)
            assert (errors.diff() < 0).all()
        with pytest.raises(ValueError, match=r"step_size: expected a number above 0 and below 0\.125, got 0\.125"):
            gd_interpolate(phi, y, 1, step_size=2 / 16)
        with pytest.raises(ValueError, match="step_size"):
            gd_interpolate(phi, y, 1, step_size=0.0)
        with pytest.raises(ValueError, match="step_size"):
            gd_interpolate(phi, y, 1, step_size=math.nan)

    def test_nothing_to_do(self) -> None:
        phi, y, start = _random(3, 5), _random(3, seed=1), _random(5, seed=2)
        weights, errors = gd_interpolate(phi, y, 0, start=start)
        assert torch.equal(weights, start)
        _close(errors, (phi @ start - y).square().mean()[None])
        weights, errors = gd_interpolate(torch.zeros(3, 5), y, 2)
        assert torch.equal(weights, torch.zeros(5))
        _close(errors, y.square().mean().expand(3))

    @pytest.mark.parametrize(("n", "p"), [(4, 7), (7, 4)])
    def test_gradient_flow_solves_its_differential_equation(self, n: int, p: int) -> None:
        phi, y, start = _random(n, p), _random(n, 2, seed=1), _random(p, 2, seed=2)
        _close(gradient_flow(phi, y, 0.0, start=start), start)
        for time in (0.05, 0.7):
            at = gradient_flow(phi, y, time, start=start)
            step = 1e-5
            slope = (
                gradient_flow(phi, y, time + step, start=start) - gradient_flow(phi, y, time - step, start=start)
            ) / (2 * step)
            _close(slope, -phi.T @ (phi @ at - y), 1e-6)

    def test_gradient_flow_is_the_limit_of_small_steps_and_ends_where_descent_ends(self) -> None:
        phi, y, start = _random(4, 7), _random(4, seed=1), _random(7, seed=2)
        flow = gradient_flow(phi, y, 0.3, start=start)
        gaps = []
        for steps in (1000, 2000):
            weights, _ = gd_interpolate(phi, y, steps, start=start, step_size=0.3 / steps)
            gaps.append(float((weights - flow).norm()))
        assert gaps[0] < 0.01
        assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)  # Euler's method is of first order
        _close(gradient_flow(phi, y, 1e6, start=start), gd_limit(phi, y, start))
        _close(gradient_flow(phi, y, 1e6), min_norm_interpolate(phi, y))

    def test_directions_without_signal_do_not_move(self) -> None:
        phi = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3e-16, 0.0]]).double()
        moved = gradient_flow(
            phi, torch.tensor([3.0, 5.0]).double(), 1e40, start=torch.tensor([0.0, 2.0, 4.0]).double()
        )
        _close(moved, torch.tensor([3.0, 2.0, 4.0]).double())
        phi[1, 1] = 1e-14
        moved = gradient_flow(phi, torch.tensor([3.0, 5.0]).double(), 1e40)
        _close(moved / torch.tensor([1.0, 1e14, 1.0]), torch.tensor([3.0, 5.0, 0.0]).double(), 0.1)

    def test_dtype_of_the_features(self) -> None:
        phi, y, start = _random(3, 5).float(), _random(3, seed=1), _random(5, seed=2)
        results = [gd_interpolate(phi, y, 2, start=start)[0], gd_limit(phi, y, start), gradient_flow(phi, y, 1.0)]
        assert all(result.dtype == torch.float32 for result in results)
        assert gd_interpolate(phi, y, 2)[1].dtype == torch.float64

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi, y = _random(3, 5), _random(3, seed=1)
        with pytest.raises(ValueError, match=r"start: expected shape \(5,\), got \(5, 1\)"):
            gd_interpolate(phi, y, 1, start=torch.zeros(5, 1))
        with pytest.raises(ValueError, match="steps: expected at least 0"):
            gd_interpolate(phi, y, -1)
        with pytest.raises(ValueError, match="time: expected at least 0"):
            gradient_flow(phi, y, -0.1)
        with pytest.raises(ValueError, match="start: expected finite"):
            gd_limit(phi, y, torch.full((5,), math.nan))
        with pytest.raises(ValueError, match="same number of rows, but features has 3, targets has 2"):
            gradient_flow(phi, y[:2], 1.0)
        with pytest.raises(ValueError, match="targets: expected finite"):
            gd_limit(phi, y / 0, torch.zeros(5))
        with pytest.raises(ValueError, match="features: expected at least one entry"):
            gd_limit(phi[:0], y[:0], torch.zeros(5))


class TestRoughness:
    def test_is_the_mean_absolute_second_derivative(self) -> None:
        grid = torch.linspace(-2, 3, 101, dtype=torch.float64)
        assert roughness(lambda x: -3 * x**2 + 7 * x, grid) == pytest.approx(6)
        assert roughness(lambda x: 5 * x - 1, grid) == pytest.approx(0, abs=1e-10)
        fine = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
        assert roughness(lambda x: torch.sin(3 * x), fine) == pytest.approx(9 * 2 / math.pi, rel=1e-3)

    def test_a_kink_counts_by_its_angle(self) -> None:
        grid = torch.linspace(-1, 1, 5, dtype=torch.float64)  # spacing 1/2, three second differences
        assert roughness(lambda x: x.abs(), grid) == pytest.approx((0 + 1 + 0) / 0.25 / 3)

    def test_along_a_line_in_space_and_for_several_values(self) -> None:
        start, along = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 1.0, -2.0])  # a vector of length 3
        line = start + torch.linspace(0, 1, 11)[:, None] * along

        def predict(x: Tensor) -> Tensor:
            position = (x.double() - start) @ (along / 3).double()
            return torch.stack([position**2, 3 * position], dim=1)

        assert roughness(predict, line) == pytest.approx((2 + 0) / 2, rel=1e-5)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="grid: expected at least 3 points, got 2"):
            roughness(torch.sin, torch.linspace(0, 1, 2))
        with pytest.raises(ValueError, match="grid: expected evenly spaced points"):
            roughness(torch.sin, torch.tensor([0.0, 1.0, 2.1, 3.0]))  # the first step is the mean step
        with pytest.raises(ValueError, match="grid: expected evenly spaced points"):
            roughness(torch.sin, torch.tensor([0.0, 1.0, 0.0]))
        with pytest.raises(ValueError, match="grid: expected evenly spaced points"):
            roughness(torch.sin, torch.ones(4))
        with pytest.raises(ValueError, match="values of predict: expected finite"):
            roughness(torch.log, torch.linspace(0, 1, 4))
        with pytest.raises(ValueError, match="grid has 4, values has 1"):
            roughness(lambda x: x[:1], torch.linspace(0, 1, 4))


class TestNaturalCubicSpline:
    @pytest.mark.parametrize("n", [2, 3, 4, 9, 60])
    def test_equals_scipy(self, n: int) -> None:
        rng = np.random.default_rng(n)
        x, y = np.sort(rng.uniform(-3, 5, n)), rng.normal(size=n)
        peer = CubicSpline(x, y, bc_type="natural")
        at = np.concatenate([x, rng.uniform(x[0], x[-1], 50)])
        found = natural_cubic_spline(torch.tensor(x), torch.tensor(y), torch.tensor(at))
        np.testing.assert_allclose(found, peer(at), atol=1e-10 * np.abs(peer(at)).max())

    def test_is_a_straight_line_outside(self) -> None:
        x, y = np.array([-1.0, 0.5, 1.0, 3.0]), np.array([2.0, -1.0, 0.5, -4.0])
        peer = CubicSpline(x, y, bc_type="natural")
        outside = np.array([-4.0, -1.5, 3.5, 10.0])
        end = np.clip(outside, -1, 3)
        found = natural_cubic_spline(torch.tensor(x), torch.tensor(y), torch.tensor(outside))
        np.testing.assert_allclose(found, peer(end) + (outside - end) * peer(end, 1), rtol=1e-12)

    def test_no_interpolant_bends_less(self) -> None:
        x, y = np.array([0.0, 1.0, 2.5, 3.0, 5.0]), np.array([1.0, -1.0, 0.5, 2.0, 0.0])
        grid = torch.linspace(0, 5, 5001, dtype=torch.float64)

        def bending(values: Tensor) -> float:
            return float(values.diff(n=2).square().sum()) / 1e-3**3

        least = bending(natural_cubic_spline(torch.tensor(x), torch.tensor(y), grid))
        others = [CubicSpline(x, y, bc_type=kind)(grid) for kind in ("not-a-knot", "clamped")]
        bump = torch.tensor(np.prod([(grid.numpy() - knot) for knot in x], axis=0))
        spline = natural_cubic_spline(torch.tensor(x), torch.tensor(y), grid)
        assert all(bending(torch.tensor(other)) > least * 1.01 for other in others)
        assert all(bending(spline + c * bump) > least for c in (-1e-3, 1e-3))

    def test_reduces_to_natural_cubic_spline_in_the_limit_of_many_relu_features(self) -> None:
        x, y = torch.tensor([0.0, 1.0, 2.0, 3.5, 4.0]).double(), torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0]).double()
        grid = torch.linspace(0, 4, 81, dtype=torch.float64)
        spline = natural_cubic_spline(x, y, grid)
        gaps = []
        for units in (40, 400):
            thresholds = torch.linspace(0, 4, units + 1, dtype=torch.float64)[:-1] + 2 / units

            def features(points: Tensor, thresholds: Tensor = thresholds) -> Tensor:
                line = torch.stack([torch.ones_like(points), points], dim=1)
                return torch.cat([line, torch.relu(points[:, None] - thresholds)], dim=1)

            penalty = torch.ones(units + 2).double()
            penalty[:2] = 1e-8
            weights = min_norm_interpolate(features(x), y, penalty=penalty)
            gaps.append(float((features(grid) @ weights - spline).abs().max()))
        assert gaps[1] < 1e-3
        assert gaps[1] < gaps[0] / 50  # of second order in the distance of the thresholds

    def test_dtype_of_the_values(self) -> None:
        x, y = torch.arange(4.0), torch.tensor([1.0, -1.0, 2.0, 0.0])
        assert natural_cubic_spline(x.double(), y, x.double()).dtype == torch.float32
        assert natural_cubic_spline(x, y.double(), x).dtype == torch.float64

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = torch.arange(3.0)
        with pytest.raises(ValueError, match=r"knots: expected at least 2, strictly increasing, got \[0\.0\]"):
            natural_cubic_spline(x[:1], x[:1], x)
        with pytest.raises(ValueError, match="knots: expected at least 2, strictly increasing"):
            natural_cubic_spline(torch.tensor([0.0, 1.0, 1.0]), x, x)
        with pytest.raises(ValueError, match="knots has 3, values has 2"):
            natural_cubic_spline(x, x[:2], x)
        with pytest.raises(ValueError, match="at: expected finite"):
            natural_cubic_spline(x, x, x / 0)


class TestGapToy:
    @given(st.floats(-100, 100))
    @settings(max_examples=20)
    def test_zero_training_error_for_every_c_and_a_guess_of_3_plus_4c(self, c: float) -> None:
        known = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
        assert torch.equal(gap_interpolant(known, c), known)
        assert gap_interpolant(torch.tensor(3.0), c).item() == pytest.approx(3 + 4 * c, rel=1e-6)

    @pytest.mark.parametrize("basis", ["Legendre", "Fourier"])
    def test_decaying_features_guess_about_3(self, basis: str) -> None:
        known, width = torch.tensor([1.0, 2.0, 4.0, 5.0]).double(), 40
        points = torch.cat([known, torch.tensor([3.0]).double()])
        if basis == "Legendre":
            features = torch.tensor(np.polynomial.legendre.legvander((points.numpy() - 3) / 2, width - 1))
        else:
            features = cosine_features(points, width, low=1, high=5)
        penalty = (1.0 + torch.arange(width)) ** 4
        weights = min_norm_interpolate(features[:4], known, penalty=penalty)
        predictions = features @ weights
        _close(predictions[:4], known)
        assert float(predictions[4]) == pytest.approx(3, abs=0.1)

    def test_without_decay_the_cosines_guess_0_however_many_they_are(self) -> None:
        known = torch.tensor([1.0, 2.0, 4.0, 5.0]).double()
        for width in (
            32,
            320,
        ):  # whole periods of the aliases on integers: the kernel at distance 1 and more is exactly 0
            weights = min_norm_interpolate(cosine_features(known, width, low=1, high=5), known)
            guess = cosine_features(torch.tensor([3.0]).double(), width, low=1, high=5) @ weights
            assert abs(guess.item()) < 3 * 8 / width

    def test_cosines_are_orthogonal_on_their_interval(self) -> None:
        middle = -2 + 5 * (torch.arange(64).double() + 0.5) / 64
        features = cosine_features(middle, 7, low=-2, high=3)
        _close(features.T @ features / 64, torch.diag(torch.tensor([1.0] + [0.5] * 6)).double())
        _close(
            cosine_features(torch.tensor([-2.0, 3.0]).double(), 4, low=-2, high=3)[:, 3],
            torch.tensor([1.0, -1.0]).double(),
        )

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="high: expected more than 1"):
            cosine_features(torch.ones(2), 3, low=1, high=1)
        with pytest.raises(ValueError, match="width: expected at least 1"):
            cosine_features(torch.ones(2), 0, low=0, high=1)
        with pytest.raises(ValueError, match="x: expected finite"):
            cosine_features(torch.ones(2) / 0, 3, low=0, high=1)
        with pytest.raises(ValueError, match="low: expected a finite number"):
            cosine_features(torch.ones(2), 3, low=math.nan, high=1)
