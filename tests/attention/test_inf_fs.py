import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mlreviews.attention.inf_fs import (
    MultiHopAttention,
    all_paths,
    fisher_affinity,
    inf_fs,
    multi_hop_attention,
    spread_affinity,
)
from mlreviews.models import CausalAttention
from tests.contracts.families import Sample

MODULE = sys.modules[inf_fs.__module__]  # the area has the function under this name
BATCH, TIME, HEADS, KV_HEADS, DIM, VALUE = 2, 9, 4, 2, 6, 5


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(**options: object) -> MultiHopAttention:
    return MultiHopAttention(16, 4, **{"kv_heads": 2, "generator": _rng(), **options})


CONTRACT = {
    "MultiHopAttention": lambda: Sample(_layer(), (_random(2, 9, 16, dtype=torch.float32),)),
    "MultiHopAttention, three hops": lambda: Sample(_layer(hops=3), (_random(2, 9, 16, dtype=torch.float32),)),
}


def _data(samples: int = 30, features: int = 6) -> Tensor:
    X = _random(samples, features) * torch.arange(1, features + 1)
    X[:, 1] = X[:, 0] + 0.5 * X[:, 1]
    X[:, 4] = X[:, 4].round()  # ties
    return X


class TestAffinity:
    def test_of_spread_and_rank_correlation(self) -> None:
        X, alpha = _data(), 0.3
        deviations = np.std(X.numpy(), axis=0)
        deviations = deviations / deviations.max()
        correlations = stats.spearmanr(X.numpy()).statistic
        expected = np.empty((6, 6))
        for i, j in itertools.product(range(6), repeat=2):
            expected[i, j] = alpha * max(deviations[i], deviations[j]) + (1 - alpha) * (1 - abs(correlations[i, j]))
        torch.testing.assert_close(spread_affinity(X, alpha), torch.from_numpy(expected))
        torch.testing.assert_close(spread_affinity(X), spread_affinity(X, 0.5))
        assert spread_affinity(X.float()).dtype == torch.float64

    def test_of_fishers_criterion(self) -> None:
        X, alpha = _data(), 0.7
        labels = torch.arange(30) % 3
        X[:, 2] = labels  # no variance within a class: not counted
        worth = np.zeros(6)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            one, other = X[labels == a].numpy(), X[labels == b].numpy()
            spread = one.var(0) + other.var(0)
            worth += np.divide((one.mean(0) - other.mean(0)) ** 2, spread, out=np.zeros(6), where=spread > 0)
        worth = torch.from_numpy(worth / worth.max())
        redundancy = spread_affinity(X, 0.0)
        expected = alpha * torch.maximum(worth[:, None], worth) + (1 - alpha) * redundancy
        torch.testing.assert_close(fisher_affinity(X, labels, alpha), expected)
        torch.testing.assert_close(fisher_affinity(X, labels), fisher_affinity(X, labels, 0.5))

    def test_copies_are_redundant_and_constants_correlate_with_nothing(self) -> None:
        X = _random(200, 4)
        X[:, 1] = X[:, 0].exp()  # the same ranks
        X[:, 3] = 2.0
        A = spread_affinity(X, 0.0)
        torch.testing.assert_close(A[0, 1], torch.tensor(0.0).double())
        assert A[0, 2] > 0.7
        torch.testing.assert_close(A[3], torch.ones(4).double())
        ranking, _ = inf_fs(A[:3, :3])
        assert ranking[0] == 2


class TestPaths:
    def test_is_the_sum_of_the_powers(self) -> None:
        A = _random(7, 7).abs()
        radius = np.abs(np.linalg.eigvals(A.numpy())).max()
        r = float(0.8 / radius)
        power, total = torch.eye(7).double(), torch.zeros(7, 7).double()
        for _ in range(120):
            power = power @ (r * A)
            total += power
        torch.testing.assert_close(all_paths(A, r), total, rtol=1e-9, atol=1e-12)

    def test_rows_of_a_stochastic_matrix(self) -> None:
        A = _random(6, 6).softmax(1)
        torch.testing.assert_close(all_paths(A, 0.7).sum(1), torch.full((6,), 0.7 / 0.3).double())

    def test_small_entries_are_exact(self) -> None:
        A = torch.tensor([[0.0, 1e-12], [1.0, 0.5]], dtype=torch.float64)
        expected = 0.5 * 1e-12 / (1 - 0.25 - 0.25e-12)
        assert all_paths(A, 0.5)[0, 1].item() == pytest.approx(expected, rel=1e-12)

    def test_reduces_to_degree_centrality(self) -> None:
        A = spread_affinity(_data())
        ranking, scores = inf_fs(A, 1e-7)
        degree = A.sum(1)
        assert torch.equal(ranking, degree.argsort(descending=True))
        torch.testing.assert_close(scores / scores.sum(), degree / degree.sum(), rtol=1e-6, atol=1e-8)

    def test_reduces_to_eigenvector_centrality(self) -> None:
        A = spread_affinity(_data())
        ranking, scores = inf_fs(A, 1 - 1e-7)
        leading = torch.linalg.eigh(A).eigenvectors[:, -1].abs()
        assert torch.equal(ranking, leading.argsort(descending=True))
        torch.testing.assert_close(scores / scores.sum(), leading / leading.sum(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(ranking, A.sum(1).argsort(descending=True)) or not torch.allclose(
            leading / leading.sum(), A.sum(1) / A.sum()
        )

    def test_the_default_is_nine_tenths_of_the_largest_factor(self) -> None:
        A = spread_affinity(_data())
        radius = float(torch.linalg.eigvalsh(A).abs().max())
        ranking, scores = inf_fs(A)
        torch.testing.assert_close(scores, all_paths(A, 0.9 / radius).sum(1))
        assert (scores[ranking].diff() <= 0).all()

    @settings(max_examples=15)
    @given(st.integers(2, 8), st.integers(0, 10**6), st.floats(0.05, 0.95))
    def test_permuted_features_get_permuted_scores(self, features: int, seed: int, r: float) -> None:
        X = _random(20, features, seed=seed)
        order = torch.randperm(features, generator=_rng(seed))
        scores, permuted = (inf_fs(spread_affinity(x), r)[1] for x in (X, X[:, order]))
        torch.testing.assert_close(permuted, scores[order])


def _matrix(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal softmax weights [batch, heads, time, time]."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / math.sqrt(q.shape[3])
    seen = torch.ones(TIME, TIME, dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & mask[:, None, None]
    return scores.masked_fill(~seen, -1e9).softmax(-1)


def _qkv() -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(BATCH, TIME, HEADS, DIM, seed=1),
        _random(BATCH, TIME, KV_HEADS, DIM, seed=2),
        _random(BATCH, TIME, KV_HEADS, VALUE, seed=3),
    )


class TestMultiHop:
    def test_one_hop_reduces_to_attention(self) -> None:
        q, k, v = _qkv()
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        for r in (0.3, 1.0):
            torch.testing.assert_close(multi_hop_attention(q, k, v, hops=1, r=r)[0], expected)
        torch.testing.assert_close(multi_hop_attention(q, k, v, r=0.0)[0], expected)
        x = _random(2, TIME, 16, dtype=torch.float32)
        full = CausalAttention(16, 4, kv_heads=2, generator=_rng())
        torch.testing.assert_close(_layer(hops=1)(x)[0], full(x)[0])

    @pytest.mark.parametrize("rows", [2, 128])
    def test_all_hops_are_the_series(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MODULE, "ROWS", rows)
        q, k, v = _qkv()
        A, values = _matrix(q, k), v.repeat_interleave(2, 2).transpose(1, 2)
        r = 0.6
        power, total = A, torch.zeros_like(A)
        for hop in range(1, 80):
            total = total + r ** (hop - 1) * power
            if hop in (2, 3):
                found, _ = multi_hop_attention(q, k, v, hops=hop, r=r)
                torch.testing.assert_close(found, (total @ values).transpose(1, 2))
            power = power @ A
        found, _ = multi_hop_attention(q, k, v, r=r)
        torch.testing.assert_close(found, (total @ values).transpose(1, 2))
        paths = torch.stack([all_paths(a, r) for a in A.flatten(0, 1)]).unflatten(0, (BATCH, HEADS)) / r
        torch.testing.assert_close(found, (paths @ values).transpose(1, 2))
        torch.testing.assert_close(multi_hop_attention(q, k, v)[0], multi_hop_attention(q, k, v, hops=None, r=0.5)[0])

    def test_constant_values_are_multiplied(self) -> None:
        q, k, _ = _qkv()
        one = torch.ones(BATCH, TIME, KV_HEADS, 1, dtype=torch.float64)
        torch.testing.assert_close(multi_hop_attention(q, k, one, r=0.75)[0], torch.full((2, 9, 4, 1), 4.0).double())
        three = 1 + 0.75 + 0.75**2
        found, _ = multi_hop_attention(q, k, one, r=0.75, hops=3)
        torch.testing.assert_close(found, torch.full((2, 9, 4, 1), three).double())

    @pytest.mark.parametrize("rows", [2, 128])
    def test_padding(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MODULE, "ROWS", rows)
        q, k, v = _qkv()
        mask = torch.ones(BATCH, TIME, dtype=torch.bool)
        mask[1, :3] = False
        for hops in (None, 3):
            found, outputs = multi_hop_attention(q, k, v, hops=hops, mask=mask)
            alone, _ = multi_hop_attention(*(x[1:, 3:] for x in (q, k, v)), hops=hops)
            torch.testing.assert_close(found[1:, 3:], alone)
            assert torch.equal(found[1, :3], torch.zeros_like(found[1, :3]))
            torch.testing.assert_close(found[:1], multi_hop_attention(*(x[:1] for x in (q, k, v)), hops=hops)[0])
            assert outputs.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        half = [x.to(dtype) for x in _qkv()]
        found, _ = multi_hop_attention(*half)
        assert found.dtype == dtype
        expected, _ = multi_hop_attention(*(x.double() for x in half))
        assert (found.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()

    @pytest.mark.parametrize("hops", [None, 3])
    def test_the_cache_can_be_cropped_and_reordered(self, hops: int | None) -> None:
        layer, x = _layer(hops=hops).double(), _random(2, TIME, 16)
        y, state = layer(x)
        back = state.crop(4)
        assert (back.length, state.length) == (4, TIME)
        torch.testing.assert_close(layer(x[:, 4:], back)[0], y[:, 4:])
        rows = back.rows(torch.tensor([1, 1]))
        torch.testing.assert_close(layer(x[[1, 1], 4:], rows)[0], y[[1, 1], 4:])

    def test_defaults(self) -> None:
        layer = MultiHopAttention(16, 4)
        assert (layer.hops, layer.r, layer.layer, layer.rope_base) == (None, 0.5, 0, 10000.0)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    X, (q, k, v) = _data(), _qkv()
    cases = [
        (lambda: spread_affinity(X, 1.2), "alpha: expected a probability"),
        (lambda: spread_affinity(X * math.nan), "X: expected finite values"),
        (
            lambda: fisher_affinity(X, torch.zeros(30, dtype=torch.int64)),
            "labels: expected at least two classes, got 1",
        ),
        (lambda: fisher_affinity(X, torch.zeros(3, dtype=torch.int64)), "same number of rows"),
        (lambda: fisher_affinity(X, torch.arange(30) % 2, -0.1), "alpha: expected a probability"),
        (lambda: all_paths(X, 0.1), "A: expected a square matrix"),
        (lambda: all_paths(torch.eye(2), 1.0), "r: expected more than 0 and less than 1 / 1"),
        (lambda: all_paths(torch.eye(2), 0.0), "r: expected more than 0"),
        (lambda: all_paths(math.inf * torch.eye(2), 0.5), "A: expected finite values"),
        (lambda: inf_fs(torch.eye(2), 1.0), "r: expected a number between 0 and 1"),
        (lambda: inf_fs(torch.eye(2), 0.0), "r: expected a number between 0 and 1"),
        (lambda: inf_fs(torch.zeros(2, 2)), "affinity: expected a spectral radius above 0"),
        (lambda: multi_hop_attention(q, k, v, hops=0), "hops: expected at least 1"),
        (lambda: multi_hop_attention(q, k, v, r=1.0), "r: expected at least 0, and less than 1"),
        (lambda: multi_hop_attention(q, k, v, hops=2, r=-0.1), "r: expected at least 0"),
        (lambda: _layer(r=1.0), "r: expected at least 0"),
        (lambda: _layer(hops=0), "hops: expected at least 1"),
        (lambda: multi_hop_attention(q[:, 2:], k, v), "past: expected 2 tokens, 4 heads, 1 levels"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
    for r in (1.0, 1.5):
        assert multi_hop_attention(q, k, v, hops=2, r=r)[0].isfinite().all()
