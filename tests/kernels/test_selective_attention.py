from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mlreviews_kernels import BackendError, softmaxes, use_backend
from mlreviews_kernels.backends import Choice
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.selective_attention import cpu, selective_attention, selective_attention_with_memory

Inputs = dict[str, Tensor]
FAST = ("compiled", "vectorised", "triton")
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
uninterpreted = pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])  # the interpreter is slow


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN; few keys are several tiles."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cpu, "BLOCK", 7)
    monkeypatch.setattr(cpu, "FEW", 0)
    gpu = importlib.import_module("mlreviews_kernels.selective_attention.gpu")
    monkeypatch.setattr(gpu, "SIDE", 64)
    monkeypatch.setattr(gpu, "SPAN", 32)  # a float32 tile is 32 wide, its steps 16
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def using(backend: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(use_backend({"compiled": "cpu", "vectorised": "cpu"}.get(backend, backend)))
    if backend == "vectorised":
        stack.enter_context(without_compiled_code())
    return stack


def few(backend: str) -> dict[str, int]:
    """Few heads for the interpreter, which is slow."""
    return {"batch": 1, "heads": 2, "kv_heads": 1} if backend == "triton" else {}


def drawn(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 3,
    v_dim: int = 5,
    seed: int = 0,
) -> Inputs:
    """Inputs in float64 with all axes different."""
    generator = torch.Generator().manual_seed(1000 * seed + keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": draw(batch, queries, heads, dim),
        "k": draw(batch, keys, kv_heads, dim),
        "v": draw(batch, keys, kv_heads, v_dim),
        "initial_selection": draw(batch, keys - queries).abs(),
    }


def padding(batch: int, keys: int) -> Tensor:
    """A mask with padding on the left, in the middle and on the right."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(keys)) > 0.2
    mask[0, : keys // 3] = False
    mask[-1, keys - keys // 4 :] = False
    return mask


def convert(values: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) for name, value in values.items()}


def with_gradients(backend: str, values: Inputs, **options: Any) -> Inputs:
    """All outputs, and the gradients of all inputs for random ones of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    with using(backend):
        found = selective_attention_with_memory(**leaves, **options)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found]
        torch.autograd.backward(found, weights)
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items() if leaf.numel()}
    outputs = dict(zip(("out", "selection", "memory"), (x.detach() for x in found), strict=True))
    return {**outputs, **grads}  # type: ignore[dict-item]


def assert_close(found: Inputs, expected: Inputs, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.isfinite(found[name]).all(), name
        scale = max(value.abs().max().item(), 1e-2) if value.numel() else 1.0
        error = (found[name].double() - value.double()).abs()
        assert (error <= tolerance * scale).all(), f"{name}: off by {error.max():.2e}, scale {scale:.2e}"


def one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_selection: Tensor,
    mask: Tensor,
    selector: int,
    scale: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the paper says, number by number: decoding with the running sums of F."""
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    out = torch.zeros(batch, queries, heads, v.shape[3], dtype=q.dtype)
    memory = torch.zeros(batch, queries, dtype=q.dtype)
    selection = torch.zeros(batch, keys, dtype=q.dtype)
    selection[:, : keys - queries] = initial_selection
    for b in range(batch):
        tokens = [j for j in range(keys) if mask[b, j]]
        for i in range(queries):
            present = keys - queries + i
            seen = [j for j in tokens if j <= present]
            logits = {}
            for h in range(heads):
                keys_of_head, values_of_head = k[b, :, h * kv_heads // heads], v[b, :, h * kv_heads // heads]
                for j in seen:
                    logits[h, j] = scale * sum(float(x * y) for x, y in zip(q[b, i, h], keys_of_head[j], strict=True))
                weights = {j: math.exp(logits[h, j] - float(selection[b, j])) for j in seen}
                for j in seen:
                    out[b, i, h] += weights[j] / sum(weights.values()) * values_of_head[j]
            memory[b, i] = sum(1 - min(float(selection[b, j]), tau) / tau for j in seen)
            if present in tokens:
                for j in seen:
                    if j not in (present, tokens[0]):
                        selection[b, j] += max(logits[selector, j], 0.0)
    return out, selection, memory


OPTIONS: list[dict[str, Any]] = [{"selector": 1, "scale": 0.7, "tau": 1.3}, {"selector": 0}, {"scale": -0.5}]


@pytest.mark.parametrize(
    ("backend", "options"),
    [(backend, options) for backend in ("reference", "compiled", "vectorised") for options in OPTIONS]
    + [("triton", OPTIONS[0])],
)
def test_equals_decoding_number_by_number(backend: str, options: dict[str, Any]) -> None:
    dtype = torch.float64 if backend in ("reference", "vectorised") else torch.float32
    values = drawn(11, 18, **few(backend))
    mask = padding(len(values["q"]), 18)
    with using(backend):
        found = selective_attention_with_memory(**convert(values, dtype), mask=mask, **options)
    given = {"selector": 0, "scale": 3**-0.5, "tau": 1.0, **options}
    expected = one_by_one(**values, mask=mask, **given)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-12 if dtype == torch.float64 else 5e-6)


SIZES: list[dict[str, Any]] = [
    {"queries": 1, "keys": 1},
    {"queries": 1, "keys": 20},
    {"queries": 17, "keys": 40, "dim": 16, "v_dim": 33, "heads": 2, "kv_heads": 1, "batch": 1},
    {"queries": 20, "keys": 37, "dim": 65, "v_dim": 6, "heads": 2, "kv_heads": 1, "batch": 1},
    {"queries": 3, "keys": 5, "dim": 5, "v_dim": 128},
    {"queries": 33, "keys": 33, "heads": 3, "kv_heads": 1, "batch": 1},
    {"queries": 15, "keys": 47, "heads": 3, "kv_heads": 3, "batch": 3},
]


@pytest.mark.parametrize(
    ("backend", "sizes", "padded"),
    [(backend, sizes, padded) for backend in FAST[:2] for sizes in SIZES for padded in (False, True)]
    + [("triton", SIZES[1] | few("triton"), True), ("triton", SIZES[2], True), ("triton", SIZES[3], False)],
)
def test_values_and_gradients_equal_the_reference(backend: str, sizes: dict[str, Any], padded: bool) -> None:
    values = drawn(**sizes)
    mask = padding(values["k"].shape[0], sizes["keys"]) if padded else None
    options: dict[str, Any] = {"mask": mask, "selector": values["q"].shape[2] - 2, "tau": 1.7}
    expected = with_gradients("reference", values, **options)
    assert_close(with_gradients(backend, convert(values, torch.float32), **options), expected, 3e-6)


@pytest.mark.parametrize(("queries", "keys"), [(63, 64), (64, 64), (65, 65), (100, 161), (128, 128), (70, 192)])
def test_compiled_tiles_of_any_length(queries: int, keys: int) -> None:
    values = drawn(queries, keys, dim=7, v_dim=6)
    expected = with_gradients("reference", values, mask=padding(2, keys), selector=1)
    found = with_gradients("compiled", convert(values, torch.float32), mask=padding(2, keys), selector=1)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_spans_and_workers(threads: int) -> None:
    # more query blocks than a span has, several workers a sequence, heads of one sequence in several tasks
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = drawn(1100, 1130, batch=1, heads=2, kv_heads=1, dim=4, v_dim=3)
        values["q"] /= 8  # F stays moderate
        expected = with_gradients("reference", values, selector=1)
        first, second = (with_gradients("compiled", convert(values, torch.float32), selector=1) for _ in range(2))
        assert_close(first, expected, 1e-4)
        for name in first:
            assert torch.equal(first[name], second[name]), name
    finally:
        torch.set_num_threads(before)


def test_vectorised_form_computes_in_float64() -> None:
    values = drawn(25, 31)
    expected = with_gradients("reference", values, mask=padding(2, 31), selector=3)
    assert_close(with_gradients("vectorised", values, mask=padding(2, 31), selector=3), expected, 1e-12)


@pytest.mark.parametrize("few", [2, 3])
def test_few_queries_are_not_laid_out_anew(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    called = []
    original = cpu.load
    monkeypatch.setattr(cpu, "load", lambda source: called.append(1) or original(source))
    expected = with_gradients("reference", drawn(3, 9))
    assert_close(with_gradients("compiled", convert(drawn(3, 9), torch.float32)), expected, 3e-6)
    assert bool(called) == (few == 2)


def test_reference_gradcheck() -> None:
    values, mask = drawn(3, 6, batch=1, heads=2, kv_heads=1, dim=2, v_dim=2), padding(1, 6)
    leaves = tuple(value.requires_grad_() for value in values.values())

    def run(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
        return selective_attention_with_memory(
            q, k, v, initial_selection=initial, mask=mask, selector=1, tau=0.8, scale=1.2
        )

    with using("reference"):
        assert torch.autograd.gradcheck(run, leaves)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bottom-right aligned, with torch's own attention."""
    queries, keys = q.shape[1], k.shape[1]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    add = torch.zeros(queries, keys, dtype=q.dtype).masked_fill(~visible, -math.inf)
    if bias is not None:
        add = add + bias[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=add, enable_gqa=True).transpose(1, 2)


def test_the_first_head_selects_unless_another_is_named() -> None:
    values = convert(drawn(5, 7), torch.float32)
    first, second = (selective_attention(**values, selector=selector)[1] for selector in (0, 1))
    assert torch.equal(selective_attention(**values)[1], first)
    assert torch.equal(selective_attention_with_memory(**values)[1], first)
    assert not torch.equal(first, second)


def without_selection(queries: int, keys: int) -> Inputs:
    """The selector's logits (head 1 of 4) are all negative."""
    values = convert(drawn(queries, keys), torch.float32)
    values["q"][:, :, 1] = values["q"][:, :, 1].abs()
    values["k"][:, :, 0] = -values["k"][:, :, 0].abs()
    return values


@uninterpreted
def test_reduces_to_causal_attention_where_nothing_is_selected(backend: str) -> None:
    values = without_selection(13, 20)
    with using(backend):
        given = {**values, "initial_selection": torch.zeros(2, 7)}
        out, selection, memory = selective_attention_with_memory(**given, selector=1)
    torch.testing.assert_close(out, causal_attention(values["q"], values["k"], values["v"]), rtol=1e-5, atol=1e-6)
    assert (selection == 0).all()
    assert torch.equal(memory, torch.arange(8.0, 21.0).expand(2, 13))  # i + 1: all tokens are remembered


@uninterpreted
def test_an_earlier_selection_is_subtracted_from_the_logits(backend: str) -> None:
    values = without_selection(13, 20)
    with using(backend):
        out, selection = selective_attention(**values, selector=1)
    earlier = torch.zeros(2, 20)
    earlier[:, :7] = values["initial_selection"]
    torch.testing.assert_close(selection, earlier, rtol=0, atol=0)
    expected = causal_attention(values["q"], values["k"], values["v"], -earlier[:, None].expand(2, 13, 20))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@uninterpreted
def test_selection_grows_and_spares_the_first_and_the_newest(backend: str) -> None:
    values = convert(drawn(19, 19), torch.float32)
    del values["initial_selection"]
    before = torch.zeros(2, 0)
    with using(backend):
        for length in range(1, 20):
            selection = selective_attention(**{name: x[:, :length] for name, x in values.items()})[1]
            assert (selection[:, :-1] >= before - 1e-5).all()
            assert (selection[:, 0] == 0).all()
            assert (selection[:, -1] == 0).all()  # F_ij = 0 for i = j + 1, too: only tokens between them select
            before = selection
    assert (before[:, 1:-1] > 0).float().mean() > 0.5


@every_backend
def test_nothing_depends_on_later_tokens(backend: str) -> None:
    values = convert(drawn(16, 23, **few(backend)), torch.float32)
    cut = 6  # of the queries; 13 of the keys
    changed = {name: value.clone() for name, value in values.items()}
    changed["q"][:, cut:] += 1
    changed["k"][:, 7 + cut :] -= 2
    changed["v"][:, 7 + cut :] *= 3
    with using(backend):
        out, _, memory = selective_attention_with_memory(**values)
        other, _, other_memory = selective_attention_with_memory(**changed)
    assert torch.equal(out[:, :cut], other[:, :cut])
    assert torch.equal(memory[:, :cut], other_memory[:, :cut])
    assert not torch.allclose(out[:, cut:], other[:, cut:])


def in_parts(values: Inputs, cuts: list[int], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Decoding: the queries between the cuts one part after another, the selection carried over."""
    queries, keys = values["q"].shape[1], values["k"].shape[1]
    mask, selection = options.pop("mask", None), values["initial_selection"]
    outs, memories = [], []
    for start, stop in zip([0, *cuts], [*cuts, queries], strict=True):
        seen = keys - queries + stop
        out, selection, memory = selective_attention_with_memory(
            values["q"][:, start:stop],
            values["k"][:, :seen],
            values["v"][:, :seen],
            initial_selection=selection,
            mask=None if mask is None else mask[:, :seen],
            **options,
        )
        outs.append(out)
        memories.append(memory)
    return torch.cat(outs, 1), selection, torch.cat(memories, 1)


@pytest.mark.parametrize(
    ("backend", "cuts"),
    [(backend, cuts) for backend in ("reference", "compiled", "vectorised") for cuts in ([0], [1], [9, 10, 11, 12])]
    + [("triton", [5, 5])],
)
def test_decoding_from_any_cut_equals_the_whole(backend: str, cuts: list[int]) -> None:
    values = drawn(13, 19, **few(backend))
    options = {"mask": padding(len(values["q"]), 19), "selector": 1}
    expected = with_gradients("reference", values, **options)
    leaves = {name: value.float().requires_grad_() for name, value in values.items()}
    with using(backend):
        found = in_parts(leaves, cuts, **options)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in found]
        torch.autograd.backward(found, weights)
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    names = ("out", "selection", "memory")
    outputs = dict(zip(names, (x.detach() for x in found), strict=True))
    assert_close({**outputs, **grads}, expected, 5e-6)  # type: ignore[dict-item]


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(0, 40),
    earlier=st.integers(0, 30),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    cut=st.integers(0, 40),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", ["compiled", "vectorised"])
def test_any_shape_and_any_cut(
    backend: str, batch: int, queries: int, earlier: int, groups: tuple[int, int], cut: int, seed: int
) -> None:
    heads, kv_heads = groups
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seed": seed}
    values = drawn(queries, queries + earlier, **sizes)
    options = {"mask": padding(batch, queries + earlier), "selector": heads - 1}
    with using("reference"):
        expected = selective_attention_with_memory(**values, **options)  # type: ignore[arg-type]
    with using(backend):
        found = in_parts(convert(values, torch.float32), [min(cut, queries)], **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "left", "right"),
    [(backend, *sides) for backend in ("reference", "compiled", "vectorised") for sides in ((5, 0), (0, 6), (3, 4))]
    + [("triton", 3, 4)],
)
def test_padding_changes_nothing(backend: str, left: int, right: int) -> None:
    values = convert(drawn(14, 14, **few(backend)), torch.float32)
    del values["initial_selection"]
    noise = convert(drawn(left + 14 + right, left + 14 + right, seed=1, **few(backend)), torch.float32)
    padded = {name: noise[name].clone() for name in values}
    for name, value in values.items():
        padded[name][:, left : left + 14] = value
    mask = torch.zeros(len(values["q"]), left + 14 + right, dtype=torch.bool)
    mask[:, left : left + 14] = True
    leaves = {name: value.requires_grad_() for name, value in padded.items()}
    with using(backend):
        expected = selective_attention_with_memory(**values)
        found = selective_attention_with_memory(**leaves, mask=mask)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[:, left : left + 14], other, rtol=1e-5, atol=1e-6)
        (found[0][:, left : left + 14].sin().sum() + found[1].sum() + found[2][:, left : left + 14].sum()).backward()
    assert (found[0][:, :left] == 0).all()  # they see nothing
    assert (found[1][~mask] == 0).all()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all(), name
        assert (leaf.grad[~mask] == 0).all(), name


@every_backend
def test_rows_that_see_nothing_give_zeros_and_no_gradient(backend: str) -> None:
    values, mask = convert(drawn(6, 9, heads=2, kv_heads=1), torch.float32), torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    found = with_gradients(backend, values, mask=mask)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    assert (found["out"][1] == 0).all()
    assert (found["memory"][1] == 0).all()
    assert torch.equal(found["selection"][1, :3], values["initial_selection"][1])
    for name in ("q", "k", "v"):
        assert (found[f"grad of {name}"][1] == 0).all()
    with using(backend):
        zeros = torch.zeros(2, 9)
        given = (values["q"], values["k"], values["v"], zeros, mask, 0, 1.0, 1.0)
        lse = torch.ops.mlreviews.selective_attention(*given)[1]
    assert (lse[1] == -math.inf).all()
    assert torch.isfinite(lse[0]).all()


@uninterpreted
def test_memory_falls_with_selection_down_to_the_spared_tokens(backend: str) -> None:
    values = convert(drawn(15, 15), torch.float32)
    values["q"], values["k"] = values["q"].abs(), values["k"].abs()  # everything is selected
    memories = []
    with using(backend):
        for strength in (0.0, 0.1, 1.0, 1e4):
            given = {**values, "q": values["q"] * strength}
            memories.append(selective_attention_with_memory(**given)[2])
        for one, other in itertools.pairwise(memories):
            assert (one >= other).all()
        wider = selective_attention_with_memory(**values, tau=2.0)[2]
    assert torch.equal(memories[0], torch.arange(1.0, 16.0).expand(2, 15))
    assert torch.equal(memories[-1], torch.arange(1.0, 16.0).clamp(max=3).expand(2, 15))  # first, last, itself
    assert (wider >= memories[2]).all()


@uninterpreted
def test_what_is_selected_strongly_has_no_weight(backend: str) -> None:
    values = convert(drawn(1, 8, heads=2, kv_heads=1), torch.float32)
    values["initial_selection"].zero_()
    values["initial_selection"][:, [2, 5]] = 1e6
    kept = [0, 1, 3, 4, 6, 7]
    pruned = {**values, "k": values["k"][:, kept], "v": values["v"][:, kept]}
    pruned["initial_selection"] = values["initial_selection"][:, kept[:-1]]
    with using(backend):
        whole, part = selective_attention(**values), selective_attention(**pruned)
    torch.testing.assert_close(whole[0], part[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[1][:, kept], part[1], rtol=0, atol=1e-6)


@every_backend
def test_large_logits_do_not_overflow(backend: str) -> None:
    values = convert(drawn(20, 25, **few(backend)), torch.float32)
    values["q"] *= 300
    found = with_gradients(backend, values, selector=1)
    expected = with_gradients("reference", convert(values, torch.float64), selector=1)
    assert_close(found, expected, 2e-3)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What one would write down, in the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ k.mT * q.shape[3] ** -0.5
    time = q.shape[1]
    S = logits[:, 0].relu().tril(-1)
    S[:, :, 0] = 0
    F = torch.cat([torch.zeros_like(S[:, :1]), S.cumsum(1)[:, :-1]], 1)
    masked = (logits - F[:, None]).masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -math.inf)
    return (masked.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])
def test_half_precision_is_no_worse_than_eager(backend: str, dtype: torch.dtype) -> None:
    # Triton's interpreter can't multiply half-precision matrices
    values = convert(drawn(40, 40, dim=8, v_dim=8), dtype)
    del values["initial_selection"]
    expected = eager(*(x.double() for x in values.values()))
    bound = (eager(*values.values()).double() - expected).abs().max()
    found = with_gradients(backend, values)
    assert found["out"].dtype == dtype
    assert found["selection"].dtype == found["memory"].dtype == torch.float32
    error = (found["out"].double() - expected).abs().max()
    assert error <= bound
    exact = with_gradients("reference", convert(values, torch.float64))
    for name in ("q", "k", "v"):
        grad = found[f"grad of {name}"]
        assert grad.dtype == dtype
        scale = exact[f"grad of {name}"].abs().max()
        # out is rounded before its products with grad_out
        assert (grad.double() - exact[f"grad of {name}"]).abs().max() <= 4 * torch.finfo(dtype).eps * scale


@every_backend
def test_same_numbers_every_time_for_any_layout_and_inputs_left_alone(backend: str) -> None:
    values = convert(drawn(9, 14, **few(backend)), torch.float32)
    before = {name: value.clone() for name, value in values.items()}
    first, second = (with_gradients(backend, values) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in before:
        assert torch.equal(before[name], values[name]), name
    with using(backend):
        strided = {name: torch.stack([x, x + 1], -1)[..., 0] for name, x in values.items()}
        assert not strided["q"].is_contiguous()
        leaves = {name: value.requires_grad_() for name, value in strided.items()}
        found = selective_attention_with_memory(**leaves)
        for one, name in zip(found, ("out", "selection", "memory"), strict=True):
            torch.testing.assert_close(one, first[name], rtol=0, atol=1e-6)
        sum(x.sum() for x in found).backward()  # gradients of stride 0
        summed = {name: leaf.grad for name, leaf in leaves.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        found = selective_attention_with_memory(**leaves)
        torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, summed[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "dim", "v_dim"), [(torch.float64, 3, 5), (torch.float32, 129, 5), (torch.float32, 3, 129)]
)
def test_what_triton_cannot_do_is_refused_by_name_and_runs_elsewhere_by_default(
    dtype: torch.dtype, dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = convert(drawn(5, 8, dim=dim, v_dim=v_dim), dtype)
    with using("triton"), pytest.raises(BackendError, match=r"^selective_attention: the Triton kernels asked for"):
        selective_attention(**values)
    expected = with_gradients("reference", values)
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    assert_close(with_gradients("triton", values), expected, 3e-6)


@every_backend
def test_no_queries_at_all(backend: str) -> None:
    values = convert(drawn(0, 4), torch.float32)
    leaf = values["initial_selection"].requires_grad_()
    with using(backend):
        out, selection, memory = selective_attention_with_memory(**values)
        selection.sum().backward()
    assert out.shape == (2, 0, 4, 5)
    assert memory.shape == (2, 0)
    assert torch.equal(selection, leaf)
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert selection.data_ptr() != leaf.data_ptr()
    nothing = {name: value[:, :0] for name, value in values.items() if name != "initial_selection"}
    with using(backend):
        assert selective_attention(**nothing)[1].shape == (2, 0)


class Recorder(TorchDispatchMode):
    """Keeps the calls of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "mlreviews":
            self.calls.append((func, tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


def test_ops_are_registered_properly() -> None:
    with Recorder() as recorder:
        with_gradients("compiled", convert(drawn(5, 7), torch.float32))
    assert len(recorder.calls) == 2
    for op, arguments in recorder.calls:
        forward = not op._schema.name.endswith("_backward")  # type: ignore[attr-defined]
        leaves = tuple(
            x.requires_grad_(forward and x.is_floating_point()) if isinstance(x, Tensor) else x for x in arguments
        )
        # that it compiles is tested below
        checks = ("test_schema", "test_faketensor", *(["test_autograd_registration"] if forward else []))
        torch.library.opcheck(op, leaves, test_utils=checks)  # type: ignore[arg-type]


def test_compiles_as_one_graph() -> None:
    values = convert(drawn(6, 8), torch.float32)
    expected = with_gradients("compiled", values, selector=1)
    compiled = torch.compile(selective_attention_with_memory, fullgraph=True, backend="aot_eager")
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    found = compiled(**leaves, selector=1)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in found]
    torch.autograd.backward(found, weights)
    outputs = dict(zip(("out", "selection", "memory"), (x.detach() for x in found), strict=True))
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    assert_close({**outputs, **grads}, expected, 1e-6)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", torch.zeros(2, 5, 4), ValueError, r"q: expected \[batch, time, heads, dim\], got \(2, 5, 4\)"),
        ("q", torch.zeros(2, 5, 4, 3).int(), TypeError, "q: expected float32"),
        ("q", torch.zeros(2, 9, 4, 3), ValueError, "q: expected no more queries than the 8 keys"),
        ("k", torch.zeros(2, 8, 3), ValueError, r"k: expected \[batch, time, kv_heads, dim\]"),
        ("k", torch.zeros(2, 8, 2, 4), ValueError, r"k: expected \[batch, k_time, kv_heads, dim\] = \(2, 8, 2, 3\)"),
        ("k", torch.zeros(3, 8, 2, 3), ValueError, r"k: expected \[batch, k_time, kv_heads, dim\] = \(2, 8, 2, 3\)"),
        ("k", torch.zeros(2, 8, 2, 3).double(), TypeError, "k: expected torch.float32"),
        ("v", torch.zeros(2, 7, 2, 5), ValueError, r"v: expected \[batch, k_time, kv_heads, v_dim\] = \(2, 8, 2, 5\)"),
        ("v", torch.zeros(2, 8, 2, 0), ValueError, "q, v: expected a dim of at least 1"),
        ("v", torch.zeros(2, 8, 2, 5).half(), TypeError, "v: expected torch.float32"),
        ("selector", 4, ValueError, "selector: expected a head from 0 to 3, got 4"),
        ("selector", -1, ValueError, "selector: expected a head from 0 to 3, got -1"),
        ("tau", 0.0, ValueError, "tau: expected a positive number, got 0.0"),
        ("tau", math.inf, ValueError, "tau: expected a positive number, got inf"),
        ("tau", math.nan, ValueError, "tau: expected a positive number, got nan"),
        ("initial_selection", torch.zeros(2, 8), ValueError, r"initial_selection: expected .* = \(2, 3\)"),
        ("initial_selection", torch.zeros(2, 3).int(), TypeError, "initial_selection: expected float32"),
        ("mask", torch.ones(2, 5, dtype=torch.bool), ValueError, r"mask: expected \[batch, k_time\] = \(2, 8\)"),
        ("mask", torch.ones(2, 8), TypeError, "mask: expected torch.bool, got torch.float32"),
        ("mask", torch.ones(2, 8, dtype=torch.bool, device="meta"), ValueError, "mask: expected a tensor on cpu"),
        (
            "initial_selection",
            torch.zeros(2, 3, device="meta"),
            ValueError,
            "initial_selection: expected a tensor on cpu",
        ),
    ],
)
def test_arguments_are_checked(name: str, value: object, error: type[Exception], message: str) -> None:
    values = convert(drawn(5, 8), torch.float32)
    with pytest.raises(error, match=message):
        selective_attention_with_memory(**{**values, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_heads", [0, 3])
def test_kv_heads_divide_the_heads(kv_heads: int) -> None:
    k, v = torch.zeros(2, 8, kv_heads, 3), torch.zeros(2, 8, kv_heads, 5)
    with pytest.raises(ValueError, match="k: expected a number of kv_heads that divides the 4 heads"):
        selective_attention(torch.zeros(2, 5, 4, 3), k, v)
