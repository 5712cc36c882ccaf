import math
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlreviews.attention.adaptive_temperature_softmax import (
    COEFFICIENTS,
    AdaptiveTemperatureAttention,
    adaptive_softmax,
    dispersion_bounds,
    fit_temperature_polynomial,
    inverse_temperature,
    softmax_entropy,
)
from mlreviews.models import CausalAttention
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _logits(*shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, dtype=torch.float64, generator=_rng())


def _layer(kind: type[CausalAttention] = AdaptiveTemperatureAttention) -> CausalAttention:
    return kind(8, 2, generator=_rng())


CONTRACT = {
    "AdaptiveTemperatureAttention": lambda: Sample(_layer(), (torch.randn(2, 5, 8, generator=_rng(1)),)),
}


def test_entropy_is_scipys() -> None:
    logits = _logits(3, 7, 5, size=3)
    expected = scipy.stats.entropy(logits.softmax(1).numpy(), axis=1)
    torch.testing.assert_close(softmax_entropy(logits, 1), torch.from_numpy(expected))
    torch.testing.assert_close(softmax_entropy(torch.zeros(2, 9).double()), torch.full((2,), math.log(9)).double())


def test_inverse_temperature_by_hand() -> None:
    entropy = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0, 2.0, 5.0, 5.9, 5.97, 9.0], dtype=torch.float64)
    polynomial = [-0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791 for h in entropy.tolist()]
    expected = [max(p, 1.0) if h > 0.5 else 1.0 for p, h in zip(polynomial, entropy.tolist(), strict=True)]
    torch.testing.assert_close(inverse_temperature(entropy), torch.tensor(expected).double())
    assert [b > 1 for b in expected] == [False] * 4 + [True] * 4 + [False] * 2  # the second deviation of the card
    torch.testing.assert_close(
        inverse_temperature(entropy, (2.0, 1.5), 0.45),
        torch.where(entropy > 0.45, 2.0 * entropy + 1.5, torch.ones_like(entropy)),
    )


def test_sharpened_rows_are_softmaxes_of_scaled_logits() -> None:
    logits = _logits(4, 20)
    entropy = torch.from_numpy(scipy.stats.entropy(logits.softmax(-1).numpy(), axis=-1))
    scaled = inverse_temperature(entropy)[:, None] * logits
    assert (inverse_temperature(entropy) > 1.5).all()
    torch.testing.assert_close(adaptive_softmax(logits), scaled.softmax(-1))
    torch.testing.assert_close(adaptive_softmax(logits.T, 0), scaled.softmax(-1).T)


def test_rows_below_the_threshold_reduces_to_softmax() -> None:
    logits = _logits(50, 6, size=8)
    low = softmax_entropy(logits) <= 0.5
    assert 5 < low.sum() < 45
    torch.testing.assert_close(adaptive_softmax(logits)[low], logits.softmax(-1)[low], rtol=0, atol=1e-15)
    torch.testing.assert_close(adaptive_softmax(logits, coefficients=(1.0,)), logits.softmax(-1), rtol=0, atol=1e-15)
    high = adaptive_softmax(logits, entropy_threshold=10.0, coefficients=(3.0,))
    torch.testing.assert_close(high, logits.softmax(-1), rtol=0, atol=1e-15)


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(0.1, 5), st.floats(-100, 100), st.integers(0, 1000))
def test_never_softer_same_order_and_no_zero(items: int, size: float, constant: float, seed: int) -> None:
    logits = size * torch.randn(3, items, dtype=torch.float64, generator=_rng(seed))
    found = adaptive_softmax(logits)
    torch.testing.assert_close(found.sum(-1), torch.ones(3).double())
    assert (scipy.stats.entropy(found.numpy(), axis=-1) <= softmax_entropy(logits).numpy() + 1e-9).all()
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(adaptive_softmax(logits + constant), found, rtol=1e-6, atol=1e-12)


def test_an_entropy_of_little_more_than_one_is_sharpened() -> None:
    logits = torch.tensor([0.0, 0.2, 0.4, -0.1], dtype=torch.float64)
    entropy = softmax_entropy(logits)
    assert 1.3 < entropy < math.log(4)
    polynomial = sum(c * entropy**power for power, c in enumerate(reversed(COEFFICIENTS)))
    assert polynomial > 1.5
    torch.testing.assert_close(adaptive_softmax(logits), (polynomial * logits).softmax(0))


def test_masked_items_take_no_part() -> None:
    logits, mask = _logits(5, 12), torch.rand(5, 12, generator=_rng(3)) < 0.6
    mask[4] = False
    for found in (
        adaptive_softmax(logits, mask=mask),
        adaptive_softmax(logits.masked_fill(~mask, float("-inf"))),
    ):
        assert found[~mask].abs().max() == 0
        for row in range(4):
            torch.testing.assert_close(found[row, mask[row]], adaptive_softmax(logits[row, mask[row]]))
    entropy = softmax_entropy(logits, mask=mask)
    torch.testing.assert_close(entropy[0], softmax_entropy(logits[0, mask[0]]))
    assert entropy[4] == 0


def test_gradients() -> None:
    logits = _logits(3, 9).requires_grad_()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 4], mask[2] = False, False
    assert torch.autograd.gradcheck(lambda x: adaptive_softmax(x, mask=mask), (logits,))
    assert (inverse_temperature(softmax_entropy(logits[:2])) > 1.5).all()  # through beta, not beside it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = _logits(3, 30).to(dtype)
    assert adaptive_softmax(logits).dtype == dtype
    assert torch.equal(adaptive_softmax(logits), adaptive_softmax(logits.float()).to(dtype))
    assert softmax_entropy(logits).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_dispersion(temperature: float) -> None:
    for items in (2, 16, 128, 1024):
        logits = 3 * torch.rand(200, items, dtype=torch.float64, generator=_rng(items))
        low, high = dispersion_bounds(items, 3.0, temperature)
        found = (logits / temperature).softmax(-1)
        assert low <= found.min()
        assert found.max() <= high
    assert dispersion_bounds(4, 3.0) == dispersion_bounds(4, 3.0, 1.0)
    low, high = dispersion_bounds(4, 3.0, temperature)
    tight = torch.tensor([3.0] + [0.0] * 1_000_000, dtype=torch.float64)
    torch.testing.assert_close(
        (tight / temperature).softmax(-1)[0] * 1e6 / 4, torch.tensor(high).double(), rtol=1e-3, atol=0
    )
    tight = torch.tensor([0.0] + [3.0] * 1_000_000, dtype=torch.float64)
    torch.testing.assert_close(
        (tight / temperature).softmax(-1)[0] * 1e6 / 4, torch.tensor(low).double(), rtol=1e-3, atol=0
    )


def test_the_fit_finds_a_polynomial_again() -> None:
    entropies = 0.5 + 5 * torch.rand(40, generator=_rng(5))
    values = torch.zeros(40).double()
    for coefficient in COEFFICIENTS:
        values = values * entropies.double() + coefficient
    found = fit_temperature_polynomial(entropies, values.float())
    torch.testing.assert_close(torch.tensor(found), torch.tensor(COEFFICIENTS), rtol=1e-3, atol=1e-4)
    line = fit_temperature_polynomial(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 4.0]), degree=1)
    torch.testing.assert_close(torch.tensor(line), torch.tensor([1.5, 0.5]))  # by the normal equations


def test_the_layer_reduces_to_plain_attention_in_training_and_only_there() -> None:
    x = torch.randn(2, 12, 8, generator=_rng(1))
    layer, plain = _layer(), _layer(CausalAttention)
    assert torch.equal(layer.train()(x)[0], plain(x)[0])
    assert not torch.allclose(layer.eval()(x)[0], plain(x)[0])
    layer.coefficients = (1.0,)  # type: ignore[attr-defined]
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_the_layer_is_the_softmax_over_its_logits() -> None:
    layer, x = _layer().eval().double(), _logits(2, 12, 8)
    q, k, v = layer.project(x, 0)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    weights = adaptive_softmax(logits, mask=torch.ones(12, 12, dtype=torch.bool).tril())
    expected = layer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    with pytest.raises(ValueError, match="coefficients: expected at least one"):
        inverse_temperature(torch.zeros(2), ())
    for arguments, match in (
        ((0, 1.0), "items: expected at least 1"),
        ((2, -1.0), "spread: expected at least 0"),
        ((2, 1.0, 0.0), "temperature: expected more than 0"),
    ):
        bad: Any = arguments
        with pytest.raises(ValueError, match=match):
            dispersion_bounds(*bad)
    with pytest.raises(ValueError, match="entropies: expected at least 5 for degree 4, got 4"):
        fit_temperature_polynomial(torch.rand(4), torch.rand(4))
    with pytest.raises(ValueError, match="degree: expected at least 0"):
        fit_temperature_polynomial(torch.rand(4), torch.rand(4), -1)
    with pytest.raises(ValueError, match="entropies, betas: expected the same number of rows"):
        fit_temperature_polynomial(torch.rand(9), torch.rand(8))
