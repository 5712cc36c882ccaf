import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlreviews.generalization import (
    ConstantPredictor,
    RandomFourierFeatures,
    RandomReLUFeatures,
    RiskCurve,
    Sample,
    asymptotic_ridgeless_risk,
    double_descent,
    double_descent_curve,
    epoch_wise_curve,
    gaussian_min_norm_risk,
    min_norm_interpolate,
    optimal_gaussian_ridge,
    sample_wise_curve,
    tuned_ridge_curve,
    weight_reuse_curve,
)
from tests.contracts import families


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_rng(seed))


def _sample(n: int, d: int = 4, k: int = 3, *, seed: int = 0) -> Sample:
    return Sample(_random(n, d, seed=seed), _random(n, k, seed=seed + 100))


def _float(sample: Sample) -> Sample:
    return Sample(sample.x.float(), sample.y.float())


def _fourier(d: int = 4, n_features: int = 120, seed: int = 7) -> RandomFourierFeatures:
    return RandomFourierFeatures(d, n_features, 1.5, generator=_rng(seed))


CONTRACT = {
    "RandomFourierFeatures": lambda: families.Sample(_fourier(3, 8), (_random(5, 3), 2, 7)),
    "RandomReLUFeatures": lambda: families.Sample(RandomReLUFeatures(3, 8, generator=_rng()), (_random(5, 3), 2, 7)),
    "weight_reuse_curve": lambda: families.Sample(
        weight_reuse_curve, (_float(_sample(5)), _float(_sample(6, seed=1)), [1, 2, 4]), {"lr": 0.1, "epochs": 3}
    ),
}


class TestRandomFeatures:
    def test_fourier_by_hand(self) -> None:
        features = RandomFourierFeatures(2, 3, 1.0)
        features.load_state_dict(
            {"directions": torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]]), "phases": torch.tensor([0.0, 1.0, 2.0])}
        )
        expected = (2 / 3) ** 0.5 * np.cos([0.5, -0.6 + 1, 1.2 + 2])
        x = torch.tensor([[0.5, -0.2]], dtype=torch.float64)
        np.testing.assert_allclose(features(x, 0, 3)[0], expected, rtol=1e-6)

    def test_relu_by_hand(self) -> None:
        features = RandomReLUFeatures(2, 8, generator=_rng())
        features.directions[:, 0] = torch.tensor([3.0, -1.0])
        x = torch.tensor([[2.0, 1.0], [-2.0, 1.0]], dtype=torch.float64)
        assert features(x, 0, 1).tolist() == [[2.5], [0.0]]

    def test_inner_products_tend_to_the_gaussian_kernel(self) -> None:
        m, bandwidth, x = 40_000, 1.7, _random(6, 3)
        phi = RandomFourierFeatures(3, m, bandwidth, generator=_rng(1))(x, 0, m)
        kernel = np.exp(-(np.linalg.norm(x[:, None] - x, axis=-1) ** 2) / (2 * bandwidth**2))
        # Each product is a mean of M terms 2 cos cos, between -2 and 2.
        np.testing.assert_allclose(phi @ phi.T, kernel, atol=5 * 2 / m**0.5)

    def test_inner_products_tend_to_the_arc_cosine_kernel(self) -> None:
        m = 20_000
        features = RandomReLUFeatures(2, m, generator=_rng(1))
        torch.testing.assert_close(features.directions.norm(dim=0), torch.full((m,), 2**0.5, dtype=torch.float64))
        x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.5]], dtype=torch.float64)
        turn = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
        on_circle = np.maximum(x.numpy() @ (2**0.5 * np.stack([np.cos(turn), np.sin(turn)])), 0)
        phi = features(x, 0, m)
        # Each product is a mean of M terms between 0 and 2 |v|^2 |x| |x'| < 5.
        np.testing.assert_allclose(phi @ phi.T, 2 * on_circle @ on_circle.T / len(turn), atol=5 * 5 / m**0.5)
        norm, angle = x.norm(dim=1).numpy(), np.arctan2(0.8, 0.6)
        assert 2 * np.mean(on_circle[0] * on_circle[1]) == pytest.approx(
            norm[0] * norm[1] * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi, rel=1e-5
        )

    @pytest.mark.parametrize("features", [_fourier(), RandomReLUFeatures(4, 120)])
    def test_any_range_of_the_features_alone(self, features: nn.Module) -> None:
        x = _random(5, 4)
        assert features(x, 0, 120).shape == (5, 120)
        for start, stop in ((0, 1), (3, 50), (119, 120)):
            torch.testing.assert_close(features(x, start, stop), features(x, 0, 120)[:, start:stop])
        for start, stop in ((-1, 3), (3, 3), (4, 121)):
            with pytest.raises(ValueError, match=f"expected a range within 120 features, got {start}:{stop}"):
                features(x, start, stop)

    def test_the_generator_and_the_bandwidth_decide(self) -> None:
        one, other = (RandomFourierFeatures(3, 9, bandwidth, generator=_rng(2)) for bandwidth in (0.5, 2.0))
        torch.testing.assert_close(one.directions, 4 * other.directions)
        assert torch.equal(one.phases, other.phases)
        assert not torch.equal(one.phases, RandomFourierFeatures(3, 9, 0.5, generator=_rng(3)).phases)
        phases = RandomFourierFeatures(1, 5000, 1.0, generator=_rng()).phases
        assert 0 <= phases.min() < 0.01
        assert 6.27 < phases.max() < 2 * math.pi
        assert RandomReLUFeatures(3, 9, dtype=torch.float32).directions.dtype == torch.float32
        assert RandomFourierFeatures(3, 9, 1.0, dtype=torch.float32).phases.dtype == torch.float32

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="bandwidth: expected more than 0"):
            RandomFourierFeatures(3, 9, 0.0)
        with pytest.raises(ValueError, match="dim: expected at least 1"):
            RandomFourierFeatures(0, 9, 1.0)
        with pytest.raises(ValueError, match="n_features: expected at least 1"):
            RandomReLUFeatures(3, 0)


def _pinv_errors(phi: Tensor, y: Tensor, phi_test: Tensor, y_test: Tensor) -> tuple[float, float, float, float]:
    a = np.linalg.pinv(phi.numpy()) @ y.numpy()
    fit, out = phi.numpy() @ a, phi_test.numpy() @ a
    wrong = np.mean(np.argmax(out, 1) != np.argmax(y_test.numpy(), 1))
    return np.mean((fit - y.numpy()) ** 2), np.mean((out - y_test.numpy()) ** 2), wrong, np.sqrt((a**2).sum())


class TestDoubleDescentCurve:
    def test_each_width_is_the_pseudo_inverse(self) -> None:
        train, test, features, widths = _sample(17), _sample(11, seed=1), _fourier(), [1, 5, 16, 17, 18, 40, 120]
        curve = double_descent_curve(features, train, test, widths)
        assert curve.sizes == widths
        for i, width in enumerate(widths):
            expected = _pinv_errors(features(train.x, 0, width), train.y, features(test.x, 0, width), test.y)
            assert [float(column[i]) for column in curve[1:]] == pytest.approx(expected, rel=1e-6, abs=1e-15)
            assert all(column.dtype == torch.float64 for column in curve[1:])

    def test_with_a_ridge(self) -> None:
        train, test, features, ridge = _sample(17), _sample(11, seed=1), _fourier(), 0.3
        curve = double_descent_curve(features, train, test, [9, 60], ridge=ridge)
        for i, width in enumerate([9, 60]):
            rows = torch.cat([features(train.x, 0, width), ridge**0.5 * torch.eye(width)])
            a = torch.linalg.pinv(rows) @ torch.cat([train.y, torch.zeros(width, 3)])
            assert float(curve.norm[i]) == pytest.approx(float(a.norm()))
            assert float(curve.test_mse[i]) == pytest.approx(
                float((features(test.x, 0, width) @ a - test.y).square().mean())
            )

    def test_peak_at_the_threshold_and_a_second_descent(self) -> None:
        n, features = 40, RandomReLUFeatures(6, 320, generator=_rng(1))
        slope = _random(6, seed=5)
        x, x_test = _random(n, 6), _random(300, 6, seed=1)
        train = Sample(x, x @ slope + 0.3 * _random(n, seed=2))
        widths = [5, 10, 20, 30, 37, 38, 39, 40, 41, 42, 50, 60, 80, 160, 320]
        curve = double_descent_curve(features, train, Sample(x_test, x_test @ slope), widths)
        at = dict(zip(widths, curve.test_mse.tolist(), strict=True))
        assert abs(max(at, key=at.__getitem__) - n) <= 1
        assert at[n] > 3 * max(min(curve.test_mse[:6]), at[8 * n])
        assert all((error < 1e-8) == (width >= n) for width, error in zip(widths, curve.train_mse, strict=True))
        assert int(curve.norm.argmax()) == widths.index(n)
        assert (curve.norm[widths.index(n) :].diff() <= 0).all()
        assert curve.test_error.isnan().all()

    @pytest.mark.parametrize("k", [1, 2])
    def test_classes_need_two_outputs(self, k: int) -> None:
        curve = double_descent_curve(_fourier(), _sample(9, k=k), _sample(5, k=k, seed=1), [3])
        assert bool(curve.test_error.isnan().all()) == (k == 1)

    def test_single_precision_input_is_solved_in_double(self) -> None:
        features = RandomFourierFeatures(4, 60, 9.0, generator=_rng(), dtype=torch.float32)
        curve = double_descent_curve(features, _float(_sample(9)), _float(_sample(5, seed=1)), [9, 30, 60])
        assert curve.train_mse.max() < 1e-14

    def test_reduces_to_min_norm_interpolation(self) -> None:
        train, test, features, width = _sample(17), _sample(11, seed=1), _fourier(), 60
        a = min_norm_interpolate(features(train.x, 0, width), train.y)
        curve = double_descent_curve(features, train, test, [width])
        assert float(curve.norm[0]) == pytest.approx(float(a.norm()))
        expected = (features(test.x, 0, width) @ a - test.y).square().mean()
        assert float(curve.test_mse[0]) == pytest.approx(float(expected))

    def test_reduces_to_mean_as_minimal_model(self) -> None:
        train, test = Sample(_random(9, 2), _random(9, seed=1)), Sample(_random(5, 2, seed=2), _random(5, seed=3))
        curve = double_descent_curve(lambda x, start, stop: torch.ones(len(x), stop - start), train, test, [1])
        mean = ConstantPredictor().fit(train.y)(test.x).detach()
        assert float(curve.test_mse[0]) == pytest.approx(float((mean - test.y).square().mean()))
        assert float(curve.train_mse[0]) == pytest.approx(float(train.y.var(correction=0)))

    def test_reduces_to_lstsq(self) -> None:
        train, test = _sample(9), _sample(5, seed=1)
        a = torch.linalg.lstsq(train.x, train.y).solution
        curve = double_descent_curve(lambda x, start, stop: x[:, start:stop], train, test, [4])
        assert float(curve.test_mse[0]) == pytest.approx(float((test.x @ a - test.y).square().mean()))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        train, test, features = _sample(9), _sample(5, seed=1), _fourier()
        for widths, message in (
            ([0, 3], "widths: expected at least 1, got 0"),
            ([3, 2], "widths: expected strictly increasing"),
            ([3, 121], "expected a range within 120 features, got 120:121"),
        ):
            with pytest.raises(ValueError, match=message):
                double_descent_curve(features, train, test, widths)
        with pytest.raises(ValueError, match="ridges: expected at least 0"):
            double_descent_curve(features, train, test, [3], ridge=-1.0)
        for sample, message in (
            (Sample(train.x[:0], train.y[:0]), "train.x: expected at least one entry"),
            (Sample(train.x[:3], train.y), "same number of rows, but train.x has 3, train.y has 9"),
            (Sample(train.x / 0, train.y), "train.x: expected finite values"),
            (Sample(train.x, train.y * math.nan), "train.y: expected finite values"),
            (Sample(train.x[:, 1:], train.y), r"train.x, test.x: .* got shapes \(9, 3\) and \(5, 4\)"),
            (Sample(train.x, train.y[:, 0]), r"train.y, test.y: .* got shapes \(9,\) and \(5, 3\)"),
        ):
            with pytest.raises(ValueError, match=message):
                double_descent_curve(features, sample, test, [3])
        with pytest.raises(ValueError, match=r"test\.y: expected finite values"):
            double_descent_curve(features, train, Sample(test.x, test.y / 0), [3])


class TestTunedRidgeCurve:
    def test_takes_the_best_on_the_validation_points(self) -> None:
        train, valid, test = _sample(17), _sample(9, seed=1), _sample(11, seed=2)
        features, widths, ridges = _fourier(), [3, 17, 60], [1e-4, 0.03, 5.0]
        curve, chosen = tuned_ridge_curve(features, train, valid, test, widths, ridges)
        tested = [double_descent_curve(features, train, test, widths, ridge=ridge) for ridge in ridges]
        valids = torch.stack([double_descent_curve(features, train, valid, widths, ridge=r).test_mse for r in ridges])
        best = valids.argmin(0).tolist()
        assert curve.sizes == widths
        assert chosen == [ridges[i] for i in best]
        for got, column in zip(curve[1:], list(zip(*tested, strict=True))[1:], strict=True):
            assert got.tolist() == pytest.approx([float(column[i][width]) for width, i in enumerate(best)])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        train, valid, test = _sample(17), _sample(9, seed=1), _sample(11, seed=2)
        with pytest.raises(ValueError, match="expected at least one of each, got 1 and 0"):
            tuned_ridge_curve(_fourier(), train, valid, test, [3], [])
        with pytest.raises(ValueError, match=r"valid\.x: expected at least one entry"):
            tuned_ridge_curve(_fourier(), train, Sample(valid.x[:0], valid.y[:0]), test, [3], [1.0])
        with pytest.raises(ValueError, match=r"valid\.y, test\.y: expected the same number of columns"):
            tuned_ridge_curve(_fourier(), train, Sample(valid.x, valid.y[:, :2]), test, [3], [1.0])


class TestSampleWiseCurve:
    @pytest.mark.parametrize("ridge", [0.0, 0.4])
    def test_each_size_is_a_curve_of_one_width(self, ridge: float) -> None:
        train, test, features = _sample(30), _sample(11, seed=1), _fourier()
        curve = sample_wise_curve(features, train, test, 12, [1, 11, 12, 30], ridge=ridge)
        assert curve.sizes == [1, 11, 12, 30]
        for i, n in enumerate(curve.sizes):
            part = double_descent_curve(features, Sample(train.x[:n], train.y[:n]), test, [12], ridge=ridge)
            assert [float(column[i]) for column in curve[1:]] == [float(column[0]) for column in part[1:]]

    def test_has_no_ridge_by_default(self) -> None:
        train, test = _sample(30), _sample(11, seed=1)
        assert float(sample_wise_curve(_fourier(), train, test, 40, [20]).train_mse) < 1e-15

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        train, test = _sample(9), _sample(5, seed=1)
        with pytest.raises(ValueError, match="sizes: expected at least 1, got 0"):
            sample_wise_curve(_fourier(), train, test, 3, [0, 2])
        for sizes in ([], [3, 3]):
            with pytest.raises(ValueError, match="sizes: expected strictly increasing"):
                sample_wise_curve(_fourier(), train, test, 3, sizes)
        with pytest.raises(ValueError, match="sizes: expected at most the 9 points of train, got 10"):
            sample_wise_curve(_fourier(), train, test, 3, [2, 10])
        with pytest.raises(ValueError, match="widths: expected at least 1"):
            sample_wise_curve(_fourier(), train, test, 0, [2])


def _gaussian_risks(p: int, n: int, beta: Tensor, sigma: float, ridges: list[float], repetitions: int) -> Tensor:
    """Exact test error given the training set, for each ridge and each of many training sets."""
    x = _random(repetitions, n, len(beta), seed=p)
    y = x @ beta + sigma * _random(repetitions, n, seed=p + 1)
    used = x[:, :, :p]
    risks = []
    for ridge in ridges:
        if ridge == 0:
            fitted = torch.linalg.pinv(used) @ y[:, :, None]
        else:
            gram = used.mT @ used + ridge * torch.eye(p, dtype=x.dtype)
            fitted = torch.linalg.solve(gram, used.mT @ y[:, :, None])
        coefficients = nn.functional.pad(fitted[:, :, 0], (0, len(beta) - p))
        risks.append((coefficients - beta).square().sum(1) + sigma**2)
    return torch.stack(risks)


class TestGaussianRisk:
    @pytest.mark.parametrize("p", [1, 4, 16, 32])
    def test_agrees_with_monte_carlo(self, p: int) -> None:
        n, sigma, repetitions = 8, 0.7, 2000
        beta = _random(36, seed=3) / 5
        (risks,) = _gaussian_risks(p, n, beta, sigma, [0.0], repetitions)
        expected = gaussian_min_norm_risk(p, n, beta, sigma)
        assert abs(float(risks.mean()) - expected) < 4 * float(risks.std()) / repetitions**0.5
        assert float(risks.std()) / repetitions**0.5 < 0.03 * expected

    def test_is_infinite_around_the_threshold_and_finite_beside_it(self) -> None:
        beta = torch.ones(30)
        values = {p: gaussian_min_norm_risk(p, 20, beta, 0.5) for p in range(17, 24)}
        assert [p for p, value in values.items() if value == math.inf] == [19, 20, 21]
        assert values[18] == pytest.approx(12.25 * (1 + 18))  # 12 features missing
        assert values[22] == pytest.approx(22 * (1 - 20 / 22) + 8.25 * (1 + 20))

    def test_without_noise_and_missing_features_only_the_unseen_part_is_lost(self) -> None:
        beta = torch.tensor([1.0, 2.0, 3.0, 0.0])
        assert [gaussian_min_norm_risk(p, 2, beta, 0.0) for p in (3, 4)] == pytest.approx([14 / 3, 7])
        assert gaussian_min_norm_risk(3, 3, beta, 0.0) == 0
        assert gaussian_min_norm_risk(3, 8, beta, 0.0) == 0
        assert gaussian_min_norm_risk(2, 2, beta, 0.0) == math.inf

    @pytest.mark.parametrize("gamma", [0.2, 0.8, 1.5, 6.0])
    def test_tends_to_the_asymptotic_risk(self, gamma: float) -> None:
        n, r2, sigma = 400_000, 2.3, 0.6
        p = round(gamma * n)
        beta = torch.full((p,), math.sqrt(r2 / p), dtype=torch.float64)
        exact = gaussian_min_norm_risk(p, n, beta, sigma) - sigma**2
        assert asymptotic_ridgeless_risk(gamma, r2, sigma**2) == pytest.approx(exact, rel=1e-4)

    def test_asymptotic_risk_at_the_threshold(self) -> None:
        assert asymptotic_ridgeless_risk(1.0, 3.0, 0.1) == math.inf
        assert asymptotic_ridgeless_risk(1.0, 3.0, 0.0) == 0

    def test_asymptotic_risk_without_noise_is_the_unseen_part(self) -> None:
        assert asymptotic_ridgeless_risk(0.5, 0.3, 0.0) == 0
        assert asymptotic_ridgeless_risk(4.0, 0.4, 0.0) == pytest.approx(0.3)

    def test_the_optimal_ridge_beats_its_neighbours(self) -> None:
        n, p, sigma, repetitions = 7, 6, 0.8, 2000
        beta = _random(9, seed=4)
        best = optimal_gaussian_ridge(p, beta, sigma)
        risks = _gaussian_risks(p, n, beta, sigma, [best, best / 1.6, 1.6 * best], repetitions)
        for other in risks[1:]:
            loss = other - risks[0]
            assert float(loss.mean()) > 4 * float(loss.std()) / repetitions**0.5

    def test_with_the_optimal_ridge_more_features_never_hurt(self) -> None:
        n, sigma, beta = 6, 0.5, torch.full((18,), 0.3, dtype=torch.float64)
        means = []
        for p in (1, 3, 5, 6, 7, 9, 18):
            (risks,) = _gaussian_risks(p, n, beta, sigma, [optimal_gaussian_ridge(p, beta, sigma)], 1000)
            means.append(float(risks.mean()))
        assert means == sorted(means, reverse=True)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        beta = torch.ones(4)
        for p, n, message in (
            (0, 3, "p: expected at least 1"),
            (5, 3, "p: expected at most the 4 features"),
            (2, 0, "n: expected at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                gaussian_min_norm_risk(p, n, beta, 1.0)
        with pytest.raises(ValueError, match="sigma: expected at least 0"):
            gaussian_min_norm_risk(2, 3, beta, -1.0)
        with pytest.raises(ValueError, match="beta: expected finite"):
            optimal_gaussian_ridge(2, beta / 0, 1.0)
        with pytest.raises(ValueError, match="beta: expected a coefficient other than zero among the first 2"):
            optimal_gaussian_ridge(2, torch.tensor([0.0, 0.0, 1.0]), 1.0)
        for arguments, name in (((0.0, 1.0, 1.0), "gamma"), ((1.0, -1.0, 1.0), "r2"), ((1.0, 1.0, -1.0), "sigma2")):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                asymptotic_ridgeless_risk(*arguments)


class TestWeightReuseCurve:
    def test_follows_the_scheme_of_the_paper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        d, n, k = 30, 50, 4  # 200 targets: 5 units have 179 parameters, 6 have 214
        trained: list[dict[str, Any]] = []

        def record(net: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> Any:
            trained.append({"net": net, "before": [p.detach().clone() for p in net.parameters()], **settings})
            for step in range(settings["steps"]):
                for p in net.parameters():
                    p.data.add_(1.0)
                yield step

        monkeypatch.setattr(double_descent, "gradient_descent", record)
        train, test = _sample(n, d, k), _sample(9, d, k, seed=1)
        curve = weight_reuse_curve(train, test, [2, 5, 6, 40], lr=0.3, epochs=3, generator=_rng())
        assert curve.sizes == [(d + 1) * h + (h + 1) * k for h in (2, 5, 6, 40)]
        small, reused, fresh, last = trained
        assert [t["decay"] for t in trained] == [0.9, 0.9, 1.0, 1.0]
        assert {(t["lr"], t["momentum"], t["steps"], t["decay_every"]) for t in trained} == {(0.3, 0.95, 3, 500)}
        for before, weight in zip(reused["before"], small["net"].parameters(), strict=True):
            kept = before[:, :2] if len(before) == k and before.ndim == 2 else before[: len(weight)]
            assert torch.equal(kept, weight)
        new = reused["before"][0][2:]
        assert abs(float(new.square().mean()) - 0.01) < 4 * 0.01 * (2 / new.numel()) ** 0.5
        for first in (fresh, last):
            assert not first["before"][1].any()
            assert first["before"][0].abs().max() <= (6 / (d + len(first["before"][0]))) ** 0.5
        # All are evaluated with their own trained weights.
        net = reused["net"].requires_grad_(False)
        assert float(curve.test_mse[1]) == pytest.approx(float((net(test.x) - test.y).square().mean()))
        assert float(curve.train_mse[1]) == pytest.approx(float((net(train.x) - train.y).square().mean()))
        squares = sum(float(p.square().sum()) for p in net.parameters())
        assert float(curve.norm[1]) == pytest.approx(math.sqrt(squares))

    def test_as_many_parameters_as_targets_are_not_below_the_threshold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found: list[tuple[float, int]] = []

        def record(net: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> Any:
            found.append((settings["decay"], settings["steps"]))
            return iter(())

        monkeypatch.setattr(double_descent, "gradient_descent", record)
        for n in (9, 10):  # (2 + 1) 2 + (2 + 1) = 9 parameters
            weight_reuse_curve(_sample(n, 2, 1), _sample(3, 2, 1), [2], lr=0.1)
        assert found == [(1.0, 6000), (0.9, 6000)]

    def test_stops_below_the_threshold_when_all_classes_are_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        labels = torch.arange(60) % 2
        easy = Sample(torch.stack([2.0 * labels - 1, 1 - 2.0 * labels], 1), nn.functional.one_hot(labels).double())
        steps: list[int] = []

        def count(*args: Any, **settings: Any) -> Any:
            steps.append(0)
            for step in original(*args, **settings):
                steps[-1] = step
                yield step

        original = double_descent.gradient_descent
        monkeypatch.setattr(double_descent, "gradient_descent", count)
        curve = weight_reuse_curve(easy, easy, [8, 16, 40], lr=0.05, epochs=40, generator=_rng())
        assert curve.test_error.tolist() == [0, 0, 0]
        assert steps[0] < 40
        assert steps[1] == 1  # the trained units already classify all, and the new ones disturb little
        assert steps[2] == 40  # above the threshold

    def test_training_error_falls_with_the_width_below_the_threshold(self) -> None:
        train = _sample(60, 3, 2)
        curve = weight_reuse_curve(train, train, [1, 4, 12], lr=0.05, epochs=60, generator=_rng())
        assert (curve.train_mse.diff() < 0).all()

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        train, test = _sample(9), _sample(5, seed=1)
        for hidden, message in (([], "strictly increasing"), ([2, 2], "strictly increasing"), ([0, 1], "at least 1")):
            with pytest.raises(ValueError, match=f"hidden: expected {message}"):
                weight_reuse_curve(train, test, hidden, lr=0.1)
        with pytest.raises(ValueError, match="lr: expected more than 0"):
            weight_reuse_curve(train, test, [1], lr=0.0)
        with pytest.raises(ValueError, match="steps: expected at least 1"):
            weight_reuse_curve(train, test, [1], lr=0.1, epochs=0)
        with pytest.raises(ValueError, match=r"train\.y: expected 2 dimensions"):
            weight_reuse_curve(*(Sample(s.x, s.y[:, 0]) for s in (train, test)), [1], lr=0.1)


class TestEpochWiseCurve:
    def test_measures_at_the_given_epochs(self) -> None:
        train, test = _float(_sample(9)), _float(_sample(5, seed=1))
        torch.manual_seed(0)
        net, same = nn.Linear(4, 3), nn.Linear(4, 3)
        same.load_state_dict(net.state_dict())
        curve = epoch_wise_curve(net, train, test, [1, 4, 6], lr=0.1, momentum=0.5)
        optimiser = torch.optim.SGD(same.parameters(), lr=0.1, momentum=0.5)
        expected = []
        for epoch in range(1, 7):
            optimiser.zero_grad()
            nn.functional.mse_loss(same(train.x), train.y).backward()
            optimiser.step()
            if epoch in (1, 4, 6):
                expected.append(float((same(test.x) - test.y).detach().square().mean()))
        assert curve.sizes == [1, 4, 6]
        assert curve.test_mse.tolist() == pytest.approx(expected, rel=1e-5)
        assert torch.equal(net.weight, same.weight)

    def test_momentum_of_the_paper_by_default(self) -> None:
        train = _sample(9)
        curves: list[RiskCurve] = []
        for momentum in ({}, {"momentum": 0.95}):
            net = nn.Linear(4, 3, dtype=torch.float64)
            nn.init.zeros_(net.weight)
            nn.init.zeros_(net.bias)
            curves.append(epoch_wise_curve(net, train, train, [3, 5], lr=0.1, **momentum))
        assert torch.equal(curves[0].train_mse, curves[1].train_mse)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        train, net = _float(_sample(9)), nn.Linear(4, 3)
        for epochs, message in (([], "strictly increasing"), ([3, 2], "strictly increasing"), ([0, 1], "at least 1")):
            with pytest.raises(ValueError, match=f"epochs: expected {message}"):
                epoch_wise_curve(net, train, train, epochs, lr=0.1)
        with pytest.raises(ValueError, match="lr: expected more than 0"):
            epoch_wise_curve(net, train, train, [1], lr=-0.1)
        with pytest.raises(ValueError, match=r"train\.x: expected finite"):
            epoch_wise_curve(net, Sample(train.x / 0, train.y), train, [1], lr=0.1)
