import importlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from mlreviews.attention.tree_attention import (
    ShardedKVCache,
    TreeAttention,
    attention_energy,
    distributed_tree_attention,
    ring_volume,
    split_cache,
    tree_attention,
    tree_volume,
)
from mlreviews.models import KVCache, LMCache, TinyLM, TinyLMConfig
from mlreviews_kernels.attention import merge_attention
from tests.attention.ranks import Ranks
from tests.contracts.families import Sample

module = importlib.import_module("mlreviews.attention.tree_attention")  # the name is its function's, too
BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 6, 3, 4, 5
CUTS = {1: (0, 7), 2: (0, 2, 7), 3: (0, 4, 4, 7)}  # ranks of unequal lengths, and an empty one


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


CONTRACT = {
    "TreeAttention": lambda: Sample(TreeAttention(8, 4, kv_heads=2, generator=_rng()), (_random(2, 7, 8).float(),))
}


def _inputs(q_time: int = 3, k_time: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (BATCH, q_time, HEADS, DIM), (BATCH, k_time, KV_HEADS, DIM), (BATCH, k_time, KV_HEADS, VALUE_DIM)
    return tuple(_random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))  # type: ignore[return-value]


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of every query to every key by PyTorch itself."""
    mask = None if mask is None else mask[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    repeated = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.logsumexp(scale * torch.einsum("bihd,bjhd->bhij", q, repeated), -1)


class TestEnergy:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("scale", [None, 0.7])
    def test_gradient_at_zero_is_attention_and_reduces_to_torch(self, causal: bool, scale: float | None) -> None:
        q, k, v = _inputs()
        zeta = torch.zeros(BATCH, 3, HEADS, VALUE_DIM, dtype=torch.float64, requires_grad=True)
        energy = attention_energy(q, k, v, zeta, causal=causal, scale=scale)
        (found,) = torch.autograd.grad(energy.sum(), zeta)
        mask = (torch.arange(7) <= torch.arange(4, 7)[:, None]).expand(BATCH, -1, -1) if causal else None
        torch.testing.assert_close(found, _torch(q, k, v, mask, scale), rtol=1e-12, atol=1e-12)
        if not causal:
            torch.testing.assert_close(energy.detach(), _lse(q, k, scale or DIM**-0.5))

    def test_second_derivative_is_the_covariance_of_the_values(self) -> None:
        q, k, v = (x[:1, :, :1] for x in _inputs(q_time=1))
        zeta = torch.zeros(1, 1, 1, VALUE_DIM, dtype=torch.float64)
        found = torch.autograd.functional.hessian(lambda z: attention_energy(q, k, v, z).sum(), zeta)
        scores = (q[0, 0] @ k[0, :, 0].T)[0].numpy() / np.sqrt(DIM)
        weights = np.exp(scores) / np.exp(scores).sum()
        covariance = np.cov(v[0, :, 0].numpy(), rowvar=False, aweights=weights, ddof=0)
        np.testing.assert_allclose(found.squeeze().numpy(), covariance, rtol=1e-10)

    def test_away_from_zero_the_values_tilt_the_scores(self) -> None:
        q, k, v = _inputs()
        zeta = _random(BATCH, 3, HEADS, VALUE_DIM, seed=4)
        found = attention_energy(q, k, v, zeta, scale=1.0)
        both = torch.cat([q, zeta], -1), torch.cat([k, v], -1)
        torch.testing.assert_close(found, _lse(*both, 1.0))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        q, k, v = _inputs()
        zeta = torch.zeros(BATCH, 3, HEADS, VALUE_DIM, dtype=torch.float64)
        with pytest.raises(ValueError, match="k: expected a number of heads that divides the 6"):
            attention_energy(q, k.repeat(1, 1, 2, 1)[:, :, :4], v, zeta)
        with pytest.raises(ValueError, match="k: expected a key for every query to see, got 2 for 3"):
            attention_energy(q, k[:, :2], v[:, :2], zeta, causal=True)
        with pytest.raises(ValueError, match="k: expected a key for every query to see, got 0 for 3"):
            attention_energy(q, k[:, :0], v[:, :0], zeta)
        assert attention_energy(q, k[:, :2], v[:, :2], zeta).isfinite().all()


def _shards(k: Tensor, v: Tensor, lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return list(k.split(lengths, 1)), list(v.split(lengths, 1))


class TestTree:
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), st.randoms(use_true_random=False))
    @settings(max_examples=10)
    def test_any_split_in_any_order_is_attention(self, lengths: list[int], random: Any) -> None:
        q, k, v = _inputs(k_time=sum(lengths))
        keys, values = _shards(k, v, lengths)
        order = random.sample(range(len(lengths)), len(lengths))
        out, lse = tree_attention(q, [keys[i] for i in order], [values[i] for i in order], scale=0.4)
        torch.testing.assert_close(out, _torch(q, k, v, scale=0.4), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, _lse(q, k, 0.4), rtol=1e-10, atol=1e-10)

    def test_one_shard_reduces_to_torch(self) -> None:
        q, k, v = _inputs()
        torch.testing.assert_close(tree_attention(q, [k], [v])[0], _torch(q, k, v), rtol=1e-12, atol=1e-12)

    def test_merging_is_associative_and_commutative_with_an_identity(self) -> None:
        q, k, v = _inputs()
        a, b, c = (tree_attention(q, [k[:, s]], [v[:, s]]) for s in (slice(2), slice(2, 3), slice(3, 7)))

        def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return merge_attention(*zip(*parts, strict=True))

        whole = merge(a, b, c)
        for found in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
        nothing = torch.zeros_like(a[0]), torch.full_like(a[1], float("-inf"))
        assert all(map(torch.equal, merge(nothing, a), a))
        assert all(map(torch.equal, merge(nothing, nothing), nothing))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_stable_for_logits_of_ten_thousand(self, dtype: torch.dtype) -> None:
        q, k, v = _inputs(dtype=dtype)
        q = q * (1e4 / (q @ k[:1, :1, :1].mT).abs().max())
        out, lse = tree_attention(q, *_shards(k, v, [1, 2, 4]), scale=1.0)
        assert lse.abs().max() > 5e3
        torch.testing.assert_close(out, _torch(q, k, v, scale=1.0), rtol=1e-4, atol=2e-3)

    def test_masks_and_a_shard_that_is_masked_altogether(self) -> None:
        q, k, v = _inputs()
        mask = torch.rand(BATCH, 3, 7, generator=_rng(9)) < 0.6
        mask[:, :, :2], mask[:, :, 2], mask[0, 1] = False, True, False
        out, lse = tree_attention(q, *_shards(k, v, [2, 3, 2]), masks=mask.split([2, 3, 2], 2))
        expected = _torch(q, k, v, mask).masked_fill(~mask.any(2)[..., None, None], 0.0)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(torch.isneginf(lse), ~mask.any(2)[:, None].expand(-1, HEADS, -1))

    def test_gradients_reach_every_shard(self) -> None:
        q, k, v = (x.requires_grad_() for x in _inputs())
        weight = _random(BATCH, 3, HEADS, VALUE_DIM, seed=5)
        found = torch.autograd.grad((tree_attention(q, *_shards(k, v, [1, 0, 4, 2]))[0] * weight).sum(), (q, k, v))
        expected = torch.autograd.grad((_torch(q, k, v) * weight).sum(), (q, k, v))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_half_precision_is_merged_in_float32(self) -> None:
        q, k, v = _inputs(dtype=torch.bfloat16)
        out, lse = tree_attention(q, *_shards(k, v, [3, 4]))
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.double(), _torch(q.double(), k.double(), v.double()), rtol=2e-2, atol=2e-2)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        q, k, v = _inputs()
        with pytest.raises(ValueError, match="keys: expected at least one shard, got none"):
            tree_attention(q, [], [])
        with pytest.raises(ValueError, match="values: expected one for each of 2 shards, got 1"):
            tree_attention(q, [k, k], [v])
        with pytest.raises(ValueError, match="masks: expected one for each of 1 shards, got 0"):
            tree_attention(q, [k], [v], masks=[])
        with pytest.raises(ValueError, match="v: expected"):
            tree_attention(q, [k], [v[:, 1:]])


def _alone(q: Tensor, k: Tensor, v: Tensor, rank: int) -> Tensor:
    return distributed_tree_attention(q, k, v)[0]


def _model() -> TinyLM:
    return TinyLM(TinyLMConfig(13, 16, 2, 4, kv_heads=2), TreeAttention, generator=_rng()).double()


def _work(rank: int, world: int) -> dict[str, Any]:
    """All that a rank has to do with the others; returns what it found."""
    q, k, v = _inputs()
    start, stop = CUTS[world][rank : rank + 2]
    mask = torch.ones(BATCH, 3, 7, dtype=torch.bool)
    mask[1, 2], mask[0, 0, 3:] = False, False
    leaves = [x.clone().requires_grad_() for x in (q, k[:, start:stop], v[:, start:stop])]
    out, lse = distributed_tree_attention(*leaves, mask=mask[:, :, start:stop], scale=0.6)
    # each rank has a loss of its own; gradients are those of the sum
    ((rank + 1.0) * out.sin().sum() + out.sum() + lse.masked_fill(torch.isneginf(lse), 0.0).square().sum()).backward()
    found: dict[str, Any] = {"out": out.detach(), "lse": lse.detach(), "grads": [x.grad for x in leaves]}

    model, ids = _model(), torch.randint(13, (2, 11), generator=_rng(1))
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[1, :2] = False
    with torch.no_grad():
        for name, prompt_mask in (("plain", None), ("padded", padding)):
            out = model(ids[:, :5], mask=prompt_mask)
            cache = split_cache(out.cache)
            logits = [out.logits]
            for piece in ids[:, 5:].split([1, 2, 3], 1):  # tokens one by one and several at a time
                out = model(piece, cache)
                logits.append(out.logits)
                cache = out.cache
            found[name] = torch.cat(logits, 1)
            # taken back to the middle of the decoded part, rows swapped
            back = cache.crop(7).rows(torch.tensor([1, 0]))
            found[f"{name} back"] = model(ids.flip(0)[:, 7:], back).logits
            found[f"{name} held"] = cache.layers[0].positions.tolist()
            found[f"{name} lengths"] = (cache.length, back.length, cache.layers[0].length)
    return found


def _check(found: list[dict[str, Any]]) -> None:
    world = len(found)
    q, k, v = (x.requires_grad_() for x in _inputs())
    mask = torch.ones(BATCH, 3, 7, dtype=torch.bool)
    mask[1, 2], mask[0, 0, 3:] = False, False
    out, lse = tree_attention(q, [k], [v], masks=[mask], scale=0.6)
    losses = [(r + 1.0) * out.sin().sum() + out.sum() for r in range(world)]
    (sum(losses) + world * lse.masked_fill(torch.isneginf(lse), 0.0).square().sum()).backward()
    for mine in found:
        torch.testing.assert_close((mine["out"], mine["lse"]), (out.detach(), lse.detach()), rtol=1e-10, atol=1e-10)
    grads = [mine["grads"] for mine in found]
    torch.testing.assert_close(sum(g[0] for g in grads), q.grad, rtol=1e-9, atol=1e-9)
    for i, x in ((1, k), (2, v)):
        torch.testing.assert_close(torch.cat([g[i] for g in grads], 1), x.grad, rtol=1e-9, atol=1e-9)

    model, ids = _model(), torch.randint(13, (2, 11), generator=_rng(1))
    whole = {"plain": model(ids).logits.detach()}
    short = model(ids[1:, 2:]).logits.detach()
    for mine in found:
        torch.testing.assert_close(mine["plain"], whole["plain"])
        torch.testing.assert_close(mine["plain back"], whole["plain"].flip(0)[:, 7:])
        torch.testing.assert_close(mine["padded"][0], whole["plain"][0])
        torch.testing.assert_close(mine["padded"][1, 2:], short[0], rtol=1e-5, atol=1e-5)  # angles are float32
        torch.testing.assert_close(mine["padded back"][0], short[0, 5:], rtol=1e-5, atol=1e-5)
        assert mine["plain lengths"] == mine["padded lengths"] == (11, 7, 11)
    held = [mine["plain held"] for mine in found]
    assert sorted(place for places in held for place in places) == list(range(11))
    assert max(map(len, held)) - min(map(len, held)) <= 1


class TestRanks:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_shards_on_several_ranks_are_the_whole(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        _check(Ranks(world).run(monkeypatch, [module], lambda rank: _work(rank, world)))

    @pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
    def test_and_so_they_are_on_several_processes(self, world: int, tmp_path: Path) -> None:
        spawn(_process, args=(world, str(tmp_path)), nprocs=world)
        _check([torch.load(tmp_path / f"{rank}.pt") for rank in range(world)])

    def test_traffic_depends_on_the_query_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = 3
        for k_time in (3, 300):
            ranks = Ranks(world)
            q, k, v = _inputs(1, k_time, torch.float32)
            ranks.run(monkeypatch, [module], partial(_alone, q, k, v))
            # a ring all-reduce: p - 1 times a p-th to reduce, and as often to spread the result
            sent = ranks.volume / world * (world - 1) * 2
            assert tree_volume(BATCH, HEADS, VALUE_DIM, world) == pytest.approx(sent)
        around = sum(2 * BATCH * 5 * KV_HEADS * DIM for _ in range(world - 1))  # keys and values, p - 1 times
        assert ring_volume(BATCH, 5, KV_HEADS, DIM, world) == around
        assert tree_volume(BATCH, HEADS, VALUE_DIM, 1) == ring_volume(BATCH, 5, KV_HEADS, DIM, 1) == 0

    def test_half_precision_travels_as_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = _inputs(dtype=torch.bfloat16)

        def work(rank: int) -> tuple[Tensor, Tensor]:
            mine = slice(0, 3) if rank else slice(3, 7)
            return distributed_tree_attention(q, k[:, mine], v[:, mine])

        for out, lse in Ranks(2).run(monkeypatch, [module], work):
            assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
            torch.testing.assert_close(out.double(), _torch(q.double(), k.double(), v.double()), rtol=2e-2, atol=2e-2)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = ShardedKVCache(*_random(2, 1, 3, 2, 4).unbind(), torch.arange(3), 3)
        for length in (-1, 4):
            with pytest.raises(ValueError, match="length: expected 0 to 3, the tokens held, got"):
                cache.crop(length)

        def work(rank: int) -> None:
            with pytest.raises(TypeError, match="cache: expected states of type KVCache, got dict"):
                split_cache(LMCache(({},)))
            with pytest.raises(ValueError, match="state: expected a cache of keys"):
                cache.append(*_random(2, 3, 1, 2, 4).unbind())

        Ranks(1).run(monkeypatch, [module], work)
        for sizes in ((0, 1, 1, 2), (1, 0, 1, 2), (1, 1, 0, 2), (1, 1, 1, 0)):
            with pytest.raises(ValueError, match="expected at least 1, got 0"):
                tree_volume(*sizes)
        with pytest.raises(ValueError, match="time: expected at least 1, got 0"):
            ring_volume(1, 0, 1, 1, 2)

    def test_shards_are_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = KVCache(*_random(2, 1, 6, 2, 4).unbind())

        def work(rank: int) -> int:
            part = split_cache(LMCache((whole,))).layers[0]
            return part.keys.untyped_storage().nbytes()

        assert Ranks(2).run(monkeypatch, [module], work) == [3 * 2 * 4 * 8] * 2


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(_work(rank, world), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
