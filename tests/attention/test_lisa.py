from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlreviews.attention import lisa
from mlreviews.attention.lisa import (
    AlignHeads,
    LiSAAttention,
    attention_distill_loss,
    attention_distill_mse,
    attention_weights,
    convert_to_lisa,
    layer_scores,
)
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from tests.contracts.families import Sample

CONFIG = TinyLMConfig(vocab_size=11, d_model=24, layers=3, heads=4, hidden=20)
each_kv_heads = pytest.mark.parametrize("kv_heads", [None, 2], ids=["heads", "grouped"])
each_rope = pytest.mark.parametrize("rope_base", [100.0, None], ids=["rope", "nope"])


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _ids(batch: int = 2, time: int = 9) -> Tensor:
    return torch.randint(11, (batch, time), generator=_rng(1))


def _teacher(rope_base: float | None = 100.0, **changes: Any) -> TinyLM:
    config = TinyLMConfig(**{**CONFIG.__dict__, **changes})
    model = TinyLM(config, partial(CausalAttention, rope_base=rope_base), generator=_rng()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=_rng(2)))
    return model


def _shared(**options: Any) -> LiSAAttention:
    """A layer that shares, with nothing left at a special value."""
    layer = LiSAAttention(24, 4, **{"layer": 1, "rank": 8, "align_hidden": 9, "generator": _rng()} | options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=_rng(2)))
    return layer


CONTRACT = {
    "AlignHeads": lambda: Sample(
        AlignHeads(3, 7, generator=_rng()), tuple(_random(2, 3, 4, 5, seed=i, dtype=torch.float32) for i in range(2))
    ),
    "LiSAAttention": lambda: Sample(
        _shared(kv_heads=2).float(),
        (_random(2, 5, 24, dtype=torch.float32),),
        {"carried": _random(2, 4, 5, 5, dtype=torch.float32)},
    ),
}


@each_kv_heads
@each_rope
def test_reduces_to_attention_at_full_rank_with_own_scores_selected(
    kv_heads: int | None, rope_base: float | None
) -> None:
    plain = CausalAttention(24, 4, kv_heads=kv_heads, rope_base=rope_base, generator=_rng()).double()
    layer = LiSAAttention(24, 4, kv_heads=kv_heads, layer=1, rank=24, rope_base=rope_base, generator=_rng()).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name).weight.copy_(getattr(plain, name).weight)
    x, mask = _random(2, 7, 24), torch.arange(7) >= torch.tensor([0, 3])[:, None]
    expected, _ = plain(x, mask=mask)
    found, _, _ = layer(x, carried=_random(2, 4, 7, 7, seed=5), mask=mask)
    torch.testing.assert_close(found[mask], expected[mask])
    # with positions of its own, as long as the differences are the same
    found, _, _ = layer(x, carried=_random(2, 4, 7, 7, seed=5), mask=mask, positions=torch.arange(7) + 4)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)  # angles are float32


def test_reduces_to_cross_layer_attention_sharing() -> None:
    layer, x, carried = _shared(rope_base=None), _random(2, 7, 24), _random(2, 4, 7, 7, seed=5)
    layer.align.set_linear(torch.eye(8)[:4])
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    found, cache, scores = layer(x, carried=carried)
    torch.testing.assert_close(scores, carried)
    # the values are mixed with the softmax of the scores of the layer before, which scaled_dot_product_attention
    # takes as its bias when queries and keys are zero
    nothing = torch.zeros(2, 4, 7, 6, dtype=torch.float64)
    bias = carried.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
    mixed = nn.functional.scaled_dot_product_attention(nothing, nothing, cache.values.transpose(1, 2), attn_mask=bias)
    torch.testing.assert_close(found, layer.o_proj(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_is_the_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisa, "_BLOCK", block)
    layer, x, carried = _shared(rope_base=None, kv_heads=2), _random(2, 7, 24), _random(2, 4, 7, 7, seed=5)
    found, _, scores = layer(x, carried=carried)
    up, down = layer.align.up, layer.align.down
    q, k, v = (proj(x) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    for row in range(2):
        heads = []
        for h in range(4):
            of_keys = h // 2
            heads.append(q[row, :, 2 * h : 2 * h + 2] @ k[row, :, 2 * of_keys : 2 * of_keys + 2].T / 2**0.5)
        own = torch.stack(heads, -1)
        expected = down(torch.relu(up(torch.cat([carried[row].permute(1, 2, 0), own], -1))))
        torch.testing.assert_close(scores[row], expected.permute(2, 0, 1))
        mixed = torch.zeros(7, 4, 6, dtype=torch.float64)
        for i in range(7):
            weights = expected[i, : i + 1].softmax(0)  # [keys, heads]
            for h in range(4):
                mixed[i, h] = weights[:, h] @ v[row, : i + 1].unflatten(1, (2, 6))[:, h // 2]
        torch.testing.assert_close(found[row], layer.o_proj(mixed.flatten(1)))


@each_kv_heads
def test_the_cache_holds_rank_numbers_a_token_for_the_keys(kv_heads: int | None) -> None:
    student = convert_to_lisa(_teacher(kv_heads=kv_heads), rank=8, start=2)
    layers = student(_ids()).cache.layers
    share = (kv_heads or 4) / 4
    assert [cache.keys[0, 0].numel() for cache in layers] == [24 * share, 24 * share, 8 * share]
    assert {cache.values[0, 0].numel() for cache in layers} == {24 * share}


@each_kv_heads
@each_rope
def test_converted_at_full_rank_the_model_is_the_same(kv_heads: int | None, rope_base: float | None) -> None:
    teacher, ids = _teacher(rope_base, kv_heads=kv_heads), _ids()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    expected, scores = layer_scores(teacher, ids)
    torch.testing.assert_close(expected, teacher(ids).logits)
    for text in (None, _ids(3, 12)):
        student = convert_to_lisa(teacher, rank=24, text=text)
        logits, found = layer_scores(student, ids)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student(ids).logits, logits)
        for one, other in zip(found, scores, strict=True):
            torch.testing.assert_close(attention_weights(one), attention_weights(other), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())


@each_kv_heads
@each_rope
def test_small_queries_and_keys_are_those_of_the_teacher_where_it_is_of_low_rank(
    kv_heads: int | None, rope_base: float | None
) -> None:
    teacher = _teacher(rope_base, kv_heads=kv_heads, d_model=32)
    with torch.no_grad():
        for block in teacher.layers:
            attention: Any = block.self_attn
            # in each head, only planes 1 and 3 of 4 are left: entries 1 and 5, 3 and 7
            for proj in (attention.q_proj, attention.k_proj):
                proj.weight.unflatten(0, (-1, 8))[:, [0, 2, 4, 6]] = 0
    student = convert_to_lisa(teacher, rank=16)
    torch.testing.assert_close(student(_ids()).logits, teacher(_ids()).logits, rtol=1e-5, atol=1e-6)
    if rope_base is not None:
        assert student.state_dict()["layers.1.self_attn.planes"].tolist() == [[1, 3]] * (kv_heads or 4)


def test_without_rope_the_small_scores_are_the_nearest_of_their_rank() -> None:
    teacher = _teacher(None, heads=2, d_model=12)
    attention: Any = convert_to_lisa(teacher, rank=4).layers[1].self_attn
    whole: Any = teacher.layers[1].self_attn
    for h in range(2):
        rows, small = slice(6 * h, 6 * h + 6), slice(2 * h, 2 * h + 2)
        product = whole.q_proj.weight[rows].T @ whole.k_proj.weight[rows] / 6**0.5
        found = attention.q_proj.weight[small].T @ attention.k_proj.weight[small] / 2**0.5
        left = torch.linalg.svdvals(product)[2:]
        torch.testing.assert_close((product - found).norm(), left.norm())


def test_alignments_are_fitted_on_text() -> None:
    teacher, text = _teacher(), _ids(4, 16)
    _, wanted = layer_scores(teacher, text)

    def losses(student: TinyLM) -> list[float]:
        return [
            float(attention_distill_loss(a, b)) for a, b in zip(layer_scores(student, text)[1], wanted, strict=True)
        ]

    with torch.no_grad():
        fitted, not_fitted = (losses(convert_to_lisa(teacher, rank=8, text=x)) for x in (text, None))
    assert fitted[0] == pytest.approx(0, abs=1e-12)
    assert fitted[1] < 0.8 * not_fitted[1]
    # a least-squares fit can't be improved in any direction
    student = convert_to_lisa(teacher, rank=8, text=text)
    layer: Any = student.layers[1].self_attn
    x = teacher(text, hidden_states=True).hidden_states[1]
    q, k, _ = layer.project(student.layers[1].input_layernorm(x))
    own = torch.einsum("bihd,bjhd->bhij", q, k) / 2**0.5
    seen = torch.ones(16, 16, dtype=torch.bool).tril()

    def misfit() -> Tensor:
        error = layer.align(wanted[0], own) - wanted[1]
        return sum(error[:, :, i, : i + 1].var(-1, unbiased=False).sum() * (i + 1) for i in range(len(seen)))

    weight = (layer.align.up.weight[:4].clone()).detach()
    best = misfit().item()
    for seed in range(3):
        layer.align.set_linear(weight + 1e-2 * _random(4, 8, seed=seed))
        assert misfit().item() > best


def test_a_permutation_of_heads_is_learnt() -> None:
    """Scores of a layer that are those of the layer before under other heads: the alignment finds that out."""
    order, align = [2, 0, 3, 1], AlignHeads(4, generator=_rng())
    optimiser = torch.optim.Adam(align.parameters(), 0.03)
    for step in range(120):
        before, own = (_random(4, 4, 8, 8, seed=2 * step + i, dtype=torch.float32) for i in range(2))
        loss = attention_distill_loss(align(2 * before, own), 2 * before[:, order])
        if step == 0:
            assert loss > 0.5
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.01


def test_a_linear_map_is_set_exactly() -> None:
    for hidden in (6, 11):
        align, weight = AlignHeads(3, hidden, generator=_rng()), _random(3, 6, dtype=torch.float32)
        before, own = (_random(2, 3, 4, 5, seed=i, dtype=torch.float32) for i in (1, 2))
        assert torch.equal(align(before, own), own)
        align.set_linear(weight)
        torch.testing.assert_close(
            align(before, own), torch.einsum("oc,bcij->boij", weight, torch.cat([before, own], 1))
        )
        align.zero_grad()
        align(before, own).square().sum().backward()
        assert align.down.weight.grad is not None
        assert align.down.weight.grad.any(0).all()  # further units can learn


@pytest.mark.parametrize("start", [1, 2])
def test_parts_equal_the_whole_and_no_token_sees_a_later_one(start: int) -> None:
    student = convert_to_lisa(_teacher(kv_heads=2), rank=8, start=start, text=_ids(3, 12))
    ids = _ids(time=8)
    whole = student(ids)
    for cut in (1, 4, 7):
        first = student(ids[:, :cut])
        second = student(ids[:, cut:], whole.cache.crop(cut))
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
        torch.testing.assert_close(second.cache, whole.cache)
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % 11
    torch.testing.assert_close(student(changed).logits[:, :5], whole.logits[:, :5])
    assert not torch.allclose(student(changed).logits[:, 5], whole.logits[:, 5])


def test_only_layers_before_one_that_shares_hand_scores_on() -> None:
    x = _random(1, 3, 24, dtype=torch.float32)
    handed = [LiSAAttention(24, 4, layer=layer, start=3, generator=_rng())(x)[2] is not None for layer in range(3)]
    assert handed == [False, False, True]
    assert [LiSAAttention(24, 4, layer=layer, start=2).shares for layer in range(4)] == [False, False, True, True]
    assert LiSAAttention(24, 4, layer=0).rank == 24


def test_weights_are_causal_from_the_last_query_back() -> None:
    scores, mask = _random(3, 2, 4, 6), torch.arange(6) >= torch.tensor([0, 2, 6])[:, None]
    found = attention_weights(scores, mask)
    for row, start in enumerate([0, 2, 6]):
        for i in range(4):
            expected = torch.zeros(2, 6, dtype=torch.float64)
            if start < 3 + i:
                expected[:, start : 3 + i] = scores[row, :, i, start : 3 + i].softmax(-1)
            torch.testing.assert_close(found[row, :, i], expected)
    assert not found[2].any()


def test_losses_by_hand_and_with_padding() -> None:
    student, teacher = _random(2, 3, 4, 5), _random(2, 3, 4, 5, seed=1)
    mask = torch.arange(5) >= torch.tensor([0, 3])[:, None]
    divergences, squares = [], []
    for row, start in enumerate([0, 3]):
        for i in range(4):
            seen = slice(start, i + 2)
            if start < i + 2:
                p, q = (x[row, :, i, seen].softmax(-1) for x in (teacher, student))
                divergences.append((p * (p / q).log()).sum(-1))
                squares.append((p - q).square())
    expected = torch.cat(divergences).mean()
    torch.testing.assert_close(attention_distill_loss(student, teacher, mask), expected)
    torch.testing.assert_close(attention_distill_mse(student, teacher, mask), torch.cat(squares, -1).mean())
    # a number for each row has no effect, and the loss vanishes only for equal attention
    torch.testing.assert_close(attention_distill_loss(student + 3, teacher - _random(2, 3, 4, 1), mask), expected)
    assert float(attention_distill_loss(teacher, teacher)) == 0
    assert float(attention_distill_mse(teacher, teacher)) == 0
    student.requires_grad_()
    for loss in (attention_distill_loss, attention_distill_mse):
        assert torch.autograd.gradcheck(partial(loss, teacher=teacher, mask=mask), (student,))


def test_half_precision_in_and_out() -> None:
    layer, x = _shared().bfloat16(), _random(2, 7, 24).bfloat16()
    carried = _random(2, 4, 7, 7, seed=5).bfloat16()
    y, cache, scores = layer(x, carried=carried)
    assert {y.dtype, cache.keys.dtype, scores.dtype} == {torch.bfloat16}
    exact, _, _ = _shared()(x.double(), carried=carried.double())
    assert (y - exact).norm() < 0.02 * exact.norm()


def test_defaults() -> None:
    assert LiSAAttention(96, 4, layer=1).rank == 16
    assert LiSAAttention(96, 4, layer=1, rope_base=None).rank == 16
    assert LiSAAttention(60, 6, layer=1).rank == 12
    assert LiSAAttention(60, 6, layer=1, rope_base=None).rank == 12
    assert LiSAAttention(66, 6, layer=1, rope_base=None).rank == 12
    assert LiSAAttention(24, 4, layer=1, rank=16).planes.tolist() == [[0, 1]] * 4
    assert LiSAAttention(64, 2, layer=1, rank=16, kv_heads=1).planes.tolist() == [[0, 4, 8, 12]]
    assert [LiSAAttention(24, 4, **layer).shares for layer in ({}, {"layer": 1})] == [False, True]
    assert LiSAAttention(24, 4).rope_base == 10000.0
    assert AlignHeads(5).up.weight.shape == (10, 10)
    assert "rank=8" in repr(_shared())


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    layer, x = _shared(), _random(2, 5, 24)
    with pytest.raises(ValueError, match=r"carried: expected .*\[2, 4, 5, 5\], got None"):
        layer(x)
    with pytest.raises(ValueError, match=r"carried: .*got \(2, 4, 5, 4\)"):
        layer(x, carried=_random(2, 4, 5, 4))
    with pytest.raises(ValueError, match="x: expected"):
        layer(x[..., :3], carried=_random(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"mask: expected \[2, 5\], as x has, of bool"):
        layer(x, carried=_random(2, 4, 5, 5), mask=torch.ones(2, 4, dtype=torch.bool))
    for rank in (4, 12, 32):
        with pytest.raises(ValueError, match=f"rank: expected a multiple of 8 up to d_model 24, got {rank}"):
            LiSAAttention(24, 4, layer=1, rank=rank)
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        LiSAAttention(24, 4, layer=1, rank=0)
    with pytest.raises(ValueError, match="start: expected at least 1"):
        LiSAAttention(24, 4, start=0)
    with pytest.raises(ValueError, match="hidden: expected at least 8, got 7"):
        AlignHeads(4, 7)
    with pytest.raises(TypeError, match=r"model: expected CausalAttention in all layers, got .*LiSA"):
        convert_to_lisa(convert_to_lisa(_teacher()))
