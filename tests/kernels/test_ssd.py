from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.ssd import ssd, ssd_step
from tests.kernels.scan_cases import Inputs, ScanCase


def _inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    """Four heads in two groups, some decays extreme; all axes different."""
    heads, groups, dim, state = 4, 2, 5, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_a = -draw(batch, time, heads).exp() / 4
    log_a[torch.rand(log_a.shape, generator=generator) < 0.05] = -50.0
    return {
        "x": draw(batch, time, heads, dim),
        "log_a": log_a,
        "B": draw(batch, time, groups, state),
        "C": draw(batch, time, groups, state),
        "D": draw(heads),
        "initial_state": draw(batch, heads, state, dim),
    }


TOKENS = ("x", "log_a", "B", "C")
LENGTHS = (1, 2, 15, 16, 17, 55)
CASES = [
    ScanCase("ssd", ssd, _inputs, TOKENS, options={"chunk_size": 16}, lengths=LENGTHS, half_in_interpreter=False),
    ScanCase("ssd-one", ssd, _inputs, TOKENS, options={"chunk_size": 1}, lengths=(1, 2, 9), half_in_interpreter=False),
]


def using(backend: str) -> object:
    return without_compiled_code() if backend == "vectorised" else use_backend(backend)


every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "vectorised", "triton"])


def drawn(
    batch: int, time: int, heads: int, groups: int, state: int, dim: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(time + dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, time, heads, dim),
        "log_a": -draw(batch, time, heads).abs(),
        "B": draw(batch, time, groups, state),
        "C": draw(batch, time, groups, state),
        "D": draw(heads),
        "initial_state": draw(batch, heads, state, dim),
    }


def dense(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """The dual, quadratic form: y = M x with one matrix a head; products of decays taken one by one."""
    batch, time, heads, _ = x.shape
    per_group = heads // B.shape[2]
    y, final = torch.empty_like(x), torch.empty_like(initial_state)
    for b in range(batch):
        for h in range(heads):
            keys, queries = B[b, :, h // per_group], C[b, :, h // per_group]
            a = log_a[b, :, h].exp()
            M = torch.zeros(time, time, dtype=x.dtype)
            for i in range(time):
                for j in range(i + 1):
                    M[i, j] = queries[i] @ keys[j] * a[j + 1 : i + 1].prod()
            since_start = torch.stack([a[: i + 1].prod() for i in range(time)])
            y[b, :, h] = (M + D[h] * torch.eye(time, dtype=x.dtype)) @ x[b, :, h]
            y[b, :, h] += since_start[:, None] * (queries @ initial_state[b, h])
            to_end = torch.stack([a[j + 1 :].prod() for j in range(time)])
            final[b, h] = a.prod() * initial_state[b, h] + keys.T @ (to_end[:, None] * x[b, :, h])
    return y, final


@every_backend
def test_equals_the_quadratic_form(backend: str) -> None:
    dtype = torch.float32 if backend in ("cpu", "triton") else torch.float64
    values = drawn(2, 11, 4, 2, 3, 5)
    expected = dense(**values)
    with using(backend):  # type: ignore[attr-defined]
        found = ssd(**{name: value.to(dtype) for name, value in values.items()}, chunk_size=4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("chunks_at_a_time", [1, 2, 3])
def test_spans_of_chunks_in_the_vectorised_form(chunks_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven tokens in chunks of 2, five whole ones and half a one: the quadratic form in values and gradients."""
    monkeypatch.setattr("mlreviews_kernels.ssd.cpu.HELD", chunks_at_a_time * 2 * 4 * 2**2)
    values = {name: value.requires_grad_() for name, value in drawn(2, 11, 4, 2, 3, 5).items()}
    found, expected = [], []
    for results, form in ((found, partial(ssd, chunk_size=2)), (expected, dense)):
        y, final = form(**values)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + final.square().sum()
        results += [y, final, *torch.autograd.grad(loss, list(values.values()))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@every_backend
def test_without_decay_it_is_causal_linear_attention(backend: str) -> None:
    values = drawn(1, 9, 2, 1, 3, 4, torch.float32)
    del values["D"], values["initial_state"]
    values["log_a"].zero_()
    with using(backend):  # type: ignore[attr-defined]
        y, _ = ssd(**values, chunk_size=4)
    scores = torch.einsum("btgn,bsgn->bts", values["C"], values["B"]).tril()
    torch.testing.assert_close(y, torch.einsum("bts,bshp->bthp", scores, values["x"]), rtol=1e-5, atol=1e-5)


@every_backend
def test_a_constant_decay_is_retention(backend: str) -> None:
    values = drawn(1, 9, 2, 1, 3, 4, torch.float32)
    del values["D"], values["initial_state"]
    rates = torch.tensor([0.9, 0.5])
    values["log_a"] = rates.log().expand(1, 9, 2)
    with using(backend):  # type: ignore[attr-defined]
        y, _ = ssd(**values, chunk_size=4)
    gaps = torch.arange(9)[:, None] - torch.arange(9)
    decay = (rates[:, None, None] ** gaps).tril()
    scores = torch.einsum("btgn,bsgn->bts", values["C"], values["B"])
    torch.testing.assert_close(y, torch.einsum("bts,hts,bshp->bthp", scores, decay, values["x"]), rtol=1e-5, atol=1e-5)


def test_blocks_below_the_diagonal_have_the_rank_of_the_state() -> None:
    time, state = 24, 3
    values = drawn(1, time, 1, 1, state, time)
    values["x"] = torch.eye(time, dtype=torch.float64)[None, :, None, :]  # y is then M itself
    y, _ = ssd(values["x"], values["log_a"] / 10, values["B"], values["C"], chunk_size=8)
    M = y[0, :, 0]
    assert torch.equal(M, M.tril())
    for cut in (5, 12, 20):
        singular = torch.linalg.svdvals(M[cut:, :cut])
        assert singular[state - 1] > 1e-6
        assert singular[state:].max() < 1e-12


@every_backend
@pytest.mark.parametrize("extreme", [-50.0, -1e4, -math.inf])
def test_extreme_decays_forget_and_nothing_else(backend: str, extreme: float) -> None:
    # what comes before a large decay must not cost the precision of what comes after
    values = drawn(2, 21, 4, 2, 3, 5)
    values["log_a"] /= 100
    values["log_a"][:, [0, 3, 8, 9, 14]] = extreme
    values["log_a"][:, 17, 1] = extreme
    dtype = torch.float32 if backend in ("cpu", "triton") else torch.float64
    names = list(values)
    results = []
    for used, kind in (("reference", torch.float64), (backend, dtype)):
        leaves = [values[name].to(kind).requires_grad_() for name in names]
        with using(used):  # type: ignore[attr-defined]
            y, final = ssd(**dict(zip(names, leaves, strict=True)), chunk_size=8)
            weights = torch.arange(y.numel(), dtype=kind).reshape(y.shape).sin()
            grads = torch.autograd.grad((y * weights).sum() + final.cos().sum(), leaves)
        results.append(dict(zip(["y", "final", *names], [y, final, *grads], strict=True)))
    expected, found = results
    for name, value in expected.items():
        assert torch.isfinite(found[name]).all(), name
        scale = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=3e-6 * scale, msg=name)
    if extreme == -math.inf:
        assert (found["log_a"][:, [0, 3, 8, 9, 14]] == 0).all()
        assert (found["initial_state"] == 0).all()


@every_backend
def test_a_reset_starts_a_sequence_afresh(backend: str) -> None:
    values = drawn(1, 13, 2, 1, 3, 4, torch.float32)
    values["log_a"][:, 6] = -math.inf
    with using(backend):  # type: ignore[attr-defined]
        y, final = ssd(**values, chunk_size=4)
        tail = {name: value[:, 6:] for name, value in values.items() if name in TOKENS}
        rest, last = ssd(**tail, D=values["D"], chunk_size=4)
    torch.testing.assert_close(y[:, 6:], rest, rtol=0, atol=2e-6)
    torch.testing.assert_close(final, last, rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_steps_continue_a_prefill(groups: int) -> None:
    values = drawn(2, 7, 6, groups, 3, 5)
    whole, last = ssd(**values, chunk_size=4)
    for prefill in (0, 1, 4, 6):
        head = {name: value[:, :prefill] if name in TOKENS else value for name, value in values.items()}
        _, state = ssd(**head, chunk_size=4)
        for t in range(prefill, 7):
            y, state = ssd_step(*(values[name][:, t] for name in TOKENS), values["D"], state)
            torch.testing.assert_close(y, whole[:, t], rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_a_step_keeps_the_types() -> None:
    values = drawn(2, 1, 4, 2, 3, 5, torch.bfloat16)
    state = values["initial_state"].float()
    y, new = ssd_step(*(values[name][:, 0] for name in TOKENS), None, state)
    assert (y.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    log_a = torch.full((2, 4), -math.inf)
    y, new = ssd_step(values["x"][:, 0], log_a, values["B"][:, 0], values["C"][:, 0], None, state)
    outer = values["B"][:, 0].float().repeat_interleave(2, 1)[..., None] * values["x"][:, 0].float()[:, :, None]
    torch.testing.assert_close(new, outer, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 17, 33), (3, 3, 16, 8), (5, 1, 40, 20)])
def test_sizes_around_the_tiles(backend: str, sizes: tuple[int, int, int, int]) -> None:
    # more heads than a task takes, widths beside whole tiles
    heads, groups, state, dim = sizes
    values = drawn(2, 19, heads, groups, state, dim)
    names = list(values)
    results = []
    for used, kind in (("reference", torch.float64), (backend, torch.float32)):
        leaves = [values[name].to(kind).requires_grad_() for name in names]
        with using(used):  # type: ignore[attr-defined]
            y, final = ssd(**dict(zip(names, leaves, strict=True)), chunk_size=7 if backend != "triton" else 16)
            results.append((y, final, *torch.autograd.grad(y.sin().sum() + final.cos().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=0, atol=2e-5 * max(one.abs().max().item(), 1.0))


def test_decays_and_skip_may_be_float32_beside_bfloat16() -> None:
    values = drawn(1, 9, 4, 2, 3, 5, torch.bfloat16)
    values["log_a"], values["D"] = values["log_a"].float() / 100, values["D"].float()
    values = {name: value.requires_grad_() for name, value in values.items()}
    y, final = ssd(**values)
    (y.float().sum() + final.sum()).backward()
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    for name, value in values.items():
        assert value.grad is not None, name
        assert value.grad.dtype == value.dtype, name


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(2, 6, 20), ValueError, r"x: expected \[batch, time, heads, dim\]"),
        ("log_a", torch.zeros(2, 6, 3), ValueError, r"log_a: expected \[batch, time, heads\] = \(2, 6, 4\)"),
        ("log_a", torch.zeros(2, 6, 4).double(), TypeError, "log_a: expected torch.float32 or torch.float32"),
        ("B", torch.zeros(2, 6, 3), ValueError, r"B: expected \[batch, time, groups, state\]"),
        ("B", torch.zeros(2, 6, 3, 3), ValueError, "B: expected a number of groups that divides the 4 heads"),
        ("B", torch.zeros(2, 6, 0, 3), ValueError, "B: expected a number of groups that divides the 4 heads"),
        ("C", torch.zeros(2, 6, 1, 3), ValueError, r"C: expected B's shape = \(2, 6, 2, 3\)"),
        ("D", torch.zeros(3), ValueError, r"D: expected \[heads\] = \(4,\)"),
        ("D", torch.zeros(4).half(), TypeError, "D: expected torch.float32 or torch.float32"),
        ("D", torch.zeros(4, device="meta"), ValueError, "D: expected a tensor on cpu"),
        ("chunk_size", 0, ValueError, "chunk_size: expected at least 1, got 0"),
        ("initial_state", torch.zeros(2, 4, 3, 5).int(), TypeError, "initial_state: expected float32"),
    ],
)
def test_arguments_are_checked(name: str, value: object, error: type[Exception], message: str) -> None:
    values = drawn(2, 6, 4, 2, 3, 5, torch.float32)
    with pytest.raises(error, match=message):
        ssd(**{**values, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(2, 1, 4, 5), ValueError, r"x: expected \[batch, heads, dim\]"),
        ("log_a", torch.zeros(2, 3), ValueError, r"log_a: expected \[batch, heads\] = \(2, 4\)"),
        ("B", torch.zeros(3, 2, 3), ValueError, r"B: expected \[batch, groups, state\] with \[batch\] = \[2\]"),
        ("state", torch.zeros(2, 4, 5, 3), ValueError, r"state: expected \[batch, heads, state, dim\]"),
        ("state", torch.zeros(2, 4, 3, 5).int(), TypeError, "state: expected float32"),
        ("C", torch.zeros(2, 2, 3).double(), TypeError, "C: expected torch.float32"),
    ],
)
def test_arguments_of_a_step_are_checked(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    values = {key: x[:, 0] if key in TOKENS else x for key, x in drawn(2, 6, 4, 2, 3, 5, torch.float32).items()}
    values["state"] = values.pop("initial_state")
    with pytest.raises(error, match=message):
        ssd_step(**{**values, name: value})


@pytest.mark.parametrize(("heads", "state", "dim", "name"), [(0, 3, 5, "x"), (4, 0, 5, "B"), (4, 3, 0, "x")])
def test_an_empty_axis_is_refused(heads: int, state: int, dim: int, name: str) -> None:
    # the compiled form picks its tasks by dividing by these
    tokens = {"x": torch.zeros(2, 6, heads, dim), "log_a": torch.zeros(2, 6, heads)}
    tokens |= {key: torch.zeros(2, 6, 2, state) for key in ("B", "C")}
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1 along every axis but time"):
        ssd(**tokens)
