import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mlreviews.common.least_squares import PathPoint, min_norm_solve, nested_solutions, ridge_solve

EPS = torch.finfo(torch.float64).eps
N = 24  # rows of most problems here


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _orthogonal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(_random(n, k, seed=seed)).Q


def _cosines(p: int, bandwidth: float) -> Tensor:
    """Random cosine features of N points in three dimensions: the smoother, the worse conditioned."""
    shift = 7 * torch.rand(p, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.cos(_random(N, 3, seed=1) @ _random(3, p, seed=2) / bandwidth + shift)


def _repeated_rows(p: int) -> Tensor:
    phi = _random(N, p)
    phi[[5, 11]] = phi[[2, 3]]
    return phi


def _repeated_columns(p: int) -> Tensor:
    phi = _random(N, p)
    phi[:, [9, N, N + 1]] = phi[:, [4, 0, 1]]
    return phi


def _condition(phi: Tensor) -> float:
    values = torch.linalg.svdvals(phi)
    return float(values[0] / values[values > EPS * max(phi.shape) * values[0]][-1])


def _conditioning(part: Tensor, y: Tensor, a: Tensor, smallest: float) -> float:
    """Relative change of the solution of least squares when the features change by the machine precision."""
    largest = float(torch.linalg.svdvals(part)[0])
    residual = float(torch.linalg.norm(part @ a - y) / (largest * torch.linalg.norm(a)))
    return EPS * (largest / smallest + residual * (largest / smallest) ** 2)


def _stack(phi: Tensor) -> Tensor:
    """Below the training rows the identity, so that the predictions there are the coefficients."""
    return torch.cat([phi, torch.eye(phi.shape[1], dtype=phi.dtype)])


def _augmented_solution(phi: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge regression as plain least squares on more rows."""
    p = phi.shape[1]
    rows = np.vstack([phi.numpy(), math.sqrt(ridge) * np.eye(p)])
    return torch.from_numpy(np.linalg.lstsq(rows, np.vstack([y.numpy(), np.zeros((p, y.shape[1]))]), rcond=None)[0])


class TestMinNormSolve:
    @pytest.mark.parametrize(("n", "p"), [(7, 3), (3, 7), (5, 5), (1, 4), (4, 1)])
    @pytest.mark.parametrize("columns", [(), (2,)])
    def test_recovers_what_the_singular_vectors_say(self, n: int, p: int, columns: tuple[int, ...]) -> None:
        rank = min(n, p)
        u, v = _orthogonal(n, rank, 1), _orthogonal(p, rank, 2)
        s = torch.logspace(0, -3, rank, dtype=torch.float64)
        inside = _random(rank, *columns, seed=3)
        y = u @ torch.diag(s) @ inside
        y += _random(n, *columns, seed=4) - u @ (u.T @ _random(n, *columns, seed=4))  # no features explain this part
        got = min_norm_solve(u @ torch.diag(s) @ v.T, y)
        torch.testing.assert_close(got, v @ inside, rtol=0, atol=1e-10)

    def test_repeated_columns_share_their_coefficient_and_repeated_rows_are_averaged(self) -> None:
        column = torch.tensor([[1.0], [1.0], [2.0]])
        got = min_norm_solve(torch.cat([column, column], dim=1), torch.tensor([1.0, 2.0, 6.0]))
        torch.testing.assert_close(got, torch.tensor([1.25, 1.25]))  # 15 / 6 in all
        assert got.dtype == torch.float32

    def test_float64_inside(self) -> None:
        phi, y = _cosines(30, 3.0).float(), _random(N, 2, seed=9).float()
        exact = min_norm_solve(phi.double(), y.double())
        torch.testing.assert_close(min_norm_solve(phi, y), exact.float(), rtol=1e-6, atol=0)

    def test_rcond_counts_small_singular_values_as_zero(self) -> None:
        phi = torch.diag(torch.tensor([2.0, 0.3, 0.1], dtype=torch.float64))
        y = torch.ones(3, dtype=torch.float64)
        assert min_norm_solve(phi, y).tolist() == pytest.approx([0.5, 1 / 0.3, 10])
        assert min_norm_solve(phi, y, rcond=0.1).tolist() == pytest.approx([0.5, 1 / 0.3, 0])
        tiny = torch.diag(torch.tensor([1.0, 4e-16, 1e-15], dtype=torch.float64))
        assert min_norm_solve(tiny, y).tolist() == pytest.approx([1, 0, 1e15])
        assert min_norm_solve(tiny, y, rcond=0.0).tolist() == pytest.approx([1, 2.5e15, 1e15])

    def test_does_not_mind_strides(self) -> None:
        phi, y = _random(9, 10)[::2, 1::3], _random(2, 5, seed=1).T
        np.testing.assert_allclose(min_norm_solve(phi, y), np.linalg.pinv(phi.numpy()) @ y.numpy(), atol=1e-12)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi, y = _random(4, 3), _random(4, seed=1)
        with pytest.raises(ValueError, match="same number of rows, but features has 4, targets has 3"):
            min_norm_solve(phi, y[:3])
        with pytest.raises(ValueError, match="features: expected 2 dimensions"):
            min_norm_solve(y, y)
        with pytest.raises(ValueError, match="targets: expected 1 or 2 dimensions"):
            min_norm_solve(phi, y[:, None, None])
        with pytest.raises(ValueError, match="features: expected at least one entry"):
            min_norm_solve(phi[:0], y[:0])
        with pytest.raises(ValueError, match="targets: expected finite"):
            min_norm_solve(phi, y * math.nan)
        for rcond in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match=r"rcond: expected a number in \[0, 1\)"):
                min_norm_solve(phi, y, rcond=rcond)


class TestRidgeSolve:
    @pytest.mark.parametrize(("n", "p"), [(7, 3), (3, 7), (5, 5)])
    @pytest.mark.parametrize("ridge", [1e-3, 0.7, 1e5])
    def test_equals_least_squares_on_augmented_rows(self, n: int, p: int, ridge: float) -> None:
        phi, y = _random(n, p), _random(n, 2, seed=1)
        expected = _augmented_solution(phi, y, ridge)
        torch.testing.assert_close(ridge_solve(phi, y, ridge), expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ridge_solve(phi, y[:, 1], ridge), expected[:, 1], rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("p", [15, N, 60])
    @pytest.mark.parametrize("ridge", [1e-18, 1e-12, 1e-6])
    def test_is_accurate_where_normal_equations_are_not(self, p: int, ridge: float) -> None:
        phi, y = _cosines(p, 8.0), _random(N, 2, seed=1)
        error = torch.linalg.norm(ridge_solve(phi, y, ridge) - _augmented_solution(phi, y, ridge))
        condition = float(torch.linalg.svdvals(phi)[0]) / math.sqrt(ridge)
        assert error < 20 * EPS * min(condition, _condition(phi)) * torch.linalg.norm(y) / math.sqrt(ridge)

    def test_dtype_and_float64_inside(self) -> None:
        phi, y = _cosines(60, 3.0).float(), _random(N, seed=1).float()
        got = ridge_solve(phi, y, 1e-4)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, ridge_solve(phi.double(), y.double(), 1e-4).float(), rtol=1e-6, atol=0)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        phi, y = _random(4, 3), _random(4, seed=1)
        for ridge in (0.0, -1.0):
            with pytest.raises(ValueError, match="ridge: expected more than 0"):
                ridge_solve(phi, y, ridge)
        with pytest.raises(ValueError, match="ridge: expected a finite number"):
            ridge_solve(phi, y, math.nan)
        with pytest.raises(ValueError, match="same number of rows"):
            ridge_solve(phi[:3], y, 1.0)


PROBLEMS: dict[str, Callable[[int], Tensor]] = {
    "gaussian": lambda p: _random(N, p),
    "rough cosines": lambda p: _cosines(p, 1.0),
    "smooth cosines": lambda p: _cosines(p, 4.0),
    "very smooth cosines": lambda p: _cosines(p, 10.0),
    "repeated rows": _repeated_rows,
    "repeated columns": _repeated_columns,
}
WIDTHS = [1, 7, N - 2, N - 1, N, N + 1, N + 2, N + 6, 2 * N, 3 * N + 5, 8 * N]


class TestNestedSolutions:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_agrees_with_the_singular_value_decomposition_at_every_width(self, name: str) -> None:
        phi, y = PROBLEMS[name](WIDTHS[-1]), _random(N, 3, seed=5)
        points = list(nested_solutions(_stack(phi), y, WIDTHS))
        assert [point.width for point in points] == WIDTHS
        for point in points:
            part = phi[:, : point.width]
            truth, condition = min_norm_solve(part, y), _condition(part)
            coefficients = point.predictions[N:]
            assert not coefficients[point.width :].any()
            error = torch.linalg.norm(coefficients[: point.width] - truth) / torch.linalg.norm(truth)
            power = 2 if point.method == "cholesky" else 1
            assert error < 20 * EPS * condition**power
            assert point.norm == pytest.approx(float(torch.linalg.norm(truth)), rel=20 * EPS * condition**power)
            # The residual at the training points is at rounding level of the products that make it up.
            rounding = EPS * torch.linalg.norm(part) * torch.linalg.norm(truth)
            difference = torch.linalg.norm(point.predictions[:N] - part @ truth)
            assert difference < 20 * rounding * (condition if power == 2 else 1)

    @pytest.mark.parametrize("name", PROBLEMS)
    @pytest.mark.parametrize("ridges", [[1e-13, 1e-9], [1e-4, 3.0, 1e6]])
    def test_agrees_with_ridge_regression_at_every_width(self, name: str, ridges: list[float]) -> None:
        phi, y = PROBLEMS[name](WIDTHS[-1]), _random(N, 3, seed=5)
        points = list(nested_solutions(_stack(phi), y, WIDTHS, ridges=ridges))
        assert [(point.width, point.ridge) for point in points] == [(w, r) for w in WIDTHS for r in ridges]
        for point in points:
            part = phi[:, : point.width]
            truth = _augmented_solution(part, y, point.ridge)
            s = torch.linalg.svdvals(part)
            smallest = math.sqrt(point.ridge + (float(s[-1]) ** 2 if point.width < N else 0))
            bound = 1e-8 if point.method == "cholesky" else 50 * _conditioning(part, y, truth, smallest)
            error = torch.linalg.norm(point.predictions[N:][: point.width] - truth) / torch.linalg.norm(truth)
            assert error < bound
            assert point.norm == pytest.approx(float(torch.linalg.norm(truth)), rel=bound)
            torch.testing.assert_close(point.predictions[:N], part @ truth, rtol=0, atol=1e-7)

    def test_cholesky_serves_exactly_where_its_error_is_small(self) -> None:
        found: set[str] = set()
        for bandwidth in (0.5, 1.0, 2.0, 3.0, 5.0):
            phi = _cosines(WIDTHS[-1], bandwidth)
            for point in nested_solutions(phi, _random(N, seed=5), WIDTHS):
                if point.width <= N:
                    assert point.method == "qr"
                    continue
                s = torch.linalg.svdvals(phi[:, : point.width])
                error = EPS * float(s.square().sum() / s[-1] ** 2)
                if not 1e-9 < error < 1e-8:  # the smallest singular value is an estimate
                    assert point.method == ("cholesky" if error < 1e-8 else "qr-update")
                    found.add(point.method)
        assert found == {"cholesky", "qr-update"}

    def test_a_ridge_makes_cholesky_accurate_everywhere(self) -> None:
        for point in nested_solutions(_cosines(WIDTHS[-1], 10.0), _random(N, seed=5), WIDTHS, ridges=[1.0]):
            assert point.method == "cholesky"

    @pytest.mark.parametrize(("name", "widths"), [("repeated rows", WIDTHS[3:]), ("repeated columns", WIDTHS[2:5])])
    def test_takes_the_svd_where_the_rank_is_deficient(self, name: str, widths: list[int]) -> None:
        phi = PROBLEMS[name](WIDTHS[-1])
        assert {point.method for point in nested_solutions(phi, _random(N, seed=5), widths)} == {"svd"}

    def test_rcond_has_the_meaning_it_has_for_one_width(self) -> None:
        u, v = _orthogonal(N, N, 1), _orthogonal(3 * N, N, 2)
        s = torch.cat([torch.linspace(2, 1, N - 3), torch.tensor([0.02, 0.01, 0.001])]).double()
        wide, y = u @ torch.diag(s) @ v.T, _random(N, 2, seed=5)
        tall = (u @ torch.diag(s))[:, torch.randperm(N, generator=torch.Generator().manual_seed(0))]
        for rcond, method in ((1e-6, {"qr-update", "qr"}), (2e-3, {"svd"}), (7e-3, {"svd"}), (0.1, {"svd"})):
            for phi in (wide, tall):
                (point,) = nested_solutions(_stack(phi), y, [phi.shape[1]], rcond=rcond)
                torch.testing.assert_close(
                    point.predictions[N:], min_norm_solve(phi, y, rcond=rcond), rtol=0, atol=1e-8
                )
                assert point.method in method

    def test_a_function_is_asked_for_few_columns_at_a_time(self) -> None:
        phi, y, asked = _cosines(WIDTHS[-1], 4.0), _random(N, 2, seed=5), []

        def columns(start: int, stop: int) -> Tensor:
            asked.append(stop - start)
            return phi[:, start:stop]

        lazily, at_once = nested_solutions(columns, y, WIDTHS), nested_solutions(phi, y, WIDTHS)
        assert not asked
        assert next(lazily).width == 1
        next(at_once)
        for one, other in zip(lazily, at_once, strict=True):
            assert torch.equal(one.predictions, other.predictions)
            assert (one.norm, one.method) == (other.norm, other.method)
        assert max(asked) == N

    def test_rounding_of_the_features_may_depend_on_the_range(self) -> None:
        phi, y = _cosines(3 * N, 4.0), _random(N, 2, seed=5)

        def columns(start: int, stop: int) -> Tensor:
            return phi[:, start:stop] + 1e-5 * _random(N, stop - start, seed=1000 * start + stop)

        for point in nested_solutions(columns, y, [N + 1, N + 2, N + 3, 2 * N, 3 * N]):
            assert point.method == "qr-update"
            assert torch.linalg.norm(point.predictions - y) < 1e-8

    @pytest.mark.parametrize("widths", [[3], [N], [5 * N + 1], [2, 3 * N], [N + 1, N + 2, 4 * N]])
    def test_any_list_of_widths_gives_the_same_solutions(self, widths: list[int]) -> None:
        phi, y = _random(N, WIDTHS[-1]), _random(N, seed=5)
        for point in nested_solutions(_stack(phi), y, widths):
            truth = min_norm_solve(phi[:, : point.width], y)
            torch.testing.assert_close(point.predictions[N:][: point.width], truth, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 4)])
    def test_predictions_have_the_form_of_the_targets(self, shape: tuple[int, ...]) -> None:
        phi = _cosines(2 * N, 2.0).float()
        for point in nested_solutions(
            _stack(phi), _random(*shape, seed=5).float(), [3, N + 3, 2 * N], ridges=[0.0, 1.0]
        ):
            assert point.predictions.shape == (3 * N, *shape[1:])
            assert point.predictions.dtype == torch.float64

    def test_features_that_vanish(self) -> None:
        for point in nested_solutions(torch.zeros(N, 2 * N), torch.ones(N), [1, N, N + 1, 2 * N]):
            assert point == PathPoint(point.width, 0.0, point.predictions, 0.0, "svd")
            assert not point.predictions.any()

    def test_one_row(self) -> None:
        phi = torch.tensor([[3.0, 4.0, 12.0]])
        points = list(nested_solutions(phi, torch.tensor([26.0]), [1, 2, 3]))
        assert [point.norm for point in points] == pytest.approx([26 / 3, 26 / 5, 2])
        assert [float(point.predictions) for point in points] == pytest.approx([26, 26, 26])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input_raises_before_the_first_solution(self) -> None:
        phi, y = _random(4, 6), _random(4, seed=1)
        for widths in ([0, 1], [-1]):
            with pytest.raises(ValueError, match="widths: expected at least 1"):
                nested_solutions(phi, y, widths)
        with pytest.raises(TypeError, match=r"widths: expected a whole number, got 1\.5"):
            nested_solutions(phi, y, [1.5])
        for widths in ([2, 1], [2, 2]):
            with pytest.raises(ValueError, match="widths: expected strictly increasing"):
                nested_solutions(phi, y, widths)
        with pytest.raises(ValueError, match="widths: expected at most the 6 columns of features, got 7"):
            nested_solutions(phi, y, [3, 7])
        with pytest.raises(ValueError, match="expected at least one of each, got 0 and 1"):
            nested_solutions(phi, y, [])
        with pytest.raises(ValueError, match="expected at least one of each, got 1 and 0"):
            nested_solutions(phi, y, [1], ridges=[])
        with pytest.raises(ValueError, match="ridges: expected at least 0"):
            nested_solutions(phi, y, [1], ridges=[0.0, -1.0])
        with pytest.raises(ValueError, match="rcond: expected a number"):
            nested_solutions(phi, y, [1], rcond=2.0)
        with pytest.raises(ValueError, match="features: expected finite"):
            nested_solutions(phi * math.inf, y, [1])
        with pytest.raises(ValueError, match="targets: expected at least one entry"):
            nested_solutions(phi[:0], y[:0], [1])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_blocks_of_features(self) -> None:
        phi, y = _random(4, 6), _random(4, seed=1)
        with pytest.raises(ValueError, match="features: expected at least 4 rows and the columns 0:2, got shape"):
            next(nested_solutions(phi[:3], y, [2]))
        with pytest.raises(ValueError, match="features: expected at least 4 rows and the columns 4:6, got shape"):
            list(nested_solutions(lambda start, stop: phi[:, start : min(stop, 5)], y, [2, 6]))
        with pytest.raises(ValueError, match="features: expected finite"):
            next(nested_solutions(lambda start, stop: phi[:, start:stop] / 0, y, [2]))
