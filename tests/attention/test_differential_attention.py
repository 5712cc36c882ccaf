import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from mlreviews.attention.differential_attention import (
    DifferentialAttention,
    differential_map,
    initial_lambda,
    learned_lambda,
    two_call_attention,
)
from mlreviews.common.rotary import apply_rotary, rotary_angles
from mlreviews.models import CausalAttention
from mlreviews_kernels.differential_attention import differential_attention
from tests.contracts.families import Sample

DIM, HEADS, KV_HEADS, BATCH, TIME = 24, 8, 4, 2, 9  # 4 differential heads on 2 of keys, d = 3


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(**options: Any) -> DifferentialAttention:
    options = {"kv_heads": KV_HEADS, "rope_base": None, "layer": 2, "generator": _rng(), **options}
    return DifferentialAttention(DIM, HEADS, **options)


def _inputs(queries: int = 4, keys: int = 7, heads: int = 6, kv_heads: int = 3) -> tuple[Tensor, ...]:
    """q1, k1, q2, k2, v, with a value size other than that of keys."""
    shapes = ((queries, heads, 5), (keys, kv_heads, 5), (queries, heads, 5), (keys, kv_heads, 5), (keys, kv_heads, 3))
    return tuple(_random(2, *shape, seed=i) for i, shape in enumerate(shapes))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _apply(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(weights.shape[1] // v.shape[2], 2))


CONTRACT = {
    "DifferentialAttention": lambda: Sample(
        _layer(rope_base=None, kv_heads=None), (_random(2, TIME, DIM, dtype=torch.float32),)
    ),
    "DifferentialAttention, grouped": lambda: Sample(
        DifferentialAttention(8, 4, kv_heads=2, generator=_rng()), (_random(2, 7, 8, dtype=torch.float32),)
    ),
}


@pytest.mark.parametrize("causal", [False, True])
def test_reduces_to_scaled_dot_product_attention(causal: bool) -> None:
    q1, k1, q2, k2, v = _inputs()
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3) if causal else None
    plain = _sdpa(q1, k1, v, mask)
    torch.testing.assert_close(_apply(differential_map(q1, k1, q2, k2, 0.0, causal=causal), v), plain)
    torch.testing.assert_close(two_call_attention(q1, k1, q2, k2, v, 0.0, causal=causal), plain)
    same = differential_map(q1, k1, q1, k1, 0.3, causal=causal)
    torch.testing.assert_close(_apply(same, v), 0.7 * plain)
    assert two_call_attention(q1, k1, q1, k1, v, 1.0, causal=causal).abs().max() < 1e-15


@pytest.mark.parametrize("causal", [False, True])
def test_one_pass_two_calls_and_the_written_out_map_agree(causal: bool) -> None:
    *qk, v = _inputs()
    lam = torch.tensor(0.37, dtype=torch.float64)
    weights = differential_map(*qk, lam, causal=causal)
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 6, 4), 0.63, dtype=torch.float64))
    expected = _apply(weights, v)
    torch.testing.assert_close(two_call_attention(*qk, v, lam, causal=causal), expected)
    torch.testing.assert_close(differential_attention(*qk, v, lam, causal=causal), expected)
    assert (weights < 0).any()


def test_the_map_by_loops_over_heads_and_positions() -> None:
    q1, k1, q2, k2, _ = _inputs()
    weights = differential_map(q1, k1, q2, k2, 0.8)
    for head in range(6):
        for i in range(4):
            seen = i + 4  # the last of 4 queries is at the last of 7 keys
            one, other = (
                (k[1, :seen, head // 2] @ q[1, i, head] / math.sqrt(5)).softmax(0) for q, k in ((q1, k1), (q2, k2))
            )
            torch.testing.assert_close(weights[1, head, i, :seen], one - 0.8 * other)
            assert not weights[1, head, i, seen:].any()


def test_first_lambda_grows_with_depth() -> None:
    assert initial_lambda(0) == pytest.approx(0.2)
    assert initial_lambda(1) == pytest.approx(0.3555, abs=1e-4)  # the values of the paper's formula at l = 2 and 4
    assert initial_lambda(3) == pytest.approx(0.5561, abs=1e-4)
    assert initial_lambda(60) == pytest.approx(0.8, abs=1e-7)


def test_lambda_is_learned() -> None:
    vectors = [_random(5, seed=i) for i in range(4)]
    expected = math.exp(vectors[0] @ vectors[1]) - math.exp(vectors[2] @ vectors[3]) + 0.4
    assert learned_lambda(*vectors, 0.4).item() == pytest.approx(expected, rel=1e-12)
    half = [x.bfloat16() for x in vectors]
    assert learned_lambda(*half, 0.4).dtype == torch.float32
    layer = _layer()
    with torch.no_grad():
        layer.lambda_q2.zero_()
        layer.lambda_q1.copy_(torch.tensor([1.0, 0.0, 0.0]))
        layer.lambda_k1.copy_(torch.tensor([math.log(2.0), 5.0, 5.0]))
    assert layer.lambda_init == initial_lambda(2)
    assert layer.lam.item() == pytest.approx(2 - 1 + initial_lambda(2), rel=1e-6)


def test_first_vectors_are_normal_with_deviation_a_tenth() -> None:
    layer = DifferentialAttention(4096, 2, kv_heads=2, generator=_rng())
    for vector in (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2):
        # 2048 entries: the standard errors are 0.1 / sqrt(2048) of the mean and 0.1 / sqrt(4096) of the deviation
        assert abs(vector.mean().item()) < 4 * 0.1 / math.sqrt(2048)
        assert abs(vector.std().item() - 0.1) < 4 * 0.1 / math.sqrt(4096)
    assert not torch.equal(layer.lambda_q1, layer.lambda_q2)


@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_the_layer_is_two_standard_attentions_a_head_normed_and_scaled(rope_base: float | None) -> None:
    layer = DifferentialAttention(DIM, 4, kv_heads=2, layer=1, rope_base=rope_base, generator=_rng()).double()
    with torch.no_grad():
        layer.subln.weight.copy_(_random(12, seed=5))
        layer.lambda_q1.add_(1.0)
    x = _random(BATCH, TIME, DIM)
    q = (x @ layer.q_proj.weight.T).view(BATCH, TIME, 4, 6)
    k = (x @ layer.k_proj.weight.T).view(BATCH, TIME, 2, 6)
    v = (x @ layer.v_proj.weight.T).view(BATCH, TIME, 1, 12)
    if rope_base is not None:
        angles = rotary_angles(torch.arange(TIME), 6, base=rope_base)
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
    causal = torch.ones(TIME, TIME, dtype=torch.bool).tril()
    heads = []
    for i in (0, 2):  # queries lie in pairs, and both pairs share the one pair of keys
        one, other = (_sdpa(q[:, :, i + j, None], k[:, :, j, None], v, causal) for j in (0, 1))
        normed = rms_norm((one - layer.lam * other)[:, :, 0], (12,), eps=1e-5) * layer.subln.weight
        heads.append((1 - initial_lambda(1)) * normed)
    torch.testing.assert_close(layer(x)[0], torch.cat(heads, -1) @ layer.o_proj.weight.T)


def test_maps_are_what_the_layer_computes_with() -> None:
    layer, x = _layer(rope_base=None).double(), _random(BATCH, TIME, DIM)
    v = layer.v_proj(x).view(BATCH, TIME, 2, 6)
    maps = layer.maps(x)
    assert maps.shape == (BATCH, 4, TIME, TIME)
    heads = (1 - layer.lambda_init) * rms_norm(_apply(maps, v), (6,), eps=1e-5)
    torch.testing.assert_close(layer.o_proj(heads.flatten(2)), layer(x)[0])


def test_has_the_parameters_of_a_standard_layer_and_six_vectors() -> None:
    layer, standard = _layer(), CausalAttention(DIM, HEADS, kv_heads=KV_HEADS, rope_base=None, generator=_rng())
    counts = [sum(p.numel() for p in module.parameters()) for module in (layer, standard)]
    assert counts[0] - counts[1] == 4 * 3 + 2 * 3
    for name, parameter in standard.named_parameters():  # drawn the same, so that comparisons start alike
        assert torch.equal(layer.get_parameter(name), parameter)
    # and the cache is as large
    x = _random(BATCH, TIME, DIM, dtype=torch.float32)
    assert [t.shape for t in layer(x)[1][:2]] == [t.shape for t in standard(x)[1][:2]]


def test_each_head_is_normed_by_itself() -> None:
    layer, x = _layer().double(), _random(BATCH, TIME, DIM)
    with torch.no_grad():
        layer.v_proj.weight *= 1e4  # beside which eps is nothing
        y = layer(x)[0]
        layer.v_proj.weight[:6] *= 7.0  # one of two heads of values
        torch.testing.assert_close(layer(x)[0], y, rtol=1e-6, atol=1e-6)


def test_half_precision_is_as_near_as_its_rounding() -> None:
    layer, x = _layer().bfloat16(), _random(BATCH, TIME, DIM)
    y, exact = layer(x.bfloat16())[0], _layer().bfloat16().double()(x.bfloat16().double())[0]
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 3 * 2**-8 * exact.norm()  # q, k, v, heads, norm and y are rounded, each by 2^-9 at most
    assert layer.maps(x.bfloat16()).dtype == torch.float32


def test_padding_is_not_seen() -> None:
    layer, x = _layer().double(), _random(2, 6, DIM)
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    y, state = layer(x, mask=mask)
    torch.testing.assert_close(y[:1, 2:], layer(x[:1, 2:])[0])
    more = _random(2, DIM, seed=4)
    step, _ = layer.step(more, state)
    alone, _ = layer.step(more[:1], layer(x[:1, 2:])[1])
    torch.testing.assert_close(step[:1], alone)
    assert y.isfinite().all()


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"heads: expected an even number.*got 3"):
        DifferentialAttention(12, 3)
    with pytest.raises(ValueError, match=r"kv_heads: expected an even number.*got 1"):
        DifferentialAttention(16, 4, kv_heads=1)
    with pytest.raises(ValueError, match="layer: expected at least 0"):
        initial_lambda(-1)
    q1, k1, q2, k2, _ = _inputs()
    with pytest.raises(ValueError, match=r"q2: expected shape .*, as q1 has"):
        differential_map(q1, k1, q2[:, 1:], k2, 0.1)
    with pytest.raises(ValueError, match=r"k2: expected shape .*, as k1 has"):
        differential_map(q1, k1, q2, k2[:, 1:], 0.1)
    with pytest.raises(ValueError, match="q1: expected at most 3 queries"):
        differential_map(q1, k1[:, :3], q2, k2[:, :3], 0.1)


def test_trains_through_lambda_and_norm() -> None:
    layer = _layer().double()
    loss = nn.functional.mse_loss(layer(_random(BATCH, TIME, DIM))[0], _random(BATCH, TIME, DIM, seed=2))
    loss.backward()
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "subln.weight"):
        gradient = layer.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().min() > 0
