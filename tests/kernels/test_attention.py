from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels import BackendError, softmaxes, use_backend
from mlreviews_kernels.attention import attention, merge_attention
from mlreviews_kernels.backends import Choice
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.differential_attention import differential_attention

gpu = importlib.import_module("mlreviews_kernels.softmaxes_gpu")
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")  # that it compiles is a test of its own
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "vectorised", "triton"])


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN; the interpreter has small tiles, of 16 queries and keys."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "SIDE", 32)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def few(backend: str) -> dict[str, int]:
    """Few heads for the interpreter, which is slow."""
    return {"heads": 2, "kv_heads": 1} if backend == "triton" else {}


def smallest(backend: str) -> dict[str, int]:
    """One row for the interpreter, too."""
    return {"batch": 1, **few(backend)} if backend == "triton" else {}


def dtype_of(backend: str) -> torch.dtype:
    """What the backend computes in."""
    return torch.float32 if backend in ("cpu", "triton") else torch.float64


def using(backend: str) -> AbstractContextManager[object]:
    return without_compiled_code() if backend == "vectorised" else use_backend(backend)


def drawn(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 5,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys + dim)
    shapes = ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(inputs: list[Tensor], function: Callable[..., Any] = attention, **options: Any) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        empty = torch.isneginf(other)
        assert torch.equal(torch.isneginf(one), empty), i
        difference = (one.double() - other.double()).masked_fill(empty, 0.0)
        scale = max(1.0, other.masked_fill(empty, 0.0).abs().max().item() if other.numel() else 0.0)
        assert (difference.abs() <= tolerance * scale).all(), f"{i}: {difference.abs().max():.1e}"


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Callable[[int, int, int], bool]
) -> tuple[Tensor, Tensor]:
    """One query and key at a time; sees(row of the batch, query, key)."""
    batch, queries, heads, _ = q.shape
    out, lse = q.new_zeros(batch, queries, heads, v.shape[3]), q.new_full((batch, heads, queries), -math.inf)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            for i in range(queries):
                keys = [j for j in range(k.shape[1]) if sees(b, i, j)]
                if keys:
                    weights = [math.exp(scale * float(q[b, i, h] @ k[b, j, kv])) for j in keys]
                    lse[b, h, i] = math.log(sum(weights))
                    for weight, j in zip(weights, keys, strict=True):
                        out[b, i, h] += weight / sum(weights) * v[b, j, kv]
    return out, lse


@every_backend
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window"),
    [(6, 6, True, None), (3, 7, True, 3), (7, 3, True, 1), (3, 7, False, 3), (7, 3, False, 1), (6, 6, False, None)],
)
def test_one_query_and_key_at_a_time(
    backend: str, queries: int, keys: int, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmaxes, "ROWS", 2)
    monkeypatch.setattr(softmaxes, "FEW", 0)
    q, k, v = drawn(queries, keys, **few(backend))

    def sees(_: int, i: int, j: int) -> bool:
        gap = i + keys - queries - j
        return (gap >= 0 or not causal) and (window is None or abs(gap) < window)

    expected = by_hand(q, k, v, 0.7, sees)
    dtype = dtype_of(backend)
    with using(backend):
        found = attention(*(x.to(dtype) for x in (q, k, v)), causal=causal, window=window, scale=0.7)
    assert found[1].dtype == dtype
    assert_close([*found], [*expected], 1e-6 if dtype == torch.float32 else 1e-12)


@every_backend
def test_masks_of_keys_and_of_pairs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmaxes, "ROWS", 2)
    q, k, v = drawn(5, 7, **few(backend), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(2, 7, generator=generator) > 0.5
    pairs = torch.rand(2, 5, 7, generator=generator) > 0.5
    with using(backend):
        padded, free = attention(q, k, v, mask=keys), attention(q, k, v, mask=pairs, causal=False)
    assert_close([*padded], [*by_hand(q, k, v, 5**-0.5, lambda b, i, j: j <= i + 2 and bool(keys[b, j]))], 1e-6)
    assert_close([*free], [*by_hand(q, k, v, 5**-0.5, lambda b, i, j: bool(pairs[b, i, j]))], 1e-6)


SIZES = [
    # queries, keys, heads, kv_heads, dim, value_dim, window: around blocks of 48 queries and 96 keys
    (49, 49, 2, 1, 16, 16, None),
    (95, 193, 3, 3, 5, 33, None),
    (145, 97, 4, 2, 17, 8, None),
    (130, 150, 2, 2, 3, 7, 50),
    (3, 40, 4, 1, 6, 2, None),
    (0, 5, 2, 1, 3, 2, None),
    (5, 0, 2, 1, 3, 2, None),
]
OPTIONS = [(True, ""), (False, ""), (True, "keys"), (False, "pairs")]
LENGTHS = {"reference": (9, 9), "cpu": (60, 60), "vectorised": (130, 130), "triton": (20, 20)}  # two blocks
TILES = [
    # around tiles of 16, causal or not, mask
    ((17, 33, 2, 1, 33, 5, None), True, "keys"),
    ((33, 20, 1, 1, 5, 3, 7), True, ""),
    ((20, 37, 1, 1, 3, 7, 11), False, "pairs"),
    ((3, 0, 2, 1, 3, 2, None), True, ""),
    ((0, 3, 2, 1, 3, 2, None), False, ""),
]


@pytest.mark.parametrize(
    ("backend", "sizes", "causal", "masked"),
    [(backend, one, *more) for backend in ("cpu", "vectorised") for one in SIZES for more in OPTIONS]
    + [("triton", *one) for one in TILES],
)
def test_values_and_gradients_equal_the_reference(
    backend: str, sizes: tuple[Any, ...], causal: bool, masked: str
) -> None:
    queries, keys, heads, kv_heads, dim, value_dim, window = sizes
    batch = 1 if backend == "triton" else 2
    inputs = drawn(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    shape = {"keys": (batch, keys), "pairs": (batch, queries, keys)}.get(masked)
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    options = {"causal": causal, "window": window, "mask": mask, "scale": 0.4}
    with using("reference"):
        expected = with_gradients(inputs, **options)
    dtype = dtype_of(backend)
    with using(backend):
        found = with_gradients([x.to(dtype) for x in inputs], **options)
    assert_close(found, expected, 5e-6 if dtype == torch.float32 else 1e-12)


def test_the_interpreter_has_its_widest_tiles_too() -> None:
    # a head of more than 64 has tiles of its own
    inputs = drawn(20, 18, batch=1, heads=1, kv_heads=1, dim=70, value_dim=65)
    with using("reference"):
        expected = with_gradients(inputs)
    with using("triton"):
        assert_close(with_gradients([x.float() for x in inputs]), expected, 5e-6)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 4), (torch.float32, 129)])
def test_what_triton_cannot_do_is_refused_by_name_and_runs_elsewhere_by_default(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = drawn(5, 5, dim=4, value_dim=dim, dtype=dtype)
    with using("triton"), pytest.raises(BackendError, match=r"^attention: the Triton kernels asked for by use_backend"):
        attention(*inputs)
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    by_default = with_gradients(inputs)
    monkeypatch.undo()
    assert_close(by_default, with_gradients([x.double() for x in inputs]), 5e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_queries_of_a_head(threads: int) -> None:
    # gradients of keys and values are then sums of parts
    inputs = drawn(150, 150, batch=1, heads=2, kv_heads=1)
    with using("reference"):
        expected = with_gradients(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = (with_gradients([x.float() for x in inputs]) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert_close(found, expected, 5e-6)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_equals_scaled_dot_product_attention() -> None:
    q, k, v = drawn(70, 70, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float32)
    out, _ = attention(q, k, v)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=2e-6)


def test_reference_gradcheck() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(3, 4, batch=1, heads=2, kv_heads=1))
    mask = torch.tensor([[False, False, True, True]])  # the first query sees nothing

    def finite(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(*inputs, **options)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    with using("reference"):
        for options in ({"mask": mask}, {"causal": False, "window": 2}):
            assert torch.autograd.gradcheck(partial(finite, **options), (q, k, v))


@every_backend
def test_a_row_that_sees_nothing_is_zero_without_nan(backend: str) -> None:
    inputs = drawn(6, 9, **few(backend), dtype=torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False
    with using(backend):
        found = with_gradients(inputs, mask=mask)
    out, lse, *grads = found
    assert (out[0] == 0).all()
    assert torch.isneginf(lse[0]).all()
    assert (out[1, 0] == 0).all()
    assert torch.isneginf(lse[1, :, 0]).all()
    assert torch.isfinite(lse[1, :, 2:]).all()
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[0] == 0).all()


@every_backend
def test_extreme_scores_neither_overflow_nor_vanish(backend: str) -> None:
    q, k, v = drawn(*LENGTHS[backend], batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    q *= 300
    with using(backend):
        found = with_gradients([q, k, v])
    with using("reference"):
        expected = with_gradients([q.double(), k.double(), v.double()])
    assert_close(found[:2], expected[:2], 1e-4)
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("backend", "offset_type"),
    [
        ("reference", torch.int32),
        ("cpu", torch.int32),
        ("cpu", torch.int64),
        ("vectorised", torch.int64),
        ("triton", torch.int64),
    ],
)
def test_packed_documents_equal_separate_runs(backend: str, offset_type: torch.dtype) -> None:
    bounds = [0, 3, 3, 22, 23] if backend == "triton" else [0, 3, 3, 60, 61]
    inputs = drawn(bounds[-1], bounds[-1], batch=1, **few(backend), dtype=torch.float32)
    mask = torch.rand(1, bounds[-1], generator=torch.Generator().manual_seed(2)) > 0.3
    leaves = [x.clone().requires_grad_() for x in inputs]
    parts = []
    for start, stop in pairwise(bounds):
        part = [x[:, start:stop] for x in leaves]
        parts.append(attention(*part, mask=mask[:, start:stop], window=20))
    out, lse = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 2)
    with using(backend):
        found = with_gradients(inputs, mask=mask, window=20, cu_seqlens=torch.tensor(bounds, dtype=offset_type))
    cotangents = [
        torch.randn(x.shape, generator=g, dtype=torch.float64).float()
        for g in [torch.Generator().manual_seed(1)]
        for x in (out, lse)
    ]
    grads = torch.autograd.grad((out, lse), leaves, cotangents)
    assert_close(found, [out, lse, *grads], 5e-6)


@every_backend
def test_causality(backend: str) -> None:
    q, k, v = drawn(*LENGTHS[backend], batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    cut = q.shape[1] - 4
    with using(backend):
        before = attention(q, k, v)
        k[:, cut:] += 1.0
        v[:, cut:] += 1.0
        after = attention(q, k, v)
    assert torch.equal(before[0][:, :cut], after[0][:, :cut])
    assert torch.equal(before[1][..., :cut], after[1][..., :cut])
    assert not torch.equal(before[0][:, cut], after[0][:, cut])


@every_backend
def test_steps_equal_the_whole(backend: str) -> None:
    q, k, v = drawn(9, 9, **smallest(backend), dtype=torch.float32)
    with using(backend):
        out, lse = attention(q, k, v, window=4)
        for t in (0, 8) if backend == "triton" else range(9):
            one, its = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], window=4)
            torch.testing.assert_close(one, out[:, t : t + 1], rtol=0, atol=1e-6)
            torch.testing.assert_close(its, lse[..., t : t + 1], rtol=0, atol=1e-6)


def test_a_window_of_everything_is_no_window() -> None:
    inputs = drawn(20, 30, dtype=torch.float32)
    assert all(torch.equal(*x) for x in zip(with_gradients(inputs, window=30), with_gradients(inputs), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu", "vectorised"])  # the interpreter can't multiply such matrices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_better_than_eager(backend: str, dtype: torch.dtype) -> None:
    inputs = drawn(70, 70, heads=2, dim=16, value_dim=16, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
        scores = scores.masked_fill(~torch.ones(70, 70, dtype=torch.bool).tril(), -math.inf)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    with using("reference"):
        exact = with_gradients([x.double() for x in inputs], lambda *x: attention(*x)[0])
    with using(backend):
        found = with_gradients(inputs, lambda *x: attention(*x)[0])
        assert attention(*inputs)[1].dtype == torch.float32
    rounded = with_gradients(inputs, eager)
    for one, other, truth in zip(found, rounded, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() <= (other.double() - truth).norm()


@every_backend
def test_memory_layout_does_not_matter(backend: str) -> None:
    inputs = drawn(9, 11, **smallest(backend), dtype=torch.float32)
    wide = [torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0] for x in inputs]
    cotangent = torch.randn(len(inputs[0]), 3, 9, inputs[0].shape[2]).transpose(1, 3).transpose(1, 2)
    found = []
    for values in (inputs, wide):
        leaves = [x.detach().requires_grad_() for x in values]
        with using(backend):
            out, _ = attention(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@every_backend
def test_gradients_of_one_output_alone(backend: str) -> None:
    inputs = drawn(9, 11, **smallest(backend), dtype=torch.float32)
    with using(backend):
        from_lse = with_gradients(inputs, lambda *x: attention(*x)[1])
        from_out = with_gradients(inputs, lambda *x: attention(*x)[0])
    assert (from_lse[3] == 0).all()
    with using("reference"):
        wide = [x.double() for x in inputs]
        assert_close(from_lse, with_gradients(wide, lambda *x: attention(*x)[1]), 5e-6)
        assert_close(from_out, with_gradients(wide, lambda *x: attention(*x)[0]), 5e-6)


@settings(max_examples=10)
@given(
    queries=st.integers(1, 60), keys=st.integers(1, 110), window=st.none() | st.integers(1, 120), causal=st.booleans()
)
def test_any_shape(queries: int, keys: int, window: int | None, causal: bool) -> None:
    inputs = drawn(queries, keys, batch=1)
    with using("reference"):
        expected = with_gradients(inputs, window=window, causal=causal)
    assert_close(with_gradients([x.float() for x in inputs], window=window, causal=causal), expected, 5e-6)


def test_op_is_registered_properly() -> None:
    q, k, v = drawn(5, 7, dtype=torch.float32)
    tokens = [x.flatten(0, 1).requires_grad_() for x in (q, k, v)]
    mask = torch.rand(14) > 0.3
    offsets = torch.arange(3)
    arguments = (*tokens, mask, offsets * 5, offsets * 7, True, 0.3, 4)
    torch.library.opcheck(torch.ops.mlreviews.attention, arguments, test_utils=CHECKS)


def test_compiles_as_one_graph(unchecked: None) -> None:
    inputs = drawn(9, 11, dtype=torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(with_gradients(inputs, compiled), with_gradients(inputs), 1e-6)


def merged(q: Tensor, k: Tensor, v: Tensor, cuts: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
    return merge_attention(*zip(*(attention(q, k[:, cut], v[:, cut], causal=False) for cut in cuts), strict=True))


def test_merging_parts_is_attention_over_all() -> None:
    inputs = drawn(6, 20)
    cuts = (slice(0, 3), slice(3, 3), slice(3, 14), slice(14, 20))
    found = with_gradients(inputs, partial(merged, cuts=cuts))
    assert_close(found, with_gradients(inputs, causal=False), 1e-12)
    # the last query's part of a causal one is merged with the past, as a cache is
    q, k, v = inputs
    past, new = attention(q, k[:, :14], v[:, :14], causal=False), attention(q, k[:, 14:], v[:, 14:])
    assert_close([*merge_attention(*zip(past, new, strict=True))], [*attention(q, k, v)], 1e-12)


def test_merging_is_associative_and_commutative_with_an_identity() -> None:
    q, k, v = drawn(6, 20)
    a, b, c = (attention(q, k[:, cut], v[:, cut], causal=False) for cut in (slice(0, 3), slice(3, 9), slice(9, 20)))

    def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return merge_attention(*zip(*parts, strict=True))

    assert_close([*merge(merge(a, b), c)], [*merge(a, merge(b, c))], 1e-13)
    assert_close([*merge(a, b, c)], [*merge(c, a, b)], 1e-13)
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], -math.inf)
    for same in (merge(a, nothing), merge(nothing, a), merge(nothing, a, nothing), merge(a)):
        assert_close([*same], [*a], 1e-15)
    assert all(torch.equal(*pair) for pair in zip(merge(nothing, nothing), nothing, strict=True))
    stacked = merge_attention(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]))
    assert_close([*stacked], [*merge(a, b)], 1e-15)


def test_merging_differentiates_without_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    lses = [torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge_attention([a, b], [c, d]), leaves)
    with torch.no_grad():
        lses[0][0] = lses[1][0] = -math.inf
        lses[0][1, 1] = -math.inf
    grads = torch.autograd.grad([x.nan_to_num(neginf=0.0).sum() for x in merge_attention(outs, lses)], leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    half = merge_attention([x.bfloat16() for x in outs], [x.float() for x in lses])
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 6, 20)}, ValueError, r"^q: expected \[batch, time, heads, dim\], got \(2, 6, 20\)"),
        ({"q": torch.zeros(2, 6, 4, 5).int()}, TypeError, "^q: expected float32"),
        ({"q": torch.zeros(2, 6, 3, 5)}, ValueError, "^k: expected a number of heads that divides the 3 heads"),
        ({"q": torch.zeros(2, 6, 4, 0)}, ValueError, "^q: expected dim of at least 1"),
        ({"q": torch.zeros(0, 6, 4, 5)}, ValueError, "^q: expected at least one row"),
        ({"k": torch.zeros(2, 6, 0, 5)}, ValueError, "^k: expected a number of heads"),
        ({"k": torch.zeros(2, 6, 2, 4)}, ValueError, r"^k: expected \[batch, time, kv_heads, dim\] = \(2, 6, 2, 5\)"),
        ({"k": torch.zeros(1, 6, 2, 5)}, ValueError, r"^k: expected .* = \(2, 6, 2, 5\)"),
        ({"k": torch.zeros(2, 6, 2, 5).double()}, TypeError, "^k: expected torch.float32"),
        ({"v": torch.zeros(2, 5, 2, 3)}, ValueError, r"^v: expected .* = \(2, 6, 2, 3\)"),
        ({"v": torch.zeros(2, 6, 1, 3)}, ValueError, r"^v: expected .* = \(2, 6, 2, 3\)"),
        ({"v": torch.zeros(2, 6, 2, 3).double()}, TypeError, "^v: expected torch.float32"),
        ({"scale": "2"}, TypeError, "^scale: expected a number or None, got str"),
        ({"window": 0}, ValueError, "^window: expected at least 1, got 0"),
        ({"mask": torch.zeros(2, 6)}, TypeError, "^mask: expected booleans"),
        ({"mask": torch.zeros(2, 5).bool()}, ValueError, r"^mask: expected \[batch, k_time\] = \(2, 6\) or"),
        ({"mask": torch.zeros(2, 6, device="meta").bool()}, ValueError, "^mask: expected a tensor on cpu"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "^cu_seqlens: packed sequences lie in one row"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = dict(zip("qkv", drawn(6, 6, dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        attention(**{**values, **change})


def test_packed_arguments_are_checked() -> None:
    q, k, v = drawn(6, 6, batch=1, dtype=torch.float32)
    offsets = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="cu_seqlens: expected as many keys as queries, got 6 and 5"):
        attention(q[:, :5], k, v, cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"mask: expected \[1, k_time\] beside cu_seqlens, got \(1, 6, 6\)"):
        attention(q, k, v, cu_seqlens=offsets, mask=torch.ones(1, 6, 6, dtype=torch.bool))
    for backend in ("reference", "cpu", "vectorised"):  # a GPU isn't waited for
        with using(backend), pytest.raises(ValueError, match="cu_seqlens: expected numbers that rise"):
            attention(q, k, v, cu_seqlens=torch.tensor([0, 7]))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "^lses: expected one for each of at least one outs, got 0 for 0"),
        ([(2, 3, 4, 5)], [(2, 4, 3)] * 2, ValueError, "^lses: expected one for each of at least one outs, got 2 for 1"),
        ([(2, 3, 4)], [(2, 4, 3)], ValueError, r"^outs\[0\]: expected \[batch, q_time, heads, value_dim\]"),
        ([(2, 3, 4, 5), (2, 3, 4, 6)], [(2, 4, 3)] * 2, ValueError, r"^outs\[1\]: expected the first one's shape"),
        ([(2, 3, 4, 5)], [(2, 3, 4)], ValueError, r"^lses\[0\]: expected \[batch, heads, q_time\] = \(2, 4, 3\)"),
    ],
)
def test_arguments_of_merging_are_checked(
    outs: list[tuple[int, ...]], lses: list[tuple[int, ...]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_attention([torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])


def test_dtypes_of_merging_are_checked() -> None:
    out, lse = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 3)
    with pytest.raises(TypeError, match=r"^outs\[1\]: expected torch.float32"):
        merge_attention([out, out.double()], [lse, lse])
    with pytest.raises(TypeError, match=r"^lses\[1\]: expected torch.float32"):
        merge_attention([out, out], [lse, lse.double()])
    with pytest.raises(TypeError, match=r"^outs\[0\]: expected float32"):
        merge_attention([out.int()], [lse])


@pytest.mark.parametrize(
    ("count", "dtype", "options"),
    [
        *product((1, 2), (torch.float32, torch.float16), ({"scale": -0.4},)),
        *product((1, 2), (torch.float32,), ({"causal": False},)),
        (1, torch.float32, {"scale": 0.0}),
        (1, torch.float32, {"window": 18}),
    ],
)
def test_scales_of_any_sign_and_whole_tiles_in_triton(
    count: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels take a positive scale; tiles that are seen whole may have a loop without masks."""
    monkeypatch.setattr(gpu, "_splits", lambda *_: True)
    generator = torch.Generator().manual_seed(0)
    shapes = [*((1, 36, 3 - count, 8), (1, 40, 1, 8)) * count, (1, 40, 1, 8)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def run(backend: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide, copy=True).requires_grad_() for x in drawn]
        with use_backend(backend):
            out = attention(*leaves, **options)[0] if count == 1 else differential_attention(*leaves, 0.5, **options)
            out.sin().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    tolerance = 1e-5 if dtype == torch.float32 else 2**-9
    for found, expected in zip(run("triton", dtype), run("reference", torch.float64), strict=True):
        largest = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * largest)
