import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_pinball_loss
from torch import Tensor, nn

from mlreviews.common.least_squares import ridge_solve
from mlreviews.generalization import (
    ConstantPredictor,
    expected_optimism,
    expected_test_error,
    expected_train_error,
    pinball_loss,
    weighted_mean,
    weighted_median,
    weighted_quantile,
)
from tests.contracts.families import Sample

MINIMISERS: dict[str, Callable[..., Tensor]] = {
    "mean": weighted_mean,
    "median": weighted_median,
    "quantile": partial(weighted_quantile, q=0.9),
}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


CONTRACT = {"ConstantPredictor": lambda: Sample(ConstantPredictor().fit(_random(6)), (_random(5, 3),))}


def _descend(loss: Callable[[Tensor], Tensor], steps: int, rate: Callable[[int], float]) -> float:
    """Gradient descent on a single constant, from 0."""
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for step in range(steps):
        (gradient,) = torch.autograd.grad(loss(constant), constant)
        with torch.no_grad():
            constant -= rate(step) * gradient
    return constant.item()


class TestGradientDescent:
    def test_on_squared_error_finds_the_mean(self) -> None:
        y = _random(9) + 3
        found = _descend(lambda c: (y - c).square().mean(), 60, lambda step: 0.3)
        assert found == pytest.approx(weighted_mean(y).item(), abs=1e-12)

    def test_on_absolute_error_finds_the_median(self) -> None:
        y = _random(9) * 2
        found = _descend(lambda c: (y - c).abs().mean(), 400, lambda step: 3 / (step + 1))
        assert found == pytest.approx(weighted_median(y).item(), abs=3 / 400)  # within one last step

    @pytest.mark.parametrize("q", [0.15, 0.5, 0.8])
    def test_on_pinball_loss_finds_the_quantile(self, q: float) -> None:
        y = _random(9) * 2
        found = _descend(lambda c: pinball_loss(c, y, q), 400, lambda step: 6 / (step + 1))
        assert found == pytest.approx(weighted_quantile(y, q).item(), abs=6 / 400)


class TestMinimisers:
    @settings(max_examples=40)
    @given(
        y=st.lists(st.integers(-9, 9), min_size=1, max_size=8),
        tenths=st.integers(1, 9),
        seed=st.integers(0, 99),
        weighted=st.booleans(),
    )
    def test_no_observation_does_better_than_the_quantile(
        self, y: list[int], tenths: int, seed: int, weighted: bool
    ) -> None:
        q, values = tenths / 10, torch.tensor(y).double()
        weights = torch.randint(0, 4, (len(y),), generator=_rng(seed)).double() if weighted else None
        if weights is not None and not weights.any():
            weights[0] = 1
        loss = mean_pinball_loss(
            y, np.full(len(y), weighted_quantile(values, q, weights)), sample_weight=weights, alpha=q
        )
        # The loss is convex and piecewise linear, so the least of all is at an observation.
        losses = [mean_pinball_loss(y, np.full(len(y), c), sample_weight=weights, alpha=q) for c in y]
        assert loss <= min(losses) + 1e-12

    @pytest.mark.parametrize("q", [0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.77, 0.9])
    @pytest.mark.parametrize("n", [1, 2, 3, 10, 30])
    def test_quantile_is_the_averaged_inverse_of_the_distribution(self, q: float, n: int) -> None:
        y = _random(2, n)[1]
        # Whether the distribution function jumps at q is decided in whole numbers here.
        position = round(100 * q) * n
        expected = np.sort(y.numpy())[[math.ceil(position / 100) - 1, min(position // 100, n - 1)]].mean()
        assert weighted_quantile(y, q).item() == pytest.approx(expected, rel=1e-15)
        if position % 100:
            assert expected == np.quantile(y.numpy(), q, method="averaged_inverted_cdf")

    @pytest.mark.parametrize("minimiser", MINIMISERS.values(), ids=MINIMISERS.keys())
    def test_whole_weights_are_repetitions(self, minimiser: Callable[..., Tensor]) -> None:
        y, weights = _random(7), torch.tensor([1.0, 0.0, 3.0, 2.0, 0.0, 1.0, 3.0]).double()
        repeated = y.repeat_interleave(weights.long())
        torch.testing.assert_close(minimiser(y, weights=weights), minimiser(repeated))
        torch.testing.assert_close(minimiser(y, weights=0.1 * weights), minimiser(repeated))
        torch.testing.assert_close(minimiser(y), minimiser(y, weights=torch.full((7,), 0.3)))

    def test_weighted_values(self) -> None:
        y, weights = torch.tensor([5.0, -1.0, 2.0]), torch.tensor([1.0, 2.0, 1.0])
        assert weighted_mean(y, weights).item() == 1.25
        assert weighted_median(y, weights).item() == 0.5  # half the weight lies at -1
        assert weighted_quantile(y, 0.76, weights).item() == 5.0
        assert weighted_quantile(y, 0.74, weights).item() == 2.0
        assert weighted_quantile(y, 0.75, weights).item() == 3.5
        assert weighted_median(y, torch.tensor([1.0, 0.0, 1.0])).item() == 3.5  # and not halfway to a weight of 0

    def test_every_share_between_0_and_1_has_a_quantile(self) -> None:
        y = torch.tensor([2.0, 1.0, 3.0])
        assert weighted_quantile(y, 5e-324).item() == 1.0
        assert weighted_quantile(y, math.nextafter(1, 0)).item() == 3.0

    def test_many_equal_weights_do_not_blur_the_share(self) -> None:
        y = torch.arange(100_000.0, dtype=torch.float64)
        assert weighted_quantile(y, 0.3).item() == 29_999.5
        assert weighted_quantile(y, 0.300004).item() == 30_000.0
        assert weighted_quantile(y, 0.3, torch.full_like(y, 0.1)).item() == 29_999.5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("minimiser", MINIMISERS.values(), ids=MINIMISERS.keys())
    def test_dtype_and_accuracy(self, minimiser: Callable[..., Tensor], dtype: torch.dtype) -> None:
        y = torch.full((4096,), 60_000.0, dtype=dtype)  # the sum is beyond float16
        constant = minimiser(y)
        assert constant.dtype == dtype
        assert constant.shape == ()
        assert constant.item() == 60_000.0

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        y = torch.tensor([1.0, 2.0])
        for minimiser in MINIMISERS.values():
            with pytest.raises(ValueError, match="y: expected at least one entry"):
                minimiser(y[:0])
            with pytest.raises(ValueError, match="y: expected 1 dimensions"):
                minimiser(y[:, None])
            with pytest.raises(ValueError, match="y: expected finite"):
                minimiser(y / 0)
            with pytest.raises(TypeError, match=r"y: expected a floating-point tensor, got torch\.int64"):
                minimiser(y.long())
            with pytest.raises(ValueError, match="y has 2, weights has 1"):
                minimiser(y, weights=y[:1])
            with pytest.raises(ValueError, match="weights: expected numbers of at least 0, and at least one above"):
                minimiser(y, weights=torch.zeros(2))
            with pytest.raises(ValueError, match="weights: expected numbers of at least 0"):
                minimiser(y, weights=torch.tensor([2.0, -1.0]))
            with pytest.raises(ValueError, match="weights: expected finite"):
                minimiser(y, weights=torch.tensor([1.0, math.nan]))
        for q in (0.0, 1.0, -0.5, math.nan):
            with pytest.raises(ValueError, match="q: expected a number between 0 and 1, both excluded"):
                weighted_quantile(y, q)


class TestPinballLoss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_agrees_with_scikit_learn(self, dtype: torch.dtype) -> None:
        y, prediction = _random(3, 8, dtype=dtype)[1:]
        weights = _random(8, seed=1, dtype=dtype).abs()
        for w in (None, weights):
            loss = pinball_loss(prediction, y, 0.3, w)
            assert loss.dtype == dtype
            assert loss.item() == pytest.approx(mean_pinball_loss(y, prediction, sample_weight=w, alpha=0.3), rel=1e-6)

    def test_one_number_predicts_for_all(self) -> None:
        y = _random(5)
        torch.testing.assert_close(
            pinball_loss(torch.tensor(0.3).double(), y, 0.8), pinball_loss(torch.full((5,), 0.3).double(), y, 0.8)
        )

    def test_gradients(self) -> None:
        y, weights = _random(6), _random(6, seed=2).abs()
        prediction = _random(6, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda c: pinball_loss(c, y, 0.3, weights), prediction)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        y = torch.ones(3)
        for prediction in (torch.ones(1), torch.ones(3, 1), torch.ones(2)):
            with pytest.raises(ValueError, match=r"prediction: expected one number, or the shape \(3,\) of y"):
                pinball_loss(prediction, y, 0.5)
        with pytest.raises(ValueError, match="prediction: expected finite"):
            pinball_loss(torch.tensor(math.inf), y, 0.5)
        with pytest.raises(ValueError, match="q: expected a number between 0 and 1"):
            pinball_loss(y, y, 1.0)
        with pytest.raises(ValueError, match="y: expected finite"):
            pinball_loss(y, y / 0, 0.5)
        with pytest.raises(ValueError, match="y has 3, weights has 2"):
            pinball_loss(y, y, 0.5, y[:2])


class TestReductions:
    def test_mean_reduces_to_torch_linalg_lstsq_on_a_column_of_ones(self) -> None:
        y, weights = _random(6), _random(6, seed=1).abs()
        ones = torch.ones(6, 1).double()
        torch.testing.assert_close(weighted_mean(y), torch.linalg.lstsq(ones, y[:, None]).solution[0, 0])
        root = weights.sqrt()[:, None]
        weighted = torch.linalg.lstsq(root * ones, root * y[:, None]).solution[0, 0]
        torch.testing.assert_close(weighted_mean(y, weights), weighted)

    def test_median_reduces_to_half_the_absolute_error(self) -> None:
        y, c = _random(6), _random(6, seed=1)
        torch.testing.assert_close(pinball_loss(c, y, 0.5), nn.functional.l1_loss(c, y) / 2)
        assert weighted_median(y).item() == np.median(y.numpy())
        assert weighted_median(y[:5]).item() == np.median(y[:5].numpy())

    def test_mean_reduces_to_sklearn_ridge_as_alpha_goes_to_infinity(self) -> None:
        x, y = _random(9, 3), _random(9, seed=1)
        mean = weighted_mean(y).item()
        centred = x - x.mean(0)
        for alpha in (1e3, 1e6, 1e9):
            bound = float((centred.T @ (y - mean)).norm() * centred.norm(dim=1).max()) / alpha
            theirs = Ridge(alpha=alpha).fit(x.numpy(), y.numpy()).predict(x.numpy())
            ours = mean + centred @ ridge_solve(centred, y - mean, alpha)
            assert np.abs(theirs - mean).max() <= bound + 1e-15
            assert (ours - mean).abs().max().item() <= bound + 1e-15

    @pytest.mark.parametrize("strategy", ["mean", "median"])
    @pytest.mark.parametrize("n", [1, 4, 7])
    def test_reduces_to_sklearn_dummy_regressor(self, strategy: str, n: int) -> None:
        x, y = _random(n, 2), _random(n, seed=1)
        theirs = DummyRegressor(strategy=strategy).fit(x.numpy(), y.numpy()).predict(x.numpy())
        ours = ConstantPredictor(MINIMISERS[strategy]).fit(y)(x)
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-14)


class TestConstantPredictor:
    @pytest.mark.parametrize("minimiser", MINIMISERS.values(), ids=MINIMISERS.keys())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_single_observation_is_memorised(self, minimiser: Callable[..., Tensor], dtype: torch.dtype) -> None:
        y = torch.tensor([0.1], dtype=dtype)
        for weights in (None, torch.tensor([0.3])):
            assert torch.equal(ConstantPredictor(minimiser).fit(y, weights)(y), y)

    def test_has_one_parameter_which_survives_a_round_trip(self) -> None:
        model = ConstantPredictor().fit(_random(5), _random(5, seed=1).abs())
        assert model.value.item() == weighted_mean(_random(5), _random(5, seed=1).abs()).item()
        assert [tuple(p.shape) for p in model.parameters()] == [()]
        other = ConstantPredictor().double()
        assert other(torch.ones(2)).tolist() == [0.0, 0.0]
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(torch.ones(4, 2, 3)), model.value.expand(4))

    def test_can_be_trained(self) -> None:
        y = _random(8, dtype=torch.float32) + 2
        model = ConstantPredictor()
        for _ in range(40):
            (gradient,) = torch.autograd.grad(nn.functional.mse_loss(model(y), y), list(model.parameters()))
            model.load_state_dict({"value": model.value - 0.3 * gradient})
        torch.testing.assert_close(model.value.detach(), weighted_mean(y))


class TestOptimism:
    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_of_the_mean_whatever_the_distribution(self, n: int) -> None:
        runs = 20_000
        sample = torch.empty(runs, n + 1, dtype=torch.float64).exponential_(generator=_rng(n))  # variance 1
        mean = sample[:, :n].mean(1, keepdim=True)
        train, test = (sample[:, :n] - mean).square().mean(1), (sample[:, n:] - mean).square().mean(1)
        for measured, expected in [
            (train, expected_train_error(1, n, 1.0)),
            (test, expected_test_error(1, n, 1.0)),
            (test - train, expected_optimism(1, n, 1.0)),
        ]:
            standard_error = float(measured.std()) / math.sqrt(runs)
            assert measured.mean().item() == pytest.approx(expected, abs=4 * standard_error + 1e-15)

    def test_one_observation_is_learnt_by_heart(self) -> None:
        assert expected_train_error(1, 1, 3.0) == 0.0
        assert expected_test_error(1, 1, 3.0) == 2 * 9.0
        assert expected_optimism(1, 1, 3.0) == 2 * 9.0

    @pytest.mark.parametrize("p", [1, 3, 6])
    def test_of_least_squares_in_fixed_design(self, p: int) -> None:
        n, sigma, runs = 6, 0.7, 4000
        x, truth = _random(n, p), _random(p, seed=1)
        noise, new = sigma * _random(2, runs, n, seed=2)
        labels = x @ truth + noise
        fitted = labels @ torch.linalg.pinv(x).T @ x.T
        train = (labels - fitted).square().mean(1)
        test = (x @ truth + new - fitted).square().mean(1)
        for measured, expected in [
            (train, expected_train_error(p, n, sigma)),
            (test, expected_test_error(p, n, sigma)),
            (test - train, expected_optimism(p, n, sigma)),
        ]:
            standard_error = float(measured.std()) / math.sqrt(runs)
            assert measured.mean().item() == pytest.approx(expected, abs=4 * standard_error + 1e-14)

    def test_no_parameters_or_no_noise_give_no_optimism(self) -> None:
        assert expected_optimism(0, 5, 2.0) == expected_optimism(3, 5, 0.0) == 0.0
        assert expected_optimism(2.5, 5, 2.0) == 4.0
        assert expected_train_error(0, 5, 2.0) == expected_test_error(0, 5, 2.0) == 4.0

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for function in (expected_optimism, expected_train_error, expected_test_error):
            with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
                function(0, 0, 1.0)
            with pytest.raises(ValueError, match="p: expected at most n = 4, got 5"):
                function(5, 4, 1.0)
            with pytest.raises(ValueError, match="p: expected at least 0"):
                function(-1, 4, 1.0)
            with pytest.raises(ValueError, match="sigma: expected at least 0"):
                function(1, 4, -1.0)
            with pytest.raises(ValueError, match="sigma: expected a finite number"):
                function(1, 4, math.inf)
