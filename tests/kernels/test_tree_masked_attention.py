from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels import softmaxes, use_backend
from mlreviews_kernels.attention import attention, merge_attention
from mlreviews_kernels.backends import BackendError, Choice
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.tree_masked_attention import ancestor_mask, cpu, reference, tree_masked_attention

Inputs = dict[str, Tensor]
FLOATS = ("q", "k", "v", "k_cache", "v_cache")
FAST = ("compiled", "vectorised", "triton")
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
gpu = importlib.import_module("mlreviews_kernels.tree_masked_attention.gpu")


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN; short caches are several stretches."""
    monkeypatch.setattr(cpu, "CHUNK", 7)
    monkeypatch.setattr(gpu, "SIDE", 32)  # 16 in float32
    monkeypatch.setattr(gpu, "STRETCH", 20)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def using(backend: str) -> AbstractContextManager[object]:
    """Triton as the default on a GPU, with a backward in PyTorch; asked for by name, it has none."""
    stack = ExitStack()
    if backend == "triton":
        choice = Choice("triton", "the default on a GPU")
        stack.enter_context(mock.patch.object(softmaxes, "select", return_value=choice))
    else:
        stack.enter_context(use_backend({"compiled": "cpu", "vectorised": "cpu"}.get(backend, backend)))
    if backend == "vectorised":
        stack.enter_context(without_compiled_code())
    return stack


def drawn(
    tree: int,
    context: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 5,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(tree + context + dim)
    shapes = {
        "q": (tree, heads, dim),
        "k": (tree, kv_heads, dim),
        "v": (tree, kv_heads, value_dim),
        "k_cache": (context, kv_heads, dim),
        "v_cache": (context, kv_heads, value_dim),
    }
    values = {x: torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for x, shape in shapes.items()}
    parents = (torch.rand(batch, tree, generator=generator) * (torch.arange(tree) + 1)).long()
    return {**{x: value.to(dtype) for x, value in values.items()}, "tree_mask": ancestor_mask(parents - 1)}


def convert(values: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if name in FLOATS else value for name, value in values.items()}


def with_gradients(
    values: Inputs, function: Callable[..., Any] = tree_masked_attention, **options: Any
) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = {x: value.detach().clone().requires_grad_(x in FLOATS) for x, value in values.items()}
    found = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found]
    return [*(x.detach() for x in found), *torch.autograd.grad(found, [leaves[x] for x in FLOATS], cotangents)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        empty = torch.isneginf(other)
        assert torch.equal(torch.isneginf(one), empty), i
        difference = (one.double() - other.double()).masked_fill(empty, 0.0)
        scale = max(1.0, other.masked_fill(empty, 0.0).abs().max().item() if other.numel() else 0.0)
        assert (difference.abs() <= tolerance * scale).all(), f"{i}: {difference.abs().max():.1e}"


def token_by_token(values: Inputs, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """For each token the keys it sees, picked out one by one, and a softmax over these."""
    q, k, v, k_cache, v_cache, mask = (values[x] for x in (*FLOATS, "tree_mask"))
    (batch, tree, heads, _), kv_heads = q.shape, k.shape[2]
    out, lse = q.new_zeros(batch, tree, heads, v.shape[3]), q.new_full((batch, heads, tree), -math.inf)
    for b in range(batch):
        for i in range(tree):
            seen = [j for j in range(tree) if mask[b, i, j]]
            for h in range(heads):
                kv = h // (heads // kv_heads)
                keys = [*k_cache[b, : lengths[b], kv], *(k[b, j, kv] for j in seen)]
                rows = [*v_cache[b, : lengths[b], kv], *(v[b, j, kv] for j in seen)]
                if keys:
                    scores = scale * (torch.stack(keys) @ q[b, i, h])
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, i, h] = scores.softmax(0) @ torch.stack(rows)
    return out, lse


@every_backend
@pytest.mark.parametrize(
    ("tree", "context", "lengths"), [(6, 23, [23, 9]), (9, 4, [0, 4]), (1, 17, [17, 16]), (3, 0, [0, 0])]
)
def test_equals_each_token_by_itself(backend: str, tree: int, context: int, lengths: list[int]) -> None:
    values = drawn(tree, context, heads=2, kv_heads=1)
    values["k_cache"][1, lengths[1] :] = math.nan  # what the buffer holds past the length doesn't matter
    values["v_cache"][1, lengths[1] :] = math.nan
    dtype = torch.float64 if backend in ("reference", "vectorised") else torch.float32
    options = {"cache_lengths": torch.tensor(lengths), "scale": 0.7}
    with using(backend):
        found = with_gradients(convert(values, dtype), **options)
    assert found[1].dtype == dtype
    assert_close(found[:2], [*token_by_token(values, lengths, 0.7)], 1e-12 if dtype == torch.float64 else 2e-6)
    assert all(torch.isfinite(grad).all() for grad in found[2:])
    assert all((grad[1, lengths[1] :] == 0).all() for grad in found[5:])


SIZES = [
    # tree, context, heads, kv_heads, dim, value_dim: around panels of 16 queries, blocks of 96 keys, stretches of 960
    (5, 40, 3, 3, 6, 5),
    (17, 21, 2, 1, 40, 9),
    (3, 22, 2, 2, 3, 70),
    (0, 5, 2, 1, 3, 2),
]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_equal_the_reference(backend: str, sizes: tuple[int, ...]) -> None:
    tree, context, heads, kv_heads, dim, value_dim = sizes
    values = drawn(tree, context, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    options = {"cache_lengths": torch.tensor([context, context // 2])}
    with using("reference"):
        expected = with_gradients(values, **options)
    dtype = torch.float64 if backend == "vectorised" else torch.float32
    with using(backend):
        found = with_gradients(convert(values, dtype), **options)
    assert_close(found, expected, 1e-12 if backend == "vectorised" else 5e-6)


@pytest.mark.parametrize("tree", [1, 16, 33, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_stretches_and_threads(tree: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    values = drawn(tree, 2100, heads=3, kv_heads=1, dim=8, value_dim=17)
    options = {"cache_lengths": torch.tensor([2100, 961], dtype=torch.int32)}
    with using("reference"):
        expected = tree_masked_attention(**values, **options)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(tree_masked_attention(**convert(values, torch.float32), **options))
    finally:
        torch.set_num_threads(before)
    assert_close([*found[1]], [*expected], 2e-6)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))  # whatever the number of threads


def test_the_compiled_form_is_not_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "vectorised", None)
    tree_masked_attention(**drawn(3, 9, dtype=torch.float32))
    with pytest.raises(TypeError):
        tree_masked_attention(**drawn(3, 9))


def test_reference_gradcheck() -> None:
    values = drawn(4, 3, batch=2, heads=2, kv_heads=1, dim=2, value_dim=2)
    mask = values["tree_mask"]
    mask[1, 2] = False  # with an empty cache this token sees nothing
    lengths = torch.tensor([2, 0])

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, k_cache, v_cache = leaves
        caches = {"k_cache": k_cache, "v_cache": v_cache, "cache_lengths": lengths}
        out, lse = tree_masked_attention(q, k, v, mask, **caches)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    with using("reference"):
        assert torch.autograd.gradcheck(run, [values[x].requires_grad_() for x in FLOATS])


@pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])  # the interpreter is slow
def test_a_chain_is_causal_attention_and_a_star_independent_queries(backend: str) -> None:
    values = drawn(6, 19, batch=1, dtype=torch.float32)
    chain, star = ancestor_mask(torch.arange(6) - 1), ancestor_mask(torch.full((6,), -1))
    k, v = (torch.cat([values[f"{x}_cache"], values[x]], 1) for x in "kv")
    causal = attention(values["q"], k, v)
    with using(backend):
        assert_close([*tree_masked_attention(**{**values, "tree_mask": chain})], [*causal], 2e-6)
        together = tree_masked_attention(**{**values, "tree_mask": star})
    for i in range(6):
        k, v = (torch.cat([values[f"{x}_cache"], values[x][:, i : i + 1]], 1) for x in "kv")
        out, lse = attention(values["q"][:, i : i + 1], k, v)
        assert_close([together[0][:, i : i + 1], together[1][..., i : i + 1]], [out, lse], 2e-6)


def test_each_branch_is_its_own_continuation() -> None:
    """Verification: the results of a path through the tree are those of decoding that path alone."""
    values = drawn(7, 12, batch=1, dtype=torch.float32)
    parents = torch.tensor([-1, 0, 0, 1, 2, 2, 4])
    out, lse = tree_masked_attention(**{**values, "tree_mask": ancestor_mask(parents)})
    path = [0, 2, 4, 6]
    k, v = (torch.cat([values[f"{x}_cache"], values[x][:, path]], 1) for x in "kv")
    expected, expected_lse = attention(values["q"][:, path], k, v)
    assert_close([out[:, path], lse[..., path]], [expected, expected_lse], 2e-6)


def test_equals_torch_with_a_mask_over_the_concatenation_and_merges() -> None:
    values = drawn(9, 50, dim=8, value_dim=8, dtype=torch.float32)
    q, k, v, k_cache, v_cache, mask = (values[x] for x in (*FLOATS, "tree_mask"))
    out, lse = tree_masked_attention(**values)
    joined = (torch.cat(pair, 1).transpose(1, 2) for pair in ((k_cache, k), (v_cache, v)))
    seen = torch.cat([torch.ones(2, 9, 50, dtype=torch.bool), mask], 2)[:, None]
    expected = scaled_dot_product_attention(q.transpose(1, 2), *joined, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=2e-6)
    # parts of a cache, on several devices say, are merged like those of any attention
    halves = (
        attention(q, k_cache[:, :20], v_cache[:, :20], causal=False),
        tree_masked_attention(q, k, v, mask, k_cache=k_cache[:, 20:], v_cache=v_cache[:, 20:]),
    )
    assert_close([*merge_attention(*zip(*halves, strict=True))], [out, lse], 2e-6)


@every_backend
def test_what_sees_nothing_is_zero_without_nan(backend: str) -> None:
    values = drawn(4, 5, heads=2, kv_heads=1, dtype=torch.float32)
    values["tree_mask"] = torch.eye(4, dtype=torch.bool)
    values["tree_mask"][2, 2] = False
    with using(backend):
        out, lse, *grads = with_gradients(values, cache_lengths=torch.tensor([0, 5]))
    assert (out[0, 2] == 0).all()
    assert torch.isneginf(lse[0, :, 2]).all()
    assert torch.isfinite(lse[1]).all()
    assert torch.isfinite(lse[0, :, [0, 1, 3]]).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][0, 2] == 0).all()


@every_backend
def test_extreme_scores_neither_overflow_nor_vanish(backend: str) -> None:
    values = drawn(3, 40, batch=1, heads=1, kv_heads=1, dtype=torch.float32)
    values["q"] *= 300
    with using(backend):
        found = with_gradients(values)
    with using("reference"):
        assert_close(found[:2], with_gradients(convert(values, torch.float64))[:2], 1e-4)
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_better_than_eager(backend: str, dtype: torch.dtype) -> None:
    # Triton's interpreter can't multiply half-precision matrices
    values = drawn(9, 70, heads=2, kv_heads=2, dim=16, value_dim=16, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor, tree_mask: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor]:
        scores = torch.einsum("bihd,bjhd->bhij", q, torch.cat([k_cache, k], 1)) / 4
        seen = torch.cat([torch.ones(2, 9, 70, dtype=torch.bool), tree_mask], 2)[:, None]
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (torch.einsum("bhij,bjhd->bihd", weights, torch.cat([v_cache, v], 1)),)

    with using("reference"):
        exact = with_gradients(convert(values, torch.float64), lambda **x: tree_masked_attention(**x)[:1])
    with using(backend):
        found = with_gradients(values, lambda **x: tree_masked_attention(**x)[:1])
        assert tree_masked_attention(**values)[1].dtype == torch.float32
    rounded = with_gradients(values, eager)
    for one, other, truth in zip(found, rounded, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() <= (other.double() - truth).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_form_reads_every_half_precision_number(dtype: torch.dtype) -> None:
    """One key has all the weight: its value comes back, be it denormal, infinite or NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    q, k_cache = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    nothing = torch.zeros(1, 1, 1, 2**16, dtype=dtype)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    out, _ = tree_masked_attention(q, q, nothing, mask, k_cache=k_cache, v_cache=numbers[None, None, None])
    torch.testing.assert_close(out.flatten(), numbers, rtol=0, atol=0, equal_nan=True)


@every_backend
def test_caches_of_any_layout_are_read_in_place(backend: str) -> None:
    values = drawn(3, 17, heads=2, kv_heads=2, dtype=torch.float32)
    before = {name: value.clone() for name, value in values.items()}
    lengths = torch.tensor([13, 17])
    strided = dict(values)
    for name in ("k_cache", "v_cache"):
        strided[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens
        assert not strided[name].is_contiguous()
    scattered = {x: torch.stack([value, value], -1)[..., 0] for x, value in values.items()}
    with using(backend):
        found = [tree_masked_attention(**x, cache_lengths=lengths) for x in (values, values, strided, scattered)]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
    assert all(torch.equal(before[name], value) for name, value in values.items())


def test_compiled_form_does_not_copy_the_cache() -> None:
    values = drawn(2, 20_000, batch=1, heads=1, kv_heads=1, dim=16, value_dim=16, dtype=torch.float32)
    for name in ("k_cache", "v_cache"):
        values[name] = values[name].expand(50, -1, -1, -1)  # 50 rows share the memory of one
    for name in ("q", "k", "v"):
        values[name] = values[name].expand(50, -1, -1, -1).contiguous()
    values["tree_mask"] = values["tree_mask"][0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out, _ = tree_masked_attention(**values)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 10 * out.numel() * 4
    assert torch.equal(out[0], out[-1])


@settings(max_examples=15)
@given(
    tree=st.integers(1, 40),
    context=st.integers(0, 130),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    length=st.floats(0, 1),
)
def test_any_shape(tree: int, context: int, groups: tuple[int, int], length: float) -> None:
    values = drawn(tree, context, heads=groups[0], kv_heads=groups[1])
    options = {"cache_lengths": torch.tensor([int(length * context), context])}
    with using("reference"):
        expected = tree_masked_attention(**values, **options)
    assert_close([*tree_masked_attention(**convert(values, torch.float32), **options)], [*expected], 2e-6)


def test_ancestors_by_walking_up() -> None:
    generator = torch.Generator().manual_seed(0)
    for tree in (1, 2, 3, 8, 9, 33):
        for parents in (
            torch.arange(tree) - 1,
            (torch.rand(2, tree, generator=generator) * (torch.arange(tree) + 1)).int() - 1,
        ):
            expected = torch.zeros(*parents.shape, tree, dtype=torch.bool)
            for place in torch.cartesian_prod(*(torch.arange(n) for n in parents.shape)).reshape(-1, parents.ndim):
                *row, token = place.tolist()
                above = token
                while above >= 0:
                    expected[(*row, token, above)] = True
                    above = int(parents[(*row, above)])
            assert torch.equal(ancestor_mask(parents), expected)
    assert ancestor_mask(torch.zeros(0, dtype=torch.int64)).shape == (0, 0)


@pytest.mark.parametrize(
    ("parents", "error", "message"),
    [
        (torch.tensor([-1.0]), TypeError, "^parents: expected int32 or int64, got torch.float32"),
        (torch.tensor(-1), ValueError, r"^parents: expected \[tree\] or \[batch, tree\], got \(\)"),
        (torch.tensor([-1, 1]), ValueError, r"^parents: expected -1 or the index of an earlier token, got \[-1, 1\]"),
        (torch.tensor([-2]), ValueError, "^parents: expected -1 or"),
    ],
)
def test_parents_are_checked(parents: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ancestor_mask(parents)


def test_op_is_registered_properly() -> None:
    values = drawn(3, 7, dtype=torch.float32)
    q, k, v, k_cache, v_cache = (values[x].requires_grad_() for x in FLOATS)
    arguments = (q, k, v, values["tree_mask"], k_cache, v_cache, torch.tensor([7, 4]), 0.7)
    torch.library.opcheck(torch.ops.mlreviews.tree_masked_attention, arguments)


def test_compiles_as_one_graph(unchecked: None) -> None:
    values = drawn(3, 7, dtype=torch.float32)
    compiled = torch.compile(tree_masked_attention, fullgraph=True, backend="aot_eager")
    options = {"cache_lengths": torch.tensor([7, 4])}
    assert_close(with_gradients(values, compiled, **options), with_gradients(values, **options), 1e-6)


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"dim": 129}, {"value_dim": 129}])
def test_what_triton_cannot_do_is_refused_when_asked_for(change: dict[str, Any]) -> None:
    values = drawn(3, 6, **{"dtype": torch.float32, **change})
    message = "float64" if values["q"].dtype == torch.float64 else "129 wide"
    with use_backend("triton"), pytest.raises(BackendError, match=f"tree_masked_attention: .*{message}"):
        tree_masked_attention(**values)
    # chosen by itself, on a GPU, PyTorch does it
    with using("triton"):
        found = with_gradients(values)
    with using("reference"):
        assert_close(found, with_gradients(convert(values, torch.float64)), 1e-5)


@pytest.mark.parametrize(("backend", "other"), [("reference", cpu), ("vectorised", reference)])
def test_backward_is_that_of_the_forward(backend: str, other: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tree_masked_attention", "tree_masked_attention_backward"):
        monkeypatch.setattr(other, name, None, raising=False)
    with using(backend):
        with_gradients(drawn(3, 6))


def test_triton_asked_for_by_name_refuses_the_backward() -> None:
    values = drawn(3, 6, dtype=torch.float32)
    leaves = {**values, "q": values["q"].clone().requires_grad_()}
    with use_backend("triton"):
        found = tree_masked_attention(**leaves)
    with using("reference"):
        assert_close([*found], [*tree_masked_attention(**values)], 5e-6)
    for x in found:
        with pytest.raises(BackendError, match=r"^tree_masked_attention: .* by name have no backward"):
            x.sum().backward(retain_graph=True)
    assert leaves["q"].grad is None


@pytest.mark.parametrize(
    ("context", "programs", "expected"), [(0, 8, (0, 0)), (19, 8, (32, 1)), (100, 8, (32, 4)), (100, 132, (64, 2))]
)
def test_stretches_fill_a_gpu(context: int, programs: int, expected: tuple[int, int]) -> None:
    assert gpu._stretches(context, programs, 16) == expected


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(2, 3, 20)}, ValueError, r"^q: expected \[batch, time, heads, dim\], got \(2, 3, 20\)"),
    ({"q": torch.zeros(2, 3, 4, 5).int()}, TypeError, "^q: expected float32"),
    ({"q": torch.zeros(2, 2, 4, 5)}, ValueError, r"^k: expected \[batch, tree, kv_heads, dim\] = \(2, 2, 2, 5\)"),
    ({"k": torch.zeros(2, 3, 3, 5)}, ValueError, "^k: expected a number of heads that divides the 4 heads"),
    ({"v": torch.zeros(2, 3, 1, 3)}, ValueError, r"^v: expected .* = \(2, 3, 2, 3\)"),
    ({"k_cache": torch.zeros(2, 7, 1, 5)}, ValueError, r"^v_cache: expected .* = \(2, 7, 1, 3\)"),
    (
        {"k_cache": torch.zeros(2, 7, 1, 5), "v_cache": torch.zeros(2, 7, 1, 3)},
        ValueError,
        r"^k_cache: expected \[batch, context, kv_heads, dim\] = \(2, 7, 2, 5\)",
    ),
    ({"k_cache": torch.zeros(2, 7, 2, 5).half()}, TypeError, "^k_cache: expected torch.float32"),
    (
        {"v_cache": torch.zeros(2, 7, 2, 4)},
        ValueError,
        r"^v_cache: expected \[batch, context, kv_heads, value_dim\] = ",
    ),
    ({"v_cache": torch.zeros(2, 6, 2, 3)}, ValueError, "^v_cache: expected"),
    ({"tree_mask": torch.zeros(3, 3)}, TypeError, "^tree_mask: expected booleans"),
    ({"tree_mask": torch.zeros(3, 4).bool()}, ValueError, r"^tree_mask: expected \[tree, tree\] = \(3, 3\) or"),
    ({"tree_mask": torch.zeros(3, 3, device="meta").bool()}, ValueError, "^tree_mask: expected a tensor on cpu"),
    ({"cache_lengths": torch.tensor([1.0, 2.0])}, TypeError, "^cache_lengths: expected int32 or int64"),
    ({"cache_lengths": torch.tensor([1])}, ValueError, r"^cache_lengths: expected \[batch\] = \(2,\)"),
    ({"cache_lengths": torch.tensor([1, 8])}, ValueError, "^cache_lengths: expected numbers from 0 to the context 7"),
    ({"cache_lengths": torch.tensor([-1, 7])}, ValueError, "^cache_lengths: expected numbers from 0"),
    ({"cache_lengths": torch.zeros(2, device="meta").int()}, ValueError, "^cache_lengths: expected a tensor on cpu"),
    ({"scale": "2"}, TypeError, "^scale: expected a number or None, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tree_masked_attention(**{**drawn(3, 7, dtype=torch.float32), **change})
