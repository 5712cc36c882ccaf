"""Regression through classes: scipy's divergence, scikit-learn's bins, limits of the width, and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import entropy
from sklearn.preprocessing import KBinsDiscretizer
from torch import Tensor, nn

from mlreviews.common.layers import linear
from mlreviews.decoding.numeric_decoding_regression import (
    SoftBinRegressor,
    bin_divergence,
    even_centers,
    hard_bin,
    soft_bin,
)
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _regressor(**options: float | bool) -> SoftBinRegressor:
    backbone = linear(4, 5, generator=_rng())
    return SoftBinRegressor(backbone, torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0]), **options)  # type: ignore[arg-type]


def _data(n: int = 7) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=_rng(1), dtype=torch.float64)
    return x, torch.randn(n, generator=_rng(2), dtype=torch.float64)


CONTRACT = {"SoftBinRegressor": lambda: Sample(_regressor(), tuple(t.float() for t in _data()))}


def test_reduces_to_scikit_learn_s_bins() -> None:
    _, y = _data(50)
    discretizer = KBinsDiscretizer(6, encode="onehot-dense", strategy="uniform", quantile_method="linear")
    expected = discretizer.fit_transform(y[:, None].numpy())
    centers = even_centers(y, 6)
    edges = torch.from_numpy(discretizer.bin_edges_[0])
    torch.testing.assert_close(centers, (edges[1:] + edges[:-1]) / 2)
    assert torch.equal(hard_bin(y, centers), torch.from_numpy(expected))
    assert hard_bin(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [[1.0, 0.0]]


def test_soft_bins_are_distributions_between_certainty_and_uniformity() -> None:
    _, y = _data()
    centers = torch.tensor([-1.0, 0.3, 2.0]).double()
    p = soft_bin(y, centers, 0.7)
    torch.testing.assert_close(p.sum(1), torch.ones(7).double())
    # by the densities of a normal distribution around each centre
    density = torch.distributions.Normal(centers, 0.7).log_prob(y[:, None]).exp()
    torch.testing.assert_close(p, density / density.sum(1, keepdim=True))
    torch.testing.assert_close(soft_bin(y, centers, 1e-3), hard_bin(y, centers))
    torch.testing.assert_close(soft_bin(y, centers, 1e6), torch.full((7, 3), 1 / 3).double())


def test_the_divergence_is_scipy_s_and_0_where_the_prediction_is_right() -> None:
    logits, _ = _data()
    target = torch.randn(7, 4, generator=_rng(3), dtype=torch.float64).softmax(-1)
    expected = entropy(target.numpy(), logits.softmax(-1).numpy(), axis=1)
    torch.testing.assert_close(bin_divergence(target, logits), torch.from_numpy(expected))
    torch.testing.assert_close(bin_divergence(target, target.log() + 3.0), torch.zeros(7).double())
    certain = torch.eye(4).double()
    torch.testing.assert_close(bin_divergence(certain, logits[:4]), -logits[:4].log_softmax(-1).diagonal())


def test_more_bins_code_a_target_more_precisely() -> None:
    _, y = _data(200)
    errors = []
    for classes in (2, 8, 32, 128):
        centers = even_centers(y, classes)
        decoded = hard_bin(y, centers) @ centers
        errors.append(float((y - decoded).abs().max()))
        assert errors[-1] <= float(y.max() - y.min()) / (2 * classes) + 1e-12  # half a bin
    assert errors == sorted(errors, reverse=True)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    model, (x, y) = _regressor(sigma=0.8).double(), _data()
    with torch.no_grad():
        model.values.add_(torch.tensor([0.1, -0.2, 0.3, 0.5, -0.4]))
    found = model(x, y, divergence=2.0, autoencoding=3.0, regression=5.0)
    p, q = soft_bin(y, model.centers, 0.8), model.backbone(x).softmax(-1)
    terms = [
        torch.from_numpy(entropy(p.detach().numpy(), q.detach().numpy(), axis=1)).mean(),
        torch.stack([(y[i] - sum(p[i, j] * model.values[j] for j in range(5))) ** 2 for i in range(7)]).mean(),
        torch.stack([(y[i] - sum(q[i, j] * model.values[j] for j in range(5))) ** 2 for i in range(7)]).mean(),
    ]
    for one, expected in zip(found[1:], terms, strict=True):
        torch.testing.assert_close(one, expected)
    torch.testing.assert_close(found.total, 2 * terms[0] + 3 * terms[1] + 5 * terms[2])
    torch.testing.assert_close(model(x, y).total, sum(terms))
    with torch.no_grad():
        prediction = model.predict(x)
        torch.testing.assert_close(prediction, q @ model.values)
        assert model.values.min() <= prediction.min()
        assert prediction.max() <= model.values.max()


def test_gradients_reach_what_is_trained() -> None:
    model, (x, y) = _regressor().double(), _data()
    assert float(model.log_sigma.detach().exp()) == pytest.approx(5 / 4)

    def loss(centers: Tensor, log_sigma: Tensor, values: Tensor) -> Tensor:
        parameters = {"centers": centers, "log_sigma": log_sigma, "values": values}
        found: Tensor = torch.func.functional_call(model, parameters, (x, y)).total
        return found

    start = tuple(p.detach().clone().requires_grad_() for p in (model.centers, model.log_sigma, model.values))
    assert torch.autograd.gradcheck(loss, start)
    # far from all centres but one the probabilities underflow
    far = _regressor(sigma=0.02)
    far(x.float(), 10 * y.float()).total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in far.parameters())
    fixed = _regressor(learn_encoder=False)
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["centers", "log_sigma"]


def test_reduces_to_least_squares() -> None:
    model, (x, y) = _regressor().double(), _data()
    model(x, y, divergence=0.0, autoencoding=0.0).total.backward()
    assert model.centers.grad is not None
    assert float(model.centers.grad.abs().max()) == 0
    found = [model.backbone.weight.grad.clone(), model.values.grad]  # type: ignore[union-attr, operator]
    head = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(model.values[None])
    backbone = linear(4, 5, generator=_rng()).double()
    nn.functional.mse_loss(head(backbone(x).softmax(-1))[:, 0], y).backward()
    torch.testing.assert_close(found[0], backbone.weight.grad)
    torch.testing.assert_close(found[1], head.weight.grad[0])  # type: ignore[index]


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    y = torch.tensor([1.0, 2.0])
    for bad in (y[:0], y[None], torch.ones(3), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="y"):
            even_centers(bad, 3)
    with pytest.raises(ValueError, match="classes"):
        even_centers(y, 0)
    backbone = nn.Identity()
    for centers in (y[:1], y[None], torch.ones(3), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="centers"):
            SoftBinRegressor(backbone, centers)
    with pytest.raises(ValueError, match="sigma"):
        SoftBinRegressor(backbone, y, sigma=0.0)
