import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from mlreviews.attention.star_attention import (
    StarAttention,
    StarAttentionCache,
    encode_context,
    end_context,
    star_attention,
    star_context_mask,
)
from mlreviews.attention.tree_attention import TreeAttention, tree_attention
from mlreviews.models import CausalAttention, LMCache, TinyLM, TinyLMConfig
from tests.attention.ranks import Ranks
from tests.contracts.families import Sample

# The names are those of functions, too.
modules = [importlib.import_module(f"mlreviews.attention.{name}_attention") for name in ("star", "tree")]
BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 4, 2, 3, 5


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _sample(**options: Any) -> Sample:
    layer = StarAttention(8, 4, kv_heads=2, generator=_rng(), **options)
    return Sample(layer, (_random(2, 7, 8, dtype=torch.float32),))


CONTRACT = {
    "StarAttention": lambda: _sample(block_size=3),
    "StarAttention, with a short anchor": lambda: _sample(block_size=2, anchor_size=1),
    "StarAttention, without an anchor": lambda: _sample(block_size=2, anchor_size=0),
}


def _inputs(time: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (BATCH, time, HEADS, DIM), (BATCH, time, KV_HEADS, DIM), (BATCH, time, KV_HEADS, VALUE_DIM)
    return tuple(_random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))  # type: ignore[return-value]


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def _blocks(time: int, block: int, anchor: int) -> Tensor:
    """What each token sees, by putting the tokens into blocks one after another."""
    mask = torch.zeros(time, time, dtype=torch.bool)
    for begin in range(0, time, block):
        for t in range(begin, min(begin + block, time)):
            mask[t, begin : t + 1] = True
            if begin:
                mask[t, :anchor] = True
    return mask


each_size = pytest.mark.parametrize(("block", "anchor"), [(1, 1), (2, 1), (3, 0), (3, 3), (4, 2), (9, 9), (20, 3)])


class TestContext:
    @each_size
    def test_the_mask_shows_the_anchor_and_earlier_tokens_of_the_block(self, block: int, anchor: int) -> None:
        assert torch.equal(star_context_mask(11, block, anchor), _blocks(11, block, anchor))
        assert torch.equal(star_context_mask(11, block), _blocks(11, block, block))

    @given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.integers(1, 12))
    @settings(max_examples=25)
    def test_it_is_attention_with_the_mask_wherever_it_goes_on(
        self, time: int, block: int, anchor: int, queries: int
    ) -> None:
        anchor, queries = min(anchor, block), min(queries, time)
        q, k, v = _inputs(time)
        expected = _torch(q, k, v, _blocks(time, block, anchor))
        found = star_attention(q[:, -queries:], k, v, block, anchor)
        torch.testing.assert_close(found, expected[:, -queries:], rtol=1e-10, atol=1e-10)

    @each_size
    def test_gradients(self, block: int, anchor: int) -> None:
        inputs = [x.requires_grad_() for x in _inputs(11)]
        weight = _random(BATCH, 11, HEADS, VALUE_DIM, seed=4)
        found = torch.autograd.grad((star_attention(*inputs, block, anchor) * weight).sum(), inputs)
        expected = torch.autograd.grad((_torch(*inputs, _blocks(11, block, anchor)) * weight).sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @each_size
    @pytest.mark.parametrize("queries", [1, 4, 11])
    def test_a_row_behind_padding_is_as_it_is_alone(self, block: int, anchor: int, queries: int) -> None:
        q, k, v = _inputs(11)
        mask = torch.arange(11) >= torch.tensor([[0], [3]])
        found = star_attention(q[:, -queries:], k, v, block, anchor, mask=mask)
        torch.testing.assert_close(found[:1], star_attention(q[:1, -queries:], k[:1], v[:1], block, anchor))
        alone = star_attention(q[1:, 3:], k[1:, 3:], v[1:, 3:], block, anchor)
        torch.testing.assert_close(found[1:, -8:], alone[:, -queries:])
        assert torch.equal(found[1:, :-8], torch.zeros_like(found[1:, :-8]))
        only = mask & False
        assert torch.equal(star_attention(q[:, -queries:], k, v, block, anchor, mask=only), found * 0)

    def test_one_block_or_two_with_their_anchor_reduces_to_causal_attention_and_three_do_not(self) -> None:
        ids = torch.randint(13, (2, 12), generator=_rng(1))
        full = _model(CausalAttention)(ids).logits
        for options in ({"block_size": 12, "anchor_size": 0}, {"block_size": 6}, {"block_size": 40}, {}):
            torch.testing.assert_close(_model(partial(StarAttention, **options))(ids).logits, full)
        for options in ({"block_size": 6, "anchor_size": 5}, {"block_size": 5}):
            found = _model(partial(StarAttention, **options))(ids).logits
            same = (found - full).abs().amax((0, 2)) < 1e-9
            assert same.tolist() == [t < (options["block_size"] if len(options) > 1 else 10) for t in range(12)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_stable_for_logits_of_ten_thousand(self, dtype: torch.dtype) -> None:
        q, k, v = _inputs(11, dtype)
        q = q * (1e4 / (q[0, -1, 0] @ k[0, 0, 0]).abs() * DIM**0.5)
        found = star_attention(q, k, v, 3)
        torch.testing.assert_close(found, _torch(q, k, v, _blocks(11, 3, 3)), rtol=1e-3, atol=1e-3)

    def test_half_precision(self) -> None:
        q, k, v = _inputs(11, torch.bfloat16)
        found = star_attention(q, k, v, 3)
        assert found.dtype == torch.bfloat16
        expected = _torch(q.double(), k.double(), v.double(), _blocks(11, 3, 3))
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        q, k, v = _inputs(5)
        for call in (partial(star_context_mask, 5), partial(star_attention, q, k, v)):
            with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
                call(0)
            with pytest.raises(ValueError, match="anchor_size: expected at most the block's 2, got 3"):
                call(2, 3)
            with pytest.raises(ValueError, match="anchor_size: expected at least 0, got -1"):
                call(2, -1)
        with pytest.raises(ValueError, match="seq_len: expected at least 1, got 0"):
            star_context_mask(0, 1)
        with pytest.raises(ValueError, match="block_size: expected at least 1"):
            StarAttention(8, 2, block_size=0)
        assert StarAttention(8, 2).block_size == 64
        for queries in (q[:, :0], torch.cat([q, q], 1)):
            with pytest.raises(ValueError, match="q: expected 1 to 5 queries"):
                star_attention(queries, k, v, 2)


def _model(attention: Any) -> TinyLM:
    return TinyLM(TinyLMConfig(13, 16, 2, 4, kv_heads=2), attention, generator=_rng()).double()


CONTEXT, QUERY, BLOCK = 14, 6, 4


def _ids() -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(13, (2, CONTEXT + QUERY), generator=_rng(1)).split([CONTEXT, QUERY], 1))  # type: ignore[return-value]


class TestPhases:
    @pytest.mark.parametrize("anchor", [0, 2, 4])
    def test_keys_and_values_are_those_of_hosts_with_a_copy_of_the_anchor(self, anchor: int) -> None:
        star = _model(partial(StarAttention, block_size=BLOCK, anchor_size=anchor))
        full, ids = _model(CausalAttention), _ids()[0]
        cache = star(ids).cache
        for begin in range(0, CONTEXT, BLOCK):
            places = torch.arange(begin, min(begin + BLOCK, CONTEXT))
            copy = torch.arange(anchor if begin else 0)
            host = full(ids[:, torch.cat([copy, places])], positions=torch.cat([copy, places])).cache
            for mine, theirs in zip(cache.layers, host.layers, strict=True):
                torch.testing.assert_close(mine.keys[:, places], theirs.keys[:, len(copy) :])
                torch.testing.assert_close(mine.values[:, places], theirs.values[:, len(copy) :])

    def test_the_second_phase_reduces_to_tree_attention_over_the_blocks(self) -> None:
        layer = StarAttention(16, 4, kv_heads=2, block_size=BLOCK, generator=_rng()).double()
        x = _random(2, CONTEXT + 1, 16)
        state = layer(x[:, :CONTEXT])[1].end_context()
        y, state = layer(x[:, CONTEXT:], state)
        q, _, _ = layer.project(x[:, CONTEXT:], CONTEXT)
        hosts = (tensor.split(BLOCK, 1)[::-1] for tensor in (state.keys, state.values))
        out, _ = tree_attention(q, *hosts)
        torch.testing.assert_close(y, layer.o_proj(out.flatten(2)), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("padding", [0, 3])
    def test_query_and_answer_may_come_in_any_parts(self, padding: int) -> None:
        model, (ids, query) = _model(partial(StarAttention, block_size=BLOCK)), _ids()
        mask = torch.ones(2, CONTEXT, dtype=torch.bool)
        mask[1, :padding] = False
        cache = end_context(model(ids, mask=mask if padding else None).cache)
        whole = model(query, cache)
        assert not torch.allclose(whole.logits, model(query, cache.crop(CONTEXT - 1)).logits)  # phase 1 goes on there
        for sizes in ([1] * QUERY, [2, 3, 1]):
            logits, state = [], cache
            for piece in query.split(sizes, 1):
                out = model(piece, state)
                logits.append(out.logits)
                state = end_context(out.cache)  # once more changes nothing
            torch.testing.assert_close(torch.cat(logits, 1), whole.logits)
        alone = model(query[1:], end_context(model(ids[1:, padding:]).cache)).logits
        torch.testing.assert_close(whole.logits[1:], alone, rtol=1e-5, atol=1e-5)  # angles are float32
        back = whole.cache.crop(CONTEXT + 2).rows(torch.tensor([1, 0]))
        torch.testing.assert_close(model(query.flip(0)[:, 2:], back).logits, whole.logits.flip(0)[:, 2:])

    def test_the_second_phase_sees_what_blocks_do_not(self) -> None:
        model, (ids, query) = _model(partial(StarAttention, block_size=BLOCK)), _ids()
        cache = model(ids).cache
        assert not torch.allclose(model(query, end_context(cache)).logits, model(query, cache).logits)
        full = _model(CausalAttention)
        exact = full(query, full(ids).cache).logits
        assert not torch.allclose(model(query, end_context(cache)).logits, exact)

    def test_the_cache_knows_the_end_of_its_context(self) -> None:
        keys, values = _random(2, 1, 6, 2, 3).unbind()
        cache = StarAttentionCache(keys[:, :4], values[:, :4]).end_context().append(keys[:, 4:], values[:, 4:])
        assert (cache.length, cache.context, cache.end_context().context) == (6, 4, 4)
        assert [cache.crop(length).context for length in (6, 4, 3, 0)] == [4, 4, None, None]
        with pytest.raises(ValueError, match="length: expected 0 to 6"):
            cache.crop(7)
        with pytest.raises(TypeError, match="cache: expected states of type StarAttentionCache, got dict"):
            end_context(LMCache(({},)))


def _work(rank: int, anchor: int | None) -> dict[str, Any]:
    model, (ids, query) = _model(TreeAttention), _ids()
    cache = encode_context(model, ids, BLOCK, anchor)
    found = {"keys": cache.layers[1].keys, "places": cache.layers[1].positions}
    first = model(query[:, :4], cache)
    second = model(query[:, 4:], first.cache)
    return {**found, "logits": torch.cat([first.logits, second.logits], 1), "length": second.cache.length}


def _check(found: list[dict[str, Any]], anchor: int | None) -> None:
    model, (ids, query) = _model(partial(StarAttention, block_size=BLOCK, anchor_size=anchor)), _ids()
    cache = end_context(model(ids).cache)
    expected = model(query, cache).logits.detach()
    for mine in found:
        torch.testing.assert_close(mine["logits"], expected)
        assert mine["length"] == CONTEXT + QUERY
    assert torch.cat([mine["places"] for mine in found]).tolist() == list(range(CONTEXT))
    torch.testing.assert_close(torch.cat([mine["keys"] for mine in found], 1), cache.layers[1].keys.detach())


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(_work(rank, None), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class TestRanks:
    @pytest.mark.parametrize(("world", "anchor"), [(1, None), (2, 0), (3, 3), (4, None)])
    def test_both_phases_on_several_ranks(
        self, world: int, anchor: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with torch.no_grad():
            _check(Ranks(world).run(monkeypatch, modules, torch.no_grad()(lambda rank: _work(rank, anchor))), anchor)

    def test_phase_one_exchanges_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ranks = Ranks(2)
        ranks.run(monkeypatch, modules, lambda rank: encode_context(_model(TreeAttention), _ids()[0], BLOCK))
        assert ranks.volume == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("world", [2, 3])
    def test_and_so_they_are_on_several_processes(self, world: int, tmp_path: Path) -> None:
        spawn(_process, args=(world, str(tmp_path)), nprocs=world)
        _check([torch.load(tmp_path / f"{rank}.pt") for rank in range(world)], None)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(rank: int) -> None:
            with pytest.raises(ValueError, match="block_size: expected a block for each of 2 ranks, got 1 of 14"):
                encode_context(_model(TreeAttention), _ids()[0], 14)
            with pytest.raises(TypeError, match="model: expected states of type KVCache, got StarAttentionCache"):
                encode_context(_model(StarAttention), _ids()[0], 7)
            with pytest.raises(ValueError, match="anchor_size: expected at most"):
                encode_context(_model(TreeAttention), _ids()[0], 7, 8)

        Ranks(2).run(monkeypatch, modules, work)
