from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels import BackendError, softmaxes
from mlreviews_kernels.attention import attention
from mlreviews_kernels.backends import Choice
from mlreviews_kernels.differential_attention import differential_attention
from tests.kernels.test_attention import (
    CHECKS,
    LENGTHS,
    assert_close,
    dtype_of,
    every_backend,
    few,
    hostile_memory,
    smallest,
    using,
    with_gradients,
)

__all__ = ["hostile_memory"]  # a fixture of all tests here

run = partial(with_gradients, function=differential_attention)


def drawn(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 5,
    value_dim: int = 7,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q1, k1, q2, k2, v and lambda."""
    generator = torch.Generator().manual_seed(queries + keys + dim)
    q, k = (batch, queries, heads, dim), (batch, keys, kv_heads, dim)
    shapes = (q, k, q, k, (batch, keys, kv_heads, value_dim), (heads,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@every_backend
@pytest.mark.parametrize(("queries", "keys", "causal"), [(6, 6, False), (3, 7, True), (7, 3, True)])
def test_one_weight_at_a_time(
    backend: str, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmaxes, "ROWS", 2)
    monkeypatch.setattr(softmaxes, "FEW", 0)
    q1, k1, q2, k2, v, lam = drawn(queries, keys, **few(backend))
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) > 0.4
    heads = q1.shape[2]
    expected = torch.zeros(2, queries, heads, 7, dtype=torch.float64)
    for b in range(2):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(keys) if mask[b, j] and (j <= i + keys - queries or not causal)]
                for weight, q, k in ((1.0, q1, k1), (-float(lam[h]), q2, k2)):
                    terms = {j: math.exp(0.7 * float(q[b, i, h] @ k[b, j, h // 2])) for j in seen}
                    for j, term in terms.items():
                        expected[b, i, h] += weight * term / sum(terms.values()) * v[b, j, h // 2]
    dtype = dtype_of(backend)
    with using(backend):
        inputs = [x.to(dtype) for x in (q1, k1, q2, k2, v, lam)]
        found = differential_attention(*inputs, causal=causal, scale=0.7, mask=mask)
    assert_close([found], [expected], 2e-6 if dtype == torch.float32 else 1e-12)


@every_backend
def test_is_the_difference_of_two_attentions(backend: str) -> None:
    queries, keys = LENGTHS[backend]
    inputs = drawn(queries, keys + 10, batch=1, **few(backend))

    def difference(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        outs = [
            scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                attn_mask=torch.ones(queries, keys + 10, dtype=torch.bool).tril(10),
                enable_gqa=True,
            )
            for q, k in ((q1, k1), (q2, k2))
        ]
        return (outs[0] - lam[:, None, None] * outs[1]).transpose(1, 2)

    dtype = dtype_of(backend)
    with using(backend):
        found = run([x.to(dtype) for x in inputs])
    assert_close(found, with_gradients(inputs, difference), 5e-6 if dtype == torch.float32 else 1e-12)


@every_backend
def test_reduces_to_attention_with_lambda_0(backend: str) -> None:
    inputs = drawn(9, 11, **smallest(backend), dtype=torch.float32)
    with using(backend):
        out, *grads = run(inputs[:5], function=partial(_with_lambda, lam=0.0))
        found, *expected = with_gradients([inputs[0], inputs[1], inputs[4]], lambda *x: attention(*x)[0])
    torch.testing.assert_close(out, found, rtol=0, atol=1e-6)
    assert_close([grads[0], grads[1], grads[4]], expected, 2e-6)
    assert (grads[2] == 0).all()
    assert (grads[3] == 0).all()


def _with_lambda(*inputs: Tensor, lam: float | Tensor) -> Tensor:
    return differential_attention(*inputs, lam)


@every_backend
def test_equal_softmaxes_with_lambda_1_cancel(backend: str) -> None:
    q, k, _, _, v, _ = drawn(*LENGTHS[backend], batch=1, **few(backend), dtype=torch.float32)
    with using(backend):
        assert differential_attention(q, k, q, k, v, 1.0).abs().max() < 1e-6


SIZES = [
    # queries, keys, heads, kv_heads, dim, value_dim: around blocks of 48 queries and 96 keys
    (49, 49, 2, 1, 16, 32),
    (97, 193, 3, 3, 5, 33),
    (145, 97, 4, 2, 17, 8),
    (3, 40, 4, 1, 6, 2),
    (0, 5, 2, 1, 3, 2),
    (5, 0, 2, 1, 3, 2),
]
OPTIONS = [(True, ""), (True, "keys"), (False, "pairs")]
TILES = [
    # around tiles of 16, causal or not, mask; wider heads have other tiles
    ((17, 20, 2, 1, 5, 66), True, "keys"),
    ((20, 17, 1, 1, 33, 3), False, "pairs"),
    ((0, 3, 2, 1, 3, 2), True, ""),
    ((3, 0, 2, 1, 3, 2), True, ""),
]


@pytest.mark.parametrize(
    ("backend", "sizes", "causal", "masked"),
    [(backend, one, *more) for backend in ("cpu", "vectorised") for one in SIZES for more in OPTIONS]
    + [("triton", *one) for one in TILES],
)
def test_values_and_gradients_equal_the_reference(
    backend: str, sizes: tuple[int, ...], causal: bool, masked: str
) -> None:
    queries, keys, heads, kv_heads, dim, value_dim = sizes
    batch = 1 if backend == "triton" else 2
    inputs = drawn(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    shape = {"keys": (batch, keys), "pairs": (batch, queries, keys)}.get(masked)
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    options = {"causal": causal, "mask": mask, "scale": 0.4}
    with using("reference"):
        expected = run(inputs, **options)
    dtype = dtype_of(backend)
    with using(backend):
        found = run([x.to(dtype) for x in inputs], **options)
    assert_close(found, expected, 5e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim"), [(torch.float64, 4, 8), (torch.float32, 129, 4), (torch.float32, 4, 257)]
)
def test_triton_refuses_what_it_cannot_do(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    with using("triton"), pytest.raises(BackendError, match=r"^differential_attention: the Triton kernels asked for"):
        differential_attention(*drawn(3, 3, dim=dim, value_dim=value_dim, dtype=dtype))


@settings(max_examples=10)
@given(queries=st.integers(1, 60), keys=st.integers(1, 110), causal=st.booleans())
def test_any_shape(queries: int, keys: int, causal: bool) -> None:
    inputs = drawn(queries, keys, batch=1)
    with using("reference"):
        expected = run(inputs, causal=causal)
    assert_close(run([x.float() for x in inputs], causal=causal), expected, 5e-6)


def test_threads_share_the_queries_of_a_head() -> None:
    inputs = drawn(150, 150, batch=1, heads=2, kv_heads=1)
    with using("reference"):
        expected = run(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found, again = (run([x.float() for x in inputs]) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert_close(found, expected, 5e-6)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@every_backend
@pytest.mark.parametrize("shape", [(), (1,), None])
def test_lambda_for_all_heads_or_for_each(backend: str, shape: tuple[int, ...] | None) -> None:
    *inputs, each = drawn(7, 9, **smallest(backend), dtype=torch.float32)
    lam = each if shape is None else torch.full(shape, 0.3)
    with using(backend):
        found = run([*inputs, lam])
        if shape == ():
            assert torch.equal(found[0], differential_attention(*inputs, 0.3))
    with using("reference"):
        expected = run([x.double() for x in (*inputs, lam.expand(len(each)))])
    grad = expected[-1] if shape is None else expected[-1].sum().reshape(shape)
    assert_close(found, [*expected[:-1], grad], 5e-6)


def test_reference_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in drawn(3, 4, batch=1, heads=2, kv_heads=1)]
    mask = torch.tensor([[False, False, True, True]])  # the first query sees nothing
    with using("reference"):
        assert torch.autograd.gradcheck(partial(differential_attention, mask=mask), inputs)


@every_backend
def test_a_row_that_sees_nothing_is_zero_without_nan(backend: str) -> None:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False
    with using(backend):
        out, *grads = run(drawn(6, 9, **few(backend), dtype=torch.float32), mask=mask)
    assert (out[0] == 0).all()
    assert (out[1, 0] == 0).all()
    assert (out[1, 2:] != 0).all()
    for grad in grads:
        assert torch.isfinite(grad).all()
    for grad in grads[:5]:
        assert (grad[0] == 0).all()


@every_backend
def test_extreme_scores(backend: str) -> None:
    inputs = drawn(*LENGTHS[backend], batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    inputs[0] *= 300
    inputs[2] *= -200
    with using(backend):
        found = run(inputs)
    with using("reference"):
        expected = run([x.double() for x in inputs])
    assert_close(found[:1], expected[:1], 1e-4)
    assert all(torch.isfinite(x).all() for x in found)


@every_backend
def test_steps_equal_the_whole(backend: str) -> None:
    q1, k1, q2, k2, v, lam = drawn(9, 9, batch=1, **few(backend), dtype=torch.float32)
    with using(backend):
        out = differential_attention(q1, k1, q2, k2, v, lam)
        for t in (0, 8) if backend == "triton" else range(9):
            now, past = slice(t, t + 1), slice(0, t + 1)
            one = differential_attention(q1[:, now], k1[:, past], q2[:, now], k2[:, past], v[:, past], lam)
            torch.testing.assert_close(one, out[:, now], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "vectorised"])  # the interpreter can't multiply such matrices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_better_than_eager(backend: str, dtype: torch.dtype) -> None:
    inputs = drawn(70, 70, heads=2, dim=16, value_dim=32, dtype=dtype)
    inputs[5] = torch.tensor([0.5, 0.25], dtype=dtype)
    above = ~torch.ones(70, 70, dtype=torch.bool).tril()

    def eager(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        p1, p2 = (
            (torch.einsum("bihd,bjhd->bhij", q, k) / 4).masked_fill(above, -math.inf).softmax(-1)
            for q, k in ((q1, k1), (q2, k2))
        )
        return torch.einsum("bhij,bjhd->bihd", p1 - lam[:, None, None] * p2, v)

    with using("reference"):
        exact = run([x.double() for x in inputs])
    with using(backend):
        found = run(inputs)
    rounded = with_gradients(inputs, eager)
    for one, other, truth in zip(found[:-1], rounded[:-1], exact[:-1], strict=True):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() <= (other.double() - truth).norm()
    assert found[-1].dtype == dtype


def test_lambda_may_be_float32_beside_bfloat16() -> None:
    inputs = [*drawn(9, 9, dtype=torch.bfloat16)[:5], torch.rand(4)]
    found = run(inputs)
    assert [x.dtype for x in found] == [torch.bfloat16] * 6 + [torch.float32]


@every_backend
def test_memory_layout_does_not_matter(backend: str) -> None:
    inputs = drawn(9, 11, **smallest(backend), dtype=torch.float32)
    wide = [torch.stack([x, x], -1).transpose(0, -2).contiguous().transpose(0, -2)[..., 0] for x in inputs]
    cotangent = torch.randn(len(inputs[0]), 7, 9, inputs[0].shape[2]).transpose(1, 3).transpose(1, 2)
    found = []
    for values in (inputs, wide):
        leaves = [x.detach().requires_grad_() for x in values]
        with using(backend):
            out = differential_attention(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_op_is_registered_properly() -> None:
    *tensors, lam = drawn(5, 7, dtype=torch.float32)
    tokens = [x.flatten(0, 1).requires_grad_() for x in tensors]
    mask, offsets = torch.rand(14) > 0.3, torch.arange(3)
    op: Callable[..., Any] = torch.ops.mlreviews.differential_attention
    arguments = (*tokens, lam.requires_grad_(), mask, offsets * 5, offsets * 7, True, 0.3)
    torch.library.opcheck(op, arguments, test_utils=CHECKS)
    assert not op(*arguments)[1].requires_grad  # the log-sum-exps are for the backward alone


def test_compiles_as_one_graph(unchecked: None) -> None:
    inputs = drawn(9, 11, dtype=torch.float32)
    compiled = torch.compile(differential_attention, fullgraph=True, backend="aot_eager")
    assert_close(run(inputs, function=compiled), run(inputs), 1e-6)


@pytest.mark.parametrize(
    ("dim", "value_dim", "backend"), [(128, 256, "triton"), (129, 4, "cpu"), (4, 257, "cpu"), (4, 256, "triton")]
)
def test_values_may_be_twice_as_wide_in_triton(
    dim: int, value_dim: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("mlreviews_kernels.differential_attention")
    used = []

    def implementation(_: object, name: str) -> object:
        used.append(name)
        return importlib.import_module("mlreviews_kernels.differential_attention.cpu")

    monkeypatch.setattr(module, "implementation", implementation)
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    differential_attention(*drawn(1, 2, dim=dim, value_dim=value_dim, dtype=torch.float32))
    assert used == [backend]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q1": torch.zeros(2, 6, 20)}, ValueError, r"^q1: expected \[batch, time, heads, dim\]"),
        ({"k1": torch.zeros(2, 6, 3, 5)}, ValueError, "^k1: expected a number of heads that divides the 4 heads"),
        ({"q2": torch.zeros(2, 6, 2, 5)}, ValueError, r"^q2: expected q1's shape = \(2, 6, 4, 5\)"),
        ({"q2": torch.zeros(2, 6, 4, 5).double()}, TypeError, "^q2: expected torch.float32"),
        ({"k2": torch.zeros(2, 5, 2, 5)}, ValueError, r"^k2: expected k1's shape = \(2, 6, 2, 5\)"),
        ({"k2": torch.zeros(2, 6, 2, 5).double()}, TypeError, "^k2: expected torch.float32"),
        ({"v": torch.zeros(2, 6, 4, 7)}, ValueError, r"^v: expected .* = \(2, 6, 2, 7\)"),
        ({"lam": torch.zeros(3)}, ValueError, r"^lam: expected one element or \[heads\] = \(4,\), got \(3,\)"),
        ({"lam": torch.zeros(4).double()}, TypeError, "^lam: expected torch.float32 or torch.float32"),
        ({"lam": torch.zeros(4, device="meta")}, ValueError, "^lam: expected a tensor on cpu"),
        ({"lam": "0.5"}, TypeError, "^lam: expected a number or a tensor, got str"),
        ({"scale": "2"}, TypeError, "^scale: expected a number or None, got str"),
        ({"mask": torch.zeros(2, 6)}, TypeError, "^mask: expected booleans"),
        ({"mask": torch.zeros(2, 5).bool()}, ValueError, r"^mask: expected \[batch, k_time\] = \(2, 6\) or"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("q1", "k1", "q2", "k2", "v", "lam")
    values: dict[str, Any] = dict(zip(names, drawn(6, 6, dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        differential_attention(**{**values, **change})
