from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews.common.rotary import apply_rotary, rotary_angles
from mlreviews.models import CausalAttention, KVCache
from mlreviews.models.attention import FEW_KEYS

DIM, HEADS, KV_HEADS, BATCH, TIME = 12, 6, 3, 2, 7


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(**options: Any) -> CausalAttention:
    return CausalAttention(DIM, HEADS, **{"kv_heads": KV_HEADS, "generator": _rng(), **options}).double()


def _x(time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, time, DIM, dtype=torch.float64, generator=_rng(seed))


def _cache(time: int = 4, mask: Tensor | None = None) -> KVCache:
    keys, values = torch.randn(2, BATCH, time, KV_HEADS, 2, generator=_rng(3)).unbind()
    return KVCache(keys, values, mask)


@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_is_what_torch_computes_from_the_same_projections(rope_base: float | None) -> None:
    layer, x = _layer(rope_base=rope_base), _x()
    q = (x @ layer.q_proj.weight.T).view(BATCH, TIME, HEADS, 2)
    k = (x @ layer.k_proj.weight.T).view(BATCH, TIME, KV_HEADS, 2)
    v = (x @ layer.v_proj.weight.T).view(BATCH, TIME, KV_HEADS, 2)
    if rope_base is not None:
        angles = rotary_angles(torch.arange(TIME), 2, base=rope_base)
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    y, cache = layer(x)
    torch.testing.assert_close(y, out.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T)
    torch.testing.assert_close(cache, KVCache(k, v))


@pytest.mark.parametrize("gradients", [True, False])  # without them, few queries take another path
@pytest.mark.parametrize("given", [None, [5, 0, 7, 7, 2]])
def test_positions_turn_pairs_of_entries_by_powers_of_the_base(given: list[int] | None, gradients: bool) -> None:
    layer = CausalAttention(24, 3, kv_heads=1, rope_base=50.0, generator=_rng()).double()
    x, places = torch.randn(2, 5, 24, dtype=torch.float64, generator=_rng(1)), range(5) if given is None else given
    turn = torch.tensor([[complex(0, t * 50.0 ** (-i / 4)) for i in range(4)] for t in places]).exp()
    q, k, v = ((x @ p.weight.T).unflatten(2, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (torch.complex(*t.chunk(2, -1)) * turn[:, None] for t in (q, k))
    scores = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0].conj()).real / 8**0.5
    weights = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjd->bihd", weights, v[:, :, 0]).flatten(2) @ layer.o_proj.weight.T
    with torch.set_grad_enabled(gradients):
        found, _ = layer(x, positions=None if given is None else torch.tensor(given))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # angles are in float32


def test_the_path_of_few_queries_ends_where_there_are_many_keys() -> None:
    layer = CausalAttention(4, 1, generator=_rng())
    x = torch.randn(1, FEW_KEYS + 1, 4, generator=_rng(1))
    expected, cache = layer(x)
    for end in (FEW_KEYS - 1, FEW_KEYS, FEW_KEYS + 1):
        with torch.no_grad():
            found, _ = layer(x[:, end - 3 : end], cache.crop(end - 3))
        torch.testing.assert_close(found, expected[:, end - 3 : end])


@pytest.mark.parametrize("cut", range(1, TIME))
def test_parts_equal_the_whole(cut: int) -> None:
    layer, x = _layer(), _x()
    y, cache = layer(x)
    first, state = layer(x[:, :cut])
    second, end = layer(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, cache)


def test_steps_equal_the_whole() -> None:
    layer, x = _layer(), _x()
    state = None
    for t, expected in enumerate(layer(x)[0].unbind(1)):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("cut", [2, 4, TIME])
def test_padding_on_the_left_changes_nothing(cut: int) -> None:
    layer, x = _layer(), _x()
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[1, :3] = False
    first, state = layer(x[:, :cut], mask=mask[:, :cut])
    y = first if cut == TIME else torch.cat([first, layer(x[:, cut:], state, mask=mask[:, cut:])[0]], 1)
    torch.testing.assert_close(y[:1], layer(x[:1])[0])
    torch.testing.assert_close(y[1:, 3:], layer(x[1:, 3:])[0])
    if cut > 3:  # what follows a padded prompt needs no mask
        torch.testing.assert_close(y[:, cut:], layer(x[:, cut:], state)[0] if cut < TIME else y[:, cut:])


def test_positions_can_be_given() -> None:
    layer, x = _layer(), _x()
    torch.testing.assert_close(layer(x, positions=torch.arange(TIME) + 40)[0], layer(x)[0])
    swapped = torch.tensor([0, 2, 1, 3, 4, 5, 6])
    rows = torch.stack([torch.arange(TIME), swapped])
    y = layer(x, positions=rows)[0]
    torch.testing.assert_close(y[:1], layer(x[:1])[0])
    assert not torch.allclose(y[1:], layer(x[1:])[0])


def test_a_permutation_of_the_heads_changes_nothing() -> None:
    layer, x = _layer(kv_heads=HEADS), _x()
    y, order = layer(x)[0], torch.randperm(HEADS, generator=_rng(5))
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj):
            proj.weight.copy_(proj.weight.unflatten(0, (HEADS, -1))[order].flatten(0, 1))
        layer.o_proj.weight.copy_(layer.o_proj.weight.unflatten(1, (HEADS, -1))[:, order].flatten(1))
    torch.testing.assert_close(layer(x)[0], y)


def test_gradients_flow_through_the_cache() -> None:
    layer, x = _layer(), _x()
    weights = list(layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), weights)
    first, state = layer(x[:, :3])
    second, _ = layer(x[:, 3:], state)
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), weights)
    torch.testing.assert_close(found, expected)


def test_a_cache_is_a_value() -> None:
    cache, more = _cache(), _cache(2)
    before = [x.clone() for x in (cache.keys, cache.values)]
    longer = cache.append(more.keys, more.values)
    longer.keys.zero_()
    assert all(map(torch.equal, before, (cache.keys, cache.values)))
    assert longer.length == 6
    assert longer.mask is None
    torch.testing.assert_close(longer.values[:, 4:], more.values)


def test_masks_are_made_where_only_one_part_has_one() -> None:
    mask = torch.tensor([[True, True], [False, True]])
    cache = _cache(2, mask).append(*_cache(1)[:2])
    assert cache.mask is not None
    assert cache.mask.tolist() == [[True, True, True], [False, True, True]]
    cache = _cache(1).append(*_cache(2)[:2], mask)
    assert cache.mask is not None
    assert cache.mask.tolist() == [[True, True, True], [True, False, True]]


def test_crop_and_rows() -> None:
    mask = torch.rand(BATCH, 4, generator=_rng(8)) < 0.5
    cache = _cache(4, mask)
    assert [None if x is None else x.shape[1] for x in cache.crop(3)] == [3, 3, 3]
    assert [x.shape[1] for x in _cache().crop(0)[:2]] == [0, 0]
    rows = cache.rows(torch.tensor([1, 1, 0]))
    for found, x in zip(rows, cache, strict=True):
        assert x is not None
        assert found is not None
        assert torch.equal(found, torch.stack([x[1], x[1], x[0]]))
    for length in (-1, 5):
        with pytest.raises(ValueError, match="length: expected 0 to 4"):
            cache.crop(length)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    for options, match in (
        ({"kv_heads": 4}, "kv_heads: expected a divisor of heads 6, got 4"),
        ({"kv_heads": 0}, "kv_heads: expected at least 1"),
        ({"layer": -1}, "layer: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=match):
            _layer(**options)
    with pytest.raises(ValueError, match="heads: expected a divisor of d_model 12, got 5"):
        CausalAttention(12, 5)
    with pytest.raises(ValueError, match="heads: expected an even head size"):
        CausalAttention(12, 4)
    layer, x = _layer(), _x()
    for bad in (x[0], x[..., :5], x[:, :0]):
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 12\]"):
            layer(bad)
    with pytest.raises(ValueError, match="x_t: expected"):
        layer.step(x)
    for mask in (torch.ones(BATCH, 3, dtype=torch.bool), torch.ones(BATCH, TIME)):
        with pytest.raises(ValueError, match=r"mask: expected \[2, 7\], as x has, of bool"):
            layer(x, mask=mask)
    with pytest.raises(ValueError, match="state: expected a cache of keys"):
        layer(x[:1], layer(x)[1])


def test_defaults() -> None:
    layer = CausalAttention(DIM, HEADS, generator=_rng())
    assert (layer.kv_heads, layer.layer, layer.rope_base, layer.head_dim) == (HEADS, 0, 10000.0, 2)
