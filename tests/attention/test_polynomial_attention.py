import math
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from mlreviews.attention.polynomial_attention import (
    PolynomialAttention,
    polynomial_attention,
    polynomial_features,
    polynomial_jacobian_norm,
    polynomial_matrix,
    recurrent_polynomial_attention,
    softmax_jacobian_norm,
)
from tests.contracts.families import Sample

MODULE = sys.modules[polynomial_attention.__module__]  # the area has the function under this name
BATCH, TIME, HEADS, KV_HEADS, DIM, VALUE = 2, 9, 4, 2, 6, 5


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _qkv(time: int = TIME) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(BATCH, time, HEADS, DIM, seed=1),
        _random(BATCH, time, KV_HEADS, DIM, seed=2),
        _random(BATCH, time, KV_HEADS, VALUE, seed=3),
    )


CONTRACT = {
    "PolynomialAttention": lambda: Sample(
        PolynomialAttention(16, 4, kv_heads=2, generator=_rng()), (_random(2, 9, 16, dtype=torch.float32),)
    ),
}


def _loop(q: Tensor, k: Tensor, v: Tensor, degree: int, causal: bool, mask: Tensor, power: float = -0.5) -> Tensor:
    """Equation (1), one pair of tokens after another."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    first = k.shape[1] - q.shape[1]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(k.shape[1]) if mask[b, j] and (j <= first + i or not causal)]
            for h in range(q.shape[2]):
                for j in keys:
                    weight = (float(q[b, i, h] @ k[b, j, h // 2]) / math.sqrt(q.shape[3])) ** degree
                    out[b, i, h] += weight * len(keys) ** power * v[b, j, h // 2]
    return out


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_time", [TIME, 3])
def test_is_the_equation(degree: int, causal: bool, q_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "ROWS", 4)
    q, k, v = _qkv()
    q = q[:, :q_time]
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    everything = polynomial_attention(q, k, v, degree=degree, causal=causal)
    torch.testing.assert_close(everything, _loop(q, k, v, degree, causal, mask))
    mask[1, :3] = False  # with three queries or more, some of them see nothing
    found = polynomial_attention(q, k, v, degree=degree, causal=causal, mask=mask, length_power=-0.7)
    torch.testing.assert_close(found, _loop(q, k, v, degree, causal, mask, -0.7))
    # Whatever is hidden has no effect at all.
    k, v = k.clone(), v.clone()
    k[1, :3], v[1, :3] = 1e6, -1e6
    again = polynomial_attention(q, k, v, degree=degree, causal=causal, mask=mask, length_power=-0.7)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(degree: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "ROWS", 2)
    inputs = [x[:, :5, :2, :3].clone().requires_grad_() for x in _qkv()]
    mask = torch.ones(BATCH, 5, dtype=torch.bool)
    mask[1, :2] = False
    run = partial(polynomial_attention, degree=degree, causal=causal, mask=mask)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_a_block_is_as_good_as_many() -> None:
    q, k, v = (_random(1, 300, 1, 4, seed=seed) for seed in (1, 2, 3))
    found = polynomial_attention(q, k, v, degree=2)
    whole = ((q[:, :, 0] @ k[:, :, 0].mT / 2) ** 2).tril() @ v[:, :, 0]
    n = torch.arange(1, 301, dtype=torch.float64)[:, None]
    torch.testing.assert_close(found[:, :, 0], whole / n.sqrt())


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_reduces_to_linear_attention_by_associativity(degree: int) -> None:
    q, k, v = _qkv()
    whole = polynomial_attention(q, k, v, degree=degree)
    torch.testing.assert_close(recurrent_polynomial_attention(q, k, v, degree=degree)[0], whole)
    first, state = recurrent_polynomial_attention(*(x[:, :4] for x in (q, k, v)), degree=degree)
    second, (memory, length) = recurrent_polynomial_attention(
        *(x[:, 4:] for x in (q, k, v)), degree=degree, state=state
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert memory.shape == (BATCH, HEADS, DIM**degree, VALUE)
    assert length == TIME
    if degree == 1:
        product = torch.einsum("bnhd,bnhv->bhdv", k, v).repeat_interleave(2, 1)
        expected = torch.einsum("bnhd,bhdv->bnhv", q, product) / math.sqrt(DIM * TIME)
        torch.testing.assert_close(polynomial_attention(q, k, v, degree=1, causal=False), expected)


def test_features_are_tensor_powers() -> None:
    x, y = _random(3, 4), _random(3, 4, seed=1)
    for degree in (1, 2, 3):
        of_x, of_y = polynomial_features(x, degree), polynomial_features(y, degree)
        assert of_x.shape == (3, 4**degree)
        torch.testing.assert_close((of_x * of_y).sum(1), (x * y).sum(1) ** degree)


def test_a_scale_of_ones_own() -> None:
    q, k, v = _qkv()
    torch.testing.assert_close(polynomial_attention(q, k, v, scale=0.3), polynomial_attention(0.3 * DIM**0.5 * q, k, v))
    found, _ = recurrent_polynomial_attention(q, k, v, scale=0.3, degree=3)
    torch.testing.assert_close(found, polynomial_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = [x.to(dtype) for x in _qkv(150)]
    for run in (polynomial_attention, lambda *x: recurrent_polynomial_attention(*x, degree=3)[0]):
        found = run(*half)
        assert found.dtype == dtype
        expected = polynomial_attention(*(x.double() for x in half))
        assert (found.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()


def test_the_layer_has_its_degree_and_scaling() -> None:
    x = _random(2, TIME, 16)
    layer = PolynomialAttention(16, 4, degree=2, length_power=0.0, generator=_rng()).double()
    q, k, v = layer.project(x, 0)
    expected = polynomial_attention(q, k, v, degree=2, length_power=0.0)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(expected.flatten(2)))
    layer = PolynomialAttention(16, 4)
    assert (layer.degree, layer.length_power, layer.layer, layer.rope_base) == (3, -0.5, 0, 10000.0)
    q, k, v = _qkv()
    assert torch.equal(polynomial_attention(q, k, v), polynomial_attention(q, k, v, degree=3, length_power=-0.5))
    one = recurrent_polynomial_attention(q, k, v, degree=1)[0]
    assert torch.equal(recurrent_polynomial_attention(q, k, v)[0], one)


def test_softmax_is_bounded_by_the_theorem() -> None:
    n = 7
    for size in (0.0, 1.0, 30.0):
        logits = size * _random(n, n)
        p = logits.softmax(1)
        assert 1 - 1e-12 <= p.norm() <= math.sqrt(n) + 1e-12
        jacobian = torch.autograd.functional.jacobian(lambda x: x.softmax(1), logits)
        torch.testing.assert_close(softmax_jacobian_norm(logits), jacobian.norm())
        assert jacobian.norm() <= 2 * math.sqrt(n)
    one_hot = 1e4 * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(one_hot.softmax(1).norm(), torch.tensor(math.sqrt(n), dtype=torch.float64))
    assert softmax_jacobian_norm(one_hot) == 0


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_norms_of_gaussian_tokens(degree: int) -> None:
    dim, means = 64, []
    for n in (64, 256, 1024):
        draws = 80 if n == 64 else 16
        q, k = (_random(draws, n, dim, seed=seed) for seed in (n, n + 1))
        norms = torch.stack([polynomial_matrix(*pair, degree).norm() for pair in zip(q, k, strict=True)])
        # Equation (3), within what so few draws tell.
        exact = n * math.prod(range(1, 2 * degree, 2)) * math.prod(1 + 2 * i / dim for i in range(degree))
        assert abs(norms.square().mean() - exact) < 4 * norms.square().std() / math.sqrt(draws)
        means.append(float(norms.mean()) / math.sqrt(n))
    assert max(means) < 1.05 * min(means)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_jacobian_norm(degree: int) -> None:
    q, k = _random(4, 3), _random(5, 3, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: polynomial_matrix(x, k, degree), q)
    torch.testing.assert_close(polynomial_jacobian_norm(q, k, degree), jacobian.norm())
    if degree == 3:
        assert torch.equal(polynomial_jacobian_norm(q, k), polynomial_jacobian_norm(q, k, 3))
        assert torch.equal(polynomial_matrix(q, k), polynomial_matrix(q, k, 3))


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="degree: expected at least 1"):
        polynomial_attention(q, k, v, degree=0)
    with pytest.raises(ValueError, match="degree: expected at least 1"):
        recurrent_polynomial_attention(q, k, v, degree=0)
    with pytest.raises(ValueError, match="degree: expected at least 1"):
        PolynomialAttention(16, 4, degree=0)
    with pytest.raises(ValueError, match=r"k: expected \[2, time, kv_heads, 6\]"):
        polynomial_attention(q, k[..., :3], v)
    with pytest.raises(ValueError, match="q: expected at most 4 queries"):
        polynomial_attention(q, k[:, :4], v[:, :4])
    for call in (polynomial_matrix, polynomial_jacobian_norm):
        with pytest.raises(ValueError, match="q: expected finite values"):
            call(torch.full((2, 3), math.nan), torch.ones(2, 3))
        with pytest.raises(ValueError, match="k: expected at least one entry"):
            call(torch.ones(2, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="logits: expected finite values"):
        softmax_jacobian_norm(torch.full((2, 3), math.inf))
