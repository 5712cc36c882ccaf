r"""Inf-FS: features ranked by all paths through a graph of affinities; with tokens as nodes, attention of many hops.

Paper: The Origin of Self-Attention: Pairwise Affinity Matrices in Feature Selection and the Emergence of Self-Attention
    (arXiv:2507.14560).
Paper: Infinite Feature Selection: A Graph-based Feature Filtering Approach (arXiv:2006.08184; first at ICCV 2015).

Features are the nodes of a graph, and an affinity says how much two of them are worth together. Inf-FS scores a feature
by the paths of all lengths that begin at it, which is a geometric series of matrices. Self-attention is the first term
of that series, with an affinity found from the tokens themselves.

Equation:
    The affinity of features i and j mixes spread and lack of redundancy,
    $$ A_{ij} = \alpha \max(\sigma_i, \sigma_j) + (1 - \alpha) \big( 1 - |\rho_{ij}| \big) \tag{1} $$
    with deviations $\sigma$ scaled to [0, 1] and Spearman's correlation $\rho$. All paths together,
    $$ S = \sum_{l \ge 1} (r A)^l = (I - r A)^{-1} - I, \qquad r = \frac{r_0}{\rho(A)}, \quad 0 < r_0 < 1 \tag{2} $$
    score the features by $c = S \mathbf{1}$. With labels, spread is replaced by Fisher's criterion. For tokens,
    $$ A = \mathrm{softmax}(Q K^\top / \sqrt{d}), \qquad
       O_L = \sum_{l=1}^{L} r^{l-1} A^l V, \qquad O_\infty = A (I - r A)^{-1} V \tag{3} $$
    where one hop is self-attention.

Symbols:
    X: [samples, features], the data.
    A: [features, features] or [time, time], affinities.
    alpha: weight of the spread against that of redundancy.
    rho(A): spectral radius.
    r_0: share of the largest r for which the series converges; 1 for attention, whose A has spectral radius 1.
    Q, K, V: [time, dim], of one head.

Defaults:
    alpha: 0.5 (the authors' code; "should be cross-validated").
    r: 0.9, the share r_0 (ICCV 2015; version 4 of the authors' code has 0.99).

Deviations:
    1. Constant features have no rank correlation; like the authors' code, theirs is taken as 0.
    2. The largest deviation is scaled to 1 and none to 0. The authors' code subtracts the smallest maximum of pairs, so
       that one more constant feature changes the ranking of all others.
    3. With labels, the spread is Fisher's criterion, summed over pairs of classes and scaled to a maximum of 1; the
       authors' code has two classes, and puts its products in the place of redundancy.
    4. The paper gives no layer. (3) leaves one factor r out of (2), so that one hop is attention whatever r is. A
       causal A is triangular, with eigenvalues in (0, 1]; the series converges for r < 1.
    5. The r of attention is 0.5 by default (ours): with 0.9 the first tokens would get ten times their values.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: `MultiHopAttention` with one hop.
    degree centrality: the ranking for r to 0.
    eigenvector centrality: the ranking for r to 1.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_matrix, check_probability, check_same_length, check_sequence
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews.models.recurrent_attention import repeated
from mlreviews_kernels.attention import attention

__all__ = [
    "MultiHopAttention",
    "MultiHopCache",
    "all_paths",
    "fisher_affinity",
    "inf_fs",
    "multi_hop_attention",
    "spread_affinity",
]

ROWS = 128  # queries whose equations are solved together


def spread_affinity(X: Float[Tensor, "samples features"], alpha: float = 0.5) -> Float[Tensor, "features features"]:
    """Equation (1).

    Args:
        X: [samples, features].
        alpha: weight of the spread; 1 - alpha is that of the lack of redundancy.

    Returns:
        Symmetric, in [0, 1], float64.

    Raises:
        ValueError: NaN or infinity, an empty axis, or alpha outside [0, 1].
        TypeError: not a floating-point tensor.
    """
    check_matrix("X", X)
    check_probability("alpha", alpha)
    return _mixed(_to_largest(X.double().std(0, correction=0)), X, alpha)


def fisher_affinity(
    X: Float[Tensor, "samples features"], labels: Int64[Tensor, " samples"], alpha: float = 0.5
) -> Float[Tensor, "features features"]:
    """Equation (1) with Fisher's criterion, squared differences of class means over variances, in place of the spread.

    Args:
        X: [samples, features].
        labels: [samples], classes; two at least.
        alpha: weight of the criterion.

    Returns:
        Symmetric, in [0, 1], float64.

    Raises:
        ValueError: one class only, or as of `spread_affinity`.
        TypeError: not a floating-point tensor.
    """
    check_matrix("X", X)
    check_probability("alpha", alpha)
    check_same_length(X=X, labels=labels)
    classes = [X.double()[labels == label] for label in labels.unique()]
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least two classes, got {len(classes)}")
    criterion = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    for one, other in itertools.combinations(classes, 2):
        spread = one.var(0, correction=0) + other.var(0, correction=0)
        apart = (one.mean(0) - other.mean(0)).square()
        criterion += torch.where(spread > 0, apart / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return _mixed(_to_largest(criterion), X, alpha)


def _to_largest(x: Tensor) -> Tensor:
    return x / x.max().clamp(min=torch.finfo(x.dtype).tiny)


def _mixed(worth: Tensor, X: Tensor, alpha: float) -> Tensor:
    return alpha * torch.maximum(worth[:, None], worth) + (1 - alpha) * (1 - _spearman(X.double()).abs())


def _spearman(X: Tensor) -> Tensor:
    """Rank correlations of the columns; ties share their mean rank, and constant columns correlate with nothing."""
    columns = X.T.contiguous()
    order = columns.sort(1).values
    ranks = sum(torch.searchsorted(order, columns, side=side) for side in ("left", "right"))
    assert isinstance(ranks, Tensor)
    centred = ranks - ranks.double().mean(1, keepdim=True)
    return nn.functional.normalize(centred, dim=1) @ nn.functional.normalize(centred, dim=1).T


def all_paths(A: Float[Tensor, "n n"], r: float) -> Float[Tensor, "n n"]:
    """``(I - r A)^-1 - I``, the sum of all powers of ``r A`` from the first on; equation (2).

    Args:
        A: [n, n], affinities.
        r: factor for each step, below one over the spectral radius.

    Raises:
        ValueError: NaN or infinity, not square, or a series that does not converge.
        TypeError: not a floating-point tensor.
    """
    check_matrix("A", A)
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"A: expected a square matrix, got shape {tuple(A.shape)}")
    if not 0 < r * _spectral_radius(A) < 1:
        raise ValueError(f"r: expected more than 0 and less than 1 / {_spectral_radius(A):.6g}, got {r}")
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    # S = (I - rA)^-1 rA: small entries are not differences of large ones.
    return torch.linalg.solve(identity - r * A, r * A)


def _spectral_radius(A: Tensor) -> float:
    return float(torch.linalg.eigvals(A).abs().max())


def inf_fs(
    affinity: Float[Tensor, "features features"], r: float = 0.9
) -> tuple[Int[Tensor, " features"], Float[Tensor, " features"]]:
    """Ranks features by all paths that begin at them: ``inf_fs(spread_affinity(X))``.

    Args:
        affinity: [features, features], such as `spread_affinity` or `fisher_affinity` give.
        r: share of the largest factor with which the series converges; between 0 and 1.

    Returns:
        ``(ranking, scores)``: features from best to worst, int64, and the score of each feature, [features].

    Raises:
        ValueError: r is not between 0 and 1, there are no paths at all, or as of `all_paths`.
        TypeError: not a floating-point tensor.
    """
    check_matrix("affinity", affinity)
    if not 0 < r < 1:
        raise ValueError(f"r: expected a number between 0 and 1, got {r}")
    radius = _spectral_radius(affinity)
    if radius == 0:
        raise ValueError("affinity: expected a spectral radius above 0, got 0")
    scores = all_paths(affinity, r / radius).sum(1)
    return scores.argsort(descending=True, stable=True), scores


def multi_hop_attention(
    q: Float[Tensor, "batch q_time heads dim"],
    k: Float[Tensor, "batch k_time kv_heads dim"],
    v: Float[Tensor, "batch k_time kv_heads value_dim"],
    *,
    hops: int | None = None,
    r: float = 0.5,
    mask: Bool[Tensor, "batch k_time"] | None = None,
    past: Float[Tensor, "batch past heads levels value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch q_time heads value_dim"], Float[Tensor, "batch k_time heads levels value_dim"]]:
    r"""Equation (3), causal; what a hop gives is the value of the next.

    All hops together solve $O_i = \sum_{j \le i} A_{ij} (v_j + r O_j)$, a block of queries after another: those before
    it are values like others, and within it the system is triangular.

    Args:
        q: [batch, q_time, heads, dim], queries of the last tokens.
        k: [batch, k_time, kv_heads, dim].
        v: [batch, k_time, kv_heads, value_dim].
        hops: L; None for all.
        r: weight of each further hop; below 1 if there is no end to them.
        mask: False where a key is padding.
        past: the second result for the tokens before these queries; None where there are none.

    Returns:
        ``(out, outputs)``: [batch, q_time, heads, value_dim], and what all tokens got from each hop but the last (from
        all of them together if there is no last), [batch, k_time, heads, levels, value_dim].

    Raises:
        ValueError: hops below 1, r out of range, or a `past` of another length.
    """
    _check_hops(hops, r)
    (batch, q_time, heads, _), k_time = q.shape, k.shape[1]
    levels = 1 if hops is None else hops - 1
    if past is None:
        past = v.new_zeros(batch, 0, heads, levels, v.shape[3])
    if past.shape[1:4] != (k_time - q_time, heads, levels):
        raise ValueError(f"past: expected {k_time - q_time} tokens, {heads} heads, {levels} levels, got {past.shape}")
    k, v = repeated(k, heads), repeated(v, heads)
    if hops is None:
        solved = past[:, :, :, 0]
        for start in range(k_time - q_time, k_time, ROWS):
            stop = min(start + ROWS, k_time)
            rows = slice(start - k_time + q_time, stop - k_time + q_time)
            values = torch.cat([v[:, :start] + r * solved, v[:, start:stop]], 1)
            new = _solved(q[:, rows], k[:, :stop], values, r, None if mask is None else mask[:, :stop])
            solved = torch.cat([solved, new], 1)
        return solved[:, k_time - q_time :], solved[:, :, :, None]
    found: list[Tensor] = []
    out = attention(q, k, v, mask=mask)[0]
    for level in range(levels):
        found.append(torch.cat([past[:, :, :, level], out], 1))
        out = attention(q, k, v + r * found[-1], mask=mask)[0]
    return out, torch.stack(found, 3) if found else v.new_zeros(batch, k_time, heads, 0, v.shape[3])


def _check_hops(hops: int | None, r: float) -> None:
    if hops is not None:
        check_count("hops", hops)
    if not (r >= 0 and (hops is not None or r < 1)):
        raise ValueError(f"r: expected at least 0, and less than 1 if hops is None, got {r}")


def _solved(q: Tensor, k: Tensor, values: Tensor, r: float, mask: Tensor | None) -> Tensor:
    """All hops of a block of queries, [batch, rows, heads, dim], from the values of earlier tokens with their hops."""
    rows = q.shape[1]
    first, lse = attention(q, k, values, mask=mask)
    wide = lse.dtype
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k[:, -rows:].to(wide)) * q.shape[3] ** -0.5
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, -rows:] | lse.isneginf()[..., None]
    inner = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).masked_fill(hidden, -torch.inf).exp()
    system = torch.eye(rows, dtype=wide, device=q.device) - r * inner
    solution = torch.linalg.solve_triangular(system, first.to(wide).transpose(1, 2), upper=False)
    return solution.transpose(1, 2).to(values.dtype)


class MultiHopCache(NamedTuple):
    """A `KVCache`, and what the tokens in it got.

    Attributes:
        cache: keys, values and mask.
        outputs: [batch, time, heads, levels, value_dim], see `multi_hop_attention`.
    """

    cache: KVCache
    outputs: Tensor

    @property
    def length(self) -> int:
        """How many tokens are held, padding included."""
        return self.cache.length

    def crop(self, length: int) -> MultiHopCache:
        """The first tokens alone.

        Args:
            length: how many.
        """
        return MultiHopCache(self.cache.crop(length), self.outputs[:, :length])

    def rows(self, index: Int[Tensor, " rows"]) -> MultiHopCache:
        """The given rows of the batch.

        Args:
            index: [rows], int64.
        """
        return MultiHopCache(self.cache.rows(index), self.outputs[index])


class MultiHopAttention(CausalAttention):
    """`multi_hop_attention` of a language model.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        hops: L; None for all.
        r: weight of each further hop.
        kv_heads: of keys and values; None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: hops below 1, r out of range, or sizes that don't go together.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        hops: int | None = None,
        r: float = 0.5,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        _check_hops(hops, r)
        self.hops, self.r = hops, r

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: MultiHopCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], MultiHopCache]:
        """Arguments, results and errors as of `CausalAttention.forward`; the state is a `MultiHopCache`."""
        check_sequence(x, self.d_model, mask)
        q, k, v = self.project(x, 0 if state is None else state.length, positions)
        cache = KVCache(k, v, mask) if state is None else state.cache.append(k, v, mask)
        past = None if state is None else state.outputs
        options = {"hops": self.hops, "r": self.r, "mask": cache.mask, "past": past}
        out, outputs = multi_hop_attention(q, cache.keys, cache.values, **options)  # type: ignore[arg-type]
        return self.o_proj(out.flatten(2)), MultiHopCache(cache, outputs)
