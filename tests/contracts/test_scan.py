"""The battery that every scan core passes with every backend: PITFALLS of scans 16 to 27, as far as they are general.

The oracle is the core's reference in float64; that the references are right is for the tests of each core, which have
independent forms. A core joins by ``CASES`` in its own test file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mlreviews_kernels import BackendError, use_backend
from mlreviews_kernels.compiled import without_compiled_code
from tests.kernels.scan_cases import Inputs, ScanCase

MODULES = sorted(Path(__file__).parents[1].glob("kernels/test_*.py"))
CASES: list[ScanCase] = [
    case
    for path in MODULES
    for case in getattr(importlib.import_module(f"tests.kernels.{path.stem}"), "CASES", [])
    if isinstance(case, ScanCase)
]
FAST = ("compiled", "vectorised", "triton")
BACKENDS = ("reference", *FAST)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


# What a test of a backend's code shows with one case, and the interpreter takes seconds for with each.
ONCE = (
    "test_any_cut_equals_the_whole",
    "test_bfloat16_is_rounded_once",
    "test_expanded_gradients",
    "test_memory_layout_does_not_matter",
    "test_same_numbers_every_time_and_inputs_left_alone",
)


@pytest.fixture(autouse=True)
def once_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """Of the cases of a core, only the first is interpreted in tests that are `ONCE`."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") == "triton" and request.node.originalname in ONCE:
        case = parameters["case"]
        first = next(other for other in CASES if other.function.__module__ == case.function.__module__)
        if case is not first:
            pytest.skip("one case of a core is enough in the interpreter")


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the interpreter gets through in reasonable time, and that short sequences have several of."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and case.interpreter_tiles:
        gpu = importlib.import_module(case.function.__module__ + ".gpu")
        for name, size in case.interpreter_tiles.items():
            assert hasattr(gpu, name)
            monkeypatch.setattr(gpu, name, size)


def using(backend: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(use_backend({"compiled": "cpu", "vectorised": "cpu"}.get(backend, backend)))
    if backend == "vectorised":
        stack.enter_context(without_compiled_code())
    return stack


@pytest.fixture(autouse=True)
def hostile_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case: ScanCase, batch: int, time: int, seed: int = 0) -> Inputs:
    return case.make(batch, time, torch.Generator().manual_seed(seed))


def convert(values: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) for name, value in values.items()}


def run(case: ScanCase, values: Inputs, **more: Any) -> tuple[Tensor, Tensor]:
    return case.function(**values, **case.options, **more)


def cotangents(out: Tensor, final: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out_grad, final_grad = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, final))
    return out_grad.to(out.dtype), final_grad.to(final.dtype)


def with_gradients(case: ScanCase, values: Inputs, **more: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    out, final = run(case, leaves, **more)
    torch.autograd.backward((out, final), cotangents(out, final))
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    assert all(grad is not None for grad in grads.values()), "an input got no gradient"
    return {"output": out.detach(), "final state": final.detach(), **grads}  # type: ignore[dict-item]


def truth(case: ScanCase, values: Inputs, **more: Any) -> dict[str, Tensor]:
    with using("reference"):
        return with_gradients(case, convert(values, torch.float64), **more)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = value.abs().max().item() if value.numel() else 0.0
        assert torch.isfinite(found[name]).all(), name
        error = (found[name].double() - value.double()).abs()
        assert (error <= tolerance * max(scale, 1e-3)).all(), f"{name}: off by {error.max():.2e}, scale {scale:.2e}"


@pytest.mark.parametrize("backend", FAST)
@every_case
def test_values_and_gradients_equal_the_reference(case: ScanCase, backend: str) -> None:
    # the interpreter is slow: the shortest, and the one over the edge of chunks
    times = case.lengths if backend != "triton" else (case.lengths[0], case.lengths[-1])
    for time in times:
        values = inputs(case, 2, time, seed=time)
        expected = truth(case, values)
        with using(backend):
            assert_close(with_gradients(case, convert(values, torch.float32)), expected, case.tolerance)


@every_case
def test_vectorised_form_computes_in_float64(case: ScanCase) -> None:
    values = inputs(case, 2, case.lengths[-1])
    with using("vectorised"):
        assert_close(with_gradients(case, values), truth(case, values), 1e-11)


@every_case
def test_triton_refuses_float64(case: ScanCase) -> None:
    # it would be float32 under another name
    with using("triton"), pytest.raises(BackendError, match="compute in float32, these are float64"):
        run(case, inputs(case, 1, 2))


@every_case
def test_reference_gradcheck(case: ScanCase) -> None:
    values = inputs(case, 1, 4)
    names = list(values)
    leaves = tuple(values[name].requires_grad_() for name in names)
    with using("reference"):
        assert torch.autograd.gradcheck(lambda *x: run(case, dict(zip(names, x, strict=True))), leaves)


def in_two(case: ScanCase, values: Inputs, cut: int) -> tuple[Tensor, Tensor]:
    """The parts before and after the cut one after the other, the state carried over."""
    parts = [slice(None, cut), slice(cut, None)]
    outputs, state = [], values[case.state]
    for part in reversed(parts) if case.options.get("reverse") else parts:
        one = {name: x[:, part] if name in case.tokens else x for name, x in values.items()}
        out, state = run(case, {**one, case.state: state})
        outputs.append(out)
    return torch.cat(outputs[::-1] if case.options.get("reverse") else outputs, 1), state


@every_backend
@every_case
def test_any_cut_equals_the_whole(case: ScanCase, backend: str) -> None:
    time = case.lengths[-1] if backend != "triton" else case.lengths[-2]
    values = inputs(case, 2, time)
    expected = truth(case, values)
    values = convert(values, torch.float32)
    last = time - time % case.split_every
    places = (0, 1, time // 3, last) if backend != "triton" else (time // 3,)
    cuts = sorted({cut - cut % case.split_every for cut in places} - {time})
    for cut in cuts:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        with using(backend):
            out, final = in_two(case, leaves, cut)
            torch.autograd.backward((out, final), cotangents(out, final))
        grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
        assert_close({"output": out, "final state": final, **grads}, expected, case.tolerance)  # type: ignore[dict-item]


@settings(max_examples=15)
@given(batch=st.integers(1, 3), time=st.integers(1, 40), cut=st.integers(0, 40), seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", ["compiled", "vectorised"])
@every_case
def test_any_shape_and_any_cut(case: ScanCase, backend: str, batch: int, time: int, cut: int, seed: int) -> None:
    cut = min(cut, time) // case.split_every * case.split_every
    values = inputs(case, batch, time, seed)
    with using("reference"):
        expected, last = run(case, values)
    values = convert(values, torch.float32)
    with using(backend):
        out, final = in_two(case, values, cut)
    assert_close({"output": out, "final state": final}, {"output": expected, "final state": last}, case.tolerance)


BOUNDS = (0, 3, 3, 20, 21)  # an empty document among them


def packed(case: ScanCase, seed: int = 0) -> tuple[Inputs, Tensor]:
    """Four documents in one row, with a state each."""
    values = inputs(case, 1, BOUNDS[-1], seed)
    states = inputs(case, len(BOUNDS) - 1, 1, seed + 1)[case.state]
    return {**values, case.state: states}, torch.tensor(BOUNDS)


@pytest.mark.parametrize("offset_type", [torch.int32, torch.int64])
@every_backend
@every_case
def test_packed_documents_equal_separate_runs(case: ScanCase, backend: str, offset_type: torch.dtype) -> None:
    if offset_type == torch.int32 and backend == "triton":
        pytest.skip("the offsets' type is the same for all backends")
    values, offsets = packed(case)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    parts = []
    with using("reference"):
        for i in range(len(BOUNDS) - 1):
            span = slice(BOUNDS[i], BOUNDS[i + 1])
            one = {name: x[:, span] if name in case.tokens else x for name, x in leaves.items()}
            parts.append(run(case, {**one, case.state: leaves[case.state][i : i + 1]}))
    out, final = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
    torch.autograd.backward((out, final), cotangents(out, final))
    expected = {"output": out, "final state": final, **{f"grad of {n}": leaf.grad for n, leaf in leaves.items()}}
    with using(backend):
        found = with_gradients(case, convert(values, torch.float32), cu_seqlens=offsets.to(offset_type))
    assert_close(found, {name: x.detach() for name, x in expected.items() if x is not None}, case.tolerance)


@every_backend
@every_case
def test_a_document_does_not_see_the_one_before(case: ScanCase, backend: str) -> None:
    values, offsets = packed(case)
    values = convert(values, torch.float32)
    changed = {name: x.clone() for name, x in values.items()}
    for name in case.tokens:
        changed[name][:, :3] -= 0.5
    changed[case.state][0] += 1.0
    with using(backend):
        (before, final), (after, other) = (run(case, x, cu_seqlens=offsets) for x in (values, changed))
    assert torch.equal(before[:, 3:], after[:, 3:])
    assert torch.equal(final[1:], other[1:])
    assert not torch.equal(before[:, :3], after[:, :3])


def strided(value: Tensor) -> Tensor:
    """The same numbers in memory of another order, with gaps."""
    if value.ndim < 2:
        return torch.stack([value, value], -1)[..., 0]
    wide = torch.stack([value, value], -1).transpose(0, 1).contiguous().transpose(0, 1)
    return wide[..., 0]


@every_backend
@every_case
def test_memory_layout_does_not_matter(case: ScanCase, backend: str) -> None:
    values = convert(inputs(case, 2, 9), torch.float32)
    found = []
    for layout in (Tensor.contiguous, strided):
        leaves = {name: layout(value).detach().requires_grad_() for name, value in values.items()}
        with using(backend):
            out, final = run(case, leaves)
            out_grad, final_grad = (layout(grad) for grad in cotangents(out, final))
            torch.autograd.backward((out, final), (out_grad, final_grad))
        found.append([out, final, *(leaf.grad for leaf in leaves.values())])
    assert not strided(values[case.tokens[0]]).is_contiguous()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@every_backend
@every_case
def test_expanded_gradients(case: ScanCase, backend: str) -> None:
    # what .sum() sends back has stride 0 everywhere
    values = convert(inputs(case, 2, 6), torch.float32)
    found = []
    for reduce in (lambda x: x.sum(), lambda x: (x * torch.ones_like(x)).sum()):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        with using(backend):
            out, final = run(case, leaves)
            (reduce(out) + reduce(final)).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@every_backend
@every_case
def test_bfloat16_is_rounded_once(case: ScanCase, backend: str) -> None:
    # an eager bfloat16 recurrence rounds at every step; here states are float32 and only results are rounded
    if backend == "triton" and not case.half_in_interpreter:
        pytest.skip("Triton's interpreter can't multiply bfloat16 matrices")
    values = convert(inputs(case, 2, case.lengths[-2]), torch.bfloat16)
    expected = truth(case, values)
    with using(backend):
        found = with_gradients(case, values)
    assert found["output"].dtype == torch.bfloat16
    assert found["final state"].dtype == torch.float32
    for name in values:
        assert found[f"grad of {name}"].dtype == torch.bfloat16
    # the output and a product with it are rounded, by up to 2^-8 each where the interpreter cuts digits off
    assert_close(found, expected, 3 * 2**-8)


@every_backend
@every_case
def test_no_time_at_all(case: ScanCase, backend: str) -> None:
    values = convert(inputs(case, 2, 0), torch.float32)
    values[case.state] = values[case.state].requires_grad_()
    with using(backend):
        out, final = run(case, values)
        final.sum().backward()
    assert out.shape[:2] == (2, 0)
    torch.testing.assert_close(final, values[case.state], rtol=0, atol=0)
    torch.testing.assert_close(values[case.state].grad, torch.ones_like(final), rtol=0, atol=0)
    assert final.data_ptr() != values[case.state].data_ptr()


@every_backend
@every_case
def test_no_initial_state_is_the_empty_one(case: ScanCase, backend: str) -> None:
    values = convert(inputs(case, 2, 4), torch.float32)
    values[case.state] = torch.full_like(values[case.state], case.empty)
    given = {name: value for name, value in values.items() if name != case.state}
    with using(backend):
        for one, other in zip(run(case, values), run(case, given), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@every_backend
@every_case
def test_same_numbers_every_time_and_inputs_left_alone(case: ScanCase, backend: str) -> None:
    values = convert(inputs(case, 3, 23) if backend != "triton" else inputs(case, 2, 9), torch.float32)
    before = {name: value.clone() for name, value in values.items()}
    with using(backend):
        first, second = with_gradients(case, values), with_gradients(case, values)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in before:
        assert torch.equal(before[name], values[name]), name


class Recorder(TorchDispatchMode):
    """Keeps the calls of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "mlreviews":
            self.calls.append((func, tree_map_only(Tensor, lambda x: x.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


@every_case
def test_ops_are_registered_properly(case: ScanCase) -> None:
    values = convert(inputs(case, 2, 5), torch.float32)
    with using("compiled"):
        with Recorder() as recorder:
            with_gradients(case, values)
        assert len(recorder.calls) >= 2
        for op, arguments in recorder.calls:
            differentiable = not op._schema.name.endswith("_backward")
            leaves = tuple(
                x.requires_grad_(differentiable and x.is_floating_point()) if isinstance(x, Tensor) else x
                for x in arguments
            )
            torch.library.opcheck(op, leaves)


@every_case
def test_compiles_as_one_graph(case: ScanCase, unchecked: None) -> None:
    values = convert(inputs(case, 2, 7), torch.float32)
    expected = with_gradients(case, values)
    torch.compiler.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    out, final = compiled(**leaves, **case.options)
    torch.autograd.backward((out, final), cotangents(out, final))
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    assert_close({"output": out, "final state": final, **grads}, expected, 1e-6)  # type: ignore[dict-item]


@every_case
def test_bad_arguments_are_named(case: ScanCase) -> None:
    values = convert(inputs(case, 2, 6), torch.float32)
    for name in case.tokens[1:]:
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            run(case, {**values, name: values[name][:, :5]})
        with pytest.raises(TypeError, match=rf"^{name}: expected"):
            run(case, {**values, name: values[name].double()})
    with pytest.raises(TypeError, match=rf"^{case.tokens[0]}: expected float32"):
        run(case, {**values, case.tokens[0]: values[case.tokens[0]].int()})
    with pytest.raises(ValueError, match=rf"^{case.state}: expected"):
        run(case, {**values, case.state: values[case.state][:1]})
    with pytest.raises(TypeError, match=rf"^{case.state}: expected float32"):
        run(case, {**values, case.state: values[case.state].int()})
    with pytest.raises(ValueError, match="cu_seqlens: packed sequences lie in one row"):
        run(case, values, cu_seqlens=torch.tensor([0, 6]))
    one = {name: x[:1] if name in (*case.tokens, case.state) else x for name, x in values.items()}
    for bounds in ([0, 5], [1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: expected numbers that rise from 0 to the time length 6"):
            run(case, one, cu_seqlens=torch.tensor(bounds))
    two = {**one, case.state: values[case.state]}
    with pytest.raises(ValueError, match="cu_seqlens: expected numbers that rise"):
        run(case, two, cu_seqlens=torch.tensor([0, 7, 6]))
    with pytest.raises(TypeError, match="cu_seqlens: expected int32 or int64"):
        run(case, one, cu_seqlens=torch.tensor([0.0, 6.0]))


@every_case
def test_nothing_but_time_may_be_empty(case: ScanCase) -> None:
    # a compiled loop would divide by the size
    values = convert(inputs(case, 2, 6), torch.float32)
    with pytest.raises(ValueError, match=rf"^{case.tokens[0]}: expected at least 1 along every axis but time, got \(0"):
        run(case, {name: x[:0] if name in (*case.tokens, case.state) else x for name, x in values.items()})


@every_case
def test_the_state_of_half_precision_goes_on_in_float32(case: ScanCase) -> None:
    values = convert(inputs(case, 2, 2 * case.split_every), torch.bfloat16)
    whole, last = run(case, values)
    values[case.state] = values[case.state].float()
    out, final = in_two(case, values, case.split_every)
    torch.testing.assert_close(out, whole, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "compiled", "vectorised"])
@every_case
def test_autocast_changes_nothing(case: ScanCase, backend: str) -> None:
    values = convert(inputs(case, 2, case.lengths[-1]), torch.float32)
    with using(backend):
        expected = with_gradients(case, values)
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradients(case, values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
