import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mlreviews.attention import efficient_attention_families as families
from mlreviews.attention.efficient_attention_families import (
    BlockTopKAttention,
    DecayAttention,
    DeltaAttention,
    FavorAttention,
    LinearAttention,
    LinformerAttention,
    RoutingAttention,
    WindowAttention,
    block_topk_attention,
    cluster_attention,
    cluster_scores,
    decay_attention,
    delta_attention,
    elu_features,
    favor_attention,
    favor_features,
    favor_projection,
    linear_attention,
    linformer_attention,
    updated_centroids,
    window_attention,
)
from mlreviews.models import CausalAttention
from tests.contracts.families import Sample

BATCH, TIME, HEADS, KV_HEADS, DIM, VALUE = 2, 9, 4, 2, 6, 5


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _qkv(time: int = TIME, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(BATCH, time, HEADS, DIM, seed=1),
        _random(BATCH, time, kv_heads, DIM, seed=2),
        _random(BATCH, time, kv_heads, VALUE, seed=3),
    )


def _layer(kind: type[nn.Module], **options: object) -> nn.Module:
    # Routing in evaluation mode: in training its centroids move with every call.
    return kind(16, 4, **{"kv_heads": 2, "generator": _rng(), **options}).eval()


def _sample(kind: type[nn.Module], **options: object) -> Sample:
    return Sample(_layer(kind, **options), (_random(2, 9, 16, dtype=torch.float32),))


CONTRACT = {
    "WindowAttention": lambda: _sample(WindowAttention, window=3),
    "WindowAttention, dilated": lambda: _sample(WindowAttention, window=2, dilation=3, global_tokens=4),
    "LinearAttention": lambda: _sample(LinearAttention),
    "FavorAttention": lambda: _sample(FavorAttention, features=6),
    "DecayAttention": lambda: _sample(DecayAttention, temperature=2.0),
    "DeltaAttention": lambda: _sample(DeltaAttention),
    "RoutingAttention": lambda: _sample(RoutingAttention, clusters=3),
    "BlockTopKAttention": lambda: _sample(BlockTopKAttention, block=2, top_k=2),
    "LinformerAttention": lambda: Sample(
        LinformerAttention(16, 4, length=10, rank=3, generator=_rng()), (_random(2, 9, 16, dtype=torch.float32),)
    ),
    "favor_projection": lambda: Sample(favor_projection, (7, 3)),
}


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention by torch, with a mask [..., q_time, k_time] for each row and head."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def _causal(q_time: int = TIME, time: int = TIME) -> Tensor:
    return torch.arange(time) <= torch.arange(time - q_time, time)[:, None]


def _gap(q_time: int = TIME, time: int = TIME) -> Tensor:
    return torch.arange(time - q_time, time)[:, None] - torch.arange(time)


class TestReductions:
    def test_window_reduces_to_attention(self) -> None:
        q, k, v = _qkv()
        torch.testing.assert_close(window_attention(q, k, v, TIME), _dense(q, k, v, _causal()))
        everything = torch.ones(TIME, TIME, dtype=torch.bool)
        torch.testing.assert_close(window_attention(q, k, v, TIME, causal=False), _dense(q, k, v, everything))
        layer, full = _layer(WindowAttention, window=TIME), _layer(CausalAttention)
        x = _random(2, TIME, 16, dtype=torch.float32)
        torch.testing.assert_close(layer(x), full(x))

    def test_blocks_reduce_to_attention(self) -> None:
        q, k, v = _qkv()
        torch.testing.assert_close(block_topk_attention(q, k, v, 2, 5), _dense(q, k, v, _causal()))
        # Where no query has more blocks before it than it may see, what is chosen doesn't matter either.
        found = block_topk_attention(q[:, :6], k, v, 2, 4, padding=torch.tensor([2, 1]))
        for row, padding in enumerate((2, 1)):
            alone = (x[row : row + 1] for x in (q[:, :6], k[:, padding:], v[:, padding:]))
            torch.testing.assert_close(found[row : row + 1], _dense(*alone, _causal(6, TIME - padding)))

    def test_one_cluster_reduces_to_attention(self) -> None:
        q, k, v = _qkv(kv_heads=HEADS)
        zeros = torch.zeros(BATCH, TIME, HEADS, dtype=torch.int64)
        torch.testing.assert_close(cluster_attention(q, k, v, zeros, zeros, 1), _dense(q, k, v, _causal()))

    def test_linformer_reduces_to_attention(self) -> None:
        q, k, v = _qkv()
        identity, everything = torch.eye(TIME, dtype=torch.float64), torch.ones(TIME, TIME, dtype=torch.bool)
        torch.testing.assert_close(linformer_attention(q, k, v, identity, identity), _dense(q, k, v, everything))

    def test_recurrent_reduces_to_linear_attention(self) -> None:
        q, k, v = _qkv()
        q, k = elu_features(q), elu_features(k)
        weights = torch.einsum("bihf,bjhf->bhij", q, k.repeat_interleave(2, 2)) * _causal()
        weights = weights / weights.sum(-1, keepdim=True)
        quadratic = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
        whole, end = linear_attention(q, k, v)
        torch.testing.assert_close(whole, quadratic)
        state, steps = None, []
        for t in range(TIME):
            out, state = linear_attention(*(x[:, t : t + 1] for x in (q, k, v)), state=state)
            steps.append(out)
        torch.testing.assert_close(torch.cat(steps, 1), quadratic)
        torch.testing.assert_close(state, end)


class TestWindow:
    @pytest.mark.parametrize("dilation", [1, 3])
    @pytest.mark.parametrize("q_time", [TIME, 4, 1])
    @pytest.mark.parametrize("causal", [True, False])
    def test_is_attention_with_the_pattern_as_a_mask(self, dilation: int, q_time: int, causal: bool) -> None:
        q, k, v = _qkv()
        q, window = q[:, :q_time], 2
        mask = torch.ones(BATCH, TIME, dtype=torch.bool)
        mask[1, :2] = False
        tokens = torch.tensor([[0, 5], [7, 3]])
        gap = _gap(q_time)
        pattern = (gap % dilation == 0) & (gap.abs() < window * dilation)
        keys = torch.zeros(BATCH, TIME, dtype=torch.bool).scatter(1, tokens, torch.ones(2, 2, dtype=torch.bool))
        seen = pattern | keys[:, None] | keys[:, TIME - q_time :, None]
        order = (gap >= 0) if causal else torch.ones_like(pattern)
        for marked, options in ((seen, {"global_tokens": tokens}), (pattern.expand_as(seen), {})):
            found = window_attention(q, k, v, window, dilation=dilation, causal=causal, mask=mask, **options)
            visible = marked & order & mask[:, None]
            expected = _dense(q, k, v, visible[:, None])
            hidden = ~visible.any(-1)[..., None, None]  # torch's zeros there depend on its version
            torch.testing.assert_close(found, expected.masked_fill(hidden, 0.0))

    def test_outputs_depend_on_the_pattern_alone(self) -> None:
        q, k, v = _qkv(TIME, HEADS)
        tokens = torch.tensor([[1], [1]])
        jacobian = torch.autograd.functional.jacobian(
            lambda v: window_attention(q, k, v, 2, dilation=2, global_tokens=tokens)[0, :, 0, 0], v
        )[:, 0, :, 0, 0]
        gap = _gap()
        is_global = torch.arange(TIME) == 1
        pattern = (gap >= 0) & (((gap % 2 == 0) & (gap < 4)) | is_global | is_global[:, None])
        assert torch.equal(jacobian != 0, pattern)

    def test_the_first_real_tokens_are_global(self) -> None:
        layer, x = _layer(WindowAttention, window=1, global_tokens=2).double(), _random(2, TIME, 16)
        mask = torch.ones(2, TIME, dtype=torch.bool)
        mask[1, :8] = False  # one token alone, fewer than are global
        y = layer(x, mask=mask)[0]
        torch.testing.assert_close(y[1:, 8:], layer(x[1:, 8:])[0])
        changed = x.clone()
        changed[0, 2] += 1
        assert (layer(changed)[0] != layer(x)[0])[0].any(1).tolist() == [False, False, True, *[False] * 6]
        changed[0, 1] += 1
        assert (layer(changed)[0] != layer(x)[0])[0].any(1).tolist() == [False, *[True] * 8]


class TestLinformer:
    def test_padding_enters_no_summary(self) -> None:
        layer, x = LinformerAttention(16, 4, length=TIME, rank=3, generator=_rng()).double(), _random(2, TIME, 16)
        mask = torch.arange(TIME).expand(2, -1) < 7
        changed = x.clone()
        changed[:, 7:] = 3
        y, z = layer(x, mask=mask), layer(changed, mask=mask)
        torch.testing.assert_close(y[:, :7], z[:, :7])
        torch.testing.assert_close(y[:, :7], layer(x[:, :7]))
        assert not torch.allclose(layer(x)[:, :7], y[:, :7])

    def test_keys_and_values_have_projections_of_their_own(self) -> None:
        q, k, v = _qkv()
        E, F = _random(3, TIME, seed=5), _random(3, TIME, seed=6)
        keys, values = torch.einsum("rn,bnhd->brhd", E, k), torch.einsum("rn,bnhd->brhd", F, v)
        expected = _dense(q, keys, values, torch.ones(TIME, 3, dtype=torch.bool))
        torch.testing.assert_close(linformer_attention(q, k, v, E, F), expected)

    def test_values_start_at_the_size_of_a_mean(self) -> None:
        layer = LinformerAttention(4, 2, length=400, rank=30, generator=_rng())
        for projection in (layer.E, layer.F):
            variance = 400 * projection.detach().var().item()
            assert abs(variance - 1) < 5 * math.sqrt(2 / projection.numel())


class TestKernels:
    def test_not_causal_is_a_product_by_associativity(self) -> None:
        q, k, v = _qkv()
        q, k = elu_features(q), elu_features(k[:, :7])
        v = v[:, :7]
        out, state = linear_attention(q, k, v, causal=False)
        keys, values = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        weights = torch.einsum("bihf,bjhf->bhij", q, keys)
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", weights, values))
        torch.testing.assert_close(state.memory, torch.einsum("bjhf,bjhd->bhfd", keys, values))
        assert state.length == 7

    def test_the_numerator_may_have_features_of_its_own(self) -> None:
        q, k, v = _qkv(kv_heads=HEADS)
        q, k = elu_features(q), elu_features(k)
        top_q, top_k = _random(*q.shape, seed=7), _random(*k.shape, seed=8)
        below = torch.einsum("bihf,bjhf->bhij", q, k)
        above = torch.einsum("bihf,bjhf->bhij", top_q, top_k)
        for causal, seen in ((True, _causal()), (False, torch.ones(TIME, TIME))):
            weights = above * seen / (below * seen).sum(-1, keepdim=True)
            found, _ = linear_attention(q, k, v, causal=causal, rotated=(top_q, top_k))
            torch.testing.assert_close(found, torch.einsum("bhij,bjhd->bihd", weights, v))

    def test_a_row_that_sees_nothing_is_zero(self) -> None:
        q, k, v = _qkv()
        out, _ = linear_attention(elu_features(q), 0 * k, v)
        assert torch.equal(out, torch.zeros_like(out))

    def test_features_are_positive(self) -> None:
        x = torch.tensor([-30.0, -1.0, 0.0, 2.0], dtype=torch.float64)
        torch.testing.assert_close(elu_features(x), torch.where(x > 0, x + 1, x.exp()))

    def test_directions_are_normal_and_orthogonal(self) -> None:
        dim = 5
        w = favor_projection(2000 * dim, dim, generator=_rng(), dtype=torch.float64)
        assert stats.kstest(w.flatten().numpy(), "norm").pvalue > 1e-4
        assert stats.kstest(w.square().sum(1).numpy(), stats.chi2(dim).cdf).pvalue > 1e-4
        # Each entry by itself: without the signs of the decomposition, some would have a mean.
        assert (w.mean(0).abs() < 5 / math.sqrt(len(w))).all()
        blocks = w.unflatten(0, (-1, dim))
        products = blocks @ blocks.mT
        torch.testing.assert_close(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)))
        assert favor_projection(7, 3, generator=_rng()).shape == (7, 3)

    def test_the_estimate_is_unbiased_and_orthogonal_features_are_better(self) -> None:
        dim, draws = 4, 4000
        x, y = 0.6 * _random(dim, seed=2), 0.6 * _random(dim, seed=3)

        def errors(w: Tensor, features: int) -> Tensor:
            # Blocks of `dim` directions are independent: draws of m features are one draw of many, in groups.
            products = favor_features(x, w) * favor_features(y, w) * len(w)
            return products.unflatten(0, (-1, features)).mean(1) - (x @ y).exp()

        generator = _rng(5)
        orthogonal = favor_projection(64 * draws, dim, generator=generator, dtype=torch.float64)
        normal = torch.randn(4 * draws, dim, generator=generator, dtype=torch.float64)
        few, many, iid = errors(orthogonal[: 4 * draws], 4), errors(orthogonal, 64), errors(normal, 4)
        for error in (few, many, iid):
            assert error.mean().abs() < 4.5 * error.std() / math.sqrt(draws)
        # 16 times as many features: a quarter of the error. The relative error of a deviation, of these heavy tails,
        # is below 10 %.
        assert 3.2 < few.std() / many.std() < 4.8
        assert few.var() < 0.9 * iid.var()

    def test_favor_is_softmax_attention_of_estimated_exponentials(self) -> None:
        q, k, v = _qkv()
        w = favor_projection(6, DIM, generator=_rng(), dtype=torch.float64)
        of_q, of_k = (favor_features(x / DIM**0.25, w) for x in (q, k))
        for causal in (True, False):
            expected, state = linear_attention(of_q, of_k, v, causal=causal)
            found, scaled = favor_attention(q, k, v, w, causal=causal)
            torch.testing.assert_close(found, expected)
            assert scaled.log_scale is not None
            memory = scaled.memory * scaled.log_scale.exp()[..., None, None]
            # The features there have their factor 1 / sqrt(m).
            torch.testing.assert_close(memory, state.memory * 6**0.5)
        many = favor_projection(30_000, DIM, generator=_rng(), dtype=torch.float64)
        estimate, _ = favor_attention(0.5 * q, 0.5 * k, v, many)
        assert (estimate - _dense(0.5 * q, 0.5 * k, v, _causal())).abs().max() < 0.05

    def test_favor_survives_exponents_of_any_size(self) -> None:
        q, k, v = (x.float() for x in _qkv())
        w = favor_projection(16, DIM, generator=_rng())
        large = torch.tensor([1.0, 60.0, 3.0] * 3)[:, None, None]  # exponents down to -1e4 and up to 88
        found, _ = favor_attention(q, large * k, v, w)
        exact, _ = favor_attention(q.double(), large.double() * k.double(), v.double(), w.double())
        torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-3)
        mask = torch.ones(BATCH, TIME, dtype=torch.bool)
        mask[:, :3] = False
        found, _ = favor_attention(q, 20 * k, v, w, mask=mask)
        alone, _ = favor_attention(q[:, 3:], 20 * k[:, 3:], v[:, 3:], w)
        torch.testing.assert_close(found[:, 3:], alone, rtol=1e-3, atol=1e-4)
        assert torch.equal(found[:, :3], torch.zeros_like(found[:, :3]))

    def test_decay(self) -> None:
        q, k, v = _qkv()
        log_decay = -_random(BATCH, TIME, HEADS, seed=4).abs()
        total = log_decay.cumsum(1).transpose(1, 2)
        weights = (total[..., None] - total[..., None, :]).exp() * _causal()
        scores = torch.einsum("bihf,bjhf->bhij", q, k.repeat_interleave(2, 2))
        expected = torch.einsum("bhij,bjhd->bihd", weights * scores, v.repeat_interleave(2, 2))
        torch.testing.assert_close(decay_attention(q, k, v, log_decay)[0], expected)
        torch.testing.assert_close(decay_attention(q, k, v)[0], decay_attention(q, k, v, 0 * log_decay)[0])

    def test_delta_rule_recalls_what_was_stored_last(self) -> None:
        keys = torch.linalg.qr(_random(DIM, DIM)).Q[:3]
        order = [0, 1, 2, 1]  # the second key gets another value
        k = keys[order][None, :, None]
        v = _random(1, 4, 2, VALUE)
        _, state = delta_attention(k.expand(-1, -1, 4, -1), k.expand(-1, -1, 2, -1), v, torch.ones(1, 4, 4).double())
        recalled = torch.einsum("bhfd,kf->bkhd", state, keys)
        torch.testing.assert_close(recalled, v[:, [0, 3, 2]].repeat_interleave(2, 2))
        half, _ = delta_attention(*(x.expand(-1, -1, 2, -1) for x in (k, k)), v, torch.full((1, 4, 2), 0.5).double())
        torch.testing.assert_close(half[:, 3], v[:, 1] / 4 + v[:, 3] / 2)


class TestClusters:
    def test_the_nearest_centroid(self) -> None:
        x = _random(BATCH, TIME, HEADS, DIM)
        mu = nn.functional.normalize(_random(HEADS, 5, DIM, seed=1), dim=2)
        distances = torch.linalg.vector_norm(x[:, :, :, None] - mu, dim=4)
        assert torch.equal(cluster_scores(x, mu).argmax(3), distances.argmin(3))

    def test_a_step_of_k_means(self) -> None:
        mu = nn.functional.normalize(_random(2, 3, 4, seed=1), dim=2)
        x = _random(BATCH, TIME, 2, 4)
        mask = torch.arange(TIME).expand(BATCH, -1) > 2
        found = updated_centroids(mu, x, decay=0.3, mask=mask)
        labels = cluster_scores(x, mu).argmax(3)
        moved = 0
        for h in range(2):
            for c in range(3):
                members = x[:, :, h][mask & (labels[:, :, h] == c)]
                expected = mu[h, c]
                if len(members):
                    expected = 0.3 * mu[h, c] + 0.7 * members.mean(0)
                    expected, moved = expected / expected.norm(), moved + 1
                torch.testing.assert_close(found[h, c], expected)
        assert moved > 3
        far = torch.stack([mu[:, 0], mu[:, 0], -mu[:, 0]], 1)
        near = far[:, 0].expand(BATCH, TIME, 2, 4)
        assert torch.equal(updated_centroids(far, near)[:, 1:], far[:, 1:])  # nobody came: they stay
        torch.testing.assert_close(updated_centroids(mu, x), updated_centroids(mu, x, decay=0.999))

    @pytest.mark.parametrize("q_time", [TIME, 4, 1])
    def test_is_attention_with_the_clusters_as_a_mask(self, q_time: int) -> None:
        q, k, v = _qkv(kv_heads=HEADS)
        labels = torch.randint(4, (BATCH, TIME, HEADS), generator=_rng())
        labels[labels == 2] = 1  # a cluster without tokens
        mask = torch.ones(BATCH, TIME, dtype=torch.bool)
        mask[1, :3] = False
        mine = labels[:, TIME - q_time :]
        found = cluster_attention(q[:, TIME - q_time :], k, v, mine, labels, 4, mask=mask)
        seen = _causal(q_time)[None, :, :, None] & (mine[:, :, None] == labels[:, None]) & mask[:, None, :, None]
        expected = _dense(q[:, TIME - q_time :], k, v, seen.permute(0, 3, 1, 2))
        hidden = ~seen.any(2)[..., None]
        torch.testing.assert_close(found, expected.masked_fill(hidden, 0.0))

    def test_the_layer_shares_queries_and_keys_and_moves_centroids_in_training(self) -> None:
        layer = _layer(RoutingAttention, clusters=3, decay=0.5, rope_base=None).double()
        x = _random(2, TIME, 16)
        y, state = layer(x)
        shared = 2 * nn.functional.normalize(layer.k_proj(x).unflatten(2, (2, -1)), dim=3)  # of length sqrt(4)
        torch.testing.assert_close(state.cache.keys, shared)
        clusters = cluster_scores(shared, layer.centroids).argmax(3)
        same = clusters[:, :, None] == clusters[:, None]
        v = layer.v_proj(x).unflatten(2, (2, -1))
        out = _dense(shared, shared, v, (same & _causal()[..., None]).permute(0, 3, 1, 2))
        torch.testing.assert_close(y, layer.o_proj(out.flatten(2)))
        before = layer.centroids.clone()
        layer(x)
        assert torch.equal(layer.centroids, before)
        torch.testing.assert_close(layer.train()(x)[0], y)  # with the centroids before they move
        torch.testing.assert_close(layer.centroids, updated_centroids(before, shared, decay=0.5))

    def test_the_cache_can_be_cropped_and_reordered(self) -> None:
        layer, x = _layer(RoutingAttention, clusters=3).double(), _random(2, TIME, 16)
        y, state = layer(x)
        back = state.crop(5)
        assert back.length == 5
        torch.testing.assert_close(layer(x[:, 5:], back)[0], y[:, 5:])
        rows = state.crop(5).rows(torch.tensor([1, 1]))
        torch.testing.assert_close(layer(x[[1, 1], 5:], rows)[0], y[[1, 1], 5:])


class TestBlocks:
    @pytest.mark.parametrize("q_time", [TIME, 4, 1])
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_against_a_loop(self, q_time: int, top_k: int) -> None:
        q, k, v = _qkv()
        q = q[:, TIME - q_time :]
        block, padding = 2, (0, 3)
        found = block_topk_attention(q, k, v, block, top_k, padding=torch.tensor(padding))
        for b in range(BATCH):
            keys, values = k[b, padding[b] :], v[b, padding[b] :]
            for t in range(q_time):
                here = TIME - q_time + t - padding[b]
                if here < 0:
                    assert torch.equal(found[b, t], torch.zeros_like(found[b, t]))
                    continue
                for h in range(HEADS):
                    own = here // block
                    gates = [
                        float(q[b, t, h] @ keys[block * n : block * n + block, h // 2].mean(0)) for n in range(own)
                    ]
                    best = sorted(range(own), key=lambda n: -gates[n])[: top_k - 1]
                    places = [p for n in (*best, own) for p in range(block * n, block * n + block) if p <= here]
                    weights = torch.softmax(keys[places, h // 2] @ q[b, t, h] / DIM**0.5, 0)
                    torch.testing.assert_close(found[b, t, h], weights @ values[places, h // 2])

    def test_half_precision(self) -> None:
        exact = _qkv()
        half = [x.bfloat16() for x in exact]
        found = block_topk_attention(*half, 2, 5)
        assert found.dtype == torch.bfloat16
        found = block_topk_attention(*half, 2, 1)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), block_topk_attention(*exact, 2, 1), rtol=0.05, atol=0.05)


class TestLayers:
    @pytest.mark.parametrize("kind", [LinearAttention, FavorAttention, DecayAttention, DeltaAttention])
    def test_a_state_has_one_size_and_rows(self, kind: type[nn.Module]) -> None:
        layer, x = _layer(kind).double(), _random(2, TIME, 16)
        y, state = layer(x)
        _, early = layer(x[:, :4])
        assert (state.length, early.length) == (TIME, 4)
        assert [x.shape for x in state if isinstance(x, Tensor)] == [x.shape for x in early if isinstance(x, Tensor)]
        rows = early.rows(torch.tensor([1, 1]))
        torch.testing.assert_close(layer(x[[1, 1], 4:], rows)[0], y[[1, 1], 4:])

    @pytest.mark.parametrize("kind", [LinearAttention, FavorAttention, DecayAttention, DeltaAttention])
    def test_only_differences_of_positions_count(self, kind: type[nn.Module]) -> None:
        layer, x = _layer(kind).double(), _random(2, TIME, 16)
        options = {"rtol": 1e-5, "atol": 1e-5}  # angles are float32
        torch.testing.assert_close(layer(x, positions=torch.arange(TIME) + 5)[0], layer(x)[0], **options)
        apart = layer(x, positions=3 * torch.arange(TIME))[0]
        assert not torch.allclose(apart, layer(x)[0], **options)

    def test_decays_are_a_sigmoid_to_a_power(self) -> None:
        layer, x = _layer(DecayAttention, rope_base=None, temperature=3.0).double(), _random(2, TIME, 16)
        q, k, v = (
            proj(x).unflatten(2, (heads, -1))
            for proj, heads in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
        )
        decay = layer.a_proj(x).sigmoid() ** (1 / 3)
        out, _ = decay_attention(q / 2, k, v, decay.log())
        out = out / (out.square().mean(3, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(layer(x)[0], layer.o_proj(out.flatten(2)))

    def test_the_delta_rule_of_a_layer_has_keys_of_length_one(self) -> None:
        layer, x = _layer(DeltaAttention, rope_base=None).double(), _random(2, TIME, 16)
        q, k, v = (
            proj(x).unflatten(2, (heads, -1))
            for proj, heads in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
        )
        q, k = (y / y.norm(dim=3, keepdim=True) for y in (q, k))
        out, _ = delta_attention(q, k, v, layer.b_proj(x).sigmoid())
        out = out / (out.square().mean(3, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(layer(x)[0], layer.o_proj(out.flatten(2)))

    def test_defaults(self) -> None:
        made = {name: kind(16, 4) for name, kind in vars(families).items() if name in LAYERS}
        assert made["WindowAttention"].window == 64
        assert (made["WindowAttention"].dilation, made["WindowAttention"].global_tokens) == (1, 0)
        assert made["FavorAttention"].projection.shape == (64, 4)
        assert made["DecayAttention"].temperature == 16
        assert made["RoutingAttention"].centroids.shape == (4, 8, 4)
        assert made["RoutingAttention"].decay == 0.999
        assert (made["BlockTopKAttention"].block, made["BlockTopKAttention"].top_k) == (16, 4)
        assert {layer.rope_base for layer in made.values()} == {10000.0}
        assert {layer.layer for layer in made.values()} == {0}


LAYERS = [name for name in families.__all__ if name.endswith("Attention") and name != "LinformerAttention"]


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    q, k, v = _qkv()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: window_attention(q, k, v, 0), "window: expected at least 1"),
        (lambda: window_attention(q, k, v, 1, dilation=0), "dilation: expected at least 1"),
        (lambda: _layer(WindowAttention, global_tokens=-1), "global_tokens: expected at least 0"),
        (lambda: linformer_attention(q, k, v, torch.ones(3, 5), torch.ones(3, TIME)), r"E: expected \[rank, 9\]"),
        (lambda: LinformerAttention(16, 4, length=3, rank=2)(torch.ones(1, 4, 16)), "x: expected at most 3 tokens"),
        (lambda: LinformerAttention(16, 3, length=3, rank=2), "heads: expected a divisor"),
        (lambda: favor_projection(0, 2), "features: expected at least 1"),
        (lambda: favor_projection(2, 0), "dim: expected at least 1"),
        (lambda: _layer(FavorAttention, features=5), "features: expected an even number"),
        (lambda: favor_attention(q, k, v, torch.ones(3, 2)), r"projection: expected \[features, 6\]"),
        (lambda: favor_attention(q, k, v, torch.ones(4, 6), state=linear_attention(q, k, v)[1]), "state: expected one"),
        (lambda: linear_attention(q, k, v, causal=False, state=linear_attention(q, k, v)[1]), "causal: expected True"),
        (lambda: linear_attention(q[0], k, v), r"q: expected \[batch, time"),
        (lambda: linear_attention(q, k[:, 1:], v), r"k: expected \[2, 9, kv_heads, 6\]"),
        (lambda: linear_attention(q[:, :, :3], k, v), "k: expected a number of heads that divides 3"),
        (lambda: delta_attention(q, k, v[:, 1:], v), r"v: expected \[2, 9, 2\]"),
        (lambda: _layer(DecayAttention, temperature=0.0), "temperature: expected more than 0"),
        (lambda: cluster_scores(q, torch.ones(3, 2, 6)), r"centroids: expected \[4, clusters, 6\]"),
        (lambda: updated_centroids(torch.ones(4, 2, 6), q, decay=1.5), "decay: expected a probability"),
        (lambda: _layer(RoutingAttention, clusters=0), "clusters: expected at least 1"),
        (lambda: block_topk_attention(q, k, v, 0, 1), "block: expected at least 1"),
        (lambda: _layer(BlockTopKAttention, top_k=0), "top_k: expected at least 1"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
