from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlreviews_kernels import softmaxes, use_backend
from mlreviews_kernels.adaptive_temperature_attention import (
    COEFFICIENTS,
    adaptive_temperature_attention,
    cpu,
    reference,
)
from mlreviews_kernels.attention import attention
from mlreviews_kernels.backends import BackendError, Choice
from mlreviews_kernels.compiled import without_compiled_code

FAST = ("compiled", "vectorised", "triton")
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
uninterpreted = pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])  # the interpreter is slow
gpu = importlib.import_module("mlreviews_kernels.adaptive_temperature_attention.gpu")


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN; few tokens are several blocks."""
    monkeypatch.setattr(cpu, "ROWS", 7)
    monkeypatch.setattr(cpu, "FEW", 0)
    monkeypatch.setattr(gpu, "SIDE", 32)  # 16 in float32
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def using(backend: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(use_backend({"compiled": "cpu", "vectorised": "cpu"}.get(backend, backend)))
    if backend == "vectorised":
        stack.enter_context(without_compiled_code())
    return stack


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
    """Scores with a standard deviation of 1.5: entropies on both sides of where sharpening begins."""
    generator = torch.Generator().manual_seed(queries + keys + dim)
    shapes = ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    q, k, v = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(1.5 * q).to(dtype), k.to(dtype), v.to(dtype)]


def masked(kind: str, queries: int, keys: int, batch: int = 2) -> Tensor | None:
    shape = {"keys": (batch, keys), "pairs": (batch, queries, keys)}.get(kind)
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(keys)) > 0.3


def with_gradients(inputs: list[Tensor], function: Callable[..., Any] | None = None, **options: Any) -> list[Tensor]:
    """Outputs and gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = (function or adaptive_temperature_attention)(*leaves, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert torch.isfinite(one).all(), i
        scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
        difference = (one.double() - other.double()).abs()
        assert (difference <= tolerance * scale).all(), f"{i}: {difference.max():.1e}"


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
    coefficients: tuple[float, ...] = COEFFICIENTS,
    entropy_threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The paper's listing with all scores at once, in numpy from the entropy to the temperature."""
    (batch, queries, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    out, entropy = q.new_zeros(batch, queries, heads, v.shape[3]), q.new_zeros(batch, heads, queries)
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            seen = torch.ones(queries, keys, dtype=torch.bool)
            seen = seen.tril(keys - queries) if causal else seen
            if mask is not None:
                seen = seen & mask[b]
            logits = q[b, :, h] @ k[b, :, kv].T * (dim**-0.5 if scale is None else scale)
            logits = logits.masked_fill(~seen, -math.inf)
            H = torch.special.entr(logits.softmax(-1).nan_to_num(0.0)).sum(-1)
            beta = np.polyval(coefficients, H.numpy())
            beta = torch.from_numpy(np.where(H.numpy() > entropy_threshold, np.maximum(beta, 1.0), 1.0))
            out[b, :, h] = (logits * beta[:, None]).softmax(-1).nan_to_num(0.0) @ v[b, :, kv]
            entropy[b, h] = H
    return out, entropy


@uninterpreted
@pytest.mark.parametrize(
    ("queries", "keys", "options", "kind"),
    [
        (18, 18, {}, ""),
        (5, 23, {}, "keys"),
        (20, 17, {"causal": False, "scale": 0.9}, "pairs"),
        (5, 11, {"coefficients": (0.5, 1.2), "entropy_threshold": 1.0}, "pairs"),
    ],
)
def test_equals_the_listing(backend: str, queries: int, keys: int, options: dict[str, Any], kind: str) -> None:
    inputs, mask = drawn(queries, keys, heads=2, kv_heads=1), masked(kind, queries, keys)
    expected = dense(*inputs, mask=mask, **options)
    dtype = torch.float64 if backend in ("reference", "vectorised") else torch.float32
    with using(backend):
        found = adaptive_temperature_attention(*(x.to(dtype) for x in inputs), mask=mask, **options)
    assert found[1].dtype == dtype
    assert_close([*found], [*expected], 1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize(("coefficients", "threshold"), [((2.0,), 0.5), ((1.0, 0.5), 0.0)])
def test_at_the_threshold_and_at_a_factor_of_one_nothing_changes(
    coefficients: tuple[float, ...], threshold: float
) -> None:
    beta, slope = reference.inverse_temperature(torch.tensor([0.5]), coefficients, threshold)
    assert (beta.item(), slope.item()) == (1.0, 0.0)


def test_the_examples_sharpen_and_leave_alone() -> None:
    entropy = dense(*drawn(18, 18))[1]
    beta, slope = reference.inverse_temperature(entropy, COEFFICIENTS, 0.5)
    assert 0.2 < (beta > 1).double().mean() < 0.9
    assert ((slope != 0) == (beta > 1)).all()
    assert (beta >= 1).all()


SIZES = [
    # queries, keys, heads, kv_heads, dim, value_dim, causal, mask
    (17, 33, 2, 1, 6, 5, True, ""),
    (23, 9, 1, 1, 4, 7, True, ""),
    (18, 17, 2, 2, 40, 9, False, "pairs"),
    (1, 17, 2, 1, 3, 70, True, "keys"),
    (9, 8, 3, 1, 2, 3, False, "keys"),
    (9, 17, 2, 1, 4, 3, True, "pairs"),
    (0, 5, 2, 1, 3, 2, True, ""),
    (5, 0, 2, 1, 3, 2, False, ""),
]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_equal_the_reference(backend: str, sizes: tuple[Any, ...]) -> None:
    queries, keys, heads, kv_heads, dim, value_dim, causal, kind = sizes
    batch = 1 if queries > 9 else 2
    inputs = drawn(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    options = {"causal": causal, "mask": masked(kind, queries, keys, batch), "scale": 0.5}
    with using("reference"):
        expected = with_gradients(inputs, **options)
    dtype = torch.float64 if backend == "vectorised" else torch.float32
    with using(backend):
        found = with_gradients([x.to(dtype) for x in inputs], **options)
    assert_close(found, expected, 1e-11 if backend == "vectorised" else 1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(49, 97), (96, 96), (145, 193)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_blocks_and_threads(queries: int, keys: int, causal: bool, threads: int) -> None:
    inputs = drawn(queries, keys, batch=1, heads=2, kv_heads=1, dim=17, value_dim=33)
    with using("reference"):
        expected = with_gradients(inputs, causal=causal)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = (with_gradients([x.float() for x in inputs], causal=causal) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert_close(found, expected, 2e-5)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("few", [2, 3])
def test_few_queries_are_not_worth_copies_of_all_keys(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    called = []
    original = cpu.load
    monkeypatch.setattr(cpu, "load", lambda source: called.append(1) or original(source))
    assert_close([*adaptive_temperature_attention(*drawn(3, 9, dtype=torch.float32))], [*dense(*drawn(3, 9))], 5e-6)
    assert bool(called) == (few == 2)


def test_reference_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in drawn(4, 6, batch=1, heads=2, kv_heads=1, dim=3)]
    mask = torch.tensor([[False, False, False, True, True, True]])  # the first query sees nothing

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return adaptive_temperature_attention(*inputs, mask=mask, coefficients=(0.3, 1.1), entropy_threshold=0.2)

    with using("reference"):
        entropy = run(*inputs)[1]
        assert (entropy > 0.2).any()  # they are sharpened
        assert torch.autograd.gradcheck(run, inputs)


@uninterpreted
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"coefficients": (1.0,)}, 1.0),
        ({"coefficients": (0.3,)}, 1.0),  # never softened
        ({"entropy_threshold": math.inf}, 1.0),
        ({"coefficients": (0.0, 2.5), "entropy_threshold": -1.0}, 2.5),
    ],
)
def test_reduces_to_attention_where_beta_is_constant(backend: str, options: dict[str, Any], factor: float) -> None:
    inputs = drawn(9, 11, batch=1, dtype=torch.float32)
    with using("reference"):
        expected = with_gradients([x.double() for x in inputs], lambda *x: attention(*x, scale=factor * 0.4)[0])
    with using(backend):
        found = with_gradients(inputs, lambda *x: adaptive_temperature_attention(*x, scale=0.4, **options)[0])
    assert_close(found, expected, 5e-6)


@uninterpreted
def test_weights_are_sharpened_in_place(backend: str) -> None:
    """Entropies fall, the order of the weights stays, and rows of low entropy are left alone."""
    q, k, _ = drawn(18, 18, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    values = torch.eye(18)[None, :, None]  # the results are the weights
    with using(backend):
        sharp, entropy = adaptive_temperature_attention(q, k, values)
        plain, _ = adaptive_temperature_attention(q, k, values, coefficients=(1.0,))
    found, before = (torch.special.entr(x.transpose(1, 2)).sum(-1) for x in (sharp, plain))
    torch.testing.assert_close(before, entropy, rtol=0, atol=2e-6)
    assert (found <= before + 1e-6).all()
    assert (found[entropy > 1.0] < before[entropy > 1.0] - 0.05).all()
    assert torch.equal(sharp.argmax(-1), plain.argmax(-1))
    same = (entropy <= 0.5).transpose(1, 2)
    assert 2 < same.sum() < same.numel()
    torch.testing.assert_close(sharp[same], plain[same], rtol=0, atol=1e-6)


@uninterpreted
def test_entropy_of_equal_scores_is_the_logarithm_of_their_number(backend: str) -> None:
    q, k, v = drawn(20, 20, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    with using(backend):
        out, entropy = adaptive_temperature_attention(torch.zeros_like(q), k, v)
    expected = torch.arange(1.0, 21.0).log().expand(1, 2, 20)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, -1], v.mean(1).repeat_interleave(2, 1), rtol=0, atol=1e-6)


@every_backend
def test_what_sees_nothing_is_zero_without_nan(backend: str) -> None:
    inputs = drawn(6, 9, heads=2, kv_heads=1, dtype=torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False
    with using(backend):
        out, entropy, *grads = with_gradients(inputs, mask=mask)
        lse = torch.ops.mlreviews.adaptive_temperature_attention(*inputs, mask, True, 1.0, [2.0], 0.5)[2:4]
    assert (out[0] == 0).all()
    assert (entropy[0] == 0).all()
    assert (out[1, :2] == 0).all()
    assert (out[1, 2:] != 0).all()
    for x in lse:
        assert torch.isneginf(x[0]).all()
        assert torch.isneginf(x[1, :, :2]).all()
        assert torch.isfinite(x[1, :, 2:]).all()
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[0] == 0).all()


@every_backend
def test_extreme_scores_neither_overflow_nor_vanish(backend: str) -> None:
    q, k, v = drawn(17, 17, batch=1, heads=1, kv_heads=1, dtype=torch.float32)
    with using(backend):
        found = with_gradients([300 * q, k, v], coefficients=(3.0,), entropy_threshold=-1.0)
    with using("reference"):
        doubles = [300 * q.double(), k.double(), v.double()]
        expected = with_gradients(doubles, coefficients=(3.0,), entropy_threshold=-1.0)
    assert_close(found[:2], expected[:2], 1e-3)
    assert all(torch.isfinite(x).all() for x in found)


@every_backend
def test_scores_of_several_blocks_may_rise_or_fall(backend: str) -> None:
    """The running entropy is right wherever the largest scores are."""
    q = torch.ones(1, 1, 1, 1)
    for direction in (1.0, -1.0):
        k = (direction * torch.linspace(-30.0, 60.0, 50)).reshape(1, 50, 1, 1)
        with using(backend):
            _, entropy = adaptive_temperature_attention(q, k, k, scale=0.1)
        expected = torch.special.entr((0.1 * k.double().flatten()).softmax(0)).sum()
        assert entropy.item() == pytest.approx(expected.item(), abs=2e-6)


@uninterpreted
def test_causality_steps_and_padding(backend: str) -> None:
    q, k, v = drawn(20, 20, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    with using(backend):
        out, entropy = adaptive_temperature_attention(q, k, v)
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, 13:] += 1.0
        other, other_entropy = adaptive_temperature_attention(*later)
        step, step_entropy = adaptive_temperature_attention(q[:, 12:13], k[:, :13], v[:, :13])
        padded = [torch.cat([x[:, :4] + 9.0, x, x[:, :3] - 9.0], 1) for x in (q, k, v)]
        mask = torch.zeros(1, 27, dtype=torch.bool)
        mask[:, 4:24] = True
        wide, wide_entropy = adaptive_temperature_attention(*padded, mask=mask)
    assert torch.equal(out[:, :13], other[:, :13])
    assert torch.equal(entropy[..., :13], other_entropy[..., :13])
    assert not torch.equal(out[:, 13], other[:, 13])
    assert_close([step, step_entropy], [out[:, 12:13], entropy[..., 12:13]], 1e-6)
    assert_close([wide[:, 4:24], wide_entropy[..., 4:24]], [out, entropy], 1e-6)


@uninterpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_better_than_eager(backend: str, dtype: torch.dtype) -> None:
    # Triton's interpreter can't multiply half-precision matrices
    inputs = drawn(40, 40, heads=2, kv_heads=2, dim=16, value_dim=16, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
        scores = scores.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -math.inf)
        p = scores.softmax(-1)
        H = -(p * (p + 1e-7).log()).sum(-1, keepdim=True)
        beta = torch.zeros_like(H)
        for c in COEFFICIENTS:
            beta = beta * H + c
        beta = torch.where(H > 0.5, beta.clamp(min=1.0), 1.0)
        return torch.einsum("bhij,bjhd->bihd", (beta * scores.masked_fill(torch.isinf(scores), -1e4)).softmax(-1), v)

    with using("reference"):
        exact = with_gradients([x.double() for x in inputs], lambda *x: adaptive_temperature_attention(*x)[0])
    with using(backend):
        found = with_gradients(inputs, lambda *x: adaptive_temperature_attention(*x)[0])
        assert adaptive_temperature_attention(*inputs)[1].dtype == torch.float32
    rounded = with_gradients(inputs, eager)
    for one, other, truth in zip(found, rounded, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() <= (other.double() - truth).norm()


@every_backend
def test_layout_and_single_gradients_and_repetition(backend: str) -> None:
    inputs = drawn(9, 8, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    before = [x.clone() for x in inputs]
    wide = [torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0] for x in inputs]
    cotangent = torch.randn(1, 3, 9, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 3).transpose(1, 2)
    found = []
    with using(backend):
        for values in (inputs, inputs, wide):
            leaves = [x.detach().requires_grad_() for x in values]
            out, entropy = adaptive_temperature_attention(*leaves)
            grads = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
            more = torch.autograd.grad(entropy.sum(), leaves)  # a gradient of stride 0
            found.append([out.detach(), *grads, *more])
    assert all(torch.equal(*pair) for pair in zip(*found[:2], strict=True))
    assert_close(found[2], found[0], 1e-6)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    assert (found[0][-1] == 0).all()  # values have no part in the entropy
    with using("reference"):
        doubles = [x.double().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(adaptive_temperature_attention(*doubles)[1].sum(), doubles)
    assert_close(found[0][4:], [*exact], 5e-6)


@settings(max_examples=12)
@given(
    queries=st.integers(1, 55),
    keys=st.integers(1, 100),
    causal=st.booleans(),
    strength=st.sampled_from([0.01, 0.3, 1.0, 4.0]),
)
def test_any_shape_and_any_sharpness(queries: int, keys: int, causal: bool, strength: float) -> None:
    inputs = drawn(queries, keys, batch=1)
    with using("reference"):
        expected = with_gradients(inputs, causal=causal, scale=strength)
    found = with_gradients([x.float() for x in inputs], causal=causal, scale=strength)
    assert_close(found, expected, 3e-5)


def test_op_is_registered_properly() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(6, 7, dtype=torch.float32))
    arguments = (q, k, v, masked("keys", 6, 7), True, 0.7, list(COEFFICIENTS), 0.5)
    torch.library.opcheck(torch.ops.mlreviews.adaptive_temperature_attention, arguments)


def test_compiles_as_one_graph(unchecked: None) -> None:
    inputs = drawn(9, 11, dtype=torch.float32)
    compiled = torch.compile(adaptive_temperature_attention, fullgraph=True, backend="aot_eager")
    assert_close(with_gradients(inputs, compiled), with_gradients(inputs), 1e-6)


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"dim": 129}, {"value_dim": 129}])
def test_what_triton_cannot_do_is_refused_when_asked_for(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = drawn(5, 6, **{"dtype": torch.float32, **change})
    message = "float64" if inputs[0].dtype == torch.float64 else "129 wide"
    with using("triton"), pytest.raises(BackendError, match=f"adaptive_temperature_attention: .*{message}"):
        adaptive_temperature_attention(*inputs)
    # chosen by itself, on a GPU, PyTorch does it
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    with using("triton"):
        found = with_gradients(inputs)
    with using("reference"):
        assert_close(found, with_gradients([x.double() for x in inputs]), 1e-5)


def test_wide_heads_up_to_the_limit_have_kernels() -> None:
    inputs = drawn(3, 4, batch=1, heads=2, dim=128, value_dim=65, dtype=torch.float32)
    with using("triton"):
        found = with_gradients(inputs)
    with using("reference"):
        assert_close(found, with_gradients([x.double() for x in inputs]), 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 6, 20)}, ValueError, r"^q: expected \[batch, time, heads, dim\], got \(2, 6, 20\)"),
        ({"q": torch.zeros(2, 6, 4, 5).int()}, TypeError, "^q: expected float32"),
        ({"k": torch.zeros(2, 6, 3, 5)}, ValueError, "^k: expected a number of heads that divides the 4 heads"),
        ({"k": torch.zeros(2, 6, 2, 5).double()}, TypeError, "^k: expected torch.float32"),
        ({"v": torch.zeros(2, 5, 2, 3)}, ValueError, r"^v: expected .* = \(2, 6, 2, 3\)"),
        ({"scale": "2"}, TypeError, "^scale: expected a number or None, got str"),
        ({"mask": torch.zeros(2, 6)}, TypeError, "^mask: expected booleans"),
        ({"mask": torch.zeros(2, 5).bool()}, ValueError, r"^mask: expected \[batch, k_time\] = \(2, 6\) or"),
        ({"coefficients": ()}, ValueError, r"^coefficients: expected at least one finite number, got \[\]"),
        ({"coefficients": (1.0, math.nan)}, ValueError, "^coefficients: expected at least one finite number"),
        ({"entropy_threshold": math.nan}, ValueError, "^entropy_threshold: expected a number, got nan"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = dict(zip("qkv", drawn(6, 6, dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        adaptive_temperature_attention(**{**values, **change})
